"""Compare DDPO-IS, DDPO-SF, RWR and RWR-sparse, as the paper does (Black et al. 2023, section 6.1), on the tiny model.

Every algorithm gets the same number of reward queries, the same advantages, and a learning rate from the same grid:
`--stage tune` tries the grid in shorter runs with another seed. `--stage compare` takes the best learning rates, trains
with every seed on every reward, and plots the curves. A run whose rows are already in the CSV file is not repeated.
"""

import sys
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import tyro
from comparisons.many_runs import held_out_rewards, perform, read_rows, use_one_thread

LABELS = {"ppo": "DDPO-IS", "reinforce": "DDPO-SF", "rwr": "RWR", "rwr_sparse": "RWR-sparse"}
COLOURS = {"ppo": "#0b6e99", "reinforce": "#d9730d", "rwr": "#6940a5", "rwr_sparse": "#448361"}
FIELDS = ("algorithm", "reward", "seed", "learning_rate", "updates", "iteration", "reward_queries", "eval_reward")
KEY = 5
"""The first five fields identify a run."""


@dataclass
class Arguments:
    """What to compare, and where the results go."""

    stage: Literal["tune", "compare", "plot"] = "compare"
    """tune: search the learning rates; compare: train and plot; plot: only plot the rows of the CSV file."""
    algorithms: tuple[str, ...] = tuple(LABELS)
    """Algorithms to compare, of ppo, reinforce, rwr and rwr_sparse."""
    rewards: tuple[str, ...] = ("jpeg_compressibility", "jpeg_incompressibility")
    """Rewards to train on."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the runs that are compared."""
    learning_rates: tuple[float, ...] = (5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2)
    """Learning rates that the search tries."""
    ppo_updates: tuple[int, ...] = (4, 2)
    """Updates per iteration that the search tries with ppo; the others make one update per epoch."""
    tuning_seed: int = 100
    """Seed of the search, which must not be one of the compared seeds."""
    tuning_iterations: int = 8
    """Iterations of a run of the search, which uses the first reward."""
    iterations: int = 12
    """Iterations of a run that is compared; each has 72 reward queries."""
    eval_samples: int = 45
    """Held-out images per evaluation: one of each animal."""
    eval_interval: int = 3
    """Iterations between evaluations."""
    jobs: int = 2
    """Number of runs at the same time, each in a process with one thread."""
    output: Path = Path("docs")
    """Folder for algorithms.csv, learning-rates.csv and images/algorithms.png."""
    model: str = "tiny"
    """Model to train."""


class Run(NamedTuple):
    """One training run."""

    algorithm: str
    reward: str
    seed: int
    learning_rate: float
    updates: int
    iterations: int


def main() -> None:
    """Parse the command line; search, compare or plot."""
    arguments = tyro.cli(Arguments, description=__doc__)
    unknown = set(arguments.algorithms) - set(LABELS)
    if unknown:
        sys.exit(f"error: algorithms must be among {', '.join(LABELS)}; got {', '.join(sorted(unknown))}")
    rates_file, results_file = arguments.output / "learning-rates.csv", arguments.output / "algorithms.csv"
    if arguments.stage == "tune":
        runs = [
            Run(algorithm, arguments.rewards[0], arguments.tuning_seed, rate, updates, arguments.tuning_iterations)
            for algorithm in arguments.algorithms
            for updates in (arguments.ppo_updates if algorithm == "ppo" else (1,))
            for rate in arguments.learning_rates
        ]
        perform(runs, partial(train, arguments), rates_file, FIELDS, KEY, arguments.jobs)
        for algorithm, found in best_settings(rates_file).items():
            settings = f"learning rate {found.learning_rate:g}, updates {found.updates}"
            print(f"{LABELS[algorithm]:10s} {settings}: {found.reward:.3f}")
        return
    if arguments.stage == "compare":
        best = best_settings(rates_file)
        missing = set(arguments.algorithms) - set(best)
        if missing:
            sys.exit(
                f"error: {rates_file} has no learning rate of {', '.join(sorted(missing))}: run --stage tune first"
            )
        runs = [
            Run(algorithm, reward, seed, best[algorithm].learning_rate, best[algorithm].updates, arguments.iterations)
            for seed in arguments.seeds  # the outer loop, so that an interrupted comparison has all algorithms
            for reward in arguments.rewards
            for algorithm in arguments.algorithms
        ]
        perform(runs, partial(train, arguments), results_file, FIELDS, KEY, arguments.jobs)
    plot(read_rows(results_file), arguments.output / "images" / "algorithms.png")
    print_table(read_rows(results_file))


