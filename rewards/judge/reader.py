"""A small network that reads emoji images: which word, activity and count an image of the bundled model shows.

It is the independent reader of the project: no other bundled model shares its weights or its training images. So it can
tell what an alignment run has learned from a judge, and whether only the judge believes it. It knows the words of
`ddpo_env/prompts/vocabulary.py`. `scripts/bundled_models/pretrain_reader.py` trains it.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rewards.kinds import images_only
from rewards.networks.pretrained import TINY, ModelHolder, check_finite, load_weights
from rewards.protocol import Details, Images, Metadata

SIDE = 64
"""Height and width of the images, in pixels."""


class Reading(NamedTuple):
    """What an image shows, or what a prompt asks for."""

    word: str | None
    """An animal or an object; None: an image that shows none."""
    activity: str | None = None
    """Such as "riding a bike"; None: the word alone."""
    count: str | None = None  # type: ignore[assignment]  # a tuple has a method of this name, which nobody calls here
    """"two", "three" or "four"; None: one."""


class ReaderNetwork(nn.Module):
    """Five convolutions, pooled by mean and maximum, and one linear head for each of word, activity and count."""

    def __init__(self, labels: Sequence[int]) -> None:
        """Build the network with random weights.

        Args:
            labels: Number of classes of each head.
        """
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs, stride in ((3, 32, 2), (32, 64, 2), (64, 96, 1), (96, 128, 2), (128, 192, 2)):
            layers += [nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
        self.features = nn.Sequential(*layers)
        self.heads = nn.ModuleList(nn.Linear(2 * 192, number) for number in labels)

    def forward(self, pixels: Tensor) -> list[Tensor]:
        """Return the logits of each head, `(batch, classes)`, for `(batch, 3, 64, 64)` images in [0, 1]."""
        maps = self.features(pixels)
        pooled = torch.cat([maps.mean(dim=(2, 3)), maps.amax(dim=(2, 3))], dim=1)
        return [head(pooled) for head in self.heads]


class Reader:
    """A trained network and its labels, as `load_cached` holds them.

    Attributes:
        network: The network, in evaluation mode.
        labels: The labels of each head, in the order of `Reading`; the first of each is None.
    """

    def __init__(self, folder: str | Path, device: torch.device, dtype: torch.dtype) -> None:
        """Load `config.json` and `model.safetensors` of a folder.

        Raises:
            ValueError: A weight is not finite.
            RuntimeError: The weights do not fit the labels.
        """
        names_by_head = _settings(folder)["labels"]
        self.labels: tuple[tuple[str | None, ...], ...] = tuple((None, *names) for names in names_by_head)
        network = ReaderNetwork([len(names) for names in self.labels])
        network.load_state_dict(load_weights(Path(folder) / "model.safetensors"))
        check_finite(network, f"model {str(folder)!r}")
        self.network = network.to(device, dtype).eval().requires_grad_(False)
        self.device, self.dtype = device, dtype

    def read(self, images: Images) -> list[Reading]:
        """Return what each image, `(batch, 64, 64, 3)` uint8, shows according to the highest logits."""
        pixels = torch.from_numpy(np.ascontiguousarray(images)).to(self.device).permute(0, 3, 1, 2)
        with torch.inference_mode():
            best = [logits.argmax(dim=1).tolist() for logits in self.network(pixels.to(self.dtype) / 255)]
        return [
            Reading(*(names[index] for names, index in zip(self.labels, row, strict=True)))
            for row in zip(*best, strict=True)
        ]


@images_only
class TinyReader(ModelHolder[Reader]):
    """1 if an image of the bundled model shows what its prompt asks for, else 0, as an independent network reads it."""

    __name__ = "tiny_reader"
    purpose = "reader"

    def __init__(self, *, device: str | torch.device = "auto", batch_size: int = 256) -> None:
        """Check the arguments. Nothing is loaded yet.

        Args:
            device: `auto`, `cpu`, `cuda:1`, ...; it may differ from the denoiser's device.
            batch_size: Images in one call of the network; it affects memory only.

        Raises:
            ValueError: An argument is not valid.
        """
        super().__init__(Reader, TINY, device=device, dtype="float32", batch_size=batch_size)

    @functools.cached_property
    def prompts(self) -> dict[str, Reading]:
        """What each known prompt asks for; the network is not loaded for it."""
        return {prompt: Reading(*asked) for prompt, asked in _settings(self.source)["prompts"].items()}

    def check_prompts(self, prompts: Sequence[str], metadata: Metadata) -> None:
        """Raise a `ValueError` for a prompt that the reader does not know."""
        for prompt in prompts:
            self.asked(prompt)

    def read(self, images: Images) -> list[Reading]:
        """Return what each image shows.

        Raises:
            ValueError: The images are not 64x64.
        """
        if images.shape[1:] != (SIDE, SIDE, 3):
            raise ValueError(
                f"tiny_reader reads the bundled model's images, (batch, {SIDE}, {SIDE}, 3); got {images.shape}"
            )
        starts = range(0, len(images), self.batch_size)
        return [one for start in starts for one in self.loaded.read(images[start : start + self.batch_size])]

    def asked(self, prompt: str) -> Reading:
        """Return what a prompt asks for.

        Raises:
            ValueError: The prompt is none of those that the reader knows.
        """
        if prompt not in self.prompts:
            raise ValueError(
                "tiny_reader knows only prompts of the bundled model's words (ddpo_env/prompts/vocabulary.py), such as "
                f"'a fox', 'a fox riding a bike' or 'two foxes'; got {prompt!r}"
            )
        return self.prompts[prompt]

    def __call__(
        self, images: Images, prompts: Sequence[str], metadata: Metadata
    ) -> tuple[NDArray[np.float64], Details]:
        """Return 1 where word, activity and count are all right, else 0, (batch,); and each of the three as 0 or 1."""
        wanted = np.array([self.asked(prompt) for prompt in prompts], dtype=object)
        right = (wanted == np.array(self.read(images), dtype=object)).astype(np.float64)
        return right.min(axis=1), dict(zip(Reading._fields, right.T.tolist(), strict=True))


def _settings(folder: str | Path) -> dict[str, Any]:
    settings: dict[str, Any] = json.loads((Path(folder) / "config.json").read_text("utf-8"))
    return settings
