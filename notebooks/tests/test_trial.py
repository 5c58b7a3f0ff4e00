"""One's own rule and optimizer on recall, as the notebook tries them, for a few iterations."""

from functools import partial
from unittest.mock import Mock

import matplotlib.pyplot as plt
import pytest
import torch

import trial
from model_local import SOFTMAX_BACKWARD


def test_one_s_own_rule_and_optimizer_are_tried_beside_full_and_none(monkeypatch, tmp_path) -> None:
    def still(model, lr, steps):
        return torch.optim.SGD(model.parameters(), lr=0.0)

    monkeypatch.setattr(trial, "train", partial(trial.train, directory=tmp_path))
    monkeypatch.setitem(SOFTMAX_BACKWARD, "mine", lambda a, g, visible: 2 * a * g)
    plt.switch_backend("agg")
    runs = trial.compare(iterations=2, seed=3, softmax_backward="mine", optimizer=still)
    assert list(runs) == ["full", "none", "yours"] and len([*tmp_path.iterdir()]) == 2
    before, after = (runs["yours"].at(step).state_dict() for step in (0, 2))
    assert all(after[name].equal(values) for name, values in before.items())

    table = trial.outcome(runs)
    assert table.loc["accuracy"].between(0, 1).all()
    cosine = table.loc["cosine of what is sent with f, at the scores"]
    assert cosine["full"] == pytest.approx(1) and 0 < cosine["yours"] < 1
    interrupted = Mock(side_effect=KeyboardInterrupt)
    assert list(trial.compare(iterations=2, seed=3, optimizer=interrupted)) == ["full", "none"]
