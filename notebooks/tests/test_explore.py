"""Explore without a browser: what its controls are set to is what is shown."""

import torch

from explore import Explorer, lines_of_code
from helpers import load_corpus, split_softmax_gradient


def test_controls_make_a_state_and_lines_of_code_the_same_numbers() -> None:
    corpus = load_corpus()
    explorer, text = Explorer(corpus), corpus.decode(corpus.val[300:330]).replace("\n", " ")
    explorer.text.value, explorer.rule.value, explorer.constant.value = text, "diagonal", 1.5
    explorer.pick(2, 1)
    explorer.key.value, explorer.by_hand.value, explorer.weight.value = 4, True, 0.3
    made = {}
    exec(lines_of_code(explorer.state), made)
    maps, seen, before = made["maps"], made["scores"][2, 1].isfinite(), 1e6 * made["g"][2, 1]
    moved = (maps["g"] - before)[seen]
    torch.testing.assert_close(moved, 1.5 * before[seen].std(correction=0).expand_as(moved))
    torch.testing.assert_close(maps["a"][20, 4].item(), 0.3)
    assert maps["sent"].equal(split_softmax_gradient(maps["a"], maps["g"]).diag)
    assert f"{maps['a g'][20].sum().item():.4g}" in explorer.numbers.value

    shown, unknown = explorer.image.value, next(c for c in "é{ж" if c not in corpus.stoi)
    explorer.text.value = 3 * unknown
    assert repr(unknown) in explorer.said.value and explorer.image.value == shown
