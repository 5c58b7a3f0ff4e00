"""Models of the transformers library, random and small: the capture, the rules and data/any_model.py.

The independent ways: the attentions that a model returns itself in its eager implementation, and the gradient that
autograd leaves at them; a softmax whose gradient is cut by hand.
"""

import base64
import io
import json
import re
import shutil
import socket
import sys

import pandas as pd
import pytest
import torch
from bs4 import BeautifulSoup
from torch.nn import functional as F

from helpers import capture_attention, energy_table, get_batch, head_energy, load_corpus, softmax_rule

transformers = pytest.importorskip("transformers", reason="not installed: python -m pip install -e .[transformers]")
tokenizers = pytest.importorskip("tokenizers")

import any_model  # noqa: E402 (it needs transformers)

V, T, H = 300, 10, 4
SIZES = {"vocab_size": V, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": H, "intermediate_size": 48}
SIZES |= {"max_position_embeddings": 64}
GROUPED = SIZES | {"num_key_value_heads": 2}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
SOFT = {"head_dim": 8, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 2.0}
GPT2 = {"vocab_size": V, "n_embd": 32, "n_layer": 2, "n_head": H, "n_positions": 64}
T5 = {"vocab_size": V, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": H}
LLAMA_LAYERS = ["model.layers.0.self_attn", "model.layers.1.self_attn"]
ALBERT_LAYER = "albert.encoder.albert_layer_groups.0.albert_layers.0.attention"
# model type: what it is made for, its configuration, the names of its attentions
MODELS = {
    "gpt2": ("CausalLM", GPT2, ["transformer.h.0.attn", "transformer.h.1.attn"]),
    "llama": ("CausalLM", GROUPED, LLAMA_LAYERS),
    "mistral": ("CausalLM", GROUPED | {"sliding_window": 4}, LLAMA_LAYERS),
    "qwen3": (
        "CausalLM",
        GROUPED | {"head_dim": 8, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
        LLAMA_LAYERS,
    ),
    "gpt_neox": ("CausalLM", SIZES, ["gpt_neox.layers.0.attention", "gpt_neox.layers.1.attention"]),
    "gemma2": ("CausalLM", GROUPED | SOFT | {"sliding_window": 4}, LLAMA_LAYERS),
    "gpt_oss": ("CausalLM", GROUPED | EXPERTS | {"head_dim": 8, "sliding_window": 4}, LLAMA_LAYERS),
    "mixtral": ("CausalLM", GROUPED | EXPERTS, LLAMA_LAYERS),
    "bert": ("MaskedLM", SIZES, [f"bert.encoder.layer.{i}.attention.self" for i in range(2)]),
    "albert": ("MaskedLM", SIZES | {"embedding_size": 16}, [ALBERT_LAYER, f"{ALBERT_LAYER} (2)"]),
    "t5": (
        "Seq2SeqLM",
        T5 | {"decoder_start_token_id": 0},
        [f"encoder.block.{i}.layer.0.SelfAttention" for i in range(2)]
        + [f"decoder.block.{i}.layer.{name}" for i in range(2) for name in ("0.SelfAttention", "1.EncDecAttention")],
    ),
}
EAGER_ALONE = {"gemma2", "gpt_oss"}  # a soft cap, a sink: no fused attention has them
ROUNDING = 1e-5  # of the largest value: float32 has 6e-8, and other kernels add up in another order


def config_of(name, **changes):
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return transformers.AutoConfig.for_model(name, **MODELS[name][1], **special, **changes)


def model_of(name, implementation="eager", **changes):
    torch.manual_seed(0)
    auto = getattr(transformers, f"AutoModelFor{MODELS[name][0]}")
    model = auto.from_config(config_of(name, **changes), attn_implementation=implementation)
    for parameter in model.parameters():  # as sharp as after some training, biases and sinks included
        torch.nn.init.normal_(parameter, mean=float(parameter.data.mean().round()), std=0.15)
    return model.eval()


def batch_of(model, padding=None):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, V, (2, T), generator=generator)
    batch = {"input_ids": ids, "labels": ids.clone()}
    if model.config.is_encoder_decoder:
        batch["labels"] = torch.randint(3, V, (2, T - 3), generator=generator)
    if padding:
        mask = torch.ones(2, T, dtype=torch.long)
        mask[1, slice(3) if padding == "left" else slice(-3, None)] = 0
        batch["attention_mask"] = mask
        batch["input_ids"] = ids * mask
        if not model.config.is_encoder_decoder:
            asked = mask.cumsum(1) > 1  # the first token of all would be asked of a query that sees nothing
            batch["labels"] = ids.masked_fill(~(asked & (mask == 1)), -100)
    return batch


def own_attentions(model, batch):
    """The weights that the model returns, in the order of use, with ``grad``; and the gradients of its parameters."""
    model.zero_grad()
    out = model(**batch, output_attentions=True)
    if model.config.is_encoder_decoder:
        pairs = zip(out.decoder_attentions, out.cross_attentions, strict=True)
        weights = [*out.encoder_attentions, *(attention for pair in pairs for attention in pair)]
    else:
        weights = list(out.attentions)
    for attention in weights:
        attention.retain_grad()
    out.loss.backward()
    return weights, gradients(model)


def gradients(model):
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()]


def captured(model, batch, **options):
    model.zero_grad()
    with capture_attention(model, **options) as layers:
        model(**batch).loss.backward()
    return layers, gradients(model)


def assert_close(found, expected, share=ROUNDING):
    """Equal to a ``share`` of the largest of all expected values."""
    atol = share * max(values.abs().max().item() for values in expected)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=atol)


