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
    explorer.rule.value = "zero"  # of the text before
    assert repr(unknown) in explorer.said.value and explorer.image.value != shown


def test_three_changes_do_what_they_do_on_paper() -> None:
    scores = torch.tensor([[2.0, 1.0, 0.0, -1.0]], dtype=torch.float64)  # one query, all visible
    g = torch.tensor([[1.0, -1.0, 2.0, 0.5]], dtype=torch.float64)
    a = scores.softmax(-1)

    def parts(**changes):
        return split_softmax_gradient(*change(scores, g, **changes))

    slope = 1.7 * a * (1 - a)
    moved = torch.stack(parts(constant=1.7)) - torch.stack(parts())
    torch.testing.assert_close(moved, torch.stack([0 * a, slope, -slope]))
    assert max(part.abs().max() for part in parts(temperature=0.01)) < 1e-12  # one key has it all
    torch.testing.assert_close(parts(temperature=1e9).full, (g - g.mean()) / 4)  # evenly

    others = [0, 1, 3]
    alone = scores[:, others].softmax(-1)
    torch.testing.assert_close(change(scores, g, by_hand=(0, 2, 0.6))[0][:, others], 0.4 * alone)
    without = torch.stack(parts(by_hand=(0, 2, 0.0)))
    expected = torch.stack(split_softmax_gradient(alone, g[:, others]))
    torch.testing.assert_close(without[..., others], expected)  # as in a row without the key
    assert not without[..., 2].any()
