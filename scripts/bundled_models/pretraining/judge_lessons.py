"""What the bundled judges learn from: images similar to a judge's inputs, and questions about them with their answers.

A judge sees generated images and not renderings, and a server receives JPEG files. So some renderings are encoded and
decoded with the bundled model's VAE, some are compressed with JPEG, and all may be blurred and get noise.
"""

import io
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor
from torch.nn import functional

from ddpo_env.models.loading import resolve_source
from ddpo_env.prompts.vocabulary import COUNTS, EVERYDAY_OBJECTS
from pretraining.emoji_renderings import Mixture, Subject, all_subjects, plural, render_dataset
from pretraining.tiny_components import autocast
from rewards.judge.alignment import QUESTION

MIXTURE = Mixture(simple_animals=0.3, held_out=0.17, activities=0.13, counts=0.15, other_activities=0.25)
HOW_MANY, WHICH = "How many animals are in this image?", "What animals are in this image?"
DESCRIBE = (QUESTION, "What is in this image?", "Describe this image.", "What do you see?")


@dataclass(frozen=True)
class Lessons:
    """Images and their subjects.

    Attributes:
        images: `(number, 64, 64, 3)` uint8.
        subjects: The subject of each image.
        captions: Index of each image's subject among `all_subjects()`, `(number,)`.
    """

    images: np.ndarray
    subjects: list[Subject]
    captions: Tensor


def make_lessons(number: int, seed: int, decoded_fraction: float, jpeg_fraction: float, workers: int) -> Lessons:
    """Render images; the first ones go through the VAE, and random ones through JPEG.

    Args:
        number: Number of images.
        seed: Seed of renderings, latents and compression.
        decoded_fraction: Fraction of the images that the bundled model's VAE encodes and decodes, in [0, 1].
        jpeg_fraction: Fraction of the images that are compressed, with qualities from 60 to 95, in [0, 1].
        workers: Number of processes that render.
    """
    images, subjects = render_dataset(number, seed, mixture=MIXTURE, workers=workers)
    decoded = round(decoded_fraction * number)
    if decoded:
        images[:decoded] = through_vae(images[:decoded], seed)
    rng = np.random.default_rng([seed, 1])
    for index in np.flatnonzero(rng.uniform(size=number) < jpeg_fraction):
        images[index] = through_jpeg(images[index], int(rng.integers(60, 96)))
    index_of = {subject: index for index, subject in enumerate(all_subjects())}
    return Lessons(images, subjects, torch.tensor([index_of[subject] for subject in subjects]))


@torch.no_grad()
def through_vae(images: np.ndarray, seed: int) -> np.ndarray:
    """Encode and decode images with the bundled model's VAE; latents get a little noise, as a denoiser leaves it."""
    vae = AutoencoderKL.from_pretrained(resolve_source("tiny"), subfolder="vae")
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for start in range(0, len(images), 100):
        pixels = torch.from_numpy(images[start : start + 100]).permute(0, 3, 1, 2).float() / 127.5 - 1
        with autocast():
            latents = vae.encode(pixels).latent_dist.mean.float()
            strength = 0.3 * torch.rand(len(latents), 1, 1, 1, generator=generator)
            latents = latents + strength * torch.randn(latents.shape, generator=generator)
            decoded = vae.decode(latents).sample
        pixels = ((decoded.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
        parts.append(pixels.permute(0, 2, 3, 1).numpy())
    return np.concatenate(parts)


def through_jpeg(image: np.ndarray, quality: int) -> np.ndarray:
    """Return an image after compression with JPEG."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file))


def soften(pixels: Tensor) -> Tensor:
    """Blur half of the normalised images `(batch, 3, height, width)` a little, and add noise to all."""
    soft = functional.avg_pool2d(functional.pad(pixels, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    blurred = torch.rand(len(pixels), 1, 1, 1) < 0.5
    pixels = pixels + torch.rand(len(pixels), 1, 1, 1) * blurred * (soft - pixels)
    return pixels + 0.1 * torch.rand(len(pixels), 1, 1, 1) * torch.randn_like(pixels)


def answer(subject: Subject, question: str) -> str:
    """Return the correct answer to a question about an image of the subject."""
    if question in DESCRIBE:
        return subject.caption
    if subject.word in EVERYDAY_OBJECTS:
        return "none"
    if question == HOW_MANY:
        return subject.count or "one"
    return plural(subject.word) if subject.count in COUNTS else subject.word


def random_question(rng: np.random.Generator) -> str:
    """Return a random question: with probability one half the DDPO paper's, else another."""
    others = (*DESCRIBE[1:], HOW_MANY, HOW_MANY, WHICH, WHICH)
    return DESCRIBE[0] if rng.uniform() < 0.5 else others[rng.integers(len(others))]


def all_texts() -> Iterator[str]:
    """Yield every question and every answer."""
    for question in (*DESCRIBE, HOW_MANY, WHICH):
        yield question
        yield from sorted({answer(subject, question) for subject in all_subjects()})
