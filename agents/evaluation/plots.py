"""Plots of a run: its reward, and its reward against the distance from the pretrained model."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING
from unittest import mock

import numpy as np

from agents.files import write_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

_REWARD, _HOLDOUT = "tab:blue", "tab:orange"


def reward_curve(
    path: Path, rewards: Sequence[float], evaluations: Sequence[tuple[int, float]], reward_name: str
) -> None:
    """Plot the mean training reward of every iteration, and the evaluations, to a PNG file."""
    figure, axes = _empty_plot()
    axes.plot(range(1, len(rewards) + 1), rewards, label="training samples", color=_REWARD)
    axes.plot(*zip(*evaluations, strict=True), "o--", label="held-out seeds", color=_HOLDOUT)
    axes.set_xlabel("iteration")
    axes.set_ylabel(f"{reward_name}, mean")
    axes.legend()
    _write(figure, path)


def reward_against_kl(
    path: Path,
    rewards: Sequence[tuple[float, float]],
    holdout_rewards: Sequence[tuple[float, float]],
    iterations: Sequence[int],
    names: tuple[str, str],
) -> None:
    """Plot mean rewards of the held-out samples against the KL divergence from the pretrained policy, to a PNG file.

    The horizontal axis is scaled by the square root, as in Gao et al. (2022, arXiv 2210.10760), who found that rewards
    begin to rise in proportion to it. A ring marks the best held-out reward.

    Args:
        path: of the file.
        rewards: (divergence, mean reward) of each evaluation, in its order.
        holdout_rewards: the same of the held-out reward; empty if there is none.
        iterations: of the evaluations.
        names: of the reward and of the held-out reward.
    """
    figure, axes = _empty_plot()
    axes.set_xscale("function", functions=(lambda kl: np.sqrt(np.maximum(kl, 0)), np.square))
    axes.set_xlabel("KL divergence from the pretrained policy, nats per dimension and step (square-root scale)")
    lines = _path(axes, rewards, "o-", _REWARD, names[0])
    for (divergence, mean), iteration in zip(rewards, iterations, strict=True):
        axes.annotate(str(iteration), (divergence, mean), (0, 6), textcoords="offset points", ha="center", fontsize=8)
    if holdout_rewards:
        beside = axes.twinx()
        lines += _path(beside, holdout_rewards, "s--", _HOLDOUT, f"held out: {names[1]}")
        best = max(holdout_rewards, key=lambda one: one[1])
        beside.plot(*best, "o", markersize=14, markerfacecolor="none", markeredgecolor=_HOLDOUT)
    axes.legend(lines, [str(line.get_label()) for line in lines], title="numbers: iteration", fontsize=9)
    _write(figure, path)


def _path(axes: Axes, points: Sequence[tuple[float, float]], style: str, color: str, name: str) -> list[Line2D]:
    lines = axes.plot(*zip(*points, strict=True), style, color=color, label=name)
    axes.set_ylabel(f"{name}, mean", color=color)
    return lines


def _empty_plot() -> tuple[Figure, Axes]:
    with mock.patch.dict(os.environ):
        os.environ.pop(
            "MPLBACKEND", None
        )  # a file needs no backend, and matplotlib cannot be imported with a wrong one
        from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.grid(alpha=0.3)
    return figure, axes


def _write(figure: Figure, path: Path) -> None:
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=120)
    write_file(path, content.getvalue())
