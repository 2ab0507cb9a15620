"""Measure how well the bundled model's images show their prompts, with the bundled reader, which never saw such images.

    python scripts/bundled_models/evaluate_tiny.py --model ddpo_env/data/tiny

The reader is a small convolutional network (`scripts/bundled_models/pretrain_reader.py`). It is tested on renderings
that no bundled model was trained on, and then it reads the model's images. The command writes a JSON file of
accuracies, and labelled contact sheets. The figures in `docs/tiny-model.md` come from it.
"""

import json
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

import numpy as np
import torch
import tyro
from diffusers import AutoencoderKL, StableDiffusionPipeline
from pretrain_reader import MIXTURE, to_pixels
from pretraining.emoji_renderings import Subject, grid, render_dataset
from pretraining.tiny_components import DEFAULT_GUIDANCE

from ddpo_env.prompts.vocabulary import (
    ACTIVE_ANIMALS,
    ACTIVITIES,
    COUNTS,
    EVERYDAY_OBJECTS,
    HELD_OUT_ACTIVITIES,
    HELD_OUT_ANIMALS,
    SIMPLE_ANIMALS,
)
from rewards.judge.reader import TinyReader

TEST_SEED = 2_000_001  # far from the seeds of every training
OTHER_ANIMALS = tuple(word for word in SIMPLE_ANIMALS if word not in ACTIVE_ANIMALS)
NOTHING = "nothing"


@dataclass
class Arguments:
    """Measure the bundled tiny Stable Diffusion."""

    model: Path = Path("ddpo_env/data/tiny")
    """Folder of the pipeline to measure."""
    run_folder: Path = Path("runs/evaluate_tiny")
    """Folder for `evaluation.json`."""
    images_folder: Path | None = None
    """Folder for the contact sheets. Default: the run folder."""
    guidance_scales: tuple[float, ...] = (DEFAULT_GUIDANCE,)
    """Guidance scales to measure on the 45 animals; the first one is used for all other prompts."""
    num_inference_steps: int = 20
    """Number of DDIM steps."""
    eta: float = 1.0
    """Noise of the DDIM steps; 0 is the deterministic sampler."""
    samples_per_word: int = 8
    """Images per animal and object."""
    samples_per_activity: int = 4
    """Images per animal or object and activity."""
    samples_per_count: int = 2
    """Images per animal and count."""
    sets: tuple[str, ...] = ()
    """Names of the sets to measure, such as `simple_animals activities_composed`. Default: all, with contact sheets."""
    batch_size: int = 64
    """Images generated at once."""
    seed: int = 0
    """Seed of the generated images."""
    threads: int = 2
    """CPU threads."""


def read(images: np.ndarray) -> list[Subject]:
    """Return what each image, `(batch, 64, 64, 3)` uint8, shows according to the bundled reader."""
    found = TinyReader(device="cpu").read(images)
    return [Subject(one.word or NOTHING, one.activity, one.count) for one in found]


def scores(wanted: Sequence[Subject], found: Sequence[Subject]) -> dict[str, float]:
    """Return the fractions with the right word, activity and count, and with all three right, each in [0, 1]."""
    pairs = list(zip(wanted, found, strict=True))
    return {
        "word": float(np.mean([a.word == b.word for a, b in pairs])),
        "activity": float(np.mean([a.activity == b.activity for a, b in pairs])),
        "count": float(np.mean([a.count == b.count for a, b in pairs])),
        "all": float(np.mean([a == b for a, b in pairs])),
        "images": len(pairs),
    }


def generate(
    pipeline: StableDiffusionPipeline, subjects: Sequence[Subject], guidance_scale: float, arguments: Arguments
) -> np.ndarray:
    """Return the model's image of each subject, `(number, 64, 64, 3)` uint8 RGB."""
    generator = torch.Generator().manual_seed(arguments.seed)
    parts = []
    for start in range(0, len(subjects), arguments.batch_size):
        prompts = [subject.caption for subject in subjects[start : start + arguments.batch_size]]
        images = pipeline(
            prompts,
            num_inference_steps=arguments.num_inference_steps,
            guidance_scale=guidance_scale,
            eta=arguments.eta,
            generator=generator,
            output_type="np",
        ).images
        parts.append((images * 255).round().astype(np.uint8))
    return np.concatenate(parts)


