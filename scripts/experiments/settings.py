"""Count the reward queries until the bundled model's images compress a quarter better, for several settings.

Each contender is a set of settings: our defaults, TRL's, and variants. `--stage tune` searches the learning rates of
the contenders with a seed that no comparison uses. `--stage compare` takes the best learning rates, or the default one
for a contender that was not in the search. It trains with every seed, prints how many queries each run needed, and
plots the curves. A run whose rows are already in the CSV file is not repeated. `trl` is the algorithm of TRL's
`DDPOTrainer` with its default settings; `scripts/benchmarks/train_trl.py` trains with TRL itself.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import tyro
from comparisons.many_runs import held_out_rewards, perform, read_rows, use_one_thread

if TYPE_CHECKING:
    from agents.config import TrainConfig

FIELDS = ("contender", "seed", "learning_rate", "iteration", "reward_queries", "eval_reward")
KEY = 3
"""The first three fields identify a run."""

TRL_ADAPTERS: dict[str, Any] = {"lora_rank": 4, "lora_targets": "attention"}
TRL_TRAINING: dict[str, Any] = {
    "samples_per_prompt": 1,
    "timestep_window": (0.0, 1.0),
    "timestep_fraction": 1.0,
    "clip_range": 1.6e-3,
    "stat_min_count": 16,
    "learning_rate_schedule": "constant",
    "adam_beta2": 0.999,
    "adam_epsilon": 1e-8,
}
"""Settings of `DDPOConfig` in TRL 0.23.1, of its example and of its pipeline; 72 samples in 4 updates, as our defaults.

TRL's clip range 1e-4 is for the 16,384 dimensions of Stable Diffusion's latent. The bundled model's latent has 1,024,
and a mean over fewer dimensions varies more, so the clip range is scaled to 1.6e-3.
"""
CONTENDERS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "trl": TRL_ADAPTERS | TRL_TRAINING,
    "trl_our_adapters": TRL_TRAINING,
    "all_but_last_step": {"timestep_fraction": 1.0},
    "fifth_of_steps": {"timestep_fraction": 0.2},
    "guided": {"guidance_scale": 3.0},
    "guided_half_gradient": {"guidance_scale": 3.0, "unconditional_gradient": False},
}
"""For each contender, the settings that differ from the defaults."""


@dataclass
class Arguments:
    """What to compare, and where the results go."""

    stage: Literal["tune", "compare", "report"] = "compare"
    """tune: search the learning rates; compare: train and report; report: only print and plot the CSV file's rows."""
    contenders: tuple[str, ...] = ("defaults", "trl")
    """Some of defaults, trl, trl_our_adapters, all_but_last_step, fifth_of_steps, guided, guided_half_gradient."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the runs that are compared."""
    learning_rates: tuple[float, ...] = (1e-3, 2e-3, 5e-3, 1e-2, 2e-2)
    """Learning rates that the search tries."""
    tuning_seed: int = 100
    """Seed of the search, which must not be one of the compared seeds."""
    iterations: int = 20
    """Iterations of a run; each has 72 reward queries."""
    reward: str = "jpeg_compressibility"
    """Reward to train on."""
    change: float = 0.25
    """Improvement of the mean held-out reward that a run must reach, as a fraction of the reward before training."""
    eval_samples: int = 90
    """Held-out images per evaluation; every iteration has one, and they do not count as queries."""
    jobs: int = 2
    """Number of runs at the same time, each in a process with one thread."""
    output: Path = Path("docs")
    """Folder for reward-queries.csv, reward-queries-tuning.csv and images/reward_queries.png."""
    model: str = "tiny"
    """Model to train."""


class Run(NamedTuple):
    """One training run; without a learning rate, it has the default one."""

    contender: str
    seed: int
    learning_rate: float | None
    iterations: int


def main() -> None:
    """Parse the command line; search, compare or report."""
    arguments = tyro.cli(Arguments, description=__doc__)
    unknown = set(arguments.contenders) - set(CONTENDERS)
    if unknown:
        sys.exit(f"error: contenders must be among {', '.join(CONTENDERS)}; got {', '.join(sorted(unknown))}")
    rates_file, results_file = arguments.output / "reward-queries-tuning.csv", arguments.output / "reward-queries.csv"
    if arguments.stage == "tune":
        runs = [
            Run(contender, arguments.tuning_seed, rate, arguments.iterations)
            for contender in arguments.contenders
            for rate in arguments.learning_rates
        ]
        perform(runs, partial(train, arguments), rates_file, FIELDS, KEY, arguments.jobs)
        for contender, (rate, reward) in best_rates(read_rows(rates_file)).items():
            print(f"{contender}: learning rate {rate:g}, {reward:.3f} after the last iteration")
        return
    if arguments.stage == "compare":
        best = best_rates(read_rows(rates_file))
        runs = [
            Run(contender, seed, best[contender][0] if contender in best else None, arguments.iterations)
            for seed in arguments.seeds
            for contender in arguments.contenders
        ]
        perform(runs, partial(train, arguments), results_file, FIELDS, KEY, arguments.jobs)
    rows = read_rows(results_file)
    print(table(rows, arguments.change))
    plot(rows, arguments.contenders, arguments.change, arguments.output / "images" / "reward_queries.png")


