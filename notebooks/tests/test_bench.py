"""What notebook 91 is made from: how costs are measured, and the model of long contexts."""

import dataclasses
import sys

import numpy as np
import pandas as pd
import pytest
import torch

from data import bench, context
from helpers import evaluate, gradients, head_energy, load_corpus
from model_local import LocalGPT, LocalGPTConfig

SMALL = LocalGPTConfig(block_size=16, n_layer=1, n_head=2, n_embd=16, method="bp")


def test_every_part_gives_rows_with_ratios_between_their_quartiles(monkeypatch):
    monkeypatch.setattr(bench, "apart", lambda function, *args: function(*args))

    def made_up(works, seconds):
        for work in works.values():
            work()
        return {name: [float(sum(map(ord, name)))] * 4 for name in works}

    monkeypatch.setattr(bench, "interleave", made_up)
    rows = bench.training(0.01, SMALL, 2) + bench.split(0.01, ((2, 2, 8),))
    rows += [bench.long_table(1, 2, 64, 8), *bench.capture(0.01, (2, 16, 16, 2, 1))]
    table = pd.DataFrame(rows)
    assert {*table.columns} <= {*bench.COLUMNS}
    assert not table.duplicated(["part", "model", "what", "over", "T"]).any()
    timed = table.dropna(subset="ratio")
    for name, of in (("ms", "what"), ("ms_over", "over")):
        assert timed[name].tolist() == [sum(map(ord, words)) for words in timed[of]]
    for name in ("low", "ratio", "high"):
        np.testing.assert_allclose(timed[name], timed["ms"] / timed["ms_over"])
    stored = pd.read_csv(bench.BENCH)
    timed = stored.dropna(subset="ratio")
    assert (timed["low"] <= timed["ratio"]).all() and (timed["ratio"] <= timed["high"]).all()
    assert [*stored.columns] == bench.COLUMNS
    for rows in (table, stored):  # the page finds what it looks for in a table that is made anew
        assert {*rows["what"]} == {*stored["what"]} and {*rows["model"]} == {*stored["model"]}


def test_works_are_timed_in_turn_and_ratios_are_those_of_one_round(monkeypatch):
    turns = []

    def work(seconds):  # on a machine that slows down from turn to turn
        turns.append(seconds * (100 + len(turns)))

    monkeypatch.setattr(bench.time, "perf_counter", lambda: sum(turns))
    times = bench.interleave({"slow": lambda: work(3.0), "fast": lambda: work(1.0)}, 1e5)
    np.testing.assert_allclose(times["slow"], 3 * np.array(times["fast"]))
    # in milliseconds, and from the second round on: the first warmed up
    assert times["fast"][0] == pytest.approx(105_500) and len(times["fast"]) == len(turns) / 4 - 1
    times = {"a": [500.0, 2.0, 12.0, 40.0], "b": [100.0, 1.0, 4.0, 10.0]}
    row = bench.compared(times, "a", "b", T=8)
    expected = {"T": 8, "ratio": 3.5, "low": 2.25, "high": 4.75, "ms": 26.0, "ms_over": 7.0}
    assert row == expected | {"what": "a", "over": "b"}


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_peak_is_what_the_work_had_at_once_and_no_more_than_that():
    assert bench.peak(lambda: torch.ones(2**24)) == pytest.approx(64, abs=4)
    assert bench.peak(lambda: None) < 4


def test_what_is_compared_does_the_same():
    attn, grad = bench.maps(2, 3, 8)
    table = head_energy(attn, grad, n_boot=1)
    for h, (ff, dd, oo, cosine) in enumerate(bench.by_loop(attn, grad)):
        expected = table.loc[h, ["r_diag", "r_offdiag", "cos_diag"]].astype(float)
        np.testing.assert_allclose([dd / ff, oo / ff, cosine], expected, rtol=1e-4)
    ours, plain = LocalGPT(SMALL), bench.PlainGPT(SMALL)
    n_ours, n_plain = (sum(p.numel() for p in model.parameters()) for model in (ours, plain))
    assert n_ours == n_plain
    idx = torch.randint(SMALL.vocab_size, (1, 16))
    changed = torch.cat([idx[:, :8], idx[:, :8]], dim=1)
    logits, others = plain(idx, idx)[0], plain(changed, idx)[0]
    torch.testing.assert_close(logits[:, :8], others[:, :8])  # no look at what comes


# --- long contexts ----------------------------------------------------------------------------


@pytest.fixture
def pair():
    """The same weights in the fused and in the explicit model, and a batch."""
    config = dataclasses.replace(SMALL, block_size=24)
    torch.manual_seed(0)
    long, explicit = context.LongGPT(config), LocalGPT(config)
    long.position_embedding.requires_grad_()
    explicit.load_state_dict(long.state_dict())
    return long, explicit, *torch.randint(config.vocab_size, (2, 3, 24))


def test_the_fused_model_has_the_gradients_of_the_explicit_one(pair):
    long, explicit, x, y = pair
    torch.testing.assert_close(long(x, y)[0], explicit(x, y)[0])
    got, expected = gradients(long, x, y), gradients(explicit, x, y)
    assert got.keys() == expected.keys()
    for name in got:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-4, atol=1e-7, msg=name)
    for changes in ({"method": "fa"}, {"softmax_backward": "diagonal"}, {"qk_norm": "exact"}):
        with pytest.raises(ValueError, match="no kernel"):
            context.LongGPT(dataclasses.replace(SMALL, **changes))


def test_one_number_makes_the_gradient_and_none_makes_that_of_the_diagonal_rule(pair):
    long, explicit, x, _ = pair
    told, untold = np.array(context.messages(long, x[:1])).T
    assert (told < 1e-5).all()
    # the gradient at the queries under both rules, by a hook
    at_queries = []
    for rule in ("full", "diagonal"):
        model = LocalGPT(dataclasses.replace(explicit.config, softmax_backward=rule))
        model.load_state_dict(explicit.state_dict())
        norm = model.blocks[0].attn.q_norm
        norm.register_forward_hook(lambda _, __, q: q.register_hook(at_queries.append) and None)
        model(x[:1, :-1], x[:1, 1:].contiguous())[1].backward()
    full, diagonal = (grad[0].transpose(0, 1).flatten(1) for grad in at_queries)  # (H, T D)
    np.testing.assert_allclose(untold, (diagonal - full).norm(dim=1) / full.norm(dim=1), rtol=1e-4)


def test_every_length_is_trained_and_measured_on_as_many_tokens_as_said(monkeypatch):
    corpus, shapes = load_corpus(), []

    def batch(self, T, n, *args):
        shapes.append((T, n))
        return get(self, T, n, *args)

    get = type(corpus).batch
    monkeypatch.setattr(type(corpus), "batch", batch)
    monkeypatch.setattr(context, "TOKENS", 16)
    model = context.trained(corpus, 1, (4, 8, 32))
    assert sorted(shapes) == 4 * [(4, 4)] + 4 * [(8, 2)] + [(32, 1)] and shapes != sorted(shapes)
    monkeypatch.setattr(context, "TOKENS", 64)  # three windows: two, and one
    table = context.measured(model, corpus, 32, 3 * 32)
    assert (table["sequences"] == 3).all() and (table["T"] == 32).all() and len(table) == 16
    assert table["loss"][0] == pytest.approx(evaluate(model, corpus.val, 3), rel=1e-5)
    assert (table["told"] < 0.01).all()
