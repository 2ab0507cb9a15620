"""The figure of a race: held-out rewards and the KL divergence against the budget that was spent."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from agents.commands.race.halving import Result
from agents.commands.race.race import Race
from agents.commands.race.runs import Evaluated, evaluations
from agents.commands.race.table import last_results
from agents.evaluation.plots import blank_figure, write_figure

_PALETTE = "tab10"
_COLOURS = 10
_STYLES = ("-", "--", ":", "-.")


def race_figure(path: Path, race: Race) -> None:
    """Draw a race to a PNG file: one line for each contender, the mean over its seeds, with a band for their range.

    Contenders of one name in the file share a colour; those of the last rung have bold lines. A cross is where a line
    ends before: its contender was left behind, or went on to a last rung with other seeds.
    """
    curves = {name: _curve(race, last_results(race.standings, name)[1]) for name in race.standings.order()}
    earlier = {name: _before_other_seeds(race, name) for name in curves}
    titles = {
        "reward": f"{race.shared.reward},\nheld-out seeds",
        "holdout_reward": f"{race.shared.run.holdout_reward},\nnever trained on",
        "kl": "KL from the pretrained policy",
    }
    panels = [measure for measure in titles if measure == "reward" or _has(curves, measure)]
    figure = blank_figure(9, 1 + 3 * len(panels))
    axes = figure.subplots(len(panels), sharex=True, squeeze=False)[:, 0]
    for axis, measure in zip(axes, panels, strict=True):
        axis.grid(alpha=0.3)
        axis.set_ylabel(titles[measure])
        for name, curve in curves.items():
            _draw(axis, race, name, curve, measure, is_last=_is_finalist(race, name))
            _draw(axis, race, name, earlier[name], measure, is_last=False, has_label=False)
    axes[-1].set_xlabel(f"{race.settings.budget_unit} of a run")
    handles, labels = axes[0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside right upper", fontsize=8)
    write_figure(path, figure)


def _draw(
    axis: Any,
    race: Race,
    name: str,
    curve: dict[int, list[Evaluated]],
    measure: str,
    is_last: bool,
    has_label: bool = True,
) -> None:
    from matplotlib import colormaps

    families = list(dict.fromkeys(contender.family for contender in race.contenders.values()))
    family = race.contenders[name].family
    number = [one.name for one in race.contenders.values() if one.family == family].index(name)
    style = {
        "color": colormaps[_PALETTE](families.index(family) % _COLOURS),
        "linestyle": _STYLES[number % len(_STYLES)],
    }
    points = [(at, [getattr(one, measure) for one in found]) for at, found in sorted(curve.items())]
    points = [(at, values) for at, values in points if None not in values]
    if not points:
        return
    spent = [race.cost(name, at) for at, _ in points]
    shown = f"{name} (winner)" if name == race.standings.winner else name
    axis.plot(
        spent,
        [np.mean(values) for _, values in points],
        marker=".",
        linewidth=2.2 if is_last else 0.9,
        label=shown if has_label else None,
        **style,
    )
    if is_last and len(race.settings.final_seeds) > 1:
        lowest, highest = ([pick(values) for _, values in points] for pick in (min, max))
        axis.fill_between(spent, lowest, highest, color=style["color"], alpha=0.18, linewidth=0)
    if not is_last:
        axis.plot(spent[-1], np.mean(points[-1][1]), "x", color=style["color"])


def _is_finalist(race: Race, name: str) -> bool:
    return race.standings.reached(name) == len(race.rungs) - 1 and name not in race.standings.failures


def _before_other_seeds(race: Race, name: str) -> dict[int, list[Evaluated]]:
    """Return the evaluations that a contender of the last rung had before that, if this rung has other seeds."""
    rung, _ = last_results(race.standings, name)
    if rung == 0 or race.rungs[rung].seeds == race.rungs[rung - 1].seeds:
        return {}
    return _curve(race, race.standings.results(name, rung - 1))


def _curve(race: Race, results: list[Result]) -> dict[int, list[Evaluated]]:
    """Return the evaluations of a contender by iteration, where every seed has one."""
    found: dict[int, list[Evaluated]] = defaultdict(list)
    for result in results:
        for one in evaluations(race.run_folder(result.contender, result.seed), result.iterations):
            found[one.iterations].append(one)
    return {at: curve for at, curve in found.items() if len(curve) == len(results)}


def _has(curves: dict[str, dict[int, list[Evaluated]]], measure: str) -> bool:
    """Whether a contender has values of a measure."""
    every = [one for curve in curves.values() for found in curve.values() for one in found]
    return any(getattr(one, measure) is not None for one in every)
