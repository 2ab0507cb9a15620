"""The LAION aesthetic predictor: a linear head on CLIP ViT-L/14 (DDPO, arXiv 2305.13301, section 5.2).

The head was fitted to ratings from 1 to 10. It needs *normalised* embeddings; for others its scores are 20 to 30. There
are no activations between its layers (https://github.com/christophschuhmann/improved-aesthetic-predictor).

With `model="tiny"` it is a miniature: the bundled CLIP, and a head that was fitted to noisy ratings by a stated formula
(`rewards.formulas.preference`; `scripts/bundled_models/pretrain_aesthetic.py`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from rewards.clip.clip_model import DifferentiableClipReward
from rewards.networks.pretrained import TINY, load_weights, resolve_weights

LAION_HEAD = "trl-lib/ddpo-aesthetic-predictor/aesthetic-model.pth"
"""The published head, for OpenAI's CLIP ViT-L/14."""
TINY_HEAD = str(files("rewards") / "data" / "tiny_aesthetic" / "head.safetensors")
"""The bundled head, for the bundled CLIP."""

_LAYER = re.compile(r"layers\.(\d+)\.(weight|bias)")


class AestheticHead:
    """Affine layers that are applied one after the other.

    Attributes:
        layers: Weight (out, in) and bias (out,) of each layer, float32. The last layer has one output.
    """

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        """Take the layers from a state dict with the keys `layers.N.weight` and `layers.N.bias`.

        Raises:
            ValueError: There are other keys, or the shapes of the layers do not fit each other.
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
        """Dimension of the embeddings that the head takes."""
        return int(self.layers[0][0].shape[1])

    def to(self, device: torch.device) -> AestheticHead:
        """Move the layers to a device; return self."""
        self.layers = [(weight.to(device), bias.to(device)) for weight, bias in self.layers]
        return self

    def __call__(self, embeddings: Tensor) -> Tensor:
        """Score embeddings of length 1, (batch, dimensions); the scores are (batch,), about 1 to 10."""
        for weight, bias in self.layers:
            embeddings = linear(embeddings, weight, bias)
        return embeddings.squeeze(-1)


class Aesthetic(DifferentiableClipReward):
    """How much people would like the image, about 1 to 10. The prompt has no influence."""

    __name__ = "aesthetic"
    purpose = "clip"

    def __init__(
        self,
        model: str | Path = "openai/clip-vit-large-patch14",
        head: str | Path | None = None,
        **options: Any,
    ) -> None:
        """Check the arguments.

        Args:
            model: Folder or Hub id of the CLIP model that the head was fitted to, or `"tiny"` for the bundled one.
            head: File of the head, or `owner/repository/file` on the Hub; None: the bundled head for the bundled CLIP,
                else LAION's. The head always computes in float32.
            **options: `device`, `dtype` and `batch_size` as in `DifferentiableClipReward`.
        """
        super().__init__(model, **options)
        if head is None:
            head = TINY_HEAD if str(model) == TINY else LAION_HEAD
        self._head_source = resolve_weights(head)
        self._head: AestheticHead | None = None

    @property
    def head(self) -> AestheticHead:
        """The head, which is loaded at its first use.

        Raises:
            ValueError: The file does not contain such a head, or the head does not fit the CLIP model.
        """
        if self._head is None:
            dimensions = self.loaded.model.config.projection_dim  # first, as its error offline names the bundled one
            head = AestheticHead(load_weights(self._head_source)).to(self.device)
            if head.dimensions != dimensions:
                raise ValueError(
                    f"aesthetic head takes embeddings of {head.dimensions} dimensions, but the CLIP model "
                    f"{self.source!r} makes {dimensions}"
                )
            self._head = head
        return self._head

    def load(self) -> None:
        """Load the CLIP model and the head now."""
        _ = self.head

    def unload(self) -> None:
        """Release both."""
        self._head = None
        super().unload()

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score the embeddings; the prompts are not used."""
        return self.head(images)
