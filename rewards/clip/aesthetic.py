"""The LAION aesthetic predictor: a linear head on CLIP ViT-L/14 (DDPO, arXiv 2305.13301, section 5.2).

The head was fitted to ratings from 1 to 10 of *normalised* embeddings; on others it answers 20 to 30. Its layers have
no activations between them (https://github.com/christophschuhmann/improved-aesthetic-predictor).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import linear

from rewards.clip.clip_model import ClipReward
from rewards.pretrained import load_weights, resolve_weights

_LAYER = re.compile(r"layers\.(\d+)\.(weight|bias)")


class AestheticHead:
    """The affine layers, applied one after the other.

    Attributes:
        layers: Weight (out, in) and bias (out,) of each, float32; the last has one output.
    """

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        """Take the layers from a state dict with the keys `layers.N.weight` and `layers.N.bias`.

        Raises:
            ValueError: There are other keys, or the shapes do not follow from one another.
        """
        unknown = [name for name in weights if not _LAYER.fullmatch(name)]
        numbers = sorted({int(match[1]) for name in weights if (match := _LAYER.fullmatch(name))})
        names = {f"layers.{number}.{kind}" for number in numbers for kind in ("weight", "bias")}
        if unknown or not numbers or names != set(weights):
            raise ValueError(f"aesthetic head must have layers.N.weight and layers.N.bias; got {sorted(weights)}")
        self.layers = [
            (weights[f"layers.{number}.weight"].float(), weights[f"layers.{number}.bias"].float()) for number in numbers
        ]
        shapes = [tuple(weight.shape) for weight, _ in self.layers]
        outputs = [shape[0] for shape in shapes]
        inputs = [shape[-1] for shape in shapes]
        biases = [len(bias) for _, bias in self.layers]
        if any(len(shape) != 2 for shape in shapes) or outputs != [*inputs[1:], 1] or biases != outputs:
            raise ValueError(f"aesthetic head must be a chain of matrices that ends in one number; got {shapes}")

    @property
    def dimensions(self) -> int:
        """Length of the embeddings that it takes."""
        return int(self.layers[0][0].shape[1])

    def to(self, device: torch.device) -> AestheticHead:
        """Move the layers to a device; return self."""
        self.layers = [(weight.to(device), bias.to(device)) for weight, bias in self.layers]
        return self

    def __call__(self, embeddings: Tensor) -> Tensor:
        """Score embeddings of length 1, (batch, dimensions): (batch,), about 1 to 10."""
        for weight, bias in self.layers:
            embeddings = linear(embeddings, weight, bias)
        return embeddings.squeeze(-1)


class Aesthetic(ClipReward):
    """How much people would like the picture, about 1 to 10; the prompt plays no part."""

    __name__ = "aesthetic"

    def __init__(
        self,
        model: str | Path = "openai/clip-vit-large-patch14",
        head: str | Path = "trl-lib/ddpo-aesthetic-predictor/aesthetic-model.pth",
        *,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "float32",
        batch_size: int = 32,
    ) -> None:
        """Check the arguments; see `ClipReward`.

        Args:
            model: Folder or Hub id of the CLIP model that the head was fitted to.
            head: File of the head, or `owner/repository/file` on the Hub.
            device: As in `ClipReward`.
            dtype: As in `ClipReward`; the head computes in float32.
            batch_size: As in `ClipReward`.
        """
        super().__init__(model, device=device, dtype=dtype, batch_size=batch_size)
        self._head_source = resolve_weights(head)
        self._head: AestheticHead | None = None

    @property
    def head(self) -> AestheticHead:
        """The head, loaded if it is not.

        Raises:
            ValueError: The file is no such head, or does not fit the CLIP model.
        """
        if self._head is None:
            head = AestheticHead(load_weights(self._head_source)).to(self.device)
            dimensions = self.clip.model.config.projection_dim
            if head.dimensions != dimensions:
                raise ValueError(
                    f"aesthetic head takes embeddings of {head.dimensions} dimensions, and the CLIP model "
                    f"{self._source!r} makes {dimensions}"
                )
            self._head = head
        return self._head

    def load(self) -> None:
        """Load the CLIP model and the head now."""
        _ = self.head

    def unload(self) -> None:
        """Let both go."""
        self._head = None
        super().unload()

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score embeddings, whatever the prompts."""
        return self.head(images)
