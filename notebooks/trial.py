"""A rule, norm, cap or optimizer of one's own, tried on recall: behind 09_your_own_rule.ipynb."""

from __future__ import annotations

import contextlib

import matplotlib.pyplot as plt
import pandas as pd
import torch
from IPython.display import display
from matplotlib.axes import Axes
from tqdm import tqdm

from data.experiment import RATES, SOLVED, TASKS, load_runs, of_arms, symptoms, windows
from figures import COLORS, plot_windows
from helpers import Run, adamw, capture_batch, energy_table, train
from model_local import LocalGPTConfig

TASK, SEED = TASKS["recall"], 7


def _train(lr: float, iterations: int, seed: int, measure=symptoms, optimizer=adamw,
           keep: bool = False, progress: bool = True, **settings) -> Run:
    """A run on recall; only those are kept whose code all belongs to the project."""
    config = LocalGPTConfig(vocab_size=TASK.data.vocab_size, **{"method": "bp"} | TASK.shape,
                            **settings)
    where = {} if keep else {"directory": None}
    return train(config, iterations, lr, TASK.batch_size, seed, TASK.data, 50, measure,
                 progress=progress, optimizer=optimizer, **where)


def compare(lr: float = 1e-3, iterations: int = 600, seed: int = SEED, optimizer=adamw,
            **settings) -> dict[str, Run]:
    """Train under ``settings`` of LocalGPTConfig, beside ``full`` and ``none``; returns the runs.

    The two are as usual, and kept; yours is trained anew at every call, and its curve grows.
    Where it is interrupted the other two are returned.
    """
    runs = {rule: _train(lr, iterations, seed, softmax_backward=rule, keep=True)
            for rule in ("full", "none")}
    figure, ax = plt.subplots(figsize=(7, 3))
    for rule, style in (("full", "-"), ("none", ":")):
        ax.plot(runs[rule].series("accuracy"), style, color=COLORS["full"], label=rule)
    (curve,) = ax.plot([], [], "o-", color=COLORS["offdiag"], label="yours", clip_on=False)
    ax.axhline(TASK.data.best_guess, color="0.7", linewidth=1, zorder=0, label="best guess")
    ax.set(xlabel="iteration", ylabel="accuracy", ylim=(-0.03, 1.03), xlim=(0, iterations))
    ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    plt.close(figure)  # it is shown here, and not once more at the cell's end
    shown = display(figure, display_id=True)
    steps, accuracies = [*range(0, iterations, 50), iterations], []

    def measure(model, x, y):
        accuracies.append(TASK.data.score(model)["accuracy"])
        curve.set_data(steps[: len(accuracies)], accuracies)
        if shown:  # outside of a notebook there is nothing to update
            shown.update(figure)
        return symptoms(model, x, y)

    with contextlib.suppress(KeyboardInterrupt):
        runs["yours"] = _train(lr, iterations, seed, measure, optimizer, progress=False, **settings)
    return runs


def outcome(runs: dict[str, Run]) -> pd.DataFrame:
    """What came out, a column a run: how well it did, what it sends, where its scores went."""
    names = {"accuracy": "accuracy", "val_loss": "loss (nats)",
             "cos_scores": "cosine of what is sent with f, at the scores",
             "cos_q": "cosine of its gradient of W_q with that of the exact pass",
             "common_mode": "drift of the scores",
             "q_norm": "size of queries", "score_max": "largest score over the mean"}
    energies = {"cos_diag": "cosine of d with f, mean over heads",
                "r_diag": "energy of d / energy of f", "r_offdiag": "energy of o / energy of f"}
    x, y = TASK.data.batch(TASK.data.block_size, 256, torch.Generator().manual_seed(-2), "cpu")
    columns = {}
    for name, run in runs.items():
        last = run.history[run.history["step"] == run.history["step"].max()]
        last = last.set_index("metric")["value"]
        table = energy_table(capture_batch(run.model, x, y), n_boot=1)
        columns[name] = last.reindex(names).rename(names).to_dict()
        columns[name] |= table[[*energies]].mean().rename(energies).to_dict()
    return pd.DataFrame(columns)


def rate_window(rates=RATES, seed: int = SEED, optimizer=adamw, **settings) -> Axes:
    """One run of full length at each rate, beside the table's ``full``, ``diagonal``, ``none``.

    It takes about a minute per rate. Interrupt the kernel whenever you like: what is done is shown.
    """
    known = of_arms(windows(load_runs().query("task == 'recall'")), "recall").query("arm == 'off'")
    rows = [known[known["rule"] == rule].assign(name=rule) for rule in ("full", "diagonal", "none")]
    with contextlib.suppress(KeyboardInterrupt):
        for lr in tqdm(rates, desc="rates"):
            share = 0.0  # where it diverges
            with contextlib.suppress(FloatingPointError):
                run = _train(lr, TASK.steps, seed, optimizer=optimizer, **settings)
                share = float(run.series("accuracy").iloc[-1] >= SOLVED)
            row = {"name": "yours", "lr": lr, "share": share, "solved": int(share), "runs": 1,
                   "task": "recall", "inside": False}
            rows.append(pd.DataFrame([row]))
    return plot_windows(pd.concat(rows))
