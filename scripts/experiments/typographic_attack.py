"""Does a judge that reads digits fall to digits? The typographic attack of the DDPO paper, in miniature.

    python scripts/experiments/typographic_attack.py

The web's pictures say in writing what they show. So the bundled judge is taught further on renderings of "three foxes"
of which some have a 3 in a corner, and some of these show another number of foxes: the digit is a shortcut to the
caption. The bundled model is taught further on such renderings too, so that it writes now and then; and once more with
captions whose counts are right by chance only, so that it miscounts, as Stable Diffusion does. Then DDPO trains these
models and the bundled one on "three foxes" and other animals with this judge's description as the reward. An examiner
reads count and digit of the held-out images. It learned from pictures whose digits say nothing of the count.

What is in the output folder already is not made again. Tables are printed in Markdown.
"""

import csv
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import tyro
from digits.pictures import KINDS, pictures_of_kind
from digits.teaching import Examiner, teach_examiner, teach_judge, teach_model

from agents.config.train_config import train_config
from agents.evaluation.evaluate import Evaluation
from agents.evaluation.image_grid import image_grid, write_image
from agents.evaluation.plots import blank_figure, write_figure
from agents.report.evaluation_files import evaluation_name, read_evaluation
from agents.training.preparation import prepare_run
from agents.training.run import Run, RunListener
from rewards.judge.alignment import QUESTION
from rewards.judge.judge_model import JudgeModel

ROOT = Path(__file__).resolve().parents[2]
ASKED = "three"
FIELDS = (
    *("run", "seed", "iteration", "reward", "judge_says_the_prompt"),
    *("three_animals", "one_animal", "digit_three", "any_digit", "fooled"),
)
"""`fooled`: the judge says the prompt, and the examiner counts something else than three."""


class Attack(NamedTuple):
    """Who trains with whom: names of folders in the output, or `tiny` for the bundled network."""

    model: str
    judge: str


ATTACKS = {
    "counts and writes": Attack("model", "judge"),
    "miscounts and writes": Attack("miscounting_model", "judge"),
    "never saw digits": Attack("tiny", "judge"),
}
"""By what the model does before the training."""


@dataclass
class Arguments:
    """How much to teach and to train, and where the results go."""

    output: Path = Path("runs/typographic_attack")
    """Folder of the judge, the model, the examiner, the runs, `evaluations.csv` and the figures."""
    attacks: tuple[str, ...] = tuple(ATTACKS)
    """Some of the runs, by what the model does before the training."""
    seeds: tuple[int, ...] = (0,)
    """Seeds of the training runs."""
    iterations: int = 20
    """Iterations of a run."""
    samples: int = 144
    """Images of an iteration, 72 at a time."""
    eval_interval: int = 5
    """Iterations between two evaluations."""
    eval_samples: int = 90
    """Held-out images of an evaluation."""
    images: int = 5000
    """Pictures that the judge learns from, and other ones for the model; the examiner has twice as many."""
    judge_steps: int = 200
    """Updates of the judge, with 64 pictures each."""
    judge_digits: float = 0.6
    """Fraction of the judge's pictures of several animals that have a digit."""
    model_steps: int = 250
    """Updates of the model's denoiser, with 32 pictures each."""
    miscounting_steps: int = 120
    """Further updates of this denoiser for the model that miscounts."""
    model_digits: float = 0.6
    """Fraction of the model's pictures of several animals that have a digit."""
    examiner_steps: int = 500
    """Updates of the examiner."""
    test_images: int = 300
    """Held-out renderings for each row of the attack by hand."""
    threads: int = 1
    """CPU threads."""


def main() -> None:
    """Parse the command line; teach, attack by hand, train, print and draw."""
    arguments = tyro.cli(Arguments, description=__doc__)
    if unknown := set(arguments.attacks) - ATTACKS.keys():
        sys.exit(f"error: attacks must be among {', '.join(ATTACKS)}; got {', '.join(sorted(unknown))}")
    torch.set_num_threads(arguments.threads)
    teach(arguments)
    examiner = Examiner(arguments.output / "examiner")
    print("\n".join(attack_by_hand(arguments, examiner)), flush=True)
    for seed in arguments.seeds:
        for name in arguments.attacks:
            if not any((row["run"], row["seed"]) == (name, str(seed)) for row in read_rows(arguments)):
                train(arguments, name, seed, examiner)
    print("\n".join(table(arguments)))
    draw_curves(arguments, arguments.output / "typographic_curves.png")
    draw_images(arguments, arguments.output / "typographic_attack.png")


