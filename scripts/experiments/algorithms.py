"""Compare DDPO-IS, DDPO-SF, RWR and RWR-sparse, as the paper does (Black et al. 2023, section 6.1), on the tiny model.

    python scripts/experiments/algorithms.py

Every algorithm gets the same number of reward queries. DDPO-IS makes 4 updates with 256 samples and DDPO-SF one, as in
the paper; RWR and RWR-sparse imitate 1,024 samples at a time in 5 and 50 epochs, as the authors' RWR-sparse does
(their RWR has 10,240). There are two protocols: `same_rate` gives all of them one learning rate, as the paper does, and
`best_rate` gives each the best of a grid, which runs with another seed search first. A run whose rows are already in
the CSV file is not repeated, nor one whose best learning rate is that of `same_rate`.
"""

import math
import sys
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import tyro
from comparisons.many_runs import append_rows, held_out_rewards, perform, read_rows, use_one_thread

if TYPE_CHECKING:
    from agents.config.train_config import TrainConfig

LABELS = {"ppo": "DDPO-IS", "reinforce": "DDPO-SF", "rwr": "RWR", "rwr_sparse": "RWR-sparse"}
COLOURS = {"ppo": "#0b6e99", "reinforce": "#d9730d", "rwr": "#6940a5", "rwr_sparse": "#448361"}
SAMPLES = {"ppo": 256, "reinforce": 256, "rwr": 1024, "rwr_sparse": 1024}
"""Samples in each iteration."""
UPDATES = {"ppo": 4, "reinforce": 1, "rwr": 4, "rwr_sparse": 1}
"""Updates in each epoch of an iteration: 256 samples in each, and for RWR-sparse all that it imitates."""
Protocol = Literal["same_rate", "best_rate"]
FIELDS = ("protocol", "algorithm", "task", "seed", "learning_rate", "iteration", "reward_queries", "eval_reward")
KEY = 5
"""The first five fields identify a run."""
TUNING = "tuning"


@dataclass
class Arguments:
    """What to compare, and where the results go."""

    protocols: tuple[Protocol, ...] = ("same_rate", "best_rate")
    """same_rate: one learning rate for all algorithms; best_rate: each has the best of the grid."""
    algorithms: tuple[str, ...] = tuple(LABELS)
    """Algorithms to compare, of ppo, reinforce, rwr and rwr_sparse."""
    tasks: tuple[str, ...] = ("incompressibility", "alignment", "aesthetic")
    """Tasks to train: the presets tiny-*. Compressibility rewards blur, which imitation makes anyway."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the runs that are compared."""
    same_rate: float = 2e-3
    """The learning rate of the first protocol."""
    learning_rates: tuple[float, ...] = (5e-4, 1e-3, 2e-3, 5e-3, 1e-2)
    """The grid of the second protocol."""
    rwr_beta: float = 1.0
    """β of RWR: its weights are exp(β × advantage), and the advantages of a batch have a standard deviation of 1."""
    tuning_seed: int = 100
    """Seed of the search, which must not be one of the compared seeds."""
    tuning_queries: int = 2048
    """Reward queries of a run of the search."""
    queries: int = 3072
    """Reward queries of a run that is compared."""
    eval_samples: int = 45
    """Held-out images per evaluation; there is one evaluation every 1,024 queries."""
    jobs: int = 2
    """Number of runs at the same time, each in a process with one thread."""
    only_plot: bool = False
    """Train nothing, and plot what is in the CSV file."""
    output: Path = Path("runs/algorithms")
    """Folder for algorithms.csv, learning-rates.csv and images/algorithms.png; docs has the project's own results."""
    model: str = "tiny"
    """Model to train."""


class Run(NamedTuple):
    """One training run."""

    protocol: str
    algorithm: str
    task: str
    seed: int
    learning_rate: float
    queries: int


