"""Models that others trained: the parts of them, of what they read and how they are tuned, broken and seen broken."""

import hashlib
import json
import math
import subprocess
import zipfile
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import finetune
import others
import pandas as pd
import pytest
import torch
from others import Batch, WheelError, atom_maps, chemistry, masked, masked_scores, nats, reactions, split_of, wheel

from helpers import capture_attention, softmax_rule
from model_local import SOFTMAX_BACKWARD

RXNMAPPER, ALBERT = "rxnmapper==0.4.3", "rxnmapper/models/transformers/albert_heads_8_uspto_all_1310k"


@pytest.fixture(scope="module")
def table():
    return reactions()


@pytest.fixture
def trained():
    return chemistry()


def batches_of(trained, texts, size=16):
    sequences = [trained.vocabulary.encode(text) for text in texts]
    return masked(sequences, trained.vocabulary.mask, size, torch.Generator().manual_seed(0))


# ---- the wheels -----------------------------------------------------------------------------------------------------


def test_a_wheel_is_fetched_by_hash_once_and_a_damaged_one_again(tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path / "made.whl", "w") as made:
        made.writestr("a.txt", "content")
    right, calls = (tmp_path / "made.whl").read_bytes(), []

    def pip(command, **options):
        requirements = Path(command[command.index("-r") + 1]).read_text()
        assert requirements == f"thing==1.0 --hash=sha256:{hashlib.sha256(right).hexdigest()}"
        assert {"--no-deps", "--require-hashes"} <= {*command}
        Path(command[-1], "thing-1.0-py3-none-any.whl").write_bytes(right)
        calls.append(command)
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(others, "WHEELS", tmp_path / "wheels")
    monkeypatch.setattr(others, "SHA256", {"thing==1.0": hashlib.sha256(right).hexdigest()})
    monkeypatch.setattr(subprocess, "run", pip)
    assert wheel("thing==1.0").read("a.txt") == wheel("thing==1.0").read("a.txt") == b"content"
    assert len(calls) == 1
    (tmp_path / "wheels" / "thing==1.0.whl").write_bytes(b"cut off")
    assert wheel("thing==1.0").read("a.txt") == b"content" and len(calls) == 2


def test_without_a_network_it_says_what_to_do(tmp_path, monkeypatch):
    said = "WARNING: retrying\nERROR: No matching distribution found for rxnmapper==0.4.3\n"
    monkeypatch.setattr(others, "WHEELS", tmp_path)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=1, stderr=said))
    with pytest.raises(WheelError, match=r"No matching distribution .*\nCall again where pip reaches .* put the wheel"):
        chemistry()


# ---- what is read ---------------------------------------------------------------------------------------------------


def test_the_tokens_are_those_of_the_authors(trained):
    vocabulary = trained.vocabulary
    assert (vocabulary.first, vocabulary.last, vocabulary.mask) == (12, 13, 14)
    tokens = vocabulary.split("C[C@H](Br)c1ccc2cc1#Cl>>[Na+].s")
    assert " ".join(tokens) == "C [C@H] ( Br ) c 1 c c c 2 c c 1 # Cl >> [Na+] . s"
    assert vocabulary.encode("CO").tolist() == [12, vocabulary.ids["C"], vocabulary.ids["O"], 13]
    for text in ("C C", "CX", "[Xx]", "C->C"):
        with pytest.raises(ValueError, match="not made of the tokens"):
            vocabulary.split(text)


def test_the_reactions_are_different_ones_in_two_forms_of_the_same_atoms(trained, table):
    assert len(table) == table["reaction"].nunique() == 1280
    assert table["part"].value_counts().to_dict() == {"measured": 256, "tuning": 1024}
    assert table["patent"].str.fullmatch(r"US[A-Z\d]{8,10}").all()
    for row in table.itertuples():
        tokens = trained.vocabulary.split(row.reaction), trained.vocabulary.split(row.rewritten)
        assert all(len(t) <= others.LONGEST - 2 and t.count(">>") == 1 for t in tokens)
        atoms = [Counter(t.strip("[]@+-H").upper() for t in found if t[0] in "[" or t.isalpha()) for found in tokens]
        assert atoms[0] == atoms[1], row.reaction


