"""What diffusers' text-to-image pipelines have in common: text encoders, a denoiser, a VAE, a LoRA format.

A family derives from `TextToImageModel` and adds the rest: what a prompt's conditioning is, and how its denoiser is
called. A model of your own does not need this class; it needs the members of `ddpo_env.models.DiffusionModel`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar

import torch
from diffusers import DiffusionPipeline
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
from torch import Tensor, nn

from ddpo_env.models.image_decoding import check_scaling, decode_latents
from ddpo_env.models.peft_format import adapter_weights, check_saved_adapter
from ddpo_env.models.pipelines import TEXT_ENCODERS
from ddpo_env.models.protocol import Conditioning, ModelAbilities

_CACHED_BYTES = 2**30
_PREPARED_PROMPTS = 1000
"""A larger set of prompts is not encoded completely beforehand: that would take longer than it saves."""


_MOST_PIXELS = 2**14
"""A larger side of an image is a mistake, and would fail later for lack of memory."""


class TextToImageModel(ModelAbilities, ABC):
    """Adapter of a text-to-image pipeline; see `ddpo_env.models.DiffusionModel` for each member."""

    denoiser_name: ClassVar[str]
    """The denoiser's name in the pipeline, and the beginning of its keys in a saved LoRA: unet or transformer."""

    def __init__(self, pipeline: DiffusionPipeline, source: str, resolution: int | None = None) -> None:
        """Read the shapes off the pipeline, and freeze its weights; `resolution` is the images' side in pixels."""
        self.pipeline = pipeline
        self.source = source
        self.resolution = resolution
        self.scheduler = pipeline.scheduler
        self.denoiser: nn.Module = getattr(pipeline, self.denoiser_name)
        for component in pipeline.components.values():
            if isinstance(component, nn.Module):
                component.requires_grad_(False).eval()
        self.offload_text_encoder = self._is_accelerated()
        check_scaling(pipeline.vae.config, source)
        self._encoded: OrderedDict[str, dict[str, Tensor]] = OrderedDict()
        self.latent_shape: tuple[int, ...] = self._latent_shape()
        if resolution is not None:
            self.latent_shape = (self.latent_shape[0], *[self._latent_side(resolution)] * 2)
        unprompted = self.encode_prompts([""])
        self.conditioning_shapes = {name: tuple(tensor.shape[1:]) for name, tensor in unprompted.items()}

    @abstractmethod
    def _encode(self, prompt: str) -> dict[str, Tensor]:
        """Return the conditioning of one prompt, each tensor `(1, ...)`."""

    @abstractmethod
    def predict(self, denoiser: nn.Module, latents: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        """Call `denoiser` as the pipeline does; return its output, latent-shaped."""

    def _latent_shape(self) -> tuple[int, ...]:
        """Return the latent of the denoiser's own `sample_size`, the pipeline's default resolution."""
        config = getattr(self.pipeline, self.denoiser_name).config
        height, width = (config.sample_size,) * 2 if isinstance(config.sample_size, int) else config.sample_size
        return config.in_channels, height, width

    def _patch(self) -> tuple[int, int | None]:
        """Return the side of the denoiser's patches of latents, and how many fit in a row: `None` is no limit."""
        return 1, None

    def _latent_side(self, resolution: int) -> int:
        """Return the latent's side for images of `resolution` pixels.

        Raises:
            ValueError: for a resolution that the VAE or the denoiser cannot have.
        """
        patch, most = self._patch()
        unit = self.pipeline.vae_scale_factor * patch
        most = _MOST_PIXELS // unit if most is None else most
        whole = isinstance(resolution, int) and not isinstance(resolution, bool)
        if not whole or resolution < unit or resolution % unit or resolution > most * unit:
            raise ValueError(
                f"resolution must be a multiple of {unit} pixels (at most {most * unit}) with model {self.source!r}, "
                f"whose VAE scales by {self.pipeline.vae_scale_factor} and whose denoiser takes patches of "
                f"{patch}; got {resolution!r}"
            )
        return resolution // self.pipeline.vae_scale_factor

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Return float32 conditioning `(batch, ...)` by name; each distinct prompt is encoded once.

        Prompts are encoded one by one, so that a prompt's conditioning does not depend on the rest of the batch.
        """
        self._remember(prompts)
        encoded = [self._encoded[prompt] for prompt in prompts]
        bytes_each = sum(tensor.nbytes for tensor in encoded[0].values())
        while len(self._encoded) * bytes_each > _CACHED_BYTES:
            self._encoded.popitem(last=False)
        return {name: torch.cat([one[name] for one in encoded]) for name in encoded[0]}

    def prepare_prompts(self, prompts: Sequence[str]) -> None:
        """Encode prompts beforehand, if encoding each one later would move the text encoders to the device and back.

        At most 1000 prompts are encoded, and only as many as the cache of 1 GiB keeps.
        """
        if self.offload_text_encoder:
            bytes_each = 4 * sum(math.prod(shape) for shape in self.conditioning_shapes.values())
            most = min(_PREPARED_PROMPTS, _CACHED_BYTES // bytes_each - len(self._encoded))
            self._remember(list(dict.fromkeys(prompts))[: max(0, most)])

    @torch.no_grad()
    def _remember(self, prompts: Sequence[str]) -> None:
        """Encode the prompts that are not in the cache, all at once, and mark all prompts as used."""
        unknown = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._encoded]
        if unknown:
            with self._text_encoders_on_device():
                for prompt in unknown:
                    self._encoded[prompt] = {name: tensor.float() for name, tensor in self._encode(prompt).items()}
        for prompt in prompts:
            self._encoded.move_to_end(prompt)

    def save_memory(self, offload_text_encoder: bool | None = None, vae_tiling: bool | None = None) -> None:
        """Choose how the model needs less of an accelerator's memory; `None` leaves a choice as it is.

        Args:
            offload_text_encoder: whether the text encoders are on the accelerator only while they encode; the default
                is yes. On a CPU nothing moves.
            vae_tiling: whether images are decoded one at a time, and those that are larger than the VAE's own
                `sample_size` in tiles that overlap. The VAE is the pipeline's, so this holds for all its resolutions.

        Raises:
            ValueError: for a value that is not a boolean, or a VAE that cannot be tiled.
        """
        for name, value in {"offload_text_encoder": offload_text_encoder, "vae_tiling": vae_tiling}.items():
            if value is not None and not isinstance(value, bool):
                raise ValueError(f"{name} must be True, False or None; got {value!r}")
        vae = self.pipeline.vae
        if vae_tiling and not hasattr(vae, "use_tiling"):
            raise ValueError(
                f"vae_tiling must be False with model {self.source!r}, whose {type(vae).__name__} has none; got True"
            )
        if vae_tiling is not None and vae_tiling != getattr(vae, "use_tiling", False):
            vae.enable_tiling() if vae_tiling else vae.disable_tiling()
        if offload_text_encoder is not None:
            self.offload_text_encoder = offload_text_encoder and self._is_accelerated()
            self._place_text_encoders(self.device)
        if self.offload_text_encoder:
            self._place_text_encoders(torch.device("cpu"))

    def at_resolution(self, resolution: int) -> TextToImageModel:
        """Return the model of the same pipeline for another resolution: they share the weights."""
        resized = type(self)(self.pipeline, self.source, resolution)
        resized._encoded = self._encoded
        return resized

    def forget_prompts(self) -> None:
        """Encode every prompt again, for all resolutions."""
        self._encoded.clear()

    @property
    def device(self) -> torch.device:
        """Device of the denoiser; the text encoders may be on another one."""
        return next(self.denoiser.parameters()).device

    def _is_accelerated(self) -> bool:
        return self.device.type not in ("cpu", "meta")

    @contextmanager
    def _text_encoders_on_device(self) -> Iterator[None]:
        """Keep the text encoders on the device inside this context."""
        self._place_text_encoders(self.device)
        try:
            yield
        finally:
            if self.offload_text_encoder:
                self._place_text_encoders(torch.device("cpu"))

    def _place_text_encoders(self, device: torch.device) -> None:
        for name, component in self.pipeline.components.items():
            if name in TEXT_ENCODERS and component is not None:
                component.to(device)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents `(batch, *latent_shape)` to uint8 images `(batch, height, width, 3)`."""
        return decode_latents(self.pipeline.vae, latents)

    def save_lora(self, denoiser: nn.Module, folder: Path) -> None:
        """Write a LoRA of the denoiser in diffusers' format.

        The file has peft's own key names: with diffusers' old ones, stock `load_lora_weights` loses the attention half
        of a LoRA on attention and convolutions. The scale `alpha / rank` is 1, which diffusers assumes if a file does
        not name it.
        """
        weights = adapter_weights(denoiser)
        self.pipeline.save_lora_weights(folder, **{f"{self.denoiser_name}_lora_layers": weights})
        check_saved_adapter(folder / LORA_WEIGHT_NAME_SAFE, weights, self.denoiser, f"{self.denoiser_name}.")