def distance(found, expected):
    return torch.stack([(one - other).norm() for one, other in zip(found, expected, strict=True)]).norm().item()


def queries_that_are_text(batch, attention):
    """(B, 1, T_q, 1), False in padding: what such a query attends to means nothing."""
    mask = batch.get("attention_mask", torch.ones(2, T))
    if attention.shape[2] != T:  # a decoder's
        mask = torch.ones(2, attention.shape[2])
    return mask.bool()[:, None, :, None]


@pytest.mark.parametrize("padding", [None, "left", "right"])
@pytest.mark.parametrize("name", MODELS)
def test_weights_and_gradients_are_those_that_the_model_returns_itself(name, padding):
    model = model_of(name)
    batch = batch_of(model, padding)
    weights, expected = own_attentions(model, batch)
    tables = []
    for implementation in ("eager",) if name in EAGER_ALONE else ("eager", "sdpa"):
        model.set_attn_implementation(implementation)
        layers, found = captured(model, batch, maps=True)
        assert [layer.name for layer in layers] == MODELS[name][2]
        assert_close(found, expected)
        for layer, own in zip(layers, weights, strict=True):
            text = queries_that_are_text(batch, own)
            keys = own.shape[-1]
            assert layer.attn.shape == (2, H, own.shape[2], keys + (name == "gpt_oss"))
            visible = layer.visible.expand_as(layer.attn)[..., :keys]
            assert torch.equal(visible & text, (own > 0) & text)
            assert_close([layer.attn[..., :keys] * text], [own * text])
            assert_close([layer.grad[..., :keys] * (visible & text)], [own.grad * (visible & text)])
        tables.append(energy_table(layers, n_boot=20))
        streamed = energy_table(captured(model, batch)[0], n_boot=20)
        pd.testing.assert_frame_equal(streamed, tables[-1], atol=1e-5)
    shown = [table[table.columns[~table.columns.str.contains("unmasked")]] for table in tables]  # it sees padding
    pd.testing.assert_frame_equal(shown[0], shown[-1], rtol=1e-3, atol=1e-4)
    assert tables[0]["defined"].all() and len(tables[0]) == H * len(weights)


def test_a_sink_takes_weight_and_hears_nothing():
    model = model_of("gpt_oss")
    layers, _ = captured(model, batch_of(model), maps=True)
    for layer in layers:
        torch.testing.assert_close(layer.attn.sum(-1), torch.ones(2, H, T))
        assert layer.attn[..., -1].min() > 0 and not layer.grad[..., -1].any()


def test_a_soft_cap_bounds_the_scores():
    model = model_of("gemma2")
    for layer in captured(model, batch_of(model), maps=True)[0]:
        assert layer.scores[layer.visible.expand_as(layer.scores)].abs().max() < SOFT["attn_logit_softcapping"]