def test_an_atom_of_the_product_comes_from_one_of_its_element(trained, table):
    for _, row in table[table["part"] == "measured"][:40].iterrows():
        weights, origin = atom_maps(trained, row)
        sides = [trained.vocabulary.split(side) for side in row["reaction"].split(">>")]
        left, right = ([t.strip("[]@+-H0123456789").upper() for t in s if t[0] == "[" or t.isalpha()] for s in sides)
        assert weights.shape == (12, 8, len(right), len(left)) and origin.shape == weights.shape[2:]
        assert origin.any(1).all() and weights.min() >= 0 and weights.sum(-1).max() <= 1 + 1e-5
        for p, r in origin.nonzero().tolist():
            assert right[p] == left[r], row["reaction"]


def test_masks_hide_the_same_share_of_every_sequence_and_never_its_ends():
    sequences = [torch.arange(100, 100 + n) for n in (7, 22, 22, 22, 42)]
    made = masked(sequences, 5, 2, torch.Generator().manual_seed(3))
    assert sorted(len(batch.ids) for batch in made) == [1, 1, 1, 2]
    for ids, targets in made:
        hidden = ids == 5
        assert (hidden == (targets != -100)).all() and not hidden[:, [0, -1]].any()
        assert (hidden.sum(1) == {7: 1, 22: 3, 42: 6}[ids.shape[1]]).all()
        whole = torch.where(hidden, targets, ids)
        assert (whole == torch.arange(100, 100 + ids.shape[1])).all()
    for seed in range(20):
        for ids, _ in masked(sequences, 5, 2, torch.Generator().manual_seed(seed)):
            assert (ids[:, 0] == 100).all() and (ids[:, -1] == 99 + ids.shape[1]).all()
    again, other = (masked(sequences, 5, 2, torch.Generator().manual_seed(seed)) for seed in (3, 4))
    assert all(torch.equal(a.ids, b.ids) for a, b in zip(made, again, strict=True))
    assert not all(a.ids.shape == b.ids.shape and torch.equal(a.ids, b.ids) for a, b in zip(made, other, strict=True))


# ---- the models -----------------------------------------------------------------------------------------------------


def test_it_names_hidden_tokens_and_head_10_5_finds_the_atoms(trained, table):
    some = table[table["part"] == "measured"][:48]
    assert masked_scores(trained.model, batches_of(trained, some["reaction"]))["accuracy"] > 0.93
    right = n = 0
    for _, row in some[:24].iterrows():
        weights, origin = atom_maps(trained, row)
        found = weights.argmax(-1, keepdim=True)
        right, n = right + origin.expand(weights.shape).gather(-1, found).sum((-2, -1)), n + len(origin)
    assert right[10, 5] / n > 0.8 > 0.6 > right[10, [0, 1, 2, 3, 4, 6, 7]].max() / n


def wrong_positions(trained):
    trained.model.position.weight.data = trained.model.position.weight.data.roll(1, 0)


def wrong_eps(trained):
    trained.model.embedding_norm.eps = 1e-2


def slightly_wrong_eps(trained):
    trained.model.embedding_norm.eps = 1e-5


def without_ring_digits(trained):
    split = trained.vocabulary.split
    trained.vocabulary.split = lambda text: [token for token in split(text) if not token.isdigit()]


def swapped_queries_and_keys(trained):
    attention = trained.model.layers[0].attention
    attention.query, attention.key = attention.key, attention.query


def without_the_segment(trained):
    with wheel(RXNMAPPER) as files, files.open(f"{ALBERT}/pytorch_model.bin") as file:
        segment = torch.load(file, "cpu", weights_only=True)["albert.embeddings.token_type_embeddings.weight"][0]
    trained.model.position.weight.data -= segment


FAULTS = [wrong_positions, wrong_eps, swapped_queries_and_keys]
SLIGHT = [slightly_wrong_eps, without_the_segment]  # hidden tokens are named as well as before


@pytest.mark.parametrize("fault", [*FAULTS, without_ring_digits], ids=lambda fault: fault.__name__)
def test_a_fault_makes_it_name_fewer_tokens(trained, table, fault):
    some = table[table["part"] == "measured"]["reaction"][:48]
    whole = masked_scores(trained.model, batches_of(trained, some))
    fault(trained)
    assert masked_scores(trained.model, batches_of(trained, some))["loss"] > 1.05 * whole["loss"]


def test_every_logit_is_that_of_the_transformers_library(trained, table):
    transformers = pytest.importorskip("transformers")
    with wheel(RXNMAPPER) as files, files.open(f"{ALBERT}/pytorch_model.bin") as file:
        state = torch.load(file, "cpu", weights_only=True)
        config = transformers.AlbertConfig(**json.loads(files.read(f"{ALBERT}/config.json")))
    theirs = transformers.AlbertForMaskedLM(config).eval()
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    assert not missing and all("pooler" in name for name in unexpected)
    ids = trained.vocabulary.encode(table["reaction"][0])[None]
    with torch.no_grad():
        logits = theirs(ids).logits
        torch.testing.assert_close(trained.model(ids), logits, rtol=0, atol=1e-4)
        for fault in (*FAULTS, *SLIGHT):
            broken = chemistry()
            fault(broken)
            assert (broken.model(ids) - logits).abs().max() > 2e-4, fault


