"""CLIP as transformers has it: pictures and prompts to unit vectors, and the base of every reward made from them.

Preprocessing is the image processor of the model's own folder, in Pillow as in the reference implementations, so that a
score does not depend on what else is installed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from rewards.clip.open_clip import clip_from_open_clip
from rewards.devices import resolve_device, resolve_dtype
from rewards.pretrained import (
    free_memory,
    load_weights,
    resolve_source,
    resolve_weights,
    shared,
)
from rewards.protocol import Images, Metadata, images_only


class ClipEmbedder:
    """A `transformers.CLIPModel` with its tokenizer and image processor.

    Attributes:
        model: The model, in evaluation mode.
        logit_scale: exp of its learned temperature: what cosines are multiplied with in `logits_per_image`.
        image_size: Side of the square that the vision tower sees, in pixels.
    """

    def __init__(
        self, source: str, processor: str, device: torch.device, dtype: torch.dtype, weights: str | None = None
    ) -> None:
        """Load everything.

        Args:
            source: Folder or Hub id of the model; only safetensors are loaded.
            processor: Folder or Hub id of the tokenizer and the image processor.
            device: Where the model computes.
            dtype: Of its weights; embeddings are normalised in float32 all the same.
            weights: File with other weights for this architecture in open_clip's layout, as `load_weights` takes it.

        Raises:
            ValueError: The weights do not fit the model.
        """
        from transformers import AutoImageProcessor, AutoTokenizer, CLIPConfig, CLIPModel

        if weights is None:
            model = CLIPModel.from_pretrained(source, dtype=dtype, use_safetensors=True)
        else:
            model = clip_from_open_clip(load_weights(weights), CLIPConfig.from_pretrained(source), dtype)
        self.model = model.to(device).eval().requires_grad_(False)
        self.image_processor = AutoImageProcessor.from_pretrained(processor, backend="pil")
        self.tokenizer = AutoTokenizer.from_pretrained(processor)
        self.logit_scale = float(self.model.logit_scale.float().exp())
        self.image_size = int(self.model.config.vision_config.image_size)
        self._max_length = min(self.tokenizer.model_max_length, self.model.config.text_config.max_position_embeddings)

    def embed_images(self, images: Sequence[Image.Image]) -> Tensor:
        """Return the projected embeddings of pictures of any size, (batch, dimensions) float32, of length 1."""
        pixels = self.image_processor(images=list(images), input_data_format="channels_last", return_tensors="pt")
        pixel_values = pixels["pixel_values"].to(self.model.device, self.model.dtype)
        with torch.inference_mode():
            return normalize(self.model.get_image_features(pixel_values).pooler_output.float(), dim=-1)

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Return the projected embeddings of texts, (batch, dimensions) float32, of length 1; long texts are cut."""
        tokens = self.tokenizer(
            list(texts), padding=True, truncation=True, max_length=self._max_length, return_tensors="pt"
        ).to(self.model.device)
        with torch.inference_mode():
            features = self.model.get_text_features(tokens["input_ids"], tokens["attention_mask"]).pooler_output
            return normalize(features.float(), dim=-1)


@images_only
class ClipReward(ABC):
    """Base of the rewards that score pictures by their CLIP embedding; a subclass implements `score`.

    The model is loaded by the first call or by `load`, shared with every reward that uses the same one, and let go by
    `unload`; the next call loads it again.

    Attributes:
        purpose: Which of the bundled models `model="tiny"` is; empty: none.
    """

    purpose: ClassVar[str] = ""

    def __init__(
        self,
        model: str | Path,
        weights: str | Path | None = None,
        processor: str | Path | None = None,
        *,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "float32",
        batch_size: int = 32,
    ) -> None:
        """Check the arguments; nothing is loaded yet.

        Args:
            model: Folder or Hub id of a `CLIPModel`.
            weights: Other weights for that architecture, in open_clip's layout: a file, or `owner/repository/file`.
            processor: Folder or Hub id of tokenizer and image processor; None: the model's own.
            device: `auto`, `cpu`, `cuda:1`, ...; it need not be the denoiser's.
            dtype: Of the weights. In half precision a score is good to two or three digits.
            batch_size: Pictures in one call of the model; a matter of memory only.

        Raises:
            ValueError: An argument is not valid.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1; got {batch_size}")
        self.device = resolve_device(device)
        self.dtype = resolve_dtype(dtype, self.device)
        self.batch_size = batch_size
        self._source = resolve_source(model, self.purpose)
        self._processor = self._source if processor is None else resolve_source(processor)
        self._weights = None if weights is None else resolve_weights(weights)
        self._clip: ClipEmbedder | None = None

    @property
    def clip(self) -> ClipEmbedder:
        """The model, loaded if it is not."""
        if self._clip is None:
            self._clip = shared(ClipEmbedder, self._source, self._processor, self.device, self.dtype, self._weights)
        return self._clip

    def load(self) -> None:
        """Load the model now: what can go wrong goes wrong here and not after the first pictures are drawn."""
        _ = self.clip

    def unload(self) -> None:
        """Let the model go; its memory is free once no other reward uses it."""
        self._clip = None
        free_memory(self.device)

    def prepare(self, images: Images) -> list[Image.Image]:
        """Turn the array into pictures for the image processor."""
        return [Image.fromarray(image) for image in images]

    @abstractmethod
    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score embeddings, (batch, dimensions) float32 of length 1, and their prompts: (batch,) float32."""

    def cosine(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return the cosine of each picture with its prompt, (batch,); equal prompts are embedded once."""
        distinct = list(dict.fromkeys(prompts))
        row = {prompt: index for index, prompt in enumerate(distinct)}
        texts = self.clip.embed_texts(distinct)[[row[prompt] for prompt in prompts]]
        return (images * texts).sum(dim=-1)

    def __call__(self, images: Images, prompts: Sequence[str], metadata: Metadata) -> NDArray[np.float32]:
        """Score a batch of pictures, (batch,) float32."""
        scores: list[NDArray[Any]] = [np.zeros(0, np.float32)]
        for start in range(0, len(images), self.batch_size):
            batch = slice(start, start + self.batch_size)
            embeddings = self.clip.embed_images(self.prepare(images[batch]))
            scores.append(self.score(embeddings, prompts[batch]).cpu().numpy())
        return np.concatenate(scores)
