"""What notebook 10 is made from: the table of bench, and the model that is trained on long contexts."""

import dataclasses
import math

import bench
import context
import numpy as np
import pandas as pd
import pytest
import torch

from helpers import gradients, head_energy, load_corpus
from model_local import LocalGPT, LocalGPTConfig

SMALL = LocalGPTConfig(block_size=16, n_layer=1, n_head=2, n_embd=16, method="bp")
TINY = bench.Plan(0.01, SMALL, 2, None, ((2, 2, 8),), (1, 2, 4), 64, (("T", (8,)), ("B", (1,)), ("C", (8,))))


@pytest.fixture
def in_process(monkeypatch):
    monkeypatch.setattr(bench, "apart", lambda function, *args: function(*args))


def test_the_table_of_bench_is_well_formed(in_process, monkeypatch):
    monkeypatch.setattr(bench, "CASES", {"nn.MultiheadAttention": bench.CASES["nn.MultiheadAttention"]})
    monkeypatch.setattr(bench, "T", 16)
    table = pd.concat([bench.table(TINY, part) for part in ("training", "growth", "split", "capture")])
    assert [*table.columns] == [*bench.COLUMNS, "torch", "processor", "threads"]
    assert table["what"].notna().all() and not table.duplicated(bench.COLUMNS[:10]).any()
    timed = table.dropna(subset="low")
    assert (timed["low"] <= timed["ratio"]).all() and (timed["ratio"] <= timed["high"]).all()
    assert (timed[["ms", "ms_over", "ratio"]] > 0).all(axis=None)
    pairs = {(what, over) for what, over, _ in bench.BOUNDS if over != "nanoGPT"}
    assert pairs <= {*zip(table["what"], table["over"], strict=True)} and table["bound"].isna().all()
    assert (table.loc[table["deviation"].notna(), "deviation"] < 1e-5).all()
    grown = table[(table["part"] == "growth") & (table["what"] == "bp")]
    assert {*zip(grown["T"], grown["B"], grown["C"], strict=True)} == {(8, 2, 16), (16, 1, 16), (16, 2, 8)}


def test_parts_are_measured_by_name_and_the_rows_of_others_stay(tmp_path, monkeypatch, capsys):
    parts = {name: lambda plan: [{"what": "bp", "over": "nanoGPT", "T": 64, "ratio": plan.seconds}] for name in "xy"}
    monkeypatch.setattr(bench, "PARTS", parts)
    for given in (["--seconds", "3"], ["y", "--seconds", "0.5"]):
        monkeypatch.setattr("sys.argv", ["bench.py", *given, "--output", str(tmp_path / "made.csv")])
        bench.main()
    table = pd.read_csv(tmp_path / "made.csv")
    assert table[["part", "ratio", "bound"]].values.tolist() == [["x", 3.0, 1.0], ["y", 0.5, 1.0]]
    assert capsys.readouterr().out.count("OVER") == 2