def test_the_antibodies_model_is_that_of_the_transformers_library():
    transformers = pytest.importorskip("transformers")
    trained = others.antibodies()
    sizes = {"num_hidden_layers": 4, "num_attention_heads": 8, "hidden_size": 128, "intermediate_size": 256}
    config = transformers.RobertaConfig(
        vocab_size=25, max_position_embeddings=146, type_vocab_size=1, pad_token_id=1, layer_norm_eps=1e-5, **sizes
    )
    theirs = transformers.RobertaForMaskedLM(config).eval()
    names = {  # ours: theirs
        "token.": "roberta.embeddings.word_embeddings.",
        "position.": "roberta.embeddings.position_embeddings.",
        "embedding_norm.": "roberta.embeddings.LayerNorm.",
        "layers.": "roberta.encoder.layer.",
        "attention.query": "attention.self.query",
        "attention.key": "attention.self.key",
        "attention.value": "attention.self.value",
        "attention.out.": "attention.output.dense.",
        "attention_norm": "attention.output.LayerNorm",
        ".up.": ".intermediate.dense.",
        ".down.": ".output.dense.",
        ".norm.": ".output.LayerNorm.",
        "head.": "lm_head.dense.",
        "head_norm.": "lm_head.layer_norm.",
        "bias": "lm_head.bias",
    }
    state = {"roberta.embeddings.token_type_embeddings.weight": torch.zeros(1, 128)}
    for name, values in trained.model.state_dict().items():
        for ours, other in names.items():
            starts = ours in ("token.", "position.", "embedding_norm.", "layers.", "head.", "head_norm.", "bias")
            if name.startswith(ours) if starts else ours in name:
                name = other + name.removeprefix(ours) if starts else name.replace(ours, other)
        state[name] = values
    state["lm_head.decoder.weight"] = state["roberta.embeddings.word_embeddings.weight"]
    state["lm_head.decoder.bias"] = state["lm_head.bias"]
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    assert not [*missing, *unexpected], (missing, unexpected)
    ids = trained.vocabulary.encode("EVQLVESGGGLVQPGGSLRLSCAASGFTFSSYAMSWVRQAPGKGLEWVSAISGSGGSTYYADSVKG")[None]
    with torch.no_grad():
        torch.testing.assert_close(trained.model(ids), theirs(ids).logits, rtol=0, atol=1e-4)


def test_the_split_closes_has_each_use_of_the_layer_and_leaves_no_gradient(trained, table):
    split = split_of(trained.model, batches_of(trained, table["reaction"][:6]))
    assert split[["layer", "head"]].values.tolist() == [[layer, head] for layer in range(12) for head in range(8)]
    assert (split[["r_diag", "r_offdiag", "r_cross"]].sum(axis=1) - 1).abs().max() < 1e-9
    assert split["cos_diag"].nunique() == 96 and all(p.grad is None for p in trained.model.parameters())


def test_the_stored_figures_of_the_antibodies_hang_together():
    table = pd.read_csv(others.ANTIBODIES)
    assert table[["layer", "head"]].values.tolist() == [[layer, head] for layer in range(4) for head in range(8)]
    assert (table[["r_diag", "r_offdiag", "r_cross"]].sum(axis=1) - 1).abs().max() < 1e-4
    assert table["defined"].all() and (table["sequences"] == 256).all() and (table["accuracy"] > 0.85).all()
    assert ((table["cos_diag_lo"] < table["cos_diag"]) & (table["cos_diag"] < table["cos_diag_hi"])).all()


# ---- fine-tuning ----------------------------------------------------------------------------------------------------


