"""What a diffusion model is: the nine members that every model has, and the abilities that a model may declare.

A prompt becomes conditioning here, and a final latent becomes an image. The environment uses `encode_prompts` and
`decode`; the policy uses `denoiser` and `predict`. Everything else in the package is written against these two classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol, TypeAlias, runtime_checkable

from torch import Tensor, nn

from ddpo_env.models.lora.lora_file import MergedLora, peft_adapters
from ddpo_env.prompts.distributions import Prompt
from ddpo_env.validation.resolution import Resolution
from rewards import Reward, reward_name
from rewards.kinds import KINDS, SampleKind, described, kinds_of

Conditioning: TypeAlias = Mapping[str, Tensor]
"""Conditioning tensors by their diffusers names, each `(batch, ...)`."""
Fields: TypeAlias = Sequence[Mapping[str, Any]]
"""For each prompt, those entries of its metadata that the model takes."""


@runtime_checkable
class DiffusionModel(Protocol):
    """What a diffusion model must offer.

    An object of any class with these members is a model that `load_model` takes: a denoiser of your own. If the model
    can do more, or generates something else than images, its class derives from `ModelAbilities`.
    """

    source: str
    """What `load_model` was given, as a string that finds this model again in this process."""
    latent_shape: tuple[int, ...]
    """Shape of one latent, without the batch."""
    conditioning_shapes: dict[str, tuple[int, ...]]
    """Shape of each conditioning tensor for one prompt, by its diffusers name."""
    scheduler: Any
    """The pipeline's diffusers scheduler; `GaussianSampler.from_scheduler` reads its configuration."""
    denoiser: nn.Module
    """The network that is trained. The model itself never changes its weights."""

    def encode_prompts(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Return float32 conditioning `(batch, *conditioning_shapes[name])` on the model's device."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Turn latents `(batch, *latent_shape)` into uint8 images `(batch, height, width, 3)`.

        A model with another `sample_kind` returns its own kind of sample, `(batch, ...)` in a dtype that NumPy has.
        """
        ...

    def predict(self, denoiser: nn.Module, latents: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        """Call `denoiser` on latents `(batch, ...)` at timesteps `(batch,)`; return its output, latent-shaped."""
        ...

    def save_lora(self, denoiser: nn.Module, folder: Path) -> None:
        """Write the adapters of `denoiser` such that the pipeline's own `load_lora_weights(folder)` reads them."""
        ...


MEMBERS = tuple(name for name in (*DiffusionModel.__annotations__, *vars(DiffusionModel)) if not name.startswith("_"))
"""Names of the nine members."""


class ShapeUnknownError(Exception):
    """The shapes of a model on the meta device depend on numbers, which are not there."""


class ModelAbilities:
    """Abilities beyond `DiffusionModel`, with defaults. A model derives from this class and overrides its own.

    Attributes:
        sample_kind: what `decode` returns, see `rewards.kinds`.
        sample_metadata: what a reward is told about every sample, such as the `sampling_rate` of sounds.
        guidance_embeds: whether the denoiser takes the guidance scale as an input and is called once per step;
            `predict` then finds the scale in `conditioning["guidance"]`, `(batch,)`, on the CPU.
        resolution: of the images in pixels if it is not the model's own, `512` or `"832x1216"`; else `None`.
        arguments: of every call of the model's pipeline, such as `num_frames`.
        guidance_problem: why `guide` is not the guidance of the model's pipeline, if it is not.
        identity: what tells this model's weights from others in any process, such as a hash; `None`: its `source`.
        merged_lora: the LoRA that is part of the frozen weights, if there is one.
        prompt_fields: names of the entries that the metadata of every prompt must have because the conditioning depends
            on them, such as `image`. `encode_prompts` and `prepare_prompts` then get them in the argument `fields`, one
            dictionary for each prompt.
    """

    sample_kind: SampleKind = "image"
    sample_metadata: Mapping[str, Any] = MappingProxyType({})
    guidance_embeds: bool = False
    resolution: Resolution | None = None
    arguments: Mapping[str, Any] = MappingProxyType({})
    guidance_problem: str | None = None
    identity: str | None = None
    merged_lora: MergedLora | None = None
    prompt_fields: tuple[str, ...] = ()

    source: str
    encode_prompts: Callable[..., dict[str, Tensor]]
    decode: Callable[..., Tensor]

    def negative_conditioning(self) -> dict[str, Tensor]:
        """Return what guidance leads away from, each tensor `(1, ...)`: the conditioning of the empty prompt.

        What is not in it, such as an encoded image, is that of the prompt.
        """
        return self.encode_prompts([""])

    def guide(self, negative: Tensor, positive: Tensor, scale: float) -> Tensor:
        """Combine the outputs for the negative prompt and for the prompt: classifier-free guidance, 1 is off."""
        return negative + scale * (positive - negative)

    def check_outputs(self) -> None:
        """Compare `predict` with the model's pipeline: there is none.

        Raises:
            ValueError: if they differ.
        """

    def sampler_options(self, num_inference_steps: int) -> dict[str, Any]:
        """Return keyword arguments for `GaussianSampler.from_scheduler`, such as `sigmas` and `mu`: none."""
        return {}

    def lora_adapters(self, file: Path) -> Mapping[str, Tensor]:
        """Return the adapters of the denoiser in a LoRA file, with scale 1: in peft's format.

        They have the names of its layers: `<layer>.lora_A.weight` `(rank, inputs, ...)`, `<layer>.lora_B.weight`
        `(outputs, rank, ...)`.

        Raises:
            ValueError: for a file that is damaged, in another format or for another model.
        """
        return peft_adapters(file)

    def prepare_prompts(self, prompts: Sequence[str], fields: Fields | None = None) -> None:
        """Prepare for prompts that the environment knows it is going to encode: there is nothing to do."""

    def forget_prompts(self) -> None:
        """Encode every prompt again from now on, because the text encoder may have changed: there is nothing to do."""

    def save_memory(self, offload_text_encoder: bool | None, vae_tiling: bool | None) -> None:
        """Choose how the model needs less of an accelerator's memory, see `load_model`; `None` changes nothing.

        Raises:
            ValueError: for a choice that the model does not have; here, for both.
        """
        choices = {
            "offload_text_encoder": (offload_text_encoder, "text encoder to move"),
            "vae_tiling": (vae_tiling, "VAE with tiles"),
        }
        for name, (value, missing) in choices.items():
            if value:
                raise ValueError(
                    f"{name} must be False with model {self.source!r}, which has no {missing}; got {value!r}"
                )

    @property
    def can_render(self) -> bool:
        """Whether `render` returns images: `decode` does, or `render` is overridden."""
        return self.sample_kind == "image" or type(self).render is not ModelAbilities.render

    def render(self, latents: Tensor) -> Tensor:
        """Return uint8 images `(batch, height, width, 3)` that show latents `(batch, *latent_shape)`: decoded ones."""
        return self.decode(latents)

    def decode_with_gradient(self, latents: Tensor) -> Tensor:
        """Return what `decode` returns, before rounding and with a gradient with respect to the latents.

        Images are `(batch, 3, height, width)` in [0, 1], and videos `(batch, frames, 3, height, width)`.

        Raises:
            ValueError: for a model without such a decoder; here, always.
        """
        raise ValueError(
            f"model {self.source!r} must have a decoder with a gradient for such training; its class does not override "
            "ModelAbilities.decode_with_gradient"
        )

    def with_arguments(self, arguments: Mapping[str, Any]) -> DiffusionModel:
        """Return a model with the same weights and other arguments for its pipeline's call.

        Raises:
            ValueError: for an argument that the pipeline does not take; here, for all.
        """
        raise ValueError(
            f"pipeline_arguments must be empty with model {self.source!r}, which takes none; got {dict(arguments)!r}"
        )

    def at_resolution(self, resolution: Resolution) -> DiffusionModel:
        """Return a model with the same weights whose images have another size in pixels.

        Raises:
            ValueError: for a resolution that the model cannot have; here, for all.
        """
        raise ValueError(
            f"resolution must be None with model {self.source!r}, which has only its own; got {resolution!r}"
        )


def encode(model: DiffusionModel, prompts: Sequence[Prompt]) -> dict[str, Tensor]:
    """Return the conditioning `(batch, ...)` of prompts, of whose metadata the model gets the fields that it takes.

    Raises:
        ValueError: for a prompt without such a field.
    """
    return abilities_of(model).encode_prompts([text for text, _ in prompts], **_fields_of(model, prompts))


def prepare(model: DiffusionModel, prompts: Sequence[Prompt]) -> None:
    """Let a model prepare for prompts, see `ModelAbilities.prepare_prompts`; errors as `encode`."""
    abilities_of(model).prepare_prompts([text for text, _ in prompts], **_fields_of(model, prompts))


def _fields_of(model: DiffusionModel, prompts: Sequence[Prompt]) -> dict[str, Fields]:
    """Return the argument `fields`, if the model takes any."""
    names = abilities_of(model).prompt_fields
    for text, metadata in prompts:
        if missing := [name for name in names if name not in metadata]:
            raise ValueError(
                f"prompts must have {' and '.join(missing)} with model {model.source!r}, which takes one for each "
                f"prompt; got {text!r} with {', '.join(metadata) or 'no metadata'}"
            )
    return {"fields": [{name: metadata[name] for name in names} for _, metadata in prompts]} if names else {}


_ABILITIES = tuple(name for name in vars(ModelAbilities) if not name.startswith("_"))


class _DefaultAbilities(ModelAbilities):
    """The defaults, for a model that does not derive from `ModelAbilities`."""

    def __init__(self, model: DiffusionModel) -> None:
        self.source = model.source
        self.encode_prompts = model.encode_prompts
        self.decode = model.decode


def abilities_of(model: DiffusionModel) -> ModelAbilities:
    """Return the abilities of a model: the model itself if it declares them, else the defaults.

    Raises:
        ValueError: for a model with a member of `ModelAbilities` whose class does not derive from it.
    """
    if isinstance(model, ModelAbilities):
        return model
    if undeclared := [name for name in _ABILITIES if hasattr(model, name)]:
        raise ValueError(
            f"model {model.source!r} has {', '.join(undeclared)}, so its class {type(model).__name__} must derive from "
            "ddpo_env.models.ModelAbilities, which declares such abilities"
        )
    return _DefaultAbilities(model)


def check_reward_and_rendering(model: DiffusionModel, reward: Reward, render_mode: str | None) -> None:
    """Refuse a reward for other samples than the model's, and rendering, if the model has no images.

    Raises:
        ValueError: naming the reward or the render mode, and the model.
    """
    abilities = abilities_of(model)
    kind = abilities.sample_kind
    if kind not in kinds_of(reward):
        raise ValueError(
            f"reward {reward_name(reward)} scores {described(kinds_of(reward))}, and model {model.source!r} generates "
            f"{KINDS[kind]}; give a reward for its samples"
        )
    if render_mode is not None and not abilities.can_render:
        raise ValueError(
            f"render_mode must be None with model {model.source!r}, which generates no images and has no method "
            f"render(latents); got {render_mode!r}"
        )