def configuration(arguments: Arguments, run: Run, run_dir: Path) -> TrainConfig:
    """Return the settings of a run."""
    from agents.config import train_config

    return train_config(
        model=arguments.model,
        reward=arguments.reward,
        iterations=run.iterations,
        learning_rate=run.learning_rate,
        seed=run.seed,
        run_dir=run_dir,
        eval_samples=arguments.eval_samples,
        eval_interval=1,
        checkpoint_interval=0,
        **CONTENDERS[run.contender],
    )


def train(arguments: Arguments, run: Run) -> list[dict[str, str]]:
    """Train once, in a process of its own; return one row per evaluation."""
    use_one_thread()
    with tempfile.TemporaryDirectory() as folder:
        config = configuration(arguments, run, Path(folder) / "run")
        evaluations = held_out_rewards(config)
    queries = config.samples_per_iteration
    return [
        dict(zip(FIELDS, [*map(str, run[:KEY]), str(at), str(at * queries), f"{reward:.6f}"], strict=True))
        for at, reward in evaluations
    ]


def best_rates(rows: list[dict[str, str]]) -> dict[str, tuple[float, float]]:
    """Return for each contender the best learning rate and its reward; runs that ended early do not count."""
    best: dict[str, tuple[float, float]] = {}
    last = max((int(row["iteration"]) for row in rows), default=0)
    for row in rows:
        contender, reward = row["contender"], float(row["eval_reward"])
        if int(row["iteration"]) == last and (contender not in best or reward > best[contender][1]):
            best[contender] = float(row["learning_rate"]), reward
    return best


def curve(rows: Iterable[dict[str, str]], contender: str, seed: str) -> list[tuple[int, float]]:
    """Return the evaluations of a run as pairs `(reward queries so far, mean reward)`."""
    chosen = [row for row in rows if (row["contender"], row["seed"]) == (contender, seed)]
    return [(int(row["reward_queries"]), float(row["eval_reward"])) for row in chosen]


def queries_to(evaluations: list[tuple[int, float]], change: float) -> int | None:
    """Return the queries before the first evaluation that is better than the first by a fraction; None if none is."""
    start = evaluations[0][1]
    return next((queries for queries, reward in evaluations if reward >= start + change * abs(start)), None)


def table(rows: list[dict[str, str]], change: float) -> str:
    """Return the queries that each contender needed, as a Markdown table."""
    lines = [
        f"| contender | learning rate | queries to {change:+.0%}, by seed | mean | reward at the end, by seed |",
        "| --- | --- | --- | --- | --- |",
    ]
    for contender in dict.fromkeys(row["contender"] for row in rows):
        own = [row for row in rows if row["contender"] == contender]
        curves = [curve(own, contender, seed) for seed in dict.fromkeys(row["seed"] for row in own)]
        needed = [queries_to(one, change) for one in curves]
        reached = [number for number in needed if number is not None]
        longest = max(one[-1][0] for one in curves)
        mean = f"{statistics.mean(reached):.0f}" if len(reached) == len(needed) else f"not all in {longest}"
        shown = ", ".join(
            f"not in {one[-1][0]}" if n is None else str(n) for n, one in zip(needed, curves, strict=True)
        )
        ends = ", ".join(f"{one[-1][1]:.3f}" for one in curves)
        lines.append(f"| {contender} | {own[0]['learning_rate']} | {shown} | {mean} | {ends} |")
    return "\n".join(lines)


def plot(rows: list[dict[str, str]], contenders: tuple[str, ...], change: float, file: Path) -> None:
    """Plot the curve of every seed, a bold mean curve per contender, and the reward that must be reached."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(6.4, 4))
    for number, contender in enumerate(contenders):
        seeds = dict.fromkeys(row["seed"] for row in rows if row["contender"] == contender)
        curves = [curve(rows, contender, seed) for seed in seeds]
        if not curves:
            continue
        for one in curves:
            axis.plot(*zip(*one, strict=True), color=f"C{number}", linewidth=0.8, alpha=0.5)
        shortest = min(curves, key=len)
        means = [statistics.mean(one[index][1] for one in curves) for index in range(len(shortest))]
        axis.plot([at for at, _ in shortest], means, color=f"C{number}", linewidth=2.2, label=contender)
    starts = [float(row["eval_reward"]) for row in rows if row["iteration"] == "0"]
    goal = statistics.mean(starts) + change * abs(statistics.mean(starts))
    axis.axhline(goal, color="#555555", linestyle=":", label=f"{change:.0%} better")
    axis.set(xlabel="reward queries", ylabel="held-out reward (kB)")
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.25)
    axis.legend(frameon=False)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    figure.savefig(file, dpi=130)


if __name__ == "__main__":
    main()