def test_full_is_plain_training_and_none_leaves_queries_and_keys_alone(table, monkeypatch):
    monkeypatch.setattr(finetune, "STEPS", 2)
    texts = [*table["rewritten"][:30]]
    models = {rule: finetune.tuned(chemistry(), texts, rule, 1e-4, 7) for rule in ("full", "diagonal", "none")}
    plain, vocabulary = chemistry()
    sequences = [vocabulary.encode(text) for text in texts]
    optimizer = torch.optim.Adam(plain.parameters(), 1e-4)
    for batch in masked(sequences, vocabulary.mask, 4, torch.Generator().manual_seed(7))[:2]:
        optimizer.zero_grad()
        (nats(plain, batch) / (batch.targets != -100).sum()).backward()
        optimizer.step()
    start = chemistry().model.state_dict()
    moved = {rule: {n for n, v in m.state_dict().items() if not torch.equal(v, start[n])} for rule, m in models.items()}
    held = {f"layers.0.attention.{name}.{part}" for name in ("query", "key") for part in ("weight", "bias")}
    assert moved["full"] == moved["diagonal"] == {*start} and moved["none"] == {*start} - held
    weight = "layers.0.attention.query.weight"
    step = plain.state_dict()[weight] - start[weight]
    for rule, high in (
        ("full", 0.02),
        ("diagonal", math.inf),
    ):  # Adam makes much of rounding where it divides by little
        off = (models[rule].state_dict()[weight] - plain.state_dict()[weight]).norm() / step.norm()
        assert off < high and (rule == "full" or off > 0.2), (rule, off)


def test_the_rule_reaches_all_twelve_uses_of_the_layer(trained, table):
    batch = batches_of(trained, table["reaction"][:1])[0]
    seen = []
    rule = SOFTMAX_BACKWARD["diagonal"]
    with softmax_rule(trained.model, "diagonal"), capture_attention(trained.model, maps=True) as layers:
        nats(trained.model, batch).backward()
    for layer in layers:
        seen.append(rule(layer.attn, layer.grad, layer.visible).abs().sum().item())
    assert len(seen) == 12 and min(seen) > 0


def test_an_interrupted_table_goes_on_and_foreign_rows_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(finetune, "FINETUNING", tmp_path / "finetuning.csv")
    for name, value in (("RULES", ("full", "none")), ("RATES", (1e-4, 1e-3, 1e-2, 1e-5)), ("SEEDS", (0, 1))):
        monkeypatch.setattr(finetune, name, value)
    monkeypatch.setattr(finetune, "scored", lambda *_: {"rewritten_loss": 1.0})
    made = []

    def tuned(trained, texts, *run):
        if len(made) == 5:
            made.append(None)
            raise KeyboardInterrupt
        assert len(texts) == 1024
        made.append(run)

    monkeypatch.setattr(finetune, "tuned", tuned)
    monkeypatch.setattr(finetune, "finetuning_code", lambda: "abc")
    with pytest.raises(KeyboardInterrupt):
        finetune.finetune()
    assert len(pd.read_csv(finetune.FINETUNING)) == 1 + 5
    finetune.finetune()
    rows = pd.read_csv(finetune.FINETUNING)
    assert len(rows) == 1 + 2 * 4 * 2 and not rows.duplicated(["rule", "lr", "seed"]).any()
    assert made.pop(5) is None and made == [*rows[["rule", "lr", "seed"]][1:].itertuples(index=False, name=None)]
    monkeypatch.setattr(finetune, "finetuning_code", lambda: "other")
    with pytest.raises(SystemExit, match="other code"):
        finetune.finetune()


def test_the_stored_runs_are_of_this_code_and_the_first_of_them_comes_out_again(trained, table):
    rows = pd.read_csv(finetune.FINETUNING)
    assert set(rows["code"]) == {finetune.finetuning_code()} and not rows.duplicated(["rule", "lr", "seed"]).any()
    before = finetune.scored(*trained, table[table["part"] == "measured"])
    for name, value in before.items():
        assert math.isclose(rows.loc[0, name], value, abs_tol=2e-3), name


def test_what_a_run_depends_on_is_in_its_fingerprint(monkeypatch):
    code = finetune.finetuning_code()
    for place, name, value in (
        (finetune, "STEPS", 201),
        (finetune, "BATCH_SIZE", 5),
        (finetune, "N_SCORED", 127),
        (others, "MASKED_SHARE", 0.2),
        (finetune, "REACTIONS", others.ANTIBODIES),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(place, name, value)
            assert finetune.finetuning_code() != code, name
    assert finetune.finetuning_code() == code


def test_scores_count_tokens_not_batches(trained):
    ids = torch.tensor([[12, 15, 16, 13]])
    one = Batch(ids, torch.tensor([[-100, 15, -100, -100]]))
    two = Batch(ids, torch.tensor([[-100, 15, 590, -100]]))
    parts, both = [masked_scores(trained.model, [b]) for b in (one, two)], masked_scores(trained.model, [one, two])
    for name in ("loss", "accuracy"):
        assert math.isclose(both[name], (parts[0][name] + 2 * parts[1][name]) / 3, rel_tol=1e-5)