def saturated_fraction(images: np.ndarray) -> float:
    """Return the fraction of channel values at either end of the range; it is high for oversaturated images."""
    return float(((images <= 2) | (images >= 253)).mean())


def test_sets(arguments: Arguments) -> dict[str, list[Subject]]:
    """Return the subjects to generate, by the name of their figure.

    Raises:
        ValueError: A name in `arguments.sets` is none of them.
    """

    def active(words: Sequence[str], activities: Sequence[str]) -> list[Subject]:
        return [Subject(*one) for one in product(words, activities)] * arguments.samples_per_activity

    def alone(words: Sequence[str]) -> list[Subject]:
        return [Subject(word) for word in words] * arguments.samples_per_word

    sets = {
        "simple_animals": alone(SIMPLE_ANIMALS),
        "held_out_animals": alone(HELD_OUT_ANIMALS),
        "everyday_objects": alone(EVERYDAY_OBJECTS),
        "activities_seen": active(ACTIVE_ANIMALS, ACTIVITIES),
        "activities_composed": active(OTHER_ANIMALS, ACTIVITIES),
        "held_out_activity_seen": active(ACTIVE_ANIMALS, HELD_OUT_ACTIVITIES),
        "held_out_activity_composed": active(OTHER_ANIMALS, HELD_OUT_ACTIVITIES),
        "held_out_animals_activities": active(HELD_OUT_ANIMALS, ACTIVITIES),
        "held_out_animals_held_out_activity": active(HELD_OUT_ANIMALS, HELD_OUT_ACTIVITIES),
        "everyday_objects_activities": active(EVERYDAY_OBJECTS, ACTIVITIES),
        "counts": [Subject(w, count=c) for c in COUNTS for w in SIMPLE_ANIMALS] * arguments.samples_per_count,
    }
    if unknown := [name for name in arguments.sets if name not in sets]:
        raise ValueError(f"sets must be among {', '.join(sets)}; got {', '.join(unknown)}")
    return {name: sets[name] for name in arguments.sets or sets}


def by_word(wanted: Sequence[Subject], found: Sequence[Subject]) -> dict[str, dict[str, float]]:
    """Return for each word how its images were read: the fraction of each word that was read."""
    readings: dict[str, list[str]] = defaultdict(list)
    for a, b in zip(wanted, found, strict=True):
        readings[a.word].append(b.word)
    return {
        word: {name: read.count(name) / len(read) for name in sorted(set(read), key=read.count, reverse=True)}
        for word, read in readings.items()
    }


def by_activity(wanted: Sequence[Subject], found: Sequence[Subject]) -> dict[str, float]:
    """Return for each activity the fraction of images in which everything is right."""
    right: dict[str, list[bool]] = defaultdict(list)
    for a, b in zip(wanted, found, strict=True):
        if a.activity is not None:
            right[a.activity].append(a == b)
    return {activity: float(np.mean(values)) for activity, values in right.items()}


@torch.no_grad()
def vae_error(vae: AutoencoderKL, images: np.ndarray) -> float:
    """Return the mean absolute error of the VAE's reconstructions, in grey levels of 255."""
    pixels = to_pixels(images) * 2 - 1
    decoded = vae.decode(vae.encode(pixels).latent_dist.mean).sample
    return float((decoded.clamp(-1, 1) - pixels).abs().mean() * 127.5)


def save_sheet(path: Path, images: Iterable[np.ndarray], labels: Iterable[str], columns: int) -> None:
    """Write a labelled contact sheet at twice the images' size."""
    grid(list(images), columns, list(labels), scale=2).save(path, optimize=True)


def brief(subject: Subject) -> str:
    """Return a short text for a subject: "fox, bike", "two foxes"."""
    return f"{subject.word}, {subject.activity.split()[-1]}" if subject.activity else subject.caption


