"""Measure the bundled judges: what they read in renderings and generated images, their speed, and BERTScore's order.

    python scripts/bundled_models/evaluate_judges.py

The seeds of the renderings were not used in any training. The bundled Stable Diffusion generates the images with 20
DDIM steps at eta 1. The bundled reader, which is independent of the judges, reads them too. The figures in
`docs/tiny-judges.md` come from this command.
"""

import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import evaluate_tiny
import numpy as np
import torch
import tyro
from diffusers import StableDiffusionPipeline
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from pretraining.emoji_renderings import Subject, all_subjects, grid, render, render_dataset
from pretraining.judge_lessons import HOW_MANY, MIXTURE, WHICH, answer, through_jpeg

from ddpo_env.models.loading import resolve_source
from ddpo_env.prompts.vocabulary import (
    ACTIVITIES,
    COUNTS,
    EVERYDAY_OBJECTS,
    HELD_OUT_ACTIVITIES,
    HELD_OUT_ANIMALS,
    SIMPLE_ANIMALS,
)
from rewards.clip.clip_model import ClipEmbedder
from rewards.clip.clip_score import ClipScore
from rewards.judge.alignment import QUESTION, TEMPLATE
from rewards.judge.bert_score import BertScoreRecall
from rewards.judge.judge_model import JudgeModel
from rewards.judge.vqa import answers_match
from rewards.networks.pretrained import TINY

TEST_SEED, SHEET_SEED = 3_000_001, 4_000_001
UNKNOWN = Subject("nothing that was asked for")


@dataclass
class Arguments:
    """Measure the bundled judges."""

    clip: Path | str = TINY
    """CLIP to measure: a folder or tiny."""
    judge: Path | str = TINY
    """LLaVA to measure: a folder or tiny."""
    text_encoder: Path | str = TINY
    """Text encoder to measure: a folder or tiny."""
    renderings: int = 3000
    """Number of held-out renderings."""
    samples_per_word: int = 4
    """Images per animal."""
    samples_per_activity: int = 2
    """Images per animal and activity, and per animal and count."""
    speed_repeats: int = 5
    """Timed passes over 512 renderings."""
    test_sheet: Path | None = None
    """Write the sheet of renderings that the tests read to this file, and do nothing else."""
    run_folder: Path = Path("runs/evaluate_judges")
    """Folder for `evaluation.json` and the sheet of wrong readings."""
    threads: int = 2
    """CPU threads."""


class Readers:
    """The two judges; each says which subject an image shows."""

    def __init__(self, arguments: Arguments) -> None:
        self.clip: ClipEmbedder = ClipScore(arguments.clip, device="cpu").loaded
        self.judge = JudgeModel(arguments.judge, device="cpu", batch_size=64)
        self.subjects = list(all_subjects())
        self.by_caption = {subject.caption: subject for subject in self.subjects}
        self.captions = self.clip.embed_texts(list(self.by_caption))

    def clip_reads(self, images: np.ndarray) -> list[Subject]:
        """Return for each image the subject with the most similar caption."""
        shown = [Image.fromarray(image) for image in images]
        parts = [self.clip.embed_images(shown[start : start + 100]) for start in range(0, len(shown), 100)]
        return [self.subjects[index] for index in (torch.cat(parts) @ self.captions.T).argmax(dim=1).tolist()]

    def judge_reads(self, images: np.ndarray) -> list[Subject]:
        """Return for each image the subject that the judge describes, or `UNKNOWN` if its answer is no caption."""
        answers = self.judge.ask(list(images), [QUESTION] * len(images))
        return [self.by_caption.get(text, UNKNOWN) for text in answers]


def scores(wanted: Sequence[Subject], found: Sequence[Subject]) -> dict[str, float]:
    """Return top-1 accuracies of the animal, the activity, the count, the word, and all three together."""
    pairs = list(zip(wanted, found, strict=True))
    animals = [(a, b) for a, b in pairs if a.word not in EVERYDAY_OBJECTS]
    active = [(a, b) for a, b in pairs if a.activity]
    counted = [(a, b) for a, b in pairs if a.count]
    return {
        "animal": mean(a.word == b.word for a, b in animals),
        "activity": mean(a.activity == b.activity for a, b in active),
        "count": mean(a.count == b.count for a, b in counted),
        "any_word": mean(a.word == b.word for a, b in pairs),
        "all": mean(a == b for a, b in pairs),
        "images": len(pairs),
    }


