"""Human preference between images of one prompt: CLIP models that were fine-tuned on people's choices.

PickScore (Kirstain et al. 2023, arXiv 2305.01569) and Human Preference Score v2 (Wu et al. 2023, arXiv 2306.09341).
Both have the ViT-H/14 architecture of LAION's CLIP.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from rewards.clip.clip_model import DifferentiableClipReward
from rewards.clip.pixels import letterbox
from rewards.protocol import Images

_VIT_H_14 = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
_PICKSCORE = "yuvalkirstain/PickScore_v1"


class PickScore(DifferentiableClipReward):
    """`exp(logit_scale) · cos(image, prompt)`, about 16 to 26. Some publications divide it by 26."""

    __name__ = "pickscore"

    def __init__(self, model: str | Path = _PICKSCORE, processor: str | Path | None = None, **options: Any) -> None:
        """Check the arguments.

        Args:
            model: Folder or Hub id of a `CLIPModel`.
            processor: Folder or Hub id of the tokenizer and image processor; None: the model's own. The published
                PickScore has none, so for it None means LAION's.
            **options: `device`, `dtype` and `batch_size` as in `DifferentiableClipReward`.
        """
        if processor is None and str(model) == _PICKSCORE:
            processor = _VIT_H_14
        super().__init__(model, None, processor, **options)

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return the scaled cosines, (batch,)."""
        return self.loaded.logit_scale * self.cosine(images, prompts)


class HPSv2(DifferentiableClipReward):
    """`cos(image, prompt)` of HPS v2.1, about 0.2 to 0.35."""

    __name__ = "hps_v2"

    def __init__(
        self,
        model: str | Path = _VIT_H_14,
        weights: str | Path | None = "xswu/HPSv2/HPS_v2.1_compressed.pt",
        **options: Any,
    ) -> None:
        """Check the arguments.

        Args:
            model: Folder or Hub id with the architecture, the tokenizer and the image processor.
            weights: The fine-tuned weights in open_clip's layout; None: the weights of `model`, a converted folder.
            **options: `device`, `dtype` and `batch_size` as in `DifferentiableClipReward`.
        """
        super().__init__(model, weights, **options)

    def prepare(self, images: Images) -> list[Image.Image]:
        """Fit the whole image into the model's square, with black borders: HPSv2 pads where CLIP crops."""
        return [_letterboxed(Image.fromarray(image), self.loaded.image_size) for image in images]

    def prepare_pixels(self, images: Tensor) -> Tensor:
        """Fit the whole image into the square, as `prepare` does."""
        return letterbox(images, self.loaded.image_size)

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return the cosines, (batch,)."""
        return self.cosine(images, prompts)


def _letterboxed(image: Image.Image, side: int) -> Image.Image:
    """Resize the longest side to `side` pixels and centre the image on a black square (open_clip `ResizeMaxSize`)."""
    scale = side / max(image.size)
    width, height = (max(round(length * scale), 1) for length in image.size)
    square = Image.new("RGB", (side, side))
    square.paste(image.resize((width, height), Image.Resampling.BICUBIC), ((side - width) // 2, (side - height) // 2))
    return square