def main() -> None:
    """Parse the command line; search, compare and plot."""
    arguments = tyro.cli(Arguments, description=__doc__)
    unknown = set(arguments.algorithms) - set(LABELS)
    if unknown:
        sys.exit(f"error: algorithms must be among {', '.join(LABELS)}; got {', '.join(sorted(unknown))}")
    if arguments.tuning_seed in arguments.seeds:
        sys.exit(f"error: tuning_seed must not be one of the seeds; got {arguments.tuning_seed}")
    rates_file, results_file = arguments.output / "learning-rates.csv", arguments.output / "algorithms.csv"
    if not arguments.only_plot:
        for protocol in arguments.protocols:
            if protocol == "best_rate":
                perform(searches(arguments), partial(train, arguments), rates_file, FIELDS, KEY, arguments.jobs)
            best = best_rates(rates_file)
            runs = [
                Run(protocol, algorithm, task, seed, rate, arguments.queries)
                for seed in arguments.seeds  # the outer loop, so that an interrupted comparison has all algorithms
                for task in arguments.tasks
                for algorithm in arguments.algorithms
                for rate in [arguments.same_rate if protocol == "same_rate" else best[algorithm, task]]
            ]
            if protocol == "best_rate":
                reuse(runs, results_file)
            perform(runs, partial(train, arguments), results_file, FIELDS, KEY, arguments.jobs)
    rows = read_rows(results_file)
    if not rows:
        sys.exit(f"error: output must be a folder with a file {results_file.name}; got {arguments.output}")
    plot(rows, arguments.output / "images" / "algorithms.png")
    print_table(rows)


def searches(arguments: Arguments) -> list[Run]:
    """Return the runs of the search."""
    return [
        Run(TUNING, algorithm, task, arguments.tuning_seed, rate, arguments.tuning_queries)
        for task in arguments.tasks
        for algorithm in arguments.algorithms
        for rate in arguments.learning_rates
    ]


def reuse(runs: list[Run], file: Path) -> None:
    """Add the rows of runs that are in the CSV file under the other protocol, with the same learning rate."""
    rows = read_rows(file)
    there = {tuple(row[name] for name in FIELDS[:KEY]) for row in rows}
    for run in runs:
        key, same = tuple(map(str, run[:KEY])), tuple(map(str, run._replace(protocol="same_rate")[:KEY]))
        found = [row for row in rows if tuple(row[name] for name in FIELDS[:KEY]) == same]
        if found and key not in there and int(found[-1]["reward_queries"]) == run.queries:
            append_rows(file, FIELDS, [row | {"protocol": run.protocol} for row in found])