def mean(values: Iterable[bool]) -> float:
    """Return the fraction of true values, to four digits; NaN without values."""
    found = list(values)
    return round(float(np.mean(found)), 4) if found else float("nan")


def questions(readers: Readers, images: np.ndarray, subjects: Sequence[Subject]) -> dict[str, float]:
    """Return the fraction of correct answers for each question of the counting prompts."""
    fractions = {}
    for name, question in (("how_many", HOW_MANY), ("which", WHICH)):
        answers = readers.judge.ask(list(images), [question] * len(images))
        fractions[name] = mean(answers_match(answer(s, question), a) for s, a in zip(subjects, answers, strict=True))
    return fractions


def order(text_encoder: Path | str) -> dict[str, float]:
    """Return the mean BERTScore of right and wrong descriptions, and how often their order is right."""
    recall = BertScoreRecall(text_encoder, device="cpu")
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(500):
        animal, other = (Subject(str(word)) for word in rng.choice(SIMPLE_ANIMALS, 2, replace=False))
        activity, another = (str(one) for one in rng.choice(ACTIVITIES, 2, replace=False))
        told = [
            Subject(animal.word, activity),
            Subject(animal.word, another),
            Subject(other.word, activity),
            Subject(other.word, another),
        ]
        reference = TEMPLATE.replace("{prompt}", told[0].caption)
        rows.append(recall([subject.caption for subject in told], [reference] * 4))
    right, wrong_activity, wrong_animal, both_wrong = np.array(rows).T
    half = np.stack([wrong_activity, wrong_animal])
    return {
        "right": round(float(right.mean()), 4),
        "wrong_activity": round(float(wrong_activity.mean()), 4),
        "wrong_animal": round(float(wrong_animal.mean()), 4),
        "both_wrong": round(float(both_wrong.mean()), 4),
        "right_is_best": mean(right > half.max(axis=0)),
        "both_wrong_is_worst": mean(both_wrong < half.min(axis=0)),
    }


def images_per_second(readers: Readers, images: np.ndarray, repeats: int) -> list[float]:
    """Return the judge's speed in each pass after a pass of warm-up."""
    speeds = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        readers.judge.ask(list(images), [QUESTION] * len(images))
        speeds.append(round(len(images) / (time.perf_counter() - began), 1))
    return speeds[1:]


def generated_images(arguments: Arguments) -> tuple[np.ndarray, list[Subject]]:
    """Return the bundled model's images, `(number, 64, 64, 3)` uint8, and the subject of each prompt."""
    subjects = [Subject(word) for word in SIMPLE_ANIMALS] * arguments.samples_per_word
    each = arguments.samples_per_activity
    subjects += [Subject(word, activity) for activity in ACTIVITIES for word in SIMPLE_ANIMALS] * each
    subjects += [Subject(word, activity) for activity in HELD_OUT_ACTIVITIES for word in SIMPLE_ANIMALS] * each
    subjects += [Subject(word, activity) for activity in ACTIVITIES for word in HELD_OUT_ANIMALS] * each
    subjects += [Subject(word, count=count) for count in COUNTS for word in SIMPLE_ANIMALS] * each
    pipeline = StableDiffusionPipeline.from_pretrained(resolve_source("tiny"))
    pipeline.set_progress_bar_config(disable=True)
    settings = evaluate_tiny.Arguments(run_folder=arguments.run_folder, threads=arguments.threads)
    return evaluate_tiny.generate(pipeline, subjects, evaluate_tiny.DEFAULT_GUIDANCE, settings), subjects


