"""Over-optimisation: when the brake sees it, and what a KL penalty, an early stop and a weaker LoRA do against it.

    python scripts/experiments/over_optimisation.py

The bundled model is trained for the miniature aesthetic for longer than is good for its images, beside the formula that
the aesthetic approximates, with several seeds; and with a KL penalty for as many reward queries. The brake is asked
about every evaluation of the run that has none: training does not depend on it, so a run with
`--stop-at-overoptimisation` ends there with the same bits. The policies generate images of the same new seeds, which
chose nothing. Tables are printed in Markdown; figures are in the folder `images`. What has ended is not repeated.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tyro
from numpy.typing import NDArray
from paper import finish, summary_of

from agents.evaluation.plots import blank_figure, write_figure
from agents.report.evaluation_files import EvaluationRecord, read_evaluation
from agents.training.monitoring.over_optimisation import over_optimisation

PRESET, REWARD, PREFERENCE, READER = "tiny-aesthetic", "aesthetic", "tiny_preference", "tiny_reader"
STEPS = 5
SETTINGS = (
    *("--preset", PRESET, "--algorithm", "draft", "--num-inference-steps", str(STEPS)),
    *("--samples-per-iteration", "24", "--learning-rate", "7e-4", "--learning-rate-schedule", "constant"),
    *("--holdout-reward", PREFERENCE),
)
"""DRaFT over-optimises soon, because it follows the reward's gradient. A constant rate does not end the learning."""
METHODS: Mapping[str, tuple[str, ...]] = {
    "none": ("--eval-interval", "1"),
    "kl": ("--eval-interval", "0", "--kl-coef", "0.1"),
}
STRENGTHS = (0.25, 0.5, 0.75, 1.0)


@dataclass
class Arguments:
    """What to train, and where the results go."""

    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the runs."""
    iterations: int = 24
    """Of each run."""
    methods: tuple[str, ...] = tuple(METHODS)
    """none, and if wanted kl."""
    output: Path = Path("runs/over-optimisation")
    """Folder of the runs and evaluations, with the figures in `images`."""
    only_draw: bool = False
    """Train and evaluate nothing: draw and print what is there."""


class Braked(NamedTuple):
    """What the brake does in a run.

    Attributes:
        records: every evaluation of the run.
        stop: place of the evaluation at which the brake ends the run; the last one, if it does not.
        reason: why it ends it; `None`: it does not.
    """

    records: list[EvaluationRecord]
    stop: int
    reason: str | None

    @property
    def preferences(self) -> list[float]:
        """The mean true preference at every evaluation."""
        return [float(_holdout(record).mean()) for record in self.records]

    @property
    def best(self) -> int:
        """Place of the best evaluation until the stop, whose policy a braked run has in `best/`."""
        return int(np.argmax(self.preferences[: self.stop + 1]))

    def gain_left(self, place: int) -> float:
        """Return the fraction of the whole run's best gain that the policy at a place has."""
        preferences = self.preferences
        return (preferences[place] - preferences[0]) / (max(preferences) - preferences[0])


def main() -> None:
    """Parse the command line; train, evaluate, draw and print."""
    arguments = tyro.cli(Arguments, description=__doc__)
    if not arguments.only_draw:
        for command, folder in (*trainings(arguments), *evaluations(arguments)):
            finish(command, folder)
    images = arguments.output / "images"
    images.mkdir(parents=True, exist_ok=True)
    draw(arguments, images / "over_optimisation.png")
    print("\n".join([*brake_table(arguments), "", *comparison_table(arguments)]))


def run_folder(arguments: Arguments, method: str, seed: int) -> Path:
    """Return the folder of a run."""
    return arguments.output / f"{REWARD}-{method}-{seed}"


def trainings(arguments: Arguments) -> Iterator[tuple[list[str], Path]]:
    """Yield the command and the folder of each run."""
    for method in arguments.methods:
        for seed in arguments.seeds:
            folder = run_folder(arguments, method, seed)
            settings = [*SETTINGS, "--iterations", str(arguments.iterations), "--seed", str(seed), *METHODS[method]]
            yield ["scripts/train_ppo.py", *settings, "--run-dir", str(folder.resolve())], folder


def evaluations(arguments: Arguments) -> Iterator[tuple[list[str], Path]]:
    """Yield the command and the folder of each evaluation: last policies, those of weaker LoRAs, and the best one.

    The best one of a run is also that of a run with the brake, if the run found no better one after the brake's stop.
    `brake_table` shows whether that is so.
    """
    for method in arguments.methods:
        for seed in arguments.seeds:
            run = run_folder(arguments, method, seed)
            strengths = STRENGTHS if method == "none" else (1.0,)
            yield _evaluation(run / "lora", strengths, run.with_name(f"{run.name}-evaluation"))
            if method == "none":
                yield _evaluation(run / "best/lora", (1.0,), run.with_name(f"{run.name}-best-evaluation"))


def _evaluation(lora: Path, strengths: tuple[float, ...], output: Path) -> tuple[list[str], Path]:
    command = ["scripts/evaluate.py", "--lora", str(lora.resolve()), "--strengths", *map(str, strengths)]
    command += ["--rewards", REWARD, PREFERENCE, READER, "--reward-options", f"{REWARD}.model=tiny"]
    command += ["--prompts", "simple_animals", "--samples-per-prompt", "2", "--num-inference-steps", str(STEPS)]
    return [*command, "--output", str(output.resolve())], output


