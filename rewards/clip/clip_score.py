"""CLIPScore: how well the picture goes with its prompt, as CLIP sees it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from rewards.clip.clip_model import ClipReward


class ClipScore(ClipReward):
    """`logits_per_image / 100`: with OpenAI's models, whose temperature is 1/100, the cosine of picture and prompt."""

    __name__ = "clip_score"
    purpose = "clip"

    def __init__(
        self,
        model: str | Path = "openai/clip-vit-large-patch14",
        *,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "float32",
        batch_size: int = 32,
    ) -> None:
        """Check the arguments; see `ClipReward` for each.

        Args:
            model: As in `ClipReward`, or `"tiny"`: the bundled miniature, which knows the bundled model's vocabulary.
            device: As in `ClipReward`.
            dtype: As in `ClipReward`.
            batch_size: As in `ClipReward`.
        """
        super().__init__(model, device=device, dtype=dtype, batch_size=batch_size)

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return the scaled cosines over 100, (batch,)."""
        return self.clip.logit_scale * self.cosine(images, prompts) / 100
