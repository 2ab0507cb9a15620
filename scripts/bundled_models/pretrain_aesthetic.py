"""Fit the head of the bundled aesthetic predictor to noisy ratings of renderings and of the bundled model's images.

    python scripts/bundled_models/pretrain_aesthetic.py --output-folder rewards/data

A rating is what a person would give: the true preference (`rewards.formulas.preference`) with normal noise, rounded to
a whole number from 1 to 10. The head is one affine map of the bundled CLIP's image embeddings, fitted by least squares
with a small ridge. The command measures the head on images that it did not learn from, and writes the sheet of the
least and the most liked images. Fit it again after the CLIP or the bundled model has changed.
"""

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from diffusers import StableDiffusionPipeline
from PIL import Image
from pretraining.emoji_renderings import grid, render_dataset
from pretraining.judge_lessons import MIXTURE
from safetensors.torch import save_file

from ddpo_env.models.loading import resolve_source
from rewards.clip.aesthetic import AestheticHead
from rewards.clip.clip_model import ClipEmbedder
from rewards.clip.clip_score import ClipScore
from rewards.formulas.preference import tiny_preference

RENDERINGS_SEED, GENERATION_SEED = 5_000_001, 6_000_001


@dataclass
class Arguments:
    """Fit the bundled aesthetic head."""

    output_folder: Path = Path("runs/pretrain_aesthetic")
    """`tiny_aesthetic/head.safetensors` is written here."""
    report_folder: Path = Path("runs/pretrain_aesthetic")
    """Folder for `tiny-aesthetic.json` and the sheet `images/tiny_preference_sheet.png`."""
    clip: Path | str = "tiny"
    """CLIP whose embeddings the head takes: a folder or tiny."""
    model: str = "tiny"
    """Stable Diffusion whose images are rated: a folder or tiny."""
    renderings: int = 8000
    """Rated renderings."""
    generated: int = 600
    """Rated images of the model, with 10 DDIM steps at eta 1, guidance off."""
    held_out: float = 0.2
    """Fraction of both that the head is measured on and does not learn from."""
    rating_noise: float = 1.0
    """Standard deviation by which a person differs from himself, in points."""
    ridge: float = 0.01
    """Weight of the squared weights in the least squares."""
    seed: int = 0
    """Seed of the noise."""
    threads: int = 2
    """CPU threads."""


def rate(images: np.ndarray, noise: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return the true preference of images, `(batch,)`, and their ratings, whole numbers from 1 to 10, `(batch,)`."""
    preference, _ = tiny_preference(images, [""] * len(images), [{}] * len(images))
    return preference, np.clip(np.rint(preference + rng.normal(0, noise, len(images))), 1, 10)


def embed(clip: ClipEmbedder, images: np.ndarray) -> np.ndarray:
    """Return the unit embeddings of images, `(batch, dimensions)` float64."""
    shown = [Image.fromarray(image) for image in images]
    parts = [clip.embed_images(shown[start : start + 100]) for start in range(0, len(shown), 100)]
    return torch.cat(parts).double().numpy()


def generate(model: str, captions: list[str]) -> np.ndarray:
    """Return the model's image of each caption, `(number, 64, 64, 3)` uint8."""
    pipeline = StableDiffusionPipeline.from_pretrained(resolve_source(model))
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(GENERATION_SEED)
    options = {"num_inference_steps": 10, "guidance_scale": 1.0, "eta": 1.0, "output_type": "np"}
    parts = [
        pipeline(captions[start : start + 50], generator=generator, **options).images
        for start in range(0, len(captions), 50)
    ]
    return (np.concatenate(parts) * 255).round().astype(np.uint8)


def fit(embeddings: np.ndarray, ratings: np.ndarray, ridge: float) -> dict[str, torch.Tensor]:
    """Return the affine map with the least squared error, with the names that `AestheticHead` takes."""
    centre = embeddings.mean(axis=0)
    centred = embeddings - centre
    penalty = ridge * np.eye(embeddings.shape[1])
    weight = np.linalg.solve(centred.T @ centred + penalty, centred.T @ (ratings - ratings.mean()))
    bias = ratings.mean() - centre @ weight
    return {
        "layers.0.weight": torch.tensor(weight[None], dtype=torch.float32),
        "layers.0.bias": torch.tensor([bias], dtype=torch.float32),
    }


def rank_correlation(left: np.ndarray, right: np.ndarray) -> float:
    """Return Spearman's correlation of values without ties."""
    ranks = [np.argsort(np.argsort(values)) for values in (left, right)]
    return round(float(np.corrcoef(*ranks)[0, 1]), 3)


def write_sheet(path: Path, sources: list[tuple[np.ndarray, np.ndarray]]) -> None:
    """Write, for each source of images, the twelve least liked, twelve near the median, and the twelve most liked."""
    shown, labels = [], []
    for images, preference in sources:
        order = np.argsort(preference)
        middle = len(order) // 2 - 6
        for part in (order[:12], order[middle : middle + 12], order[-12:]):
            shown += list(images[part])
            labels += [f"{value:.1f}" for value in preference[part]]
    path.parent.mkdir(parents=True, exist_ok=True)
    grid(shown, 12, labels).save(path, optimize=True)


def main() -> None:
    """Parse the command line, rate images, fit the head, measure it, and write everything."""
    arguments = tyro.cli(Arguments, description=__doc__)
    started = time.monotonic()
    torch.set_num_threads(arguments.threads)
    rng = np.random.default_rng(arguments.seed)
    rendered, subjects = render_dataset(
        arguments.renderings, RENDERINGS_SEED, mixture=MIXTURE, workers=arguments.threads
    )
    generated = generate(arguments.model, [subject.caption for subject in subjects[: arguments.generated]])
    clip = ClipScore(arguments.clip, device="cpu").loaded
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in asdict(arguments).items()}
    report: dict[str, object] = {"settings": settings}
    learned, tests, sheets = [], {}, []
    for name, images in (("renderings", rendered), ("generated", generated)):
        preference, ratings = rate(images, arguments.rating_noise, rng)
        split = round(len(images) * (1 - arguments.held_out))
        embeddings = embed(clip, images)
        learned.append((embeddings[:split], ratings[:split]))
        tests[name] = (embeddings[split:], preference[split:], ratings[split:])
        sheets.append((images[split:], preference[split:]))
    weights = fit(*(np.concatenate(parts) for parts in zip(*learned, strict=True)), arguments.ridge)
    head = AestheticHead(weights)
    for name, (embeddings, preference, ratings) in tests.items():
        scores = head(torch.tensor(embeddings, dtype=torch.float32)).numpy()
        report[f"held_out_{name}"] = {
            "images": len(scores),
            "rank_correlation": rank_correlation(scores, preference),
            "correlation": round(float(np.corrcoef(scores, preference)[0, 1]), 3),
            "correlation_of_a_rating": round(float(np.corrcoef(ratings, preference)[0, 1]), 3),
            "mean_preference": round(float(preference.mean()), 2),
            "mean_score": round(float(scores.mean()), 2),
        }
    report["seconds"] = round(time.monotonic() - started)
    folder = arguments.output_folder / "tiny_aesthetic"
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "head.safetensors")
    arguments.report_folder.mkdir(parents=True, exist_ok=True)
    (arguments.report_folder / "tiny-aesthetic.json").write_text(json.dumps(report, indent=1) + "\n")
    write_sheet(arguments.report_folder / "images" / "tiny_preference_sheet.png", sheets)
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
