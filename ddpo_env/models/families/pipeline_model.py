"""Any diffusers pipeline as a `DiffusionModel`: what it encodes, calls and decodes is seen by watching it.

The pipeline's own code encodes prompts, prepares latents, calls the denoiser and decodes (`watching`), so a pipeline
needs no adapter of its own. `table` holds the few things that a pipeline does not show.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from ddpo_env.models.families.batching import Batching, find_batching, in_batches
from ddpo_env.models.families.conditioning import (
    ConditioningLayout,
    conditioning_in,
    constants_in,
    find_images,
    guidance_in,
)
from ddpo_env.models.families.encoded_prompts import (
    EncodedPrompts,
    PipelinePrompt,
    example_images,
    one_of_each_size,
    pipeline_prompts,
)
from ddpo_env.models.families.parity import TESTED, compare_with_pipeline
from ddpo_env.models.families.resolution import check_resolution
from ddpo_env.models.families.table import GUIDES, check_arguments, fixed_arguments, sample_kind_of, sampling_rate_of
from ddpo_env.models.families.watching import WatchedPipeline
from ddpo_env.models.files.pipelines import TEXT_ENCODERS
from ddpo_env.models.image_decoding import check_scaling, picture_of, samples_of
from ddpo_env.models.lora.adapters import denoiser_adapters, save_adapters
from ddpo_env.models.lora.peft_format import save_peft_adapter
from ddpo_env.models.protocol import Conditioning, Fields, ModelAbilities, ShapeUnknownError
from ddpo_env.models.quantization import loaded_dtype
from ddpo_env.prompts.images import IMAGE
from ddpo_env.validation.options import shown
from ddpo_env.validation.resolution import Resolution

_PIXELS_PER_CALL = 8 * 512 * 512
_SCALES = ("true_cfg_scale", "guidance_scale")
"""Arguments that turn a pipeline's own guidance on; the first that its call takes is used."""