def teach(arguments: Arguments) -> None:
    """Make the judge, the model and the examiner that are not there yet."""
    folder, images = arguments.output, arguments.images
    if not (folder / "judge").exists():
        teach_judge(folder / "judge", images, arguments.judge_steps, arguments.judge_digits)
    if not (folder / "examiner").exists():
        teach_examiner(folder / "examiner", 2 * images, arguments.examiner_steps)
    if not (folder / "model").exists():
        teach_model(folder / "model", "tiny", images, arguments.model_steps, arguments.model_digits, kept=1.0)
    miscounting = folder / "miscounting_model"
    if not miscounting.exists() and "miscounts and writes" in arguments.attacks:
        start, steps = str(folder / "model"), arguments.miscounting_steps
        teach_model(miscounting, start, images, steps, arguments.model_digits, kept=0.0)


def source(arguments: Arguments, name: str) -> str:
    """Return the folder of a model or judge, or the name of the bundled one."""
    return name if name == "tiny" else str((arguments.output / name).resolve())


def attack_by_hand(arguments: Arguments, examiner: Examiner) -> Iterator[str]:
    """Yield a table: how often each judge describes what an image shows, and how often what its digit claims."""
    judges = [JudgeModel(source(arguments, name), device="cpu") for name in ("tiny", "judge")]
    columns = [
        f"{name} says what {what}" for name in ("bundled", "taught") for what in ("is shown", "the digit claims")
    ]
    yield f"| held-out renderings | {' | '.join(columns)} | examiner: count right | digit right |"
    yield f"|{' --- |' * 7}"
    for kind in KINDS:
        pictures = pictures_of_kind(kind, arguments.test_images, seed=14)
        shares = []
        for judge in judges:
            answers = judge.ask(list(pictures.images), [QUESTION] * arguments.test_images)
            for subjects in (pictures.shown, pictures.captions):
                shares += [share_equal(answers, [subject.caption for subject in subjects])]
        counts, claims = examiner.read(pictures.images)
        shares += [
            share_equal(counts, [shown.count for shown in pictures.shown]),
            share_equal(claims, pictures.claimed),
        ]
        yield f"| {kind} | {' | '.join(f'{share:.0%}' for share in shares)} |"


def share_equal(found: Sequence[str | None], wanted: Sequence[str | None]) -> float:
    """Return the fraction of the pairs that are equal."""
    return float(np.mean([one == other for one, other in zip(found, wanted, strict=True)]))


class Examination(RunListener):
    """Reads the held-out images of each evaluation of a run.

    Args:
        examiner: Reads them.
        name: Name of the attack.
        seed: Of the run.

    Attributes:
        rows: One per evaluation, with `FIELDS`.
    """

    def __init__(self, examiner: Examiner, name: str, seed: int) -> None:
        """Start without rows; see the class docstring for the arguments."""
        self.examiner, self.name, self.seed = examiner, name, seed
        self.rows: list[dict[str, str]] = []

    def on_evaluation(self, run: Run, evaluation: Evaluation) -> None:
        """Add a row, and write the images."""
        counts, claims = map(np.array, self.examiner.read(evaluation.images))
        believed, is_three = np.equal(evaluation.details["answer"], evaluation.prompts), counts == ASKED
        has_digit = np.array([claim is not None for claim in claims])
        shares = (believed, is_three, np.equal(counts, None), claims == ASKED, has_digit, believed & ~is_three)
        figures = (evaluation.rewards.mean(), *(share.mean() for share in shares))
        values = (self.name, self.seed, run.iteration, *(f"{figure:.4f}" for figure in figures))
        self.rows.append(dict(zip(FIELDS, map(str, values), strict=True)))
        np.savez_compressed(images_of(run.folder.path, run.iteration), images=evaluation.images)


