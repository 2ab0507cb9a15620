"""What people prefer among pictures of one prompt: CLIP models that were fine-tuned on their choices.

PickScore (Kirstain et al. 2023, arXiv 2305.01569) and Human Preference Score v2 (Wu et al. 2023, arXiv 2306.09341),
both of the ViT-H/14 architecture of LAION's CLIP.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from rewards.clip.clip_model import ClipReward
from rewards.protocol import Images

_VIT_H_14 = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
_PICKSCORE = "yuvalkirstain/PickScore_v1"


class PickScore(ClipReward):
    """`exp(logit_scale) · cos(picture, prompt)`, about 16 to 26; some divide it by 26."""

    __name__ = "pickscore"

    def __init__(
        self,
        model: str | Path = _PICKSCORE,
        processor: str | Path | None = None,
        *,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "float32",
        batch_size: int = 32,
    ) -> None:
        """Check the arguments; see `ClipReward` for each.

        Args:
            model: As in `ClipReward`.
            processor: None: the model's own, and LAION's for the published PickScore, which goes without.
            device: As in `ClipReward`.
            dtype: As in `ClipReward`.
            batch_size: As in `ClipReward`.
        """
        if processor is None and str(model) == _PICKSCORE:
            processor = _VIT_H_14
        super().__init__(model, processor=processor, device=device, dtype=dtype, batch_size=batch_size)

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return the scaled cosines, (batch,)."""
        return self.clip.logit_scale * self.cosine(images, prompts)


class HPSv2(ClipReward):
    """`cos(picture, prompt)` of HPS v2.1, about 0.2 to 0.35."""

    __name__ = "hps_v2"

    def __init__(
        self,
        model: str | Path = _VIT_H_14,
        weights: str | Path | None = "xswu/HPSv2/HPS_v2.1_compressed.pt",
        *,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "float32",
        batch_size: int = 32,
    ) -> None:
        """Check the arguments; see `ClipReward`.

        Args:
            model: Where architecture, tokenizer and image processor come from.
            weights: The fine-tuned weights in open_clip's layout; None: those of `model`, a converted folder.
            device: As in `ClipReward`.
            dtype: As in `ClipReward`.
            batch_size: As in `ClipReward`.
        """
        super().__init__(model, weights, device=device, dtype=dtype, batch_size=batch_size)

    def prepare(self, images: Images) -> list[Image.Image]:
        """Fit the whole picture into the model's square, on black: HPSv2 pads where CLIP crops."""
        return [_letterboxed(Image.fromarray(image), self.clip.image_size) for image in images]

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return the cosines, (batch,)."""
        return self.cosine(images, prompts)


def _letterboxed(image: Image.Image, side: int) -> Image.Image:
    """Resize the longest side to `side` pixels and centre the picture on a black square (open_clip `ResizeMaxSize`)."""
    scale = side / max(image.size)
    width, height = (max(round(length * scale), 1) for length in image.size)
    square = Image.new("RGB", (side, side))
    square.paste(image.resize((width, height), Image.Resampling.BICUBIC), ((side - width) // 2, (side - height) // 2))
    return square
