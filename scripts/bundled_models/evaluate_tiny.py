"""Measure how well the bundled model's images show their prompts, with a classifier that never saw such images.

    python scripts/bundled_models/evaluate_tiny.py --model ddpo_env/data/tiny

A small convolutional network learns to read word, activity and count from emoji renderings. The model was not trained
on these renderings: places, sizes and backgrounds are different. The network is tested on other renderings, and then it
reads the model's images. The command writes a JSON file of accuracies, and labelled contact sheets. The figures in
`docs/tiny-model.md` come from it.
"""

import json
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from diffusers import AutoencoderKL, StableDiffusionPipeline
from pretraining.emoji_renderings import Mixture, Subject, grid, render_dataset
from pretraining.tiny_components import DEFAULT_GUIDANCE
from torch import nn
from torch.nn import functional

from ddpo_env.prompts.vocabulary import ACTIVITIES, COUNTS, EVERYDAY_OBJECTS, HELD_OUT_ANIMALS, SIMPLE_ANIMALS

WORDS = (*SIMPLE_ANIMALS, *HELD_OUT_ANIMALS, *EVERYDAY_OBJECTS)
LABELS: tuple[tuple[str | None, ...], ...] = (WORDS, (None, *ACTIVITIES), (None, *COUNTS))
TRAIN_SEED, TEST_SEED = 1_000_001, 2_000_001  # far from the seeds of pretraining
MIXTURE = Mixture(simple_animals=0.4, held_out=0.25, activities=0.25, counts=0.1)


@dataclass
class Arguments:
    """Measure the bundled tiny Stable Diffusion."""

    model: Path = Path("ddpo_env/data/tiny")
    """Folder of the pipeline to measure."""
    run_folder: Path = Path("runs/evaluate_tiny")
    """Folder for `evaluation.json` and the trained classifier, which later runs use again."""
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
    samples_per_activity: int = 2
    """Images per animal and activity, and per animal and count."""
    only_animals: bool = False
    """Measure only the 45 animals, which is quick."""
    batch_size: int = 64
    """Images generated at once."""
    classifier_renderings: int = 24_000
    """Number of renderings that the classifier learns from."""
    classifier_epochs: int = 3
    """Passes over these renderings."""
    seed: int = 0
    """Seed of the generated images and of the classifier."""
    threads: int = 2
    """CPU threads."""


