"""The prompts of a watched pipeline, with their images if they have some, and a cache of their conditioning."""

from __future__ import annotations

import math
import re
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ddpo_env.models.protocol import Fields
from ddpo_env.prompts.images import IMAGE, describe_image, read_image

CACHED_BYTES = 2**30
_PREPARED_PROMPTS = 1000
"""A larger set of prompts is not encoded completely beforehand: that would take longer than it saves."""
_OF_PROMPTS = re.compile(r"prompt:([1-9]\d{0,4})x([1-9]\d{0,4})")


@dataclass(frozen=True)
class PipelinePrompt:
    """A prompt as a pipeline encodes it.

    Attributes:
        text: the prompt.
        image: path or object; `None` without one. Two of the same content are the same.
        digest: of the image's content.
        size: of the image in pixels, width and height.
    """

    text: str
    image: Any = field(default=None, compare=False)
    digest: str = ""
    size: tuple[int, int] = (0, 0)

    @classmethod
    def of(cls, text: str, image: Any) -> PipelinePrompt:
        """Describe the image.

        Raises:
            ValueError: as `describe_image`.
        """
        described = describe_image(image, f"{IMAGE} of prompt {text!r}")
        return cls(text, image, described.digest, described.size)

    @property
    def description(self) -> str:
        """What the image is, for messages."""
        path = f", {str(self.image)!r}" if isinstance(self.image, str | Path) else ""
        return f"the image of {self.text!r} ({self.size[0]}x{self.size[1]} pixels{path})"

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of the pipeline's call."""
        if self.image is None:
            return {"prompt": self.text}
        return {"prompt": self.text, IMAGE: read_image(self.image, f"{IMAGE} of prompt {self.text!r}")}


Encode: TypeAlias = Callable[[Iterable[PipelinePrompt]], Iterator[dict[str, Tensor]]]
"""Prompts → the conditioning of each, every tensor `(1, ...)`."""


class EncodedPrompts(OrderedDict[PipelinePrompt, dict[str, Tensor]]):
    """The conditioning of prompts by prompt, 1 GiB at most: those that were used last."""

    def conditioning(self, prompts: Sequence[PipelinePrompt], encode: Encode) -> dict[str, Tensor]:
        """Return the conditioning of prompts, `(batch, ...)`; each distinct prompt is encoded once."""
        self.add(prompts, encode)
        encoded = [self[prompt] for prompt in prompts]
        bytes_each = sum(tensor.nbytes for tensor in encoded[0].values())
        while len(self) * bytes_each > CACHED_BYTES:
            self.popitem(last=False)
        return {name: torch.cat([one[name] for one in encoded]) for name in encoded[0]}

    def add(self, prompts: Sequence[PipelinePrompt], encode: Encode) -> None:
        """Encode the prompts that are not here, all at once, and mark all of them as used."""
        unknown = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self]
        if unknown:
            self.update(zip(unknown, encode(unknown), strict=True))
        for prompt in prompts:
            self.move_to_end(prompt)

    def prepare(self, prompts: Sequence[PipelinePrompt], shapes: Mapping[str, tuple[int, ...]], encode: Encode) -> None:
        """Encode prompts beforehand: at most 1000, and only as many as are kept."""
        bytes_each = 4 * sum(math.prod(shape) for shape in shapes.values())
        most = min(_PREPARED_PROMPTS, CACHED_BYTES // max(1, bytes_each) - len(self))
        self.add(list(dict.fromkeys(prompts))[: max(0, most)], encode)


def one_of_each_size(prompts: Sequence[PipelinePrompt]) -> list[PipelinePrompt]:
    """Return a prompt for each size of images: they show whether the pipeline brings them to one size."""
    return list({prompt.size: prompt for prompt in reversed(prompts) if prompt.image is not None}.values())


def pipeline_prompts(prompts: Sequence[str], fields: Fields | None, has_images: bool) -> list[PipelinePrompt]:
    """Return prompts with the images of their fields.

    Raises:
        ValueError: for prompts without images if the pipeline takes one for each, or an image that cannot be read.
    """
    if not has_images:
        return [PipelinePrompt(text) for text in prompts]
    if fields is None or len(fields) != len(prompts):
        raise ValueError(
            f"fields must be one dictionary with an {IMAGE} for each of the {len(prompts)} prompts; "
            f"got {'none' if fields is None else len(fields)}"
        )
    return [PipelinePrompt.of(text, own.get(IMAGE)) for text, own in zip(prompts, fields, strict=True)]


def size_of_prompt_images(argument: Any) -> tuple[int, int] | None:
    """Return width and height if an argument of a call says that every prompt has an image, as `prompt:64x48` does."""
    found = _OF_PROMPTS.fullmatch(argument) if isinstance(argument, str) else None
    return None if found is None else (int(found[1]), int(found[2]))


def example_images(argument: Any) -> list[Image.Image]:
    """Return two images of noise, always the same, if an argument of a call says that every prompt has an image.

    What differs between them depends on the image.
    """
    size = size_of_prompt_images(argument)
    if size is None:
        return []
    width, height = size
    pixels = np.random.default_rng(0).integers(0, 256, (2, height, width, 3), np.uint8)
    return [Image.fromarray(one) for one in pixels]
