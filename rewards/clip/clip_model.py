"""CLIP from transformers: images and prompts become unit vectors, which every reward in this folder scores.

Images are preprocessed by the image processor of the model's own folder. It uses Pillow, as the reference
implementations do, so that a score does not depend on which other packages are installed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from rewards.clip.open_clip import clip_from_open_clip
from rewards.clip.pixels import preprocess
from rewards.kinds import images_only
from rewards.networks.pretrained import (
    ModelHolder,
    check_finite,
    check_settings,
    load_network,
    load_processor,
    load_weights,
    resolve_source,
    resolve_weights,
)
from rewards.protocol import Details, Images, Metadata


class ClipEmbedder:
    """A `transformers.CLIPModel` with its tokenizer and image processor, as `load_cached` holds them.

    Attributes:
        model: The model, in evaluation mode.
        logit_scale: The learned factor by which `logits_per_image` multiplies cosines (exp of the parameter).
        image_size: Side of the square image that the vision tower takes, in pixels.
    """

    def __init__(
        self, source: str, device: torch.device, dtype: torch.dtype, processor: str, weights: str | None = None
    ) -> None:
        """Load the model, the tokenizer and the image processor.

        Args:
            source: Folder or Hub id of the model. Only safetensors are loaded.
            device: The device of the model.
            dtype: Dtype of the weights. Embeddings are always normalised in float32.
            processor: Folder or Hub id of the tokenizer and the image processor.
            weights: Other weights for this architecture in open_clip's layout, as `load_weights` takes them.

        Raises:
            ValueError: The weights do not fit the model.
        """
        from transformers import AutoImageProcessor, AutoTokenizer, CLIPConfig, CLIPModel

        if weights is None:
            model = load_network(CLIPModel, source, dtype, use_safetensors=True)
        else:
            settings, _ = CLIPConfig.get_config_dict(source)
            check_settings(settings, f"model {source!r}")
            model = clip_from_open_clip(load_weights(weights), CLIPConfig.from_dict(settings), dtype)
            check_finite(model, f"weights {weights!r}")
        self.model = model.to(device).eval().requires_grad_(False)
        self.image_processor = load_processor(AutoImageProcessor, processor, backend="pil")
        self.tokenizer = load_processor(AutoTokenizer, processor)
        self.logit_scale = float(self.model.logit_scale.float().exp())
        self.image_size = int(self.model.config.vision_config.image_size)
        self._max_length = min(self.tokenizer.model_max_length, self.model.config.text_config.max_position_embeddings)

    def embed_images(self, images: Sequence[Image.Image]) -> Tensor:
        """Return the projected embeddings of images of any size, (batch, dimensions) float32, of length 1."""
        pixels = self.image_processor(images=list(images), input_data_format="channels_last", return_tensors="pt")
        with torch.inference_mode():
            return self._embed(pixels["pixel_values"])

    def embed_pixels(self, pixels: Tensor) -> Tensor:
        """Return the same with a gradient, of images (batch, 3, height, width) in [0, 1]."""
        return self._embed(preprocess(pixels, self.image_processor))

    def _embed(self, pixel_values: Tensor) -> Tensor:
        inputs = pixel_values.to(self.model.device, self.model.dtype)
        return normalize(self.model.get_image_features(inputs).pooler_output.float(), dim=-1)

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Return the projected embeddings of texts, (batch, dimensions) float32, of length 1. Long texts are cut."""
        tokens = self.tokenizer(
            list(texts), padding=True, truncation=True, max_length=self._max_length, return_tensors="pt"
        ).to(self.model.device)
        with torch.inference_mode():
            features = self.model.get_text_features(tokens["input_ids"], tokens["attention_mask"]).pooler_output
            return normalize(features.float(), dim=-1)


@images_only
class ClipReward(ModelHolder[ClipEmbedder], ABC):
    """Base of the rewards that score images by their CLIP embeddings; a subclass implements `score`."""

    def __init__(
        self,
        model: str | Path,
        weights: str | Path | None = None,
        processor: str | Path | None = None,
        /,
        *,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "float32",
        batch_size: int = 32,
    ) -> None:
        """Check the arguments. Nothing is loaded yet.

        Args:
            model: Folder or Hub id of a `CLIPModel`.
            weights: Other weights for this architecture in open_clip's layout: a file, or `owner/repository/file`.
            processor: Folder or Hub id of the tokenizer and image processor; None: the model's own.
            device: `auto`, `cpu`, `cuda:1`, ...; it may differ from the denoiser's device.
            dtype: Dtype of the weights. In half precision two or three digits of a score are correct.
            batch_size: Images per call of the model. It changes the memory and not the scores.

        Raises:
            ValueError: An argument is not valid.
        """
        super().__init__(
            ClipEmbedder,
            model,
            resolve_source(model if processor is None else processor, self.purpose),
            None if weights is None else resolve_weights(weights),
            device=device,
            dtype=dtype,
            batch_size=batch_size,
        )

    def prepare(self, images: Images) -> list[Image.Image]:
        """Convert the array to Pillow images for the image processor."""
        return [Image.fromarray(image) for image in images]

    @abstractmethod
    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return scores, (batch,) float32, of image embeddings, (batch, dimensions) of length 1, and their prompts."""

    def cosine(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return the cosine of each image with its prompt, (batch,). Equal prompts are embedded once."""
        distinct = list(dict.fromkeys(prompts))
        row = {prompt: index for index, prompt in enumerate(distinct)}
        texts = self.loaded.embed_texts(distinct)[[row[prompt] for prompt in prompts]]
        return (images * texts).sum(dim=-1)

    def __call__(
        self, images: Images, prompts: Sequence[str], metadata: Metadata
    ) -> NDArray[np.float32] | tuple[NDArray[np.float64], Details]:
        """Return the scores of a batch of images, (batch,) float32; a subclass may return details too."""
        scores: list[NDArray[Any]] = [np.zeros(0, np.float32)]
        for start in range(0, len(images), self.batch_size):
            batch = slice(start, start + self.batch_size)
            embeddings = self.loaded.embed_images(self.prepare(images[batch]))
            scores.append(self.score(embeddings, prompts[batch]).cpu().numpy())
        return np.concatenate(scores)


class DifferentiableClipReward(ClipReward):
    """Base of those whose score does not change while a run goes on, so that it has a gradient of its own."""

    def prepare_pixels(self, images: Tensor) -> Tensor:
        """Do to images, (batch, 3, height, width) in [0, 1], what `prepare` does to arrays."""
        return images

    def differentiable_score(self, samples: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return the scores of images, (batch, 3, height, width) in [0, 1], with a gradient, (batch,) float32."""
        return self.score(self.loaded.embed_pixels(self.prepare_pixels(samples.float())), prompts)