class RenderingClassifier(nn.Module):
    """Reads word, activity and count from an image: one row of logits for each of `LABELS`."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs, stride in ((3, 32, 2), (32, 64, 2), (64, 96, 1), (96, 128, 2), (128, 192, 2)):
            layers += [nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
        self.features = nn.Sequential(*layers)
        self.heads = nn.ModuleList(nn.Linear(2 * 192, len(labels)) for labels in LABELS)

    def forward(self, pixels: torch.Tensor) -> list[torch.Tensor]:
        """Return the logits for `(batch, 3, 64, 64)` images in [0, 1]."""
        maps = self.features(pixels)
        pooled = torch.cat([maps.mean(dim=(2, 3)), maps.amax(dim=(2, 3))], dim=1)
        return [head(pooled) for head in self.heads]

    @torch.no_grad()
    def read(self, images: np.ndarray) -> list[Subject]:
        """Return what each of the images, `(batch, 64, 64, 3)` uint8, shows according to the highest logits."""
        self.eval()
        parts = [self(to_pixels(images[i : i + 256])) for i in range(0, len(images), 256)]
        found = zip(*(torch.cat(logits).argmax(dim=1).tolist() for logits in zip(*parts, strict=True)), strict=True)
        return [Subject(WORDS[word], LABELS[1][activity], LABELS[2][count]) for word, activity, count in found]


def to_pixels(images: np.ndarray) -> torch.Tensor:
    """Turn `(batch, height, width, 3)` uint8 into `(batch, 3, height, width)` float32 in [0, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255


def blur_and_noise(pixels: torch.Tensor) -> torch.Tensor:
    """Blur half of the images a little and add noise, so that the classifier cannot rely on sharpness."""
    soft = functional.avg_pool2d(functional.pad(pixels, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    pixels = pixels + torch.rand(len(pixels), 1, 1, 1) * (torch.rand(len(pixels), 1, 1, 1) < 0.5) * (soft - pixels)
    return pixels + 0.03 * torch.rand(len(pixels), 1, 1, 1) * torch.randn_like(pixels)


def train_classifier(arguments: Arguments) -> RenderingClassifier:
    """Return the classifier of the run folder; if there is none, train one and save it there."""
    path = arguments.run_folder / "classifier.pt"
    torch.manual_seed(arguments.seed)
    classifier = RenderingClassifier()
    if path.is_file():
        classifier.load_state_dict(torch.load(path, weights_only=True))
        return classifier
    images, subjects = render_dataset(
        arguments.classifier_renderings, TRAIN_SEED, mixture=MIXTURE, workers=arguments.threads
    )
    targets = torch.tensor(
        [[LABELS[0].index(s.word), LABELS[1].index(s.activity), LABELS[2].index(s.count)] for s in subjects]
    )
    steps = arguments.classifier_epochs * len(images) // 64
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=3e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for step in range(steps):
        chosen = torch.randint(len(images), (64,))
        logits = classifier(blur_and_noise(to_pixels(images[chosen.numpy()])))
        losses = [functional.cross_entropy(row, targets[chosen, head]) for head, row in enumerate(logits)]
        optimizer.zero_grad()
        torch.stack(losses).sum().backward()
        optimizer.step()
        schedule.step()
        if step % 250 == 0:
            print(f"classifier {step}/{steps} " + " ".join(f"{loss:.3f}" for loss in losses), flush=True)
    torch.save(classifier.state_dict(), path)
    return classifier


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
    """Return the subjects to generate, by the name of their figure."""
    sets = {"simple_animals": [Subject(w) for w in SIMPLE_ANIMALS] * arguments.samples_per_word}
    if not arguments.only_animals:
        each = arguments.samples_per_activity
        sets["held_out_animals"] = [Subject(w) for w in HELD_OUT_ANIMALS] * arguments.samples_per_word
        sets["everyday_objects"] = [Subject(w) for w in EVERYDAY_OBJECTS] * arguments.samples_per_word
        for activity in ACTIVITIES:
            sets[activity] = [Subject(w, activity=activity) for w in SIMPLE_ANIMALS] * each
        sets["counts"] = [Subject(w, count=c) for c in COUNTS for w in SIMPLE_ANIMALS] * each
    return sets


def by_word(wanted: Sequence[Subject], found: Sequence[Subject]) -> dict[str, dict[str, float]]:
    """Return for each word how its images were read: the fraction of each word that was read."""
    readings: dict[str, list[str]] = defaultdict(list)
    for a, b in zip(wanted, found, strict=True):
        readings[a.word].append(b.word)
    return {
        word: {name: read.count(name) / len(read) for name in sorted(set(read), key=read.count, reverse=True)}
        for word, read in readings.items()
    }


@torch.no_grad()
def vae_error(vae: AutoencoderKL, images: np.ndarray) -> float:
    """Return the mean absolute error of the VAE's reconstructions, in grey levels of 255."""
    pixels = to_pixels(images) * 2 - 1
    decoded = vae.decode(vae.encode(pixels).latent_dist.mean).sample
    return float((decoded.clamp(-1, 1) - pixels).abs().mean() * 127.5)


def save_sheet(path: Path, images: Iterable[np.ndarray], labels: Iterable[str], columns: int) -> None:
    """Write a labelled contact sheet at twice the images' size."""
    grid(list(images), columns, list(labels), scale=2).save(path, optimize=True)


def save_sheets(folder: Path, generated: dict[str, np.ndarray], sets: dict[str, list[Subject]]) -> None:
    """Write the first image of every subject; images are not selected."""
    folder.mkdir(parents=True, exist_ok=True)
    save_sheet(folder / "tiny_contact_sheet.png", generated["simple_animals"][:45], SIMPLE_ANIMALS, columns=9)
    if "counts" not in sets:
        return
    others = [*generated["held_out_animals"][:20], *generated["everyday_objects"][:20]]
    save_sheet(folder / "tiny_held_out_sheet.png", others, (*HELD_OUT_ANIMALS, *EVERYDAY_OBJECTS), columns=10)
    rows = [(activity, index) for activity in ACTIVITIES for index in range(0, 45, 3)]
    labels = [f"{SIMPLE_ANIMALS[index]}, {activity.split()[-1]}" for activity, index in rows]
    save_sheet(folder / "tiny_activities_sheet.png", [generated[a][i] for a, i in rows], labels, columns=15)
    counts = [(c, c * 45 + i) for c in range(3) for i in range(0, 45, 3)]
    labels = [sets["counts"][i].caption for _, i in counts]
    save_sheet(folder / "tiny_counts_sheet.png", [generated["counts"][i] for _, i in counts], labels, columns=15)


def main() -> None:
    """Parse the command line, train or load the classifier, generate images, read them, and write the figures."""
    arguments = tyro.cli(Arguments, description=__doc__)
    torch.set_num_threads(arguments.threads)
    arguments.run_folder.mkdir(parents=True, exist_ok=True)
    classifier = train_classifier(arguments)
    renderings, shown = render_dataset(3000, TEST_SEED, mixture=MIXTURE, workers=arguments.threads)
    report: dict[str, object] = {
        "settings": {key: str(value) if isinstance(value, Path) else value for key, value in asdict(arguments).items()},
        "classifier_on_renderings": scores(shown, classifier.read(renderings)),
        "saturated_fraction_of_renderings": saturated_fraction(renderings),
    }
    print(json.dumps(report["classifier_on_renderings"]), flush=True)

    pipeline = StableDiffusionPipeline.from_pretrained(arguments.model)
    pipeline.set_progress_bar_config(disable=True)
    report["vae_mean_absolute_error_of_255"] = vae_error(pipeline.vae, renderings[:200])
    sets = test_sets(arguments)
    report["guidance"] = {}
    for scale in arguments.guidance_scales[1:]:
        images = generate(pipeline, sets["simple_animals"], scale, arguments)
        found = classifier.read(images)
        figures = {**scores(sets["simple_animals"], found), "saturated_fraction": saturated_fraction(images)}
        report["guidance"][str(scale)] = figures  # type: ignore[index]
        print(f"guidance {scale}: {json.dumps(figures)}", flush=True)
    generated = {}
    for name, subjects in sets.items():
        started = time.monotonic()
        generated[name] = generate(pipeline, subjects, arguments.guidance_scales[0], arguments)
        found = classifier.read(generated[name])
        report[name] = {
            **scores(subjects, found),
            "saturated_fraction": saturated_fraction(generated[name]),
            "seconds": round(time.monotonic() - started, 1),
            "read_as": by_word(subjects, found),
        }
        print(f"{name}: {json.dumps(scores(subjects, found))}", flush=True)
    (arguments.run_folder / "evaluation.json").write_text(json.dumps(report, indent=1) + "\n")
    save_sheets(arguments.images_folder or arguments.run_folder, generated, sets)


if __name__ == "__main__":
    main()
