"""Geometry of line charts: curves in, coordinates of an SVG picture out. The template draws them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from agents.report.run_data import Curve, RunData
from agents.report.verdicts import number

WIDTH, HEIGHT = 360, 220
"""Size of a chart, in the picture's own unit, which is about a pixel on a phone and on a desk."""
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 12, 10, 38
_TICKS = 5
_SPARK = (120, 28)
_UNITS = {"jpeg_compressibility": "negative kB", "jpeg_incompressibility": "kB"}


@dataclass(frozen=True)
class Series:
    """One curve of a chart.

    Attributes:
        label: in the legend.
        style: of the line, a CSS class.
        curve: (iteration, value).
        margins: half the height of the band around each value; empty for no band.
        has_dots: whether each value is marked, for curves with few values.
    """

    label: str
    style: str
    curve: Curve
    margins: Sequence[float] = ()
    has_dots: bool = True


@dataclass(frozen=True)
class DrawnSeries:
    """A curve in the picture's coordinates.

    Attributes:
        label: in the legend.
        style: a CSS class.
        line: `x,y` of its points, separated by spaces.
        band: the same of the polygon around it; empty if there is none.
        dots: (x, y, text) of the values that are marked.
    """

    label: str
    style: str
    line: str
    band: str
    dots: Sequence[tuple[float, float, str]]


@dataclass(frozen=True)
class Chart:
    """A chart in the picture's coordinates.

    Attributes:
        title: what it shows.
        unit: of the vertical axis.
        series: its curves.
        x_ticks: (x, text).
        y_ticks: (y, text).
        box: left, top, right and bottom of the plot.
        span: iterations at the left and the right.
    """

    title: str
    unit: str
    series: Sequence[DrawnSeries]
    x_ticks: Sequence[tuple[float, str]]
    y_ticks: Sequence[tuple[float, str]]
    span: tuple[int, int]
    box: tuple[int, int, int, int] = field(default=(_LEFT, _TOP, WIDTH - _RIGHT, HEIGHT - _BOTTOM))


def charts(runs: Sequence[RunData]) -> list[Chart]:
    """Return the charts of one run, or of several in one picture: reward, held-out reward, KL divergence."""
    last = max((run.iterations for run in runs), default=0)
    kinds = sorted({str(run.settings.get("reward")) for run in runs})
    holdouts = sorted({str(run.settings.get("holdout_reward")) for run in runs if _holdout(run)})
    sums = {run.settings.get("log_prob_reduction") == "sum" for run in runs}
    drawn = [
        _chart("Reward", _reward_unit(kinds), _rewards(runs, "eval/reward"), last),
        _chart("Held-out reward", _reward_unit(holdouts), _rewards(runs, "eval/holdout_reward"), last),
        _chart("Distance from the pretrained model", _kl_unit(sums), _divergences(runs), last),
    ]
    return [one for one in drawn if one is not None]


def sparkline(curve: Curve) -> str:
    """Return the points of a small line without axes, `x,y` in a picture of 120 × 28; empty for fewer than two."""
    if len(curve) < 2:
        return ""
    (width, height), values = _SPARK, [value for _, value in curve]
    low, high = min(values), max(values)
    if low == high:
        low, high = low - 1, high + 1
    first, last = curve[0][0], curve[-1][0]
    return " ".join(
        f"{3 + (at - first) / (last - first) * (width - 6):.1f},{3 + (high - value) / (high - low) * (height - 6):.1f}"
        for at, value in curve
    )


def ticks(low: float, high: float, most: int = _TICKS) -> list[float]:
    """Return at most `most` round numbers, 1, 2 or 5 times a power of ten apart, that lie in [low, high]."""
    step = 10.0 ** math.floor(math.log10((high - low) / most))
    while (high - low) / step >= most:
        leading = round(step / 10.0 ** math.floor(math.log10(step) + 1e-9))
        step *= 2.5 if leading == 2 else 2
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [index * step for index in range(first, last + 1)]


def _chart(title: str, unit: str, series: Sequence[Series], last: int) -> Chart | None:
    series = [one for one in series if one.curve]
    if not series:
        return None
    low, high = _range(series)
    left, top, right, bottom = _LEFT, _TOP, WIDTH - _RIGHT, HEIGHT - _BOTTOM
    end = max(last, 1)

    def x(iteration: float) -> float:
        return round(left + iteration / end * (right - left), 1)

    def y(value: float) -> float:
        return round(bottom - (value - low) / (high - low) * (bottom - top), 1)

    drawn = []
    for one in series:
        line = " ".join(f"{x(at)},{y(value)}" for at, value in one.curve)
        edges = list(zip(one.curve, one.margins, strict=True)) if one.margins else []
        upper = [f"{x(at)},{y(value + margin)}" for (at, value), margin in edges]
        lower = [f"{x(at)},{y(value - margin)}" for (at, value), margin in reversed(edges)]
        dots = [(x(at), y(value), f"{one.label}, iteration {at}: {number(value)}") for at, value in one.curve]
        drawn.append(DrawnSeries(one.label, one.style, line, " ".join(upper + lower), dots if one.has_dots else []))
    return Chart(
        title=title,
        unit=unit,
        series=drawn,
        x_ticks=[(x(at), f"{at:.0f}") for at in ticks(0, end) if at == round(at)],
        y_ticks=[(y(value), number(value + 0.0)) for value in ticks(low, high)],
        span=(0, end),
    )


def _range(series: Sequence[Series]) -> tuple[float, float]:
    """Return the range of the vertical axis: all values and bands, with some space around them."""
    edges = [
        value + sign * margin
        for one in series
        for (_, value), margin in zip(one.curve, one.margins or [0.0] * len(one.curve), strict=True)
        for sign in (-1, 1)
    ]
    low, high = min(edges), max(edges)
    space = 0.06 * (high - low) or abs(high) * 0.1 or 1.0
    return low - space, high + space


def _rewards(runs: Sequence[RunData], column: str) -> list[Series]:
    """Return the mean rewards; of one run with their standard errors and with those of training."""
    if len(runs) > 1:
        return [
            Series(run.name, f"line-{index}", run.curve(f"{column}_mean")) for index, run in enumerate(runs, start=1)
        ]
    (run,) = runs
    means, deviations = run.curve(f"{column}_mean"), dict(run.curve(f"{column}_std"))
    root = math.sqrt(max(1, run.count("eval_samples")))
    margins = [2 * deviations.get(iteration, 0.0) / root for iteration, _ in means]
    held_out = Series("same held-out seeds, ± 2 standard errors", "line-1", means, margins)
    if column != "eval/reward":
        return [held_out]
    training = Series("training samples", "line-0", run.curve("rollout/reward_mean"), has_dots=False)
    return [training, held_out]


def _divergences(runs: Sequence[RunData]) -> list[Series]:
    curves = [run.curve("eval/kl_to_pretrained") for run in runs]
    names = [run.name for run in runs] if len(runs) > 1 else ["same held-out seeds"]
    pairs = enumerate(zip(names, curves, strict=True), start=1)
    return [Series(name, f"line-{index}", curve) for index, (name, curve) in pairs]


def _holdout(run: RunData) -> bool:
    return run.settings.get("holdout_reward") is not None


def _reward_unit(names: Sequence[str]) -> str:
    units = " / ".join(f"{name} in {_UNITS[name]}" if name in _UNITS else name for name in names)
    return f"mean of {units}"


def _kl_unit(sums: set[bool]) -> str:
    return "KL divergence in nats" if sums == {True} else "KL divergence in nats per dimension"