def braked(folder: Path) -> Braked:
    """Ask the brake about every evaluation of a run."""
    records = [read_evaluation(path) for path in sorted((folder / "samples/images").glob("iteration_*.json"))]
    holdout, rewards = [_holdout(record) for record in records], [record.rewards for record in records]
    for place in range(len(records)):
        reason = over_optimisation(holdout[: place + 1], rewards[: place + 1])
        if reason is not None:
            return Braked(records, place, reason)
    return Braked(records, len(records) - 1, None)


def _holdout(record: EvaluationRecord) -> NDArray[np.float64]:
    assert record.holdout_rewards is not None
    return record.holdout_rewards


def draw(arguments: Arguments, path: Path) -> None:
    """Draw per seed the learned reward and the true preference of every evaluation, and where the brake stops."""
    figure = blank_figure(4.2 * len(arguments.seeds), 3.6)
    panels = figure.subplots(1, len(arguments.seeds), squeeze=False, sharey=True)[0]
    for axes, seed in zip(panels, arguments.seeds, strict=True):
        run = braked(run_folder(arguments, "none", seed))
        iterations = [record.iteration for record in run.records]
        rewards = [float(np.nanmean(record.rewards)) for record in run.records]
        axes.plot(iterations, rewards, "o-", markersize=4, label="learned reward, trained on")
        axes.plot(iterations, run.preferences, "s-", markersize=4, label="true preference, held out")
        if run.reason is not None:
            axes.axvline(iterations[run.stop], color="#555555", linestyle=":", label="the brake stops")
        axes.set(title=f"seed {seed}", xlabel="iteration")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].legend(frameon=False)
    write_figure(path, figure)


def brake_table(arguments: Arguments) -> Iterator[str]:
    """Yield where the brake stops each run, and what is left of the gain of the true preference."""
    yield "| seed | best after | the brake stops after | true preference before, best, when stopped, at the end |" + (
        " gain left when stopped | at the end | in `best/` when stopped |"
    )
    yield "| --- | --- | --- | --- | --- | --- | --- |"
    for seed in arguments.seeds:
        run = braked(run_folder(arguments, "none", seed))
        preferences, iterations = run.preferences, [record.iteration for record in run.records]
        shown = (preferences[0], max(preferences), preferences[run.stop], preferences[-1])
        stopped = "not stopped" if run.reason is None else str(iterations[run.stop])
        left = [f"{run.gain_left(place):.0%}" for place in (run.stop, len(preferences) - 1, run.best)]
        numbers = ", ".join(f"{one:.2f}" for one in shown)
        best = iterations[int(np.argmax(preferences))]
        yield f"| {seed} | {best} | {stopped} | {numbers} | {' | '.join(left)} |"


def comparison_table(arguments: Arguments) -> Iterator[str]:
    """Yield what each method reaches on new seeds, by training seed."""
    yield "| policy | reward queries | learned reward | true preference | its mean | animals read |"
    yield "| --- | --- | --- | --- | --- | --- |"
    runs = [run_folder(arguments, "none", seed) for seed in arguments.seeds]
    every = [summary_of(run)["reward_queries"] for run in runs]
    last = [run.with_name(f"{run.name}-evaluation") for run in runs]
    yield _row("pretrained", [0] * len(runs), last, 0.0)
    for strength in reversed(STRENGTHS):
        yield _row("last" if strength == 1 else f"last, strength {strength:g}", every, last, strength)
    stops = [braked(run) for run in runs]
    spent = [
        queries * one.records[one.stop].iteration // one.records[-1].iteration
        for queries, one in zip(every, stops, strict=True)
    ]
    yield _row("best of the run", spent, [run.with_name(f"{run.name}-best-evaluation") for run in runs], 1.0)
    for method in arguments.methods:
        if method != "none":
            runs = [run_folder(arguments, method, seed) for seed in arguments.seeds]
            queries = [summary_of(run)["reward_queries"] for run in runs]
            yield _row(method, queries, [run.with_name(f"{run.name}-evaluation") for run in runs], 1.0)


def _row(name: str, queries: list[int], folders: list[Path], strength: float) -> str:
    scores = [_scores(folder, strength) for folder in folders]
    reward, preference = ([one[key] for one in scores] for key in (REWARD, PREFERENCE))
    read = ", ".join(f"{one[READER]:.0%}" for one in scores)
    spent = ", ".join(f"{one:,}" for one in dict.fromkeys(queries))
    texts = [", ".join(f"{one:.2f}" for one in values) for values in (reward, preference)]
    return f"| {name} | {spent} | {texts[0]} | {texts[1]} | {np.mean(preference):.2f} | {read} |"


def _scores(folder: Path, strength: float) -> dict[str, float]:
    results = json.loads((folder / "evaluation.json").read_text("utf-8"))["results"]
    return {one["reward"]: float(one["score"]["mean"]) for one in results if one["strength"] == strength}


if __name__ == "__main__":
    main()