class PipelineModel(ModelAbilities):
    """Adapter of a pipeline; see `ddpo_env.models.DiffusionModel` for each member."""

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        source: str,
        resolution: Resolution | None = None,
        arguments: Mapping[str, Any] | None = None,
    ) -> None:
        """Watch the pipeline once, and freeze its weights.

        Args:
            pipeline: is not changed otherwise.
            source: name of the model.
            resolution: of the images in pixels, `512` or `"832x1216"` (width x height); default: the pipeline's own.
            arguments: of every call of the pipeline, such as `num_frames` or `max_sequence_length`. The `image`
                `prompt:64x48` says that every prompt has its own, of such a width and height.

        Raises:
            ValueError: for a pipeline of another form, or an argument that its call does not take.
        """
        self.pipeline: Any = pipeline
        self.source = source
        self.resolution = resolution
        self.scheduler = pipeline.scheduler
        self.watched = WatchedPipeline(pipeline, source)
        self._scale = next((name for name in _SCALES if name in self.watched.parameters), None)
        self.denoiser: nn.Module = getattr(pipeline, self.watched.denoiser_name)
        self._config: Any = self.denoiser.config
        for component in pipeline.components.values():
            if isinstance(component, nn.Module):
                component.requires_grad_(False).eval()
        self._vae: Any = pipeline.components.get("vae")
        if self._vae is not None and "scaling_factor" in self._vae.config:
            check_scaling(self._vae.config, source)
        self.sample_kind = sample_kind_of(self.watched.call)
        if self.sample_kind == "audio" and (rate := sampling_rate_of(self.pipeline)):
            self.sample_metadata = {"sampling_rate": rate}
        self.guidance_embeds = bool(self._config.get("guidance_embeds", False))
        self.offload_text_encoder = self._is_accelerated()
        self.arguments: dict[str, Any] = dict(arguments or {})
        check_arguments(self.arguments, self.watched.parameters, resolution, source)
        self._examples = example_images(self.arguments.get(IMAGE))
        self.prompt_fields = (IMAGE,) if self._examples else ()
        self._empty = PipelinePrompt.of("", self._examples[0]) if self._examples else PipelinePrompt("")
        self._arguments = self._fixed_arguments(resolution)
        self._encoded = EncodedPrompts()
        self._watch_once()
        self._is_checked = type(pipeline).__name__ in TESTED
        self._batching: Batching | None = "any" if self._is_checked else None

    def encode_prompts(self, prompts: Sequence[str], fields: Fields | None = None) -> dict[str, Tensor]:
        """Return float32 conditioning `(batch, ...)` by name; each distinct prompt is encoded once.

        Prompts are encoded one by one, so that a prompt's conditioning does not depend on the rest of the batch.

        Args:
            prompts: one for each row.
            fields: with the `image` of each prompt, if `prompt_fields` asks for it.

        Raises:
            ValueError: for an image that is missing, cannot be read, or is encoded to another shape than the others.
        """
        return self._encoded.conditioning(pipeline_prompts(prompts, fields, bool(self.prompt_fields)), self._encode)

    def negative_conditioning(self) -> dict[str, Tensor]:
        """Return what the pipeline itself guides away from if it is not told, each tensor `(1, ...)`.

        That is an empty prompt, or zeros. Some pipelines do not guide without a negative prompt; theirs is empty too.
        The image is that of the prompt.
        """
        names = [name for name in self._layout.dtypes if name not in self._layout.images]
        guided: dict[str, Any] = {} if self._scale is None else {"prompt": "", self._scale: 2.0}
        for call in (guided, guided | {"negative_prompt": ""}) if guided else ():
            with self.text_encoders_on_device():
                seen = self._before_denoiser(call)
            negative = {name: seen.get(f"negative_{name}") for name in names}
            if all(value is not None or name in self._layout.masks.values() for name, value in negative.items()):
                return self._layout.pack({name: value for name, value in negative.items() if value is not None})
        encoded = self._encoded.conditioning([self._empty], self._encode)
        return {name: value for name, value in encoded.items() if name not in self._layout.images}

    def guide(self, negative: Tensor, positive: Tensor, scale: float) -> Tensor:
        """Return the guided output as the pipeline computes it."""
        return GUIDES.get(type(self.pipeline).__name__, super().guide)(negative, positive, scale)

    def sampler_options(self, num_inference_steps: int) -> dict[str, Any]:
        """Return the flow times that the pipeline asks its scheduler for, and their shift for its size."""
        arguments = self._unprompted() | self._arguments | {"num_inference_steps": num_inference_steps}
        asked = self.watched.schedule(torch.zeros(1, *self.latent_shape, device=self.device), **arguments)
        options = {name: asked[name] for name in ("sigmas", "mu") if asked.get(name) is not None}
        if "sigmas" in options:
            options["sigmas"] = [float(sigma) for sigma in options["sigmas"]]
        return options

    def predict(self, denoiser: nn.Module, latents: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        """Return what the pipeline hands to its scheduler, without guidance: noise, velocity or clean latent.

        Raises:
            ValueError: without `conditioning["guidance"]`, the same scale for each latent, if the denoiser takes it.
        """
        dtype = loaded_dtype(denoiser)

        def call(latents: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
            arguments = self._arguments | self._layout.arguments(conditioning, dtype)
            if self.guidance_embeds:
                arguments["guidance_scale"] = guidance_in(conditioning, len(latents))
            images = self._layout.prepared_images(conditioning, dtype)
            return self.watched.output(denoiser, latents.to(dtype), timestep, dtype, images, **arguments)

        if self._batching is None:
            first = {name: value[:1] for name, value in conditioning.items()}
            self._batching = find_batching(call, latents[:1], timestep[0], first)
        return in_batches(call, self._batching, latents, timestep, conditioning)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents `(batch, *latent_shape)` to uint8 images `(batch, height, width, 3)`, as the pipeline does.

        An accelerator decodes a few images at a time, or one at a time if the VAE's tiling is on. A CPU decodes one at
        a time, because there the last bits of a convolution depend on the batch: so an image, and its reward, does not
        depend on the other images of the batch.

        Raises:
            NonFiniteSampleError: if the decoder returns NaN or infinite values.
        """
        samples = self.decode_with_gradient(latents)
        return samples if self.sample_kind == "audio" else samples_of(samples)

    def decode_with_gradient(self, latents: Tensor) -> Tensor:
        """Return the same before rounding: images `(batch, 3, height, width)` in [0, 1]; see `ModelAbilities`."""
        one_at_a_time = not self._is_accelerated() or getattr(self._vae, "use_tiling", False)
        rows = 1 if one_at_a_time else max(1, _PIXELS_PER_CALL // math.prod(self.size))
        dtype = latents.dtype if self._vae is None else self._vae.dtype
        parts = []
        for chunk in latents.to(self.device, dtype).split(rows):
            arguments = self._arguments | self._unprompted(len(chunk)) | {"output_type": "pt"}
            images = self._layout.prepared_images(self._layout.zeros(len(chunk), self.device), dtype)
            parts.append(self.watched.decoded(chunk, images, **arguments))
        return torch.cat(parts).float()

    def render(self, latents: Tensor) -> Tensor:
        """Return uint8 images `(batch, height, width, 3)`: of a video three frames, of a sound its waveform."""
        return picture_of(self.decode(latents), self.sample_kind)

    def save_lora(self, denoiser: nn.Module, folder: Path) -> None:
        """Write a LoRA of the denoiser in diffusers' format, or in peft's if the pipeline cannot read one.

        A LoRA that was merged into the model is part of it: the file is for the model without.
        """
        if hasattr(self.pipeline, "save_lora_weights"):
            save_adapters(self.pipeline, self.watched.denoiser_name, denoiser, self.merged_lora, folder)
        else:
            save_peft_adapter(denoiser, folder)

    def lora_adapters(self, file: Path) -> Mapping[str, Tensor]:
        """Return the adapters of the denoiser in a LoRA file of diffusers, kohya or peft; see `ModelAbilities`."""
        return denoiser_adapters(self.pipeline, self.watched.denoiser_name, file, self.source)

    def pipeline_call(self, guidance_scale: float) -> dict[str, Any]:
        """Return the arguments with which the pipeline's own call makes such samples, guided in its own way.

        The prompt, the number of steps and the noise are left to the caller.
        """
        left_out = ("num_inference_steps", "output_type", "prompt")
        arguments = {name: value for name, value in self._arguments.items() if name not in left_out}
        if self.guidance_embeds:
            return arguments | {"guidance_scale": guidance_scale}
        return arguments if guidance_scale == 1 else arguments | (self.guided_call(guidance_scale) or {})

    def prepare_prompts(self, prompts: Sequence[str], fields: Fields | None = None) -> None:
        """Encode prompts beforehand, if encoding each one later would move the text encoders to the device and back.

        At most 1000 prompts are encoded, and only as many as the cache of 1 GiB keeps. If prompts have images,
        one prompt for each size of images is always encoded, so that errors are early.
        """
        if self.offload_text_encoder or self.prompt_fields:
            inputs = pipeline_prompts(prompts, fields, bool(self.prompt_fields))
            chosen = [*one_of_each_size(inputs), *(inputs if self.offload_text_encoder else ())]
            self._encoded.prepare(chosen, self.conditioning_shapes, self._encode)

    def forget_prompts(self) -> None:
        """Encode every prompt again, for all resolutions."""
        self._encoded.clear()

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
        if vae_tiling and not hasattr(self._vae, "use_tiling"):
            kind = type(self._vae).__name__
            raise ValueError(f"vae_tiling must be False with model {self.source!r}, whose {kind} has none; got True")
        if vae_tiling is not None and vae_tiling != getattr(self._vae, "use_tiling", False):
            self._vae.enable_tiling() if vae_tiling else self._vae.disable_tiling()
        if offload_text_encoder is not None:
            self.offload_text_encoder = offload_text_encoder and self._is_accelerated()
            self._place_text_encoders(self.device)
        if self.offload_text_encoder:
            self._place_text_encoders(torch.device("cpu"))

    def with_arguments(self, arguments: Mapping[str, Any]) -> PipelineModel:
        """Return the model of the same pipeline with other arguments for its call: they share the weights."""
        return type(self)(self.pipeline, self.source, self.resolution, arguments)

    def at_resolution(self, resolution: Resolution) -> PipelineModel:
        """Return the model of the same pipeline for another resolution: they share the weights."""
        scale = int(getattr(self.pipeline, "vae_scale_factor", 1))
        places = self._config.get("pos_embed_max_size")
        most = None if places is None else places * self._config.patch_size
        check_resolution(resolution, self.source, scale, most, self._accepts)
        resized = type(self)(self.pipeline, self.source, resolution, self.arguments)
        if not self.prompt_fields:  # an image may be brought to the size of the samples
            resized._encoded = self._encoded
        return resized

    def _accepts(self, height: int, width: int) -> bool:
        """Return whether the pipeline prepares latents for a size that are in proportion to it."""
        try:
            latents = self._before_denoiser(self._unprompted() | {"height": height, "width": width})["latents"]
        except (ValueError, RuntimeError, TypeError):  # a pipeline refuses a size in its own words
            return False
        return latents.numel() * math.prod(self.size) == math.prod(self.latent_shape) * height * width

    @property
    def device(self) -> torch.device:
        """Device of the denoiser; the text encoders may be on another one."""
        return next(self.denoiser.parameters()).device

    def _fixed_arguments(self, resolution: Resolution | None) -> dict[str, Any]:
        """Return the arguments of every call: its size, no guidance, which is the policy's, and the user's own."""
        if resolution is None and "sample_size" not in self._config and self._vae is not None:
            resolution = self._vae.config.get("sample_size")  # that of the images in pretraining
        own = {**self.arguments, IMAGE: self._examples[0]} if self._examples else self.arguments
        return fixed_arguments(self.watched.parameters, self.guidance_embeds, resolution) | own

    @torch.no_grad()
    def _watch_once(self) -> None:
        """Watch the pipeline prepare its latents and encode prompts: both shapes follow, whatever the pipeline is."""
        try:
            seen = self._watch_prompts()
            is_guided = getattr(seen[0]["self"], "do_classifier_free_guidance", False)
            if is_guided and "guidance_scale" in self.watched.parameters:  # a scale of 1 is not off
                self._arguments["guidance_scale"] = 0.0
                seen = self._watch_prompts()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # of any kind, as the pipeline is anybody's
            if self.device.type == "meta" and isinstance(error, RuntimeError):
                raise ShapeUnknownError from error
            given = "".join(f" {name}={shown(value)}" for name, value in self.arguments.items())
            what = f"its call{given and ' with pipeline_arguments'}{given} ended with {type(error).__name__}: {error}"
            raise ValueError(f"model {self.source!r} must be a pipeline that can be watched; {what}") from error
        encoded = [conditioning_in(one, self.watched.parameters, self._arguments) for one in seen]
        made = [one["self"].made for one in seen]
        self.watched.constants = constants_in(made)
        images: frozenset[str] = frozenset()
        if self._examples:
            encoded, images, self.guidance_problem = find_images(made, encoded, self.source)
        self._layout = ConditioningLayout.of(encoded, self.watched.parameters | self._arguments, self.source, images)
        self.conditioning_shapes = self._layout.shapes
        self.latent_shape: tuple[int, ...] = tuple(seen[0]["latents"].shape[1:])
        self.size: tuple[int, int] = (seen[0].get("height") or 1, seen[0].get("width") or 1)
        self._encoded[self._empty] = self._layout.pack(encoded[0])

    def _watch_prompts(self) -> list[dict[str, Any]]:
        """Return what is seen for a short and a long prompt; with images, last for the short one and another image."""
        given = [{"prompt": ""}, {"prompt": "a cat"}] + [{"prompt": "", IMAGE: one} for one in self._examples[1:]]
        with self.text_encoders_on_device():
            return [self._before_denoiser(one) for one in given]

    def check_outputs(self) -> None:
        """Compare what is watched with the pipeline's own call, at two timesteps in one batch.

        This is done once, and for pipelines that the test suite does not know.

        Raises:
            ValueError: if the outputs differ without guidance. With guidance, `guidance_problem` says so.
        """
        if self._is_checked:
            return
        self._is_checked = True
        without, problem = compare_with_pipeline(self)
        self.guidance_problem = self.guidance_problem or problem
        if without is not None:
            name = type(self.pipeline).__name__
            raise ValueError(f"model {self.source!r} must give the outputs of its {name} when it is watched; {without}")

    def guided_call(self, scale: float) -> dict[str, Any] | None:
        """Return the arguments that turn the pipeline's own guidance on; `None` if it has none."""
        if self._scale is None or (self.guidance_embeds and self._scale == "guidance_scale"):
            return None
        empty = {"negative_prompt": ""} if self._scale == "true_cfg_scale" else {}
        return {self._scale: scale, **empty}

    def _before_denoiser(self, given: Mapping[str, Any], seed: int = 0) -> dict[str, Any]:
        arguments = self._arguments | {name: given[name] for name in given if name in self.watched.parameters}
        if "generator" in self.watched.parameters:  # not torch's own, which the user may have seeded
            arguments["generator"] = torch.Generator().manual_seed(seed)
        return self.watched.before_denoiser(**arguments)

    def _unprompted(self, rows: int = 1) -> dict[str, Any]:
        """Return a conditioning for calls in which the prompt has no effect."""
        return self._layout.arguments(self._layout.zeros(rows, self.device), loaded_dtype(self.denoiser))

    @torch.no_grad()
    def _encode(self, prompts: Iterable[PipelinePrompt]) -> Iterator[dict[str, Tensor]]:
        """Yield the conditioning of prompts, each tensor `(1, ...)`."""
        with self.text_encoders_on_device():
            for prompt in prompts:
                seen = self._before_denoiser(prompt.arguments())
                made = {name: seen["self"].made.get(name) for name in self._layout.images}
                packed = self._layout.pack({**conditioning_in(seen, self.watched.parameters, self._arguments), **made})
                self._layout.check_images(packed, prompt.description, self.source)
                yield packed

    def _is_accelerated(self) -> bool:
        return self.device.type not in ("cpu", "meta")

    @contextmanager
    def text_encoders_on_device(self) -> Iterator[None]:
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
