"""Images of a base model or a trained LoRA in one grid, a prompt per column and a seed per row, and a film of them."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
from numpy.typing import NDArray

from agents.evaluation.generation import (
    SEED,
    SEEDS_APART,
    GenerationArguments,
    StockImages,
    check_model,
    stock_images,
    with_images,
)
from agents.output.files import check_writable
from ddpo_env.prompts import PROMPT_SETS, Prompt, PromptSet, PromptSource, load_prompts
from ddpo_env.prompts.files import SUFFIXES

_FILES = tuple(filter(None, SUFFIXES))
"""A prompt that ends like a prompt file is one that is missing."""


@dataclass(frozen=True, kw_only=True)
class SampleArguments(GenerationArguments):
    """Which images to generate, and with which model."""

    compare: bool = False
    """With --lora: also generate the images without it, in a row above."""
    prompts: tuple[str, ...] = ("a cat", "a fox", "a lion", "a penguin", "a fox riding a bike")
    """Prompts, one per column. The name of a prompt set or a file with prompts stands for its prompts."""
    seeds: tuple[Annotated[int, SEED], ...] = (0, 1, 2)
    """Seeds of the initial noise, one per row."""
    output: Path = Path("samples.png")
    """The image grid, a PNG file."""
    film: Path | None = None
    """Also write the denoising to this GIF file: the grid after every step."""

    def check(self) -> None:
        """Check the arguments before anything is loaded.

        Raises:
            ValueError: naming the argument, its value and what is valid.
        """
        super().check()
        if not self.prompts:
            raise ValueError("prompts must be at least one; got none")
        if not self.seeds:
            raise ValueError("seeds must be at least one; got none")
        if self.compare and self.lora is None:
            raise ValueError("compare must be used with a LoRA: add --lora")
        _ = self.prompt_set
        _check_output("output", self.output, "png")
        if self.film is not None:
            _check_output("film", self.film, "gif")
            if self.film.resolve() == self.output.resolve():
                raise ValueError(f"film must be another file than output; got {str(self.film)!r} for both")

    @property
    def prompt_set(self) -> PromptSet:
        """The prompts, with those of sets and files in the place of their names.

        Raises:
            ValueError: for a file that is missing or cannot be read, or a prompt that is not valid.
        """
        entries: list[str | Prompt] = []
        for value in self.prompts:
            is_named = value in PROMPT_SETS or os.path.isfile(value) or value.lower().endswith(_FILES)
            entries += _set_of(value) if is_named else [value]
        return _set_of(entries)


def write_grid(arguments: SampleArguments) -> None:
    """Check the arguments, generate the images and write them to the grid `output`, and to the film if there is one.

    Raises:
        ValueError: as `generate`; or for an argument that is not valid, before any image is generated.
        OSError: as `generate`; or for a file that cannot be written.
    """
    arguments.check()
    prompts = arguments.prompt_set
    check_model(with_images(arguments, [prompts]))
    from agents.evaluation.image_grid import image_grid, write_film

    if arguments.film is None:
        rows, labels = generate(arguments)
    else:
        films, labels = generate_films(arguments)
        rows = [film[-1] for film in films]
        frames = [image_grid(shown, labels, prompts.prompts) for shown in zip(*films, strict=True)]
        arguments.film.parent.mkdir(parents=True, exist_ok=True)
        write_film(arguments.film, frames)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    image_grid(rows, labels, prompts.prompts).save(arguments.output)


def generate(arguments: SampleArguments) -> tuple[list[NDArray[np.uint8]], list[str]]:
    """Generate the images.

    Returns:
        The rows of the grid, each `(prompts, height, width, 3)` uint8, and the label of each row.

    Raises:
        ValueError: for a model that is no text-to-image pipeline, or a resolution that it cannot have.
        OSError: for a model that cannot be downloaded.
    """
    return _rows(arguments, lambda images: images)


def generate_films(arguments: SampleArguments) -> tuple[list[NDArray[np.uint8]], list[str]]:
    """Generate the images and keep the decoded latents after every step.

    Returns:
        The rows of the grid, each `(steps, prompts, height, width, 3)` uint8, and the label of each row. The last step
        has the images of `generate`.

    Raises:
        ValueError: as `generate`; or for a pipeline that does not show its latents.
        OSError: as `generate`.
    """
    return _rows(arguments, lambda images: images.after_each_step)


def _rows(
    arguments: SampleArguments, generator_of: Callable[[StockImages], Callable[..., NDArray[np.uint8]]]
) -> tuple[list[NDArray[np.uint8]], list[str]]:
    rows, labels = [], []
    strengths = {"base": 0.0, "trained": 1.0}
    texts, metadata = zip(*arguments.prompt_set, strict=True)
    arguments = with_images(arguments, [arguments.prompt_set])
    variants = list(strengths) if arguments.compare else ["trained" if arguments.lora else "base"]
    with stock_images(arguments) as images:
        generated = generator_of(images)
        for seed in arguments.seeds:
            for variant in variants:
                seeds = range(seed, seed + SEEDS_APART * len(texts), SEEDS_APART)
                rows.append(generated(texts, seeds, strengths[variant], metadata))
                labels.append(f"{variant}\nseed {seed}")
    return rows, labels


def _set_of(prompts: PromptSource) -> PromptSet:
    found = load_prompts(prompts)
    assert isinstance(found, PromptSet)
    return found


def _check_output(name: str, output: Path, kind: str) -> None:
    """Refuse a file that cannot be written, or whose ending names no image format; nothing is written."""
    from PIL import Image

    endings = Image.registered_extensions()
    found = endings.get(output.suffix.lower())
    if found not in Image.SAVE or (kind == "gif" and found != "GIF"):
        others = "" if kind == "gif" else ", or another image format's ending"
        raise ValueError(f"{name} must end in .{kind}{others}; got {str(output)!r}")
    nearest = next(path for path in (output, *output.absolute().parents) if path.exists())
    if (nearest == output and not output.is_file()) or (nearest != output and not nearest.is_dir()):
        raise ValueError(
            f"{name} must be a file in a folder; {str(nearest)!r} is not what it needs; got {str(output)!r}"
        )
    check_writable(name, output, "file")