def train(arguments: Arguments, run: Run) -> list[dict[str, str]]:
    """Train once, in a process of its own; return one row per evaluation."""
    use_one_thread()
    from agents.config import train_config

    with tempfile.TemporaryDirectory() as folder:
        config = train_config(
            model=arguments.model,
            reward=run.reward,
            algorithm=run.algorithm,
            iterations=run.iterations,
            learning_rate=run.learning_rate,
            updates_per_iteration=run.updates,
            seed=run.seed,
            run_dir=Path(folder) / "run",
            eval_samples=arguments.eval_samples,
            eval_interval=arguments.eval_interval,
            checkpoint_interval=0,
        )
        evaluations = held_out_rewards(config)
    queries = config.samples_per_iteration
    return [
        dict(zip(FIELDS, [*map(str, run[:KEY]), str(at), str(at * queries), f"{reward:.6f}"], strict=True))
        for at, reward in evaluations
    ]


class Best(NamedTuple):
    """An algorithm's best settings, and the held-out reward that it reached with them in the search."""

    learning_rate: float
    updates: int
    reward: float


def best_settings(file: Path) -> dict[str, Best]:
    """Return the best settings of each algorithm from the CSV file of a search."""
    best: dict[str, Best] = {}
    rows = read_rows(file)
    last = max((int(row["iteration"]) for row in rows), default=0)
    for row in rows:
        found = Best(float(row["learning_rate"]), int(row["updates"]), float(row["eval_reward"]))
        if int(row["iteration"]) == last and (
            row["algorithm"] not in best or found.reward > best[row["algorithm"]].reward
        ):
            best[row["algorithm"]] = found
    return best


def curves(rows: list[dict[str, str]], algorithm: str, reward: str) -> tuple[list[int], list[list[float]]]:
    """Return the numbers of queries, and for each the held-out rewards of all seeds."""
    by_queries: dict[int, list[float]] = {}
    for row in rows:
        if (row["algorithm"], row["reward"]) == (algorithm, reward):
            by_queries.setdefault(int(row["reward_queries"]), []).append(float(row["eval_reward"]))
    return sorted(by_queries), [by_queries[queries] for queries in sorted(by_queries)]


def plot(rows: list[dict[str, str]], file: Path) -> None:
    """Plot one panel per reward: the mean over seeds, and a band from the worst to the best seed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rewards = sorted({row["reward"] for row in rows})
    figure, axes = pyplot.subplots(1, len(rewards), figsize=(5.2 * len(rewards), 4), squeeze=False)
    for axis, reward in zip(axes[0], rewards, strict=True):
        for algorithm, label in LABELS.items():
            queries, values = curves(rows, algorithm, reward)
            if not queries:
                continue
            means = [sum(one) / len(one) for one in values]
            axis.plot(queries, means, label=label, color=COLOURS[algorithm], linewidth=2)
            axis.fill_between(
                queries,
                list(map(min, values)),
                list(map(max, values)),
                color=COLOURS[algorithm],
                alpha=0.18,
                linewidth=0,
            )
        axis.set(title=reward, xlabel="reward queries", ylabel="held-out reward (kB)")
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    seeds = len({row["seed"] for row in rows})
    axes[0][0].legend(frameon=False, title=f"mean and range of {seeds} seeds")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    figure.savefig(file, dpi=130)


def print_table(rows: list[dict[str, str]]) -> None:
    """Print the rewards before and after training as a Markdown table."""
    print("\n| reward | algorithm | before | after, by seed | mean |\n| --- | --- | --- | --- | --- |")
    for reward in sorted({row["reward"] for row in rows}):
        for algorithm, label in LABELS.items():
            queries, values = curves(rows, algorithm, reward)
            if queries:
                seeds = ", ".join(f"{value:.3f}" for value in values[-1])
                mean = sum(values[-1]) / len(values[-1])
                print(f"| {reward} | {label} | {values[0][0]:.3f} | {seeds} | {mean:.3f} |")


if __name__ == "__main__":
    main()
