"""The DDPO paper in miniature: train the bundled model on its four tasks, evaluate it, and draw every figure.

    python scripts/experiments/paper.py

Each of the four presets tiny-* is trained with several seeds, beside a held-out reward that no training sees: whether
an independent network reads the prompt in the image, or for the aesthetic the formula that its head approximates.
The policies meet prompts that they were never trained on. Then come what over-optimisation costs and what helps
against it, the comparison of the algorithms, and the typographic attack, each by a script of its own beside this one.
A run or an evaluation that ended is not repeated, and one that was interrupted goes on. Tables are printed in Markdown;
figures are in the folder `images`.
"""

from __future__ import annotations

import csv
import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import tyro

from agents.config.authority import resume_flags
from agents.config.train_config import TrainConfig
from agents.evaluation.plots import blank_figure, write_figure
from rewards import configured_reward

ROOT = Path(__file__).resolve().parents[2]


class Task(NamedTuple):
    """One of the paper's four tasks."""

    preset: str
    reward: str
    options: tuple[str, ...]
    """Of the reward, for the evaluation."""
    holdout_reward: str
    unit: str
    evaluated_on: tuple[str, ...]
    """Prompt sets of the evaluation: those of the training first."""


_ANIMALS = ("simple_animals", "held_out_animals", "everyday_objects")
_ACTIVITIES = (
    *("animal_activities", "activities_of_held_out_animals", "held_out_activities"),
    *("held_out_activities_of_held_out_animals", "simple_animals"),
)
TASKS = {
    "compressibility": Task("tiny-compressibility", "jpeg_compressibility", (), "tiny_reader", "−kB", _ANIMALS),
    "incompressibility": Task("tiny-incompressibility", "jpeg_incompressibility", (), "tiny_reader", "kB", _ANIMALS),
    "aesthetic": Task("tiny-aesthetic", "aesthetic", ("aesthetic.model=tiny",), "tiny_preference", "score", _ANIMALS),
    "alignment": Task(
        "tiny-alignment", "vlm_alignment", ("vlm_alignment.model=tiny",), "tiny_reader", "BERTScore", _ACTIVITIES
    ),
}
OTHERS = {
    "over_optimisation": ["scripts/experiments/over_optimisation.py"],
    "algorithms": ["scripts/experiments/algorithms.py", "--protocols", "same_rate", "--queries", "2048"],
    "typographic_attack": ["scripts/experiments/typographic_attack.py"],
}
"""The other experiments, by the names of their folders; each has its figures there or in `images`."""


@dataclass
class Arguments:
    """What to train, and where the results go."""

    tasks: tuple[str, ...] = tuple(TASKS)
    """Some of compressibility, incompressibility, aesthetic, alignment."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the runs. On other prompts the first one's policies are evaluated, and all policies of alignment."""
    others: tuple[str, ...] = tuple(OTHERS)
    """Experiments that follow: some of over_optimisation, algorithms, typographic_attack, or none."""
    eval_interval: int = 2
    """Iterations between two evaluations on the 90 held-out samples."""
    output: Path = Path("runs/paper")
    """Folder of the runs and evaluations, with the figures in `images`."""
    only_draw: bool = False
    """Train and evaluate nothing: draw and print what is there."""


def main() -> None:
    """Parse the command line; train, evaluate, draw and print."""
    arguments = tyro.cli(Arguments, description=__doc__)
    if unknown := set(arguments.tasks) - TASKS.keys():
        sys.exit(f"error: tasks must be among {', '.join(TASKS)}; got {', '.join(sorted(unknown))}")
    if unknown := set(arguments.others) - OTHERS.keys():
        sys.exit(f"error: others must be among {', '.join(OTHERS)}; got {', '.join(sorted(unknown))}")
    if not arguments.only_draw:
        try:  # a package of the judge may be missing, which nobody wants to hear after an hour
            configured_reward("vlm_alignment", {"model": "tiny"})
        except ImportError as error:
            sys.exit(f"error: {error}")
        for command, folder in chain(trainings(arguments), evaluations(arguments)):
            finish(command, folder)
    images = arguments.output / "images"
    images.mkdir(parents=True, exist_ok=True)
    draw_curves(arguments, images / "four_tasks.png")
    for task in arguments.tasks:
        shutil.copyfile(
            run_folder(arguments, task, 0) / "samples/before_after.png", images / f"{task}_before_after.png"
        )
    print("\n".join([*training_table(arguments), "", *evaluation_tables(arguments)]), flush=True)
    for name in arguments.others:
        output = (arguments.output / name).resolve()
        if not arguments.only_draw:
            run([*OTHERS[name], "--output", str(output)])
        for image in [*output.glob("*.png"), *output.glob("images/*.png")]:
            shutil.copyfile(image, images / image.name)


def run_folder(arguments: Arguments, task: str, place: int) -> Path:
    """Return the folder of a task's run with the seed at a place."""
    return arguments.output / f"{task}-{arguments.seeds[place]}"


def trainings(arguments: Arguments) -> Iterator[tuple[list[str], Path]]:
    """Yield the command and the folder of each run: all tasks with the first seed, then with the next."""
    for place, seed in enumerate(arguments.seeds):
        for task in arguments.tasks:
            folder = run_folder(arguments, task, place)
            settings = ["--preset", TASKS[task].preset, "--holdout-reward", TASKS[task].holdout_reward]
            settings += ["--seed", str(seed), "--eval-interval", str(arguments.eval_interval)]
            yield ["scripts/train_ppo.py", *settings, "--run-dir", str(folder.resolve())], folder