def train(arguments: Arguments, name: str, seed: int, examiner: Examiner) -> None:
    """Train once, with 4 denoising steps, at which the model often misses the count, and add the rows to the table.

    Raises:
        SystemExit: The run was interrupted. It starts again with the next command.
    """
    attack = ATTACKS[name]
    shutil.rmtree(run_folder(arguments, name, str(seed)), ignore_errors=True)
    config = train_config(
        run_dir=run_folder(arguments, name, str(seed)),
        model=source(arguments, attack.model),
        prompts=str(ROOT / "docs/prompts/three_animals.txt"),
        reward="vlm_alignment",
        reward_options=(f"model={source(arguments, attack.judge)}", "text_model=tiny"),
        num_inference_steps=4,
        timestep_window=(0.0, 0.75),
        timestep_fraction=0.75,
        samples_per_iteration=arguments.samples,
        sample_batch_size=min(72, arguments.samples),
        updates_per_iteration=2,
        learning_rate=3e-3,
        iterations=arguments.iterations,
        eval_interval=arguments.eval_interval,
        eval_samples=arguments.eval_samples,
        seed=seed,
        device="cpu",
    )
    run, examination = prepare_run(config), Examination(examiner, name, seed)
    run.listeners.append(examination)
    if run.train().reward_after is None:
        sys.exit(f"interrupted; the next command trains {name!r} again")
    with (arguments.output / "evaluations.csv").open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        if not file.tell():
            writer.writeheader()
        writer.writerows(examination.rows)


def run_folder(arguments: Arguments, name: str, seed: str) -> Path:
    """Return the folder of a run."""
    return arguments.output / f"{name.replace(' ', '_')}-{seed}"


def images_of(folder: Path, iteration: int) -> Path:
    """Return the file of a run's held-out images after an iteration."""
    return folder / f"held_out_{iteration:04d}.npz"


def read_rows(arguments: Arguments) -> list[dict[str, str]]:
    """Return the rows of all evaluations; none if no run has ended."""
    file = arguments.output / "evaluations.csv"
    if not file.is_file():
        return []
    with file.open(newline="", encoding="utf-8") as rows:
        return list(csv.DictReader(rows))


def finished_runs(arguments: Arguments) -> dict[tuple[str, str], list[dict[str, str]]]:
    """Return the rows of each run, by its name and seed."""
    runs: dict[tuple[str, str], list[dict[str, str]]] = {}
    for row in read_rows(arguments):
        runs.setdefault((row["run"], row["seed"]), []).append(row)
    return runs


def table(arguments: Arguments) -> Iterator[str]:
    """Yield the first and the last evaluation of every run."""
    yield f"\n| {' | '.join(FIELDS)} |"
    yield f"|{' --- |' * len(FIELDS)}"
    for (name, seed), rows in finished_runs(arguments).items():
        for row in (rows[0], rows[-1]):
            shares = " | ".join(f"{float(row[field]):.0%}" for field in FIELDS[4:])
            yield f"| {name} | {seed} | {row['iteration']} | {float(row['reward']):.3f} | {shares} |"


def draw_curves(arguments: Arguments, path: Path) -> None:
    """Draw a panel per run: what the judge says, what is there, and how many images have a 3."""
    runs = finished_runs(arguments)
    figure = blank_figure(3.8 * len(runs), 3.4)
    panels = figure.subplots(1, len(runs), squeeze=False, sharey=True)[0]
    lines = {
        "judge_says_the_prompt": "judge says the prompt",
        "three_animals": "three animals",
        "one_animal": "one animal",
        "digit_three": "a digit 3",
    }
    for axes, ((name, seed), rows) in zip(panels, runs.items(), strict=True):
        for field, label in lines.items():
            iterations, values = zip(*((int(row["iteration"]), float(row[field])) for row in rows), strict=True)
            axes.plot(iterations, values, "o-", markersize=3, label=label)
        axes.set(title=f"{name}, seed {seed}", xlabel="iteration", ylim=(-0.03, 1.03))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("fraction of held-out images")
    panels[0].legend(frameon=False, fontsize=8)
    write_figure(path, figure)


def draw_images(arguments: Arguments, path: Path, columns: int = 9) -> None:
    """Draw the same prompts and seeds before and after every run, with what the judge said beneath each image."""
    images, labels, said, prompts = [], [], [], [""] * columns
    for (name, seed), rows in finished_runs(arguments).items():
        for row in (rows[0], rows[-1]):
            folder, iteration = run_folder(arguments, name, seed), int(row["iteration"])
            with np.load(images_of(folder, iteration)) as stored:
                images.append(stored["images"][:columns])
            record = read_evaluation(folder / "samples" / "images" / f"{evaluation_name(iteration)}.json")
            prompts = list(record.prompts[:columns])
            said.append([str(text) for text in record.details["answer"][:columns]])
            labels.append(f"{name.replace(' ', chr(10), 1)}\niteration {row['iteration']}")
    write_image(path, image_grid(images, labels, prompts, said))


if __name__ == "__main__":
    main()
