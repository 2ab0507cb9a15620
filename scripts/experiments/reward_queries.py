r"""Count the reward queries and seconds until samples are a quarter better, in a race's runs and in TRL's own trainer.

    ddpo-race --contenders scripts/experiments/race/few_queries.yaml --preset tiny-compressibility \
        --holdout-reward tiny_reader --budget 288 --seeds 0 1 2 --eval-interval 1 --output races/few_queries
    trl-venv/bin/python scripts/benchmarks/train_trl.py --model ddpo_env/data/tiny --learning-rate 2e-2 \
        --prompts docs/prompts/simple_animals.txt > trl-0.csv
    python scripts/experiments/reward_queries.py races/few_queries --trl trl-0.csv

`--points 20` asks for 20 points more of the images that the held-out reward reads, instead of a better reward.

The runs of a race are scored on held-out samples after every iteration. TRL's trainer has no held-out samples, so its
curve is the mean reward of the samples that it trains on, which the policy of that moment generated. Seconds are those
of training: the evaluations of a race are not in them.
"""

import csv
import itertools
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NamedTuple

import tyro

from agents import TrainConfig


@dataclass
class Arguments:
    """What to compare."""

    race: Annotated[Path, tyro.conf.Positional]
    """Folder of a race whose runs have an evaluation after every iteration."""
    trl: tuple[Path, ...] = ()
    """CSV files that scripts/benchmarks/train_trl.py has printed, one for each seed."""
    change: float = 0.25
    """Improvement that is asked for, as a fraction of the reward before training."""
    points: float | None = None
    """Percentage points that the held-out reward is to rise by, instead of a change of the reward."""
    output: Path = Path("reward_queries.png")
    """File of the figure."""


class Curve(NamedTuple):
    """The mean reward of a run after so many queries and seconds, and the fraction of images that the reader reads."""

    queries: list[int]
    seconds: list[float]
    rewards: list[float]
    read: list[float]


def race_curves(folder: Path) -> dict[str, list[Curve]]:
    """Return the curves of a race by contender, one for each seed."""
    curves: dict[str, list[Curve]] = {}
    for run in sorted(folder.glob("contenders/*/seed-*")):
        samples = TrainConfig.read(run).samples_per_iteration
        with (run / "progress.csv").open(newline="") as file:
            rows = [row for row in csv.DictReader(file) if row.get("eval/reward_mean")]
        evaluating = itertools.accumulate(float(row["time/evaluation"]) for row in rows)
        curves.setdefault(run.parent.name, []).append(
            Curve(
                [samples * int(row["time/iterations"]) for row in rows],
                [
                    max(0.0, float(row["time/time_elapsed"] or 0) - spent)
                    for row, spent in zip(rows, evaluating, strict=True)
                ],
                [float(row["eval/reward_mean"]) for row in rows],
                [float(row["eval/holdout_reward_mean"]) for row in rows if row.get("eval/holdout_reward_mean")],
            )
        )
    return curves


def trl_curve(file: Path) -> Curve:
    """Return the curve that train_trl.py has printed."""
    with file.open(newline="") as table:
        rows = list(csv.DictReader(table))
    return Curve(
        [int(row["reward_queries"]) for row in rows],
        [float(row["seconds"]) - float(rows[0]["seconds"]) for row in rows],  # from the first samples on
        [float(row["reward_mean"]) for row in rows],
        [],
    )


def goal(values: list[float], arguments: Arguments) -> float:
    """Return the value that is asked for; the first of `values` is that before training."""
    if arguments.points is not None:
        return values[0] + arguments.points / 100
    return values[0] + arguments.change * abs(values[0])


def judged(curve: Curve, arguments: Arguments) -> list[float]:
    """Return the values of a run of which the goal is one: its rewards, or the fractions that the reader reads."""
    return curve.rewards if arguments.points is None else curve.read


def first_better(curve: Curve, arguments: Arguments) -> int | None:
    """Return the place of the first evaluation that reaches the goal; None if none does."""
    values = judged(curve, arguments)
    return next((place for place, value in enumerate(values) if value >= goal(values, arguments)), None)


def asked(arguments: Arguments) -> str:
    """Return the goal in words."""
    return f"{arguments.change:+.0%}" if arguments.points is None else f"{arguments.points:+g} points"


def table(curves: dict[str, list[Curve]], arguments: Arguments) -> str:
    """Return what each contender needed, and what was left of the images then, as a Markdown table."""
    needs = f"queries to {asked(arguments)}, by seed"
    lines = [
        f"| contender | {needs} | median | seconds of training then | images read then | reward at the end, by seed |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for contender, runs in curves.items():
        needed, shown, seconds, read = [], [], [], []
        for run in runs:
            place = first_better(run, arguments)
            needed.append(float("inf") if place is None else run.queries[place])
            shown.append(f"not in {run.queries[-1]}" if place is None else str(run.queries[place]))
            seconds.append("–" if place is None else f"{run.seconds[place]:.0f}")
            read.append(f"{run.read[place]:.0%}" if place is not None and run.read else "–")
        median = statistics.median(needed)
        cells = [contender, ", ".join(shown), "–" if median == float("inf") else f"{median:.0f}"]
        cells += [", ".join(seconds), ", ".join(read)]
        lines.append(f"| {' | '.join(cells)} | {', '.join(f'{run.rewards[-1]:.3f}' for run in runs)} |")
    return "\n".join(lines)


def plot(curves: dict[str, list[Curve]], arguments: Arguments) -> None:
    """Draw every run, one colour for each contender, and the value that is asked for."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), sharey=True)
    start = statistics.mean(judged(run, arguments)[0] for runs in curves.values() for run in runs)
    for axis, label in zip(axes, ("reward queries", "seconds of training"), strict=True):
        for number, (contender, runs) in enumerate(curves.items()):
            for place, run in enumerate(runs):
                at = run.queries if axis is axes[0] else run.seconds
                style = {"color": f"C{number}", "label": contender if place == 0 else None}
                axis.plot(at, judged(run, arguments), linewidth=1.5, alpha=0.8, **style)
        axis.axhline(goal([start], arguments), color="#555555", linestyle=":", label=asked(arguments))
        axis.set_xlabel(label)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    axes[0].set_ylabel("mean reward" if arguments.points is None else "fraction read")
    axes[0].legend(frameon=False)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    figure.savefig(arguments.output, dpi=130)


def main() -> None:
    """Read the runs, print the table and draw the figure."""
    arguments = tyro.cli(Arguments, description=__doc__)
    curves = race_curves(arguments.race)
    if not curves:
        sys.exit(f"error: race must be the folder of a race; got {arguments.race}, which has no contenders/*/seed-*")
    if arguments.trl:
        curves["TRL's trainer"] = [trl_curve(file) for file in arguments.trl]
    if arguments.points is not None and not all(run.read for runs in curves.values() for run in runs):
        sys.exit("error: points needs runs with --holdout-reward, which TRL's trainer does not have")
    print(table(curves, arguments))
    plot(curves, arguments)


if __name__ == "__main__":
    main()