def evaluated(arguments: Arguments) -> Iterator[tuple[str, int, Path]]:
    """Yield the task and the place of the seed of the runs that are evaluated, and the folder of each evaluation."""
    for task in arguments.tasks:
        for place, seed in enumerate(arguments.seeds[: len(arguments.seeds) if task == "alignment" else 1]):
            yield task, place, arguments.output / (f"{task}-evaluation-{seed}" if place else f"{task}-evaluation")


def evaluations(arguments: Arguments) -> Iterator[tuple[list[str], Path]]:
    """Yield the command and the folder of each evaluation of a run's last policy."""
    for task, place, folder in evaluated(arguments):
        run = run_folder(arguments, task, place)
        rewards = list(dict.fromkeys([TASKS[task].reward, TASKS[task].holdout_reward, "tiny_reader"]))
        command = ["scripts/evaluate.py", "--lora", str(run.resolve() / "lora"), "--rewards", *rewards]
        command += ["--reward-options", *TASKS[task].options] if TASKS[task].options else []
        command += ["--prompts", *TASKS[task].evaluated_on, "--samples-per-prompt", "2"]
        steps = TrainConfig.read(run).num_inference_steps
        yield [*command, "--num-inference-steps", str(steps), "--output", str(folder.resolve())], folder


def finish(command: list[str], folder: Path) -> None:
    """Run a command that makes a folder, unless it has ended; resume it if it is a run that began."""
    if (folder / "summary.json").is_file() or (folder / "evaluation.json").is_file():
        return
    if (folder / "config.yaml").is_file():
        flags = resume_flags(TrainConfig.read(folder))
        command = [command[0], "--resume", str(folder.resolve()), *flags]
    run(command)


def run(command: list[str]) -> None:
    """Run one of the project's scripts from its folder."""
    print("+", shlex.join(command), flush=True)
    subprocess.run([sys.executable, *command], cwd=ROOT, check=True)


def summary_of(folder: Path) -> dict[str, Any]:
    """Return the summary of a run that ended."""
    summary: dict[str, Any] = json.loads((folder / "summary.json").read_text("utf-8"))
    return summary


def evaluations_of(folder: Path) -> list[Mapping[str, str]]:
    """Return the rows of a run's metrics that an evaluation wrote."""
    with (folder / "progress.csv").open(newline="", encoding="utf-8") as file:
        return [row for row in csv.DictReader(file) if row["eval/reward_mean"]]


def column(rows: Sequence[Mapping[str, str]], name: str) -> list[float]:
    """Return a metric of every evaluation."""
    return [float(row[name]) for row in rows]


def draw_curves(arguments: Arguments, path: Path) -> None:
    """Draw for each task the reward of the held-out samples and, below, the held-out reward, a line per seed."""
    figure = blank_figure(3.6 * len(arguments.tasks), 5.6)
    panels = figure.subplots(2, len(arguments.tasks), squeeze=False, sharex="col")
    for number, task in enumerate(arguments.tasks):
        for place, seed in enumerate(arguments.seeds):
            rows = evaluations_of(run_folder(arguments, task, place))
            iterations = [int(row["time/iterations"]) for row in rows]
            for axes, name in zip(panels[:, number], ("eval/reward_mean", "eval/holdout_reward_mean"), strict=True):
                axes.plot(iterations, column(rows, name), color=f"C{place}", label=f"seed {seed}", linewidth=1.8)
        panels[0, number].set(title=task, ylabel=f"reward trained on ({TASKS[task].unit})")
        panels[1, number].xaxis.get_major_locator().set_params(integer=True)
        is_read = TASKS[task].holdout_reward == "tiny_reader"
        below = "images that the reader reads" if is_read else f"held out: {TASKS[task].holdout_reward}"
        panels[1, number].set(xlabel="iteration", ylabel=below, ylim=(0, 1.02) if is_read else None)
    for axes in panels.flat:
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0, 0].legend(frameon=False)
    write_figure(path, figure)


def training_table(arguments: Arguments) -> Iterator[str]:
    """Yield the rewards of each task before and after training, and the time of its runs."""
    columns = ["task", "reward before → after, by seed", "held-out reward", "before → best → after, by seed"]
    yield f"| {' | '.join([*columns, 'queries', 'seconds'])} |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for task in arguments.tasks:
        every = [summary_of(run_folder(arguments, task, place)) for place in range(len(arguments.seeds))]
        rewards = ", ".join(f"{one['reward_before']:.3f} → {one['reward_after']:.3f}" for one in every)
        names = [f"holdout_reward_{name}" for name in ("before", "best", "after")]
        holdout = ", ".join(" → ".join(f"{one[name]:.3f}" for name in names) for one in every)
        seconds = ", ".join(f"{one['wall_clock_seconds']:.0f}" for one in every)
        cells = [task, rewards, TASKS[task].holdout_reward, holdout, str(every[0]["reward_queries"]), seconds]
        yield f"| {' | '.join(cells)} |"


def evaluation_tables(arguments: Arguments) -> Iterator[str]:
    """Yield the tables of the evaluations, and copy their figures and grids to the images."""
    for task, place, folder in evaluated(arguments):
        yield f"### {task}, seed {arguments.seeds[place]}"
        yield next(folder.glob("*.md")).read_text("utf-8")
        for image in sorted(folder.glob("*.png")) if place == 0 else ():
            shutil.copyfile(image, arguments.output / "images" / f"{task}_{image.name}")


if __name__ == "__main__":
    main()