def save_mistakes(path: Path, images: np.ndarray, wanted: Sequence[Subject], found: Sequence[Subject]) -> None:
    """Write the first 40 images that the judge read differently from their prompts, with both: prompt | read."""
    wrong = [index for index, pair in enumerate(zip(wanted, found, strict=True)) if pair[0] != pair[1]][:40]
    labels = [f"{evaluate_tiny.brief(wanted[index])} | {evaluate_tiny.brief(found[index])}" for index in wrong]
    if wrong:
        grid(list(images[wrong]), 8, labels, scale=3).save(path, optimize=True)


def save_test_sheet(path: Path) -> None:
    """Write 108 renderings in rows of twelve; the PNG's text chunk `captions` has their captions, one per line."""
    rng = np.random.default_rng(SHEET_SEED)
    subjects = [Subject(word) for word in SIMPLE_ANIMALS]
    subjects += [Subject(word, activity) for activity in ACTIVITIES for word in SIMPLE_ANIMALS[::3]]
    subjects += [Subject(word, count=count) for count, word in zip(COUNTS * 2, SIMPLE_ANIMALS, strict=False)]
    subjects += [Subject(word, activity) for activity in HELD_OUT_ACTIVITIES for word in SIMPLE_ANIMALS[::9]]
    subjects += [Subject(*one) for one in zip(HELD_OUT_ANIMALS[:4], (*ACTIVITIES, *HELD_OUT_ACTIVITIES), strict=True)]
    subjects += [Subject(*one) for one in zip(EVERYDAY_OBJECTS[:3], ACTIVITIES, strict=True)]
    images = np.stack([render(subject, rng) for subject in subjects])
    rows = images.reshape(-1, 12, *images.shape[1:]).swapaxes(1, 2)
    captions = PngInfo()
    captions.add_text("captions", "\n".join(subject.caption for subject in subjects))
    Image.fromarray(rows.reshape(-1, 12 * images.shape[2], 3)).save(path, optimize=True, pnginfo=captions)


def main() -> None:
    """Parse the command line, let the judges read renderings and generated images, and write the figures."""
    arguments = tyro.cli(Arguments, description=__doc__)
    if arguments.test_sheet is not None:
        return save_test_sheet(arguments.test_sheet)
    torch.set_num_threads(arguments.threads)
    arguments.run_folder.mkdir(parents=True, exist_ok=True)
    readers = Readers(arguments)
    images, subjects = render_dataset(arguments.renderings, TEST_SEED, mixture=MIXTURE, workers=arguments.threads)
    compressed = np.stack([through_jpeg(image, 80) for image in images])
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in asdict(arguments).items()}
    report: dict[str, object] = {"settings": settings}
    for name, shown in (("renderings", images), ("renderings_jpeg_80", compressed)):
        report[name] = {
            "clip": scores(subjects, readers.clip_reads(shown)),
            "judge": scores(subjects, readers.judge_reads(shown)),
            "judge_questions": questions(readers, shown, subjects),
        }
        print(name, json.dumps(report[name]), flush=True)
    generated, asked = generated_images(arguments)
    seen_by_reader = evaluate_tiny.read(generated)
    seen_by_clip, seen_by_judge = readers.clip_reads(generated), readers.judge_reads(generated)
    report["generated_images"] = {
        "reader_against_prompts": scores(asked, seen_by_reader),
        "clip_against_prompts": scores(asked, seen_by_clip),
        "judge_against_prompts": scores(asked, seen_by_judge),
        "clip_against_reader": scores(seen_by_reader, seen_by_clip),
        "judge_against_reader": scores(seen_by_reader, seen_by_judge),
    }
    print("generated_images", json.dumps(report["generated_images"]), flush=True)
    report["bert_score"] = order(arguments.text_encoder)
    print("bert_score", json.dumps(report["bert_score"]), flush=True)
    report["judge_images_per_second"] = images_per_second(readers, images[:512], arguments.speed_repeats)
    print("images per second", report["judge_images_per_second"], flush=True)
    (arguments.run_folder / "evaluation.json").write_text(json.dumps(report, indent=1) + "\n")
    save_mistakes(arguments.run_folder / "mistakes.png", generated, asked, seen_by_judge)


if __name__ == "__main__":
    main()