def test_a_window_that_slides_is_seen():
    causal = torch.ones(T, T, dtype=torch.bool).tril()
    for name, windows in {"mistral": (4, 4), "qwen3": (T, 4), "gemma2": (4, T)}.items():
        model = model_of(name)
        for layer, window in zip(captured(model, batch_of(model), maps=True)[0], windows, strict=True):
            assert torch.equal(layer.visible.expand(2, H, T, T)[1, 2], causal & ~causal.tril(-window))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["gpt2", "llama", "bert", "t5"])
def test_half_precision(name, dtype):
    model = model_of(name)
    batch = batch_of(model)
    layers, in_float32 = captured(model, batch)
    exact = energy_table(layers, n_boot=1)
    for implementation in ("eager", "sdpa"):
        model.set_attn_implementation(implementation)
        with torch.autocast("cpu", dtype):
            model.zero_grad()
            model(**batch).loss.backward()
            expected = gradients(model)
            layers, found = captured(model, batch, maps=True)
        # how two ways of rounding differ depends on the processor; neither may be farther off than the other, by much
        assert distance(found, in_float32) < 1.5 * distance(expected, in_float32)
        table = energy_table(layers, n_boot=1)
        both = table["defined"]
        assert both.mean() > 0.5
        for quantity in ("cos_diag", "entropy", "attn_max"):
            assert (table[quantity] - exact[quantity])[both].abs().max() < 0.05, quantity


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_a_softmax_that_is_asked_for_in_float32_stays_one(name):
    model = model_of(name).bfloat16()
    batch = batch_of(model)
    model(**batch).loss.backward()
    expected = gradients(model)
    layers, found = captured(model, batch, maps=True)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    for layer in layers:  # rounded to bfloat16 they would be off by 1e-3
        assert (layer.attn.sum(-1) - 1).abs().max() < 1e-5


def test_dropout_comes_after_the_weights():
    model = model_of("gpt2", attn_pdrop=0.5).train()
    for implementation in ("eager", "sdpa"):
        model.set_attn_implementation(implementation)
        for layer in captured(model, batch_of(model), maps=True)[0]:
            torch.testing.assert_close(layer.attn.sum(-1), torch.ones(2, H, T))
            assert 0.3 < (layer.grad == 0)[layer.visible.expand_as(layer.grad)].double().mean() < 0.7


CUTS = {
    "none": lambda scores: scores.detach().log_softmax(-1).exp(),  # the scores hear nothing
    "zero": lambda scores: (scores - scores.logsumexp(-1, keepdim=True).detach()).exp(),  # the sum is a constant
}


@pytest.mark.parametrize("padding", [None, "left"])
@pytest.mark.parametrize("rule", CUTS)
@pytest.mark.parametrize("name", ["gpt2", "llama", "t5", "bert"])
def test_a_rule_is_a_softmax_that_is_cut_by_hand(name, rule, padding, monkeypatch):
    found = []
    for implementation in ("eager", "sdpa"):
        model = model_of(name, implementation)
        batch = batch_of(model, padding)
        with softmax_rule(model, rule):
            model(**batch).loss.backward()
        found.append(gradients(model))
    model = model_of(name)
    own_attentions(model, batch)
    exact = gradients(model)
    model.zero_grad()
    with monkeypatch.context() as patch:
        patch.setattr(F, "softmax", lambda scores, dim, dtype=None: CUTS[rule](scores))
        model(**batch).loss.backward()
    for other in found:
        assert_close(other, gradients(model))
    assert any((a - b).abs().max() > 1e-4 for a, b in zip(found[0], exact, strict=True))