def test_a_nanogpt_is_taken_from_where_the_user_says(tmp_path):
    made = "print('number of parameters')\ndef GPT(config): return config\n"
    (tmp_path / "model.py").write_text(f"from types import SimpleNamespace as GPTConfig\n{made}")
    shape = {name: getattr(SMALL, name) for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd")}
    assert vars(bench.nanogpt(tmp_path, SMALL)) == {"bias": False, "dropout": 0.0} | shape


def test_the_ways_to_the_split_that_are_timed_agree():
    attn, grad = bench.maps(2, 3, 8)
    table = head_energy(attn, grad, n_boot=1)
    for h, (ff, dd, oo, cosine) in enumerate(bench.by_loop(attn, grad)):
        row = table.iloc[h]
        np.testing.assert_allclose(
            [dd / ff, oo / ff, cosine], row[["r_diag", "r_offdiag", "cos_diag"]].astype(float), rtol=1e-4
        )
    f = attn * (grad - (attn * grad).sum(-1, keepdim=True))
    torch.testing.assert_close(bench.by_jacobian(attn, grad).view_as(f), f, rtol=1e-4, atol=1e-10)


def test_the_products_of_a_step_are_those_that_its_model_makes():
    class Counting(torch.utils._python_dispatch.TorchDispatchMode):
        flops = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if func.overloadpacket.__name__ in ("mm", "bmm", "baddbmm"):
                self.flops += out.numel() * args[-2].shape[-1]
            return out

    counts = []
    for work in (bench.step(LocalGPT(SMALL), SMALL.vocab_size, 2, 16), bench.products(SMALL, 2)):
        with Counting() as counting:
            work()
        counts.append(counting.flops)
    assert counts[0] == counts[1] > 0


# --- long contexts ---------------------------------------------------------------------------------------------------


def pair(T=24):
    """The same weights in both models, and a batch."""
    config = dataclasses.replace(SMALL, block_size=T)
    torch.manual_seed(0)
    long = context.LongGPT(config)
    long.position_embedding.requires_grad_()
    explicit = LocalGPT(config)
    explicit.load_state_dict(long.state_dict())
    return long, explicit, *torch.randint(config.vocab_size, (2, 3, T))


def test_the_fused_model_has_the_gradients_of_the_explicit_one():
    long, explicit, x, y = pair()
    torch.testing.assert_close(long(x, y)[0], explicit(x, y)[0])
    got, expected = gradients(long, x, y), gradients(explicit, x, y)
    assert got.keys() == expected.keys()
    for name in got:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-4, atol=1e-7, msg=name)


@pytest.mark.parametrize("changes", [{"method": "fa"}, {"softmax_backward": "diagonal"}, {"qk_norm": "exact"}])
def test_other_rules_have_no_fused_kernel(changes):
    with pytest.raises(ValueError, match="no kernel"):
        context.LongGPT(dataclasses.replace(SMALL, **changes))


def test_what_is_told_makes_the_gradient_and_the_diagonal_rule_is_what_it_is_without():
    long, explicit, x, _ = pair()
    told, untold = np.array(context.messages(long, x[:1])).T
    assert (told < 1e-5).all()
    window, dq = x[:1], []

    def watch(q, grads):
        q.register_hook(grads.append)

    for model in (explicit, LocalGPT(dataclasses.replace(explicit.config, softmax_backward="diagonal"))):
        model.load_state_dict(explicit.state_dict())
        grads = []
        model.blocks[0].attn.q_norm.register_forward_hook(lambda *args, grads=grads: watch(args[2], grads))
        model(window[:, :-1], window[:, 1:].contiguous())[1].backward()
        dq.append(grads[0])
    norm = (0, 1, 3)  # of a head
    expected = torch.linalg.vector_norm(dq[1] - dq[0], dim=norm) / torch.linalg.vector_norm(dq[0], dim=norm)
    np.testing.assert_allclose(untold, expected, rtol=1e-4)


def test_training_goes_on_where_it_was_and_ends_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(context, "CHECKPOINT", tmp_path / "context.pt")
    monkeypatch.setattr(context, "TOKENS", 32)
    monkeypatch.setattr(context, "SAVE_EVERY", 2)
    corpus, steps = load_corpus(), []
    whole = context.trained(corpus, 1, (8, 16)).state_dict()

    def batch(*args):
        steps.append(args[0])
        if len(steps) == 3:
            raise KeyboardInterrupt
        return type(corpus).batch(corpus, *args)

    (tmp_path / "context.pt").unlink()
    interrupted = dataclasses.replace(corpus)
    object.__setattr__(interrupted, "batch", batch)
    with pytest.raises(KeyboardInterrupt):
        context.trained(interrupted, 1, (8, 16))
    again = context.trained(corpus, 1, (8, 16)).state_dict()
    assert len(steps) == 3 and all(torch.equal(whole[name], again[name]) for name in whole)


def test_rows_are_measured_on_all_of_the_tokens():
    config = LocalGPTConfig(block_size=32, n_layer=1, n_head=2, n_embd=16, method="bp")
    table = context.measured(context.LongGPT(config), load_corpus(), 32, 128)
    assert (table["sequences"] == 4).all() and table["T"].eq(32).all() and len(table) == 2
    assert table["loss"].between(0.9 * math.log(65), 1.1 * math.log(65)).all() and (table["told"] < 1e-4).all()