def save_sheets(
    folder: Path,
    generated: dict[str, np.ndarray],
    sets: dict[str, list[Subject]],
    readings: dict[str, list[Subject]],
) -> None:
    """Write the first image of every subject, of the composed activities of every second one; none is selected.

    "no:" stands before what the reader does not find.
    """
    folder.mkdir(parents=True, exist_ok=True)
    save_sheet(folder / "tiny_contact_sheet.png", generated["simple_animals"][:45], SIMPLE_ANIMALS, columns=9)
    others = [*generated["held_out_animals"][:20], *generated["everyday_objects"][:20]]
    save_sheet(folder / "tiny_held_out_sheet.png", others, (*HELD_OUT_ANIMALS, *EVERYDAY_OBJECTS), columns=10)
    for file, names, every in (
        ("tiny_activities_sheet", ("activities_seen", "held_out_activity_seen"), 1),
        ("tiny_composition_sheet", ("activities_composed", "held_out_activity_composed"), 2),
    ):
        images, labels = [], []
        for name in names:
            activities = HELD_OUT_ACTIVITIES if name.startswith("held_out") else ACTIVITIES
            for index, subject in by_row(sets[name], activities, every):
                images.append(generated[name][index])
                labels.append(brief(subject) if readings[name][index] == subject else f"no: {brief(subject)}")
        save_sheet(folder / f"{file}.png", images, labels, columns=15)
    counts = [count * 45 + index for count in range(3) for index in range(0, 45, 3)]
    labels = [sets["counts"][index].caption for index in counts]
    save_sheet(folder / "tiny_counts_sheet.png", [generated["counts"][index] for index in counts], labels, columns=15)


def by_row(subjects: Sequence[Subject], activities: Sequence[str], every: int) -> list[tuple[int, Subject]]:
    """Return the first index of each subject and the subject, sorted by activity, of every so many words."""
    first = {subject: subjects.index(subject) for subject in dict.fromkeys(subjects)}
    return [
        (index, subject)
        for activity in activities
        for subject, index in [one for one in first.items() if one[0].activity == activity][::every]
    ]


def main() -> None:
    """Parse the command line, generate images, read them, and write the figures."""
    arguments = tyro.cli(Arguments, description=__doc__)
    torch.set_num_threads(arguments.threads)
    arguments.run_folder.mkdir(parents=True, exist_ok=True)
    sets = test_sets(arguments)
    renderings, shown = render_dataset(3000, TEST_SEED, mixture=MIXTURE, workers=arguments.threads)
    report: dict[str, object] = {
        "settings": {key: str(value) if isinstance(value, Path) else value for key, value in asdict(arguments).items()},
        "reader_on_renderings": scores(shown, read(renderings)),
        "saturated_fraction_of_renderings": saturated_fraction(renderings),
    }
    print(json.dumps(report["reader_on_renderings"]), flush=True)

    pipeline = StableDiffusionPipeline.from_pretrained(arguments.model)
    pipeline.set_progress_bar_config(disable=True)
    report["vae_mean_absolute_error_of_255"] = vae_error(pipeline.vae, renderings[:200])
    guidance: dict[str, dict[str, float]] = {}
    animals = [Subject(word) for word in SIMPLE_ANIMALS] * arguments.samples_per_word
    for scale in arguments.guidance_scales[1:]:
        images = generate(pipeline, animals, scale, arguments)
        guidance[str(scale)] = {**scores(animals, read(images)), "saturated_fraction": saturated_fraction(images)}
        print(f"guidance {scale}: {json.dumps(guidance[str(scale)])}", flush=True)
    report["guidance"] = guidance
    generated, readings = {}, {}
    for name, subjects in sets.items():
        started = time.monotonic()
        generated[name] = generate(pipeline, subjects, arguments.guidance_scales[0], arguments)
        readings[name] = read(generated[name])
        report[name] = {
            **scores(subjects, readings[name]),
            "saturated_fraction": saturated_fraction(generated[name]),
            "seconds": round(time.monotonic() - started, 1),
            "by_activity": by_activity(subjects, readings[name]),
            "read_as": by_word(subjects, readings[name]),
        }
        print(f"{name}: {json.dumps(scores(subjects, readings[name]))}", flush=True)
    (arguments.run_folder / "evaluation.json").write_text(json.dumps(report, indent=1) + "\n")
    if not arguments.sets:
        save_sheets(arguments.images_folder or arguments.run_folder, generated, sets, readings)


if __name__ == "__main__":
    main()
