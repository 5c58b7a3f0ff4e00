"""Explore without a browser: what its controls are set to is what is shown."""

import torch

from explore import Explorer, change, lines_of_code
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


S = torch.tensor([[2.0, 1.0, 0.0, -1.0]], dtype=torch.float64)  # scores of one query, not masked
G = torch.tensor([[1.0, -1.0, 2.0, 0.5]], dtype=torch.float64)


def test_a_constant_moves_d_and_o_against_each_other_and_f_not_at_all() -> None:
    before, after = (split_softmax_gradient(*change(S, G, constant=c)) for c in (0.0, 1.7))
    slope = 1.7 * S.softmax(-1) * (1 - S.softmax(-1))
    for x, y, moved in zip(before, after, (0 * slope, slope, -slope), strict=True):
        torch.testing.assert_close(y - x, moved)


def test_temperature_ends_in_one_key_where_nothing_is_left_or_in_even_weights() -> None:
    a, g = change(S, G, temperature=0.01)
    torch.testing.assert_close(a, torch.eye(4, dtype=torch.float64)[:1])
    assert all(part.abs().max() < 1e-12 for part in split_softmax_gradient(a, g))
    full = split_softmax_gradient(*change(S, G, temperature=1e9)).full
    torch.testing.assert_close(full, (G - G.mean()) / 4)


def test_a_weight_by_hand_leaves_the_others_their_proportions() -> None:
    others = [0, 1, 3]
    alone = S[:, others].softmax(-1)
    for weight in (0.0, 0.6, 1 - 1e-9):
        a, g = change(S, G, by_hand=(0, 2, weight))
        torch.testing.assert_close(a[0, 2].item(), weight)
        torch.testing.assert_close(a[:, others], (1 - weight) * alone)
        parts = split_softmax_gradient(a, g)
        if weight == 0:  # as in a row without the key
            expected = split_softmax_gradient(alone, G[:, others])
            for part, values in zip(parts, expected, strict=True):
                torch.testing.assert_close(part[:, others], values)
                assert part[0, 2] == 0
    assert all(part.abs().max() < 1e-7 for part in parts)  # one key has it all
