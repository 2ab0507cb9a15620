"""Figures in PNG files; plots of a run: its reward, and its reward against the distance from the pretrained model."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING
from unittest import mock

import numpy as np

from agents.output.files import write_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MOST_NUMBERS = 12
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
    write_figure(path, figure)


def reward_against_kl(
    path: Path,
    divergences: Sequence[float],
    curves: Mapping[str, Sequence[float]],
    iterations: Sequence[int],
    unit: str,
) -> None:
    """Plot mean rewards of the held-out samples against the distance from the pretrained policy, to a PNG file.

    The distance is the square root of the KL divergence, as in Gao et al. (2022, arXiv 2210.10760), who found that
    rewards begin to rise in proportion to it. A ring marks the best value of each reward.

    Args:
        path: of the file.
        divergences: KL divergence at each evaluation.
        curves: mean of the reward at each evaluation, by the reward's name; after it that of the held-out reward, if
            there is one, which gets an axis of its own at the right.
        iterations: of the evaluations.
        unit: of the divergence.
    """
    figure, axes = _empty_plot()
    axes.set_xlabel(f"square root of the KL divergence from the pretrained policy ({unit})")
    distances = np.sqrt(divergences)
    sides, styles = [axes, *(axes.twinx() for _ in range(len(curves) - 1))], (("o-", _REWARD), ("s--", _HOLDOUT))
    for side, (style, color), (name, means) in zip(sides, styles, curves.items(), strict=False):
        side.plot(distances, means, style, color=color, label=name)
        side.set_ylabel(f"{name}, mean", color=color)
        best = int(np.argmax(means))
        side.plot(distances[best], means[best], "o", markersize=13, markerfacecolor="none", markeredgecolor=color)
    places = list(zip(iterations, distances, next(iter(curves.values())), strict=True))
    for iteration, distance, mean in places[:: -(-len(places) // _MOST_NUMBERS)]:
        axes.annotate(str(iteration), (distance, mean), (0, 8), textcoords="offset points", ha="center", fontsize=8)
    figure.legend(loc="outside upper center", ncols=2, title="numbers: iteration; ring: best", fontsize=9)
    write_figure(path, figure)


def blank_figure(width: float, height: float) -> Figure:
    """Return a matplotlib figure of this size in inches."""
    with mock.patch.dict(os.environ):
        # A file needs no backend, and matplotlib cannot be imported with a wrong one.
        os.environ.pop("MPLBACKEND", None)
        from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def write_figure(path: Path, figure: Figure) -> None:
    """Write a figure to a PNG file, completely or not at all."""
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=120)
    write_file(path, content.getvalue())


def _empty_plot() -> tuple[Figure, Axes]:
    figure = blank_figure(7, 4)
    axes = figure.subplots()
    axes.grid(alpha=0.3)
    return figure, axes