def test_a_model_that_was_trained_has_the_same_split_by_either_implementation():
    corpus = load_corpus()
    torch.manual_seed(0)
    config = transformers.GPT2Config(**GPT2 | {"vocab_size": corpus.vocab_size}, bos_token_id=None, eos_token_id=None)
    model = transformers.GPT2LMHeadModel(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(0)
    losses = []
    for _ in range(60):
        x, _ = get_batch(corpus.train, 32, 8, generator)
        loss = model(input_ids=x, labels=x).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5
    model.eval()
    x, _ = get_batch(corpus.val, 32, 8, generator)
    tables = []
    for implementation in ("eager", "sdpa"):
        model.set_attn_implementation(implementation)
        tables.append(energy_table(captured(model, {"input_ids": x, "labels": x})[0], n_boot=50))
    pd.testing.assert_frame_equal(*tables, rtol=1e-3, atol=1e-4)


# --- python data/any_model.py ----------------------------------------------------------------------------------------

TEXT = "".join(f"{i}. The café by the sea has {i * i} chairs, and in winter {i + 7} guests.\n" for i in range(30))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folders with a model and a tokenizer that was trained here, and a text."""
    folder = tmp_path_factory.mktemp("models")
    trained = tokenizers.Tokenizer(tokenizers.models.BPE())
    trained.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel()
    special = ["[PAD]", "[CLS]", "[SEP]", "[MASK]"]
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=V, special_tokens=special, initial_alphabet=alphabet)
    trained.train_from_iterator([TEXT], trainer)
    around = [("[CLS]", 1), ("[SEP]", 2)]
    trained.post_processor = tokenizers.processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=around)
    names = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=trained, **names)
    for name in ("gpt2", "bert", "t5", "gemma2"):
        model_of(name).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    return folder


@pytest.fixture
def command(monkeypatch, capsys):
    """Calls the command as from a shell, without a network; gives its exit status and what it said."""

    def connect(*args):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", connect)

    def call(model, text, out, *more):
        monkeypatch.setattr(
            sys, "argv", ["any_model.py", *map(str, ("--model", model, "--text", text, "--out", out, *more))]
        )
        capsys.readouterr()
        try:
            any_model.main()
        except SystemExit as leaving:
            return leaving.code, capsys.readouterr().err
        return 0, capsys.readouterr().out

    return call


def page_of(out):
    soup = BeautifulSoup(out.read_text(encoding="utf-8"), "html.parser")
    address = soup.find("a", download=True)["href"]
    kind, data = address.split(",")
    assert kind == "data:text/csv;base64"
    return soup, pd.read_csv(io.BytesIO(base64.b64decode(data)))


@pytest.mark.parametrize(("name", "n_heads"), {"gpt2": 2 * H, "bert": 2 * H, "t5": 6 * H, "gemma2": 2 * H}.items())
def test_the_command_writes_one_file_that_needs_no_other(name, n_heads, saved, command, tmp_path):
    out = tmp_path / "new folder" / "split.html"
    status, said = command(saved / name, saved / "text.txt", out, "--length", 24, "--sequences", 6)
    assert status == 0 and f"{n_heads} heads" in said
    assert [path.name for path in out.parent.iterdir()] == ["split.html"]
    soup, table = page_of(out)
    assert not soup.find_all(["script", "link", "iframe"])
    assert all(tag["src"].startswith("data:") for tag in soup.find_all(src=True))
    assert all(tag["href"].startswith("data:") for tag in soup.find_all(href=True))
    assert len(table) == n_heads and list(dict.fromkeys(table["name"])) == MODELS[name][2]
    assert (table["r_diag"] + table["r_offdiag"] + table["r_cross"]).sub(1).abs().max() < 1e-9
    rows = soup.select_one(".wide table tbody").find_all("tr")
    assert len(rows) == n_heads
    first, row = table.iloc[0], [cell.text for cell in rows[0].find_all("td")]
    assert row[:3] == ["0", MODELS[name][2][0], "0"]
    assert row[3] == f"{first['r_diag']:.2f} [{first['r_diag_lo']:.2f}, {first['r_diag_hi']:.2f}]"
    for image, quantity in zip(soup.find_all("img"), any_model.QUANTITIES, strict=True):
        picture = base64.b64decode(image["src"].split(",")[1]).decode()
        assert image["src"].startswith("data:image/svg+xml") and picture.rstrip().endswith("</svg>")
        assert image["alt"].startswith(f"{quantity} of {n_heads} heads")
        largest = table.loc[table[quantity].idxmax()]
        assert f"to {largest[quantity]:.2f} (layer {largest['layer']}, head {largest['head']})" in image["alt"]
        assert image.find_next("figcaption").text == any_model.QUANTITIES[quantity]
    said = [f"{table[quantity].mean():.2f}" for quantity in any_model.QUANTITIES]
    assert [strong.text for strong in soup.find("p").find_all("strong")] == said
    facts = soup.find_all("table")[-1].text
    assert name in facts and transformers.__version__ in facts and torch.__version__ in facts
    assert str(saved) not in soup.text
    before = out.read_bytes()
    command(saved / name, saved / "text.txt", out, "--length", 24, "--sequences", 6)
    assert out.read_bytes() == before


def test_what_it_writes_is_what_the_model_says_of_its_own_attentions(saved, command, tmp_path):
    out = tmp_path / "split.html"
    assert command(saved / "gpt2", saved / "text.txt", out, "--length", 24, "--sequences", 10)[0] == 0
    soup, table = page_of(out)
    model = transformers.AutoModelForCausalLM.from_pretrained(saved / "gpt2", attn_implementation="eager").eval()
    ids = transformers.AutoTokenizer.from_pretrained(saved / "gpt2")(TEXT, add_special_tokens=False)["input_ids"]
    L = 24 - 2  # of text: [CLS] and [SEP] are around it
    n = len(ids) // L
    starts = [L * round(i * (n - 1) / 9) for i in range(10)]
    windows = torch.tensor([[1, *ids[start : start + L], 2] for start in starts])
    weights, _ = own_attentions(model, {"input_ids": windows, "labels": windows})
    expected = pd.concat([head_energy(attention.detach(), attention.grad) for attention in weights], ignore_index=True)
    pd.testing.assert_frame_equal(table[expected.columns], expected, rtol=1e-3, atol=1e-4)
    loss = re.search(r"([\d.]+) nats a token \(next token\)", soup.text)[1]
    assert float(loss) == pytest.approx(model(input_ids=windows, labels=windows).loss.item(), abs=0.001)


def test_a_head_that_rounding_may_decide_is_said_and_left_out_of_the_means(saved):
    model, tokenizer, ask = any_model.load(str(saved / "gpt2"))
    table, _ = any_model.split(model, ask, any_model.Windows(TEXT, tokenizer, 16, 4))
    hidden = table.columns.str.contains("r_|cos_")
    table.loc[3, table.columns[hidden]] = float("nan")
    soup = BeautifulSoup(any_model.page("a/b", table, {}), "html.parser")
    said = soup.find("p").text
    assert f"Mean over {2 * H - 1} heads" in said and "In 1 further heads rounding may decide" in said
    assert f"{table['r_cross'].mean():.2f}" in said
    cells = [cell.text for cell in soup.select(".wide tbody tr")[3].find_all("td")]
    assert cells[3:8] == ["not defined"] * 5 and cells[:3] == ["0", "transformer.h.0.attn", "3"]
    assert cells[8].startswith(f"{table['entropy'][3]:.2f} [")
    assert soup.find("a", download=True)["download"] == "a-b.csv"
    table[table.columns[hidden]] = float("nan")
    with pytest.raises(ValueError, match="in no head is the gradient large enough"):
        any_model.page("a/b", table, {})


def test_as_many_tokens_are_masked_in_every_window_and_only_they_are_asked_for(saved):
    model, tokenizer, ask = any_model.load(str(saved / "bert"))
    assert ask is any_model.masked_tokens
    windows = any_model.Windows(TEXT, tokenizer, 22, 7)
    seen = []
    model.register_forward_pre_hook(lambda model, args, kwargs: seen.append(kwargs["input_ids"]), with_kwargs=True)
    logits, targets = ask(model, windows, windows.rows, torch.Generator().manual_seed(0))
    whole = windows.marked(windows.rows)
    hidden = targets != -100
    assert logits.shape == (*whole.shape, V) and whole.shape == (7, 22)
    assert (hidden.sum(1) == 3).all()  # 15 % of 20
    assert torch.equal(seen[0], whole.masked_fill(hidden, tokenizer.mask_token_id))
    assert torch.equal(targets[hidden], whole[hidden])
    assert not hidden[:, [0, -1]].any() and (whole[:, 0] == 1).all() and (whole[:, -1] == 2).all()
    assert len({tuple(row.tolist()) for row in hidden}) > 1


def test_a_continuation_is_asked_of_the_text_before_it(saved):
    model, tokenizer, ask = any_model.load(str(saved / "t5"))
    assert ask is any_model.continuation
    windows = any_model.Windows(TEXT, tokenizer, 22, 3)
    seen = []
    model.register_forward_pre_hook(lambda model, args, kwargs: seen.append(kwargs["input_ids"]), with_kwargs=True)
    logits, targets = ask(model, windows, windows.rows, torch.Generator())
    assert torch.equal(seen[0], windows.marked(windows.rows[:, :10]))
    assert torch.equal(targets, windows.marked(windows.rows[:, 10:])) and logits.shape == (3, 12, V)


@pytest.mark.parametrize(("name", "length"), [("gpt2", 64), ("t5", 100)])
def test_windows_are_no_longer_than_the_model_can_read(name, length, saved, command, tmp_path):
    assert command(saved / name, saved / "text.txt", tmp_path / "out.html", "--length", 100)[0] == 0
    assert f"of {length - 2} tokens" in page_of(tmp_path / "out.html")[0].text


def changed(config=None, weights=None, without=(), text=None, **files):
    """Spoils a copy of a saved model."""

    def spoil(folder, text_file):
        for name in without:
            (folder / name).unlink()
        for name, content in files.items():
            (folder / name.replace("__", ".")).write_text(content)
        if config:
            path = folder / "config.json"
            path.write_text(json.dumps(json.loads(path.read_text()) | config))
        if weights:
            model = transformers.AutoModelForCausalLM.from_pretrained(folder)
            weights(model)
            model.save_pretrained(folder)
        if text is not None:
            text_file.write_bytes(text)

    return spoil


def spoil_one_weight(model):
    model.lm_head.weight.data[0, 0] = torch.nan


def replace_by_mamba(folder, text_file):
    config = transformers.AutoConfig.for_model("mamba", vocab_size=V, hidden_size=16, num_hidden_layers=1, state_size=4)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)


class RunsCode:
    def __reduce__(self):
        return exec, ("raise SystemExit('code was run')",)


def pickle_the_weights(folder, text_file):
    (folder / "model.safetensors").unlink()
    torch.save({"weights": RunsCode()}, folder / "pytorch_model.bin")


CODE = {"auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.Own"}, "model_type": "own"}
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
WRONG = {
    "no tokenizer": (changed(without=TOKENIZER), "no tokenizer"),
    "pickled code": (pickle_the_weights, "weights_only"),
    "another tokenizer": (changed(weights=lambda model: model.resize_token_embeddings(100)), "it is another one's"),
    "no weights": (changed(without=["model.safetensors"]), "model.safetensors"),
    "weights missing": (changed(config={"n_layer": 3}), "lacks weights of GPT2LMHeadModel (transformer.h.2"),
    "no language model": (changed(config={"architectures": ["GPT2Model"]}), "expected a causal, masked or seq2seq"),
    "no architecture": (changed(config={"architectures": None}), "expected a causal, masked or seq2seq"),
    "code of its own": (changed(config=CODE, own__py="raise SystemExit('code was run')"), "custom code"),
    "weights that are not finite": (changed(weights=spoil_one_weight), "is nan: nothing to split"),
    "no attention": (replace_by_mamba, "no attention was seen"),
    "short text": (changed(text=b"one hand"), "make no two windows of"),
    "empty text": (changed(text=b""), "0 tokens of text make no two windows"),
    "no text": (changed(text=b"\xff\xfe\x00"), "is no UTF-8 text"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_is_said_and_the_old_file_stays(what, saved, command, tmp_path):
    spoil, expected = WRONG[what]
    folder, text, out = tmp_path / "model", tmp_path / "text.txt", tmp_path / "out.html"
    shutil.copytree(saved / "gpt2", folder)
    shutil.copy(saved / "text.txt", text)
    spoil(folder, text)
    out.write_text("old")
    status, said = command(folder, text, out)
    assert status == 2 and "any_model.py: " in said and expected in said
    assert out.read_text() == "old" and len(list(tmp_path.iterdir())) == 3


def test_interrupted_while_the_page_is_made_it_leaves_the_old_one(saved, command, tmp_path, monkeypatch):
    def page(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(any_model, "page", page)
    (tmp_path / "out.html").write_text("old")
    status, said = command(saved / "gpt2", saved / "text.txt", tmp_path / "out.html", "--sequences", 2)
    assert status == 130 and "nothing was written" in said
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


def test_a_path_that_is_none_is_said(command, saved, tmp_path):
    for path in (tmp_path / "nothing", "./nothing", "a/b/c"):
        status, said = command(path, saved / "text.txt", tmp_path / "out.html")
        assert status == 2 and f"there is no folder {path}" in said
    status, said = command(saved / "gpt2", tmp_path / "nothing.txt", tmp_path / "out.html")
    assert status == 2 and "nothing.txt" in said
    status, said = command(saved / "gpt2", saved / "text.txt", tmp_path / "out.html", "--sequences", 1)
    assert status == 2 and "1 windows make no interval" in said