def configuration(arguments: Arguments, run: Run, run_dir: Path) -> "TrainConfig":
    """Return the settings of a run."""
    from agents.config.presets import preset_config

    samples = SAMPLES[run.algorithm]
    return preset_config(f"tiny-{run.task}").changed(
        model=arguments.model,
        algorithm=run.algorithm,
        samples_per_iteration=samples,
        updates_per_iteration=UPDATES[run.algorithm],
        iterations=max(1, run.queries // samples),
        advantage="per_prompt" if run.algorithm in ("ppo", "reinforce") else "batch",
        rwr_beta=arguments.rwr_beta if run.algorithm == "rwr" else 1.0,
        rwr_per_prompt=run.algorithm == "rwr" and run.task == "aesthetic",  # as the authors' configurations
        learning_rate=run.learning_rate,
        seed=run.seed,
        run_dir=run_dir,
        eval_samples=arguments.eval_samples,
        eval_interval=max(1, 1024 // samples),
        checkpoint_interval=0,
    )


def train(arguments: Arguments, run: Run) -> list[dict[str, str]]:
    """Train once, in a process of its own; return one row per evaluation."""
    use_one_thread()
    with tempfile.TemporaryDirectory() as folder:
        evaluations = held_out_rewards(configuration(arguments, run, Path(folder) / "run"))
    samples = SAMPLES[run.algorithm]
    return [
        dict(zip(FIELDS, [*map(str, run[:KEY]), str(at), str(at * samples), f"{reward:.6f}"], strict=True))
        for at, reward in evaluations
    ]


def best_rates(file: Path) -> dict[tuple[str, str], float]:
    """Return the best learning rate of each algorithm for each task, from the CSV file of a search."""
    best: dict[tuple[str, str], tuple[float, float]] = {}
    last = {tuple(row[name] for name in FIELDS[:KEY]): row for row in read_rows(file)}
    for row in last.values():
        key, found = (row["algorithm"], row["task"]), (float(row["eval_reward"]), float(row["learning_rate"]))
        best[key] = max(best.get(key, found), found)
    return {key: rate for key, (_, rate) in best.items()}


def curves(rows: list[dict[str, str]], protocol: str, algorithm: str, task: str) -> tuple[list[int], list[list[float]]]:
    """Return the numbers of queries, and for each the held-out rewards of all seeds."""
    by_queries: dict[int, list[float]] = {}
    for row in rows:
        if (row["protocol"], row["algorithm"], row["task"]) == (protocol, algorithm, task):
            by_queries.setdefault(int(row["reward_queries"]), []).append(float(row["eval_reward"]))
    return sorted(by_queries), [by_queries[queries] for queries in sorted(by_queries)]


def plot(rows: list[dict[str, str]], file: Path) -> None:
    """Plot a panel for each task and protocol: the mean over seeds, and a band from worst to best seed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pairs = list(dict.fromkeys((row["protocol"], row["task"]) for row in rows))
    columns = min(len(pairs), 2 if len(pairs) % 3 else 3)
    size = (4.2 * columns, 3.6 * math.ceil(len(pairs) / columns))
    figure, axes = pyplot.subplots(round(size[1] / 3.6), columns, figsize=size, squeeze=False)
    for axis in axes.flat[len(pairs) :]:
        axis.set_axis_off()
    for axis, (protocol, task) in zip(axes.flat, pairs, strict=False):
        for algorithm, label in LABELS.items():
            queries, values = curves(rows, protocol, algorithm, task)
            if not queries:
                continue
            means = [sum(one) / len(one) for one in values]
            colour = COLOURS[algorithm]
            axis.plot(queries, means, label=label, color=colour, linewidth=2)
            lowest, highest = list(map(min, values)), list(map(max, values))
            axis.fill_between(queries, lowest, highest, color=colour, alpha=0.18, linewidth=0)
        axis.set(title=f"{task}, {protocol.replace('_', ' ')}", xlabel="reward queries", ylabel="held-out reward")
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    seeds = len({row["seed"] for row in rows})
    figure.tight_layout()
    figure.subplots_adjust(right=1 - 2.5 / (size[0] + 2.5))
    figure.set_figwidth(size[0] + 2.5)
    handles, labels = axes[0][0].get_legend_handles_labels()
    title = f"mean and range of {seeds} seeds"
    figure.legend(handles, labels, frameon=False, title=title, loc="center right")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=130)


def print_table(rows: list[dict[str, str]]) -> None:
    """Print the rewards before and after training as a Markdown table."""
    print("\n| protocol | task | algorithm | learning rate | before, by seed | after, by seed | mean |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for protocol in dict.fromkeys(row["protocol"] for row in rows):
        for task in dict.fromkeys(row["task"] for row in rows):
            for algorithm, label in LABELS.items():
                _, values = curves(rows, protocol, algorithm, task)
                if values:
                    key = protocol, algorithm, task
                    [*rates] = dict.fromkeys(
                        row["learning_rate"] for row in rows if (row["protocol"], row["algorithm"], row["task"]) == key
                    )
                    before, after = (", ".join(f"{value:.3f}" for value in one) for one in (values[0], values[-1]))
                    mean = f"{sum(values[-1]) / len(values[-1]):.3f}"
                    print(f"| {' | '.join([protocol, task, label, ', '.join(rates), before, after, mean])} |")


if __name__ == "__main__":
    main()
