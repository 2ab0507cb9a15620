"""CLIPScore: how well an image matches its prompt, measured by CLIP."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from rewards.clip.clip_model import DifferentiableClipReward


class ClipScore(DifferentiableClipReward):
    """`logits_per_image / 100`. With OpenAI's models this is the cosine of image and prompt."""

    __name__ = "clip_score"
    purpose = "clip"

    def __init__(self, model: str | Path = "openai/clip-vit-large-patch14", **options: Any) -> None:
        """Check the arguments.

        Args:
            model: Folder or Hub id of a `CLIPModel`, or `"tiny"` for the bundled one.
            **options: `device`, `dtype` and `batch_size` as in `DifferentiableClipReward`.
        """
        super().__init__(model, **options)

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return the scaled cosines divided by 100, (batch,)."""
        return self.loaded.logit_scale * self.cosine(images, prompts) / 100
