"""What a pipeline must do to pass: the checks of one pipeline, one after the other."""

from __future__ import annotations

import copy
import inspect
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import wraps
from typing import Any, NamedTuple

import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from ddpo_env.models.families.pipeline_model import PipelineModel
from ddpo_env.sampler.gaussian_sampler import GaussianSampler

PROMPTS = ("a cat", "a red cat sits on the roof of the house and looks at the moon")
SCALE = 3.0
TOLERANCE = 1e-4
"""Largest difference, relative to the largest value if that is above 1."""

_MIN_STD = 0.02
"""As in Stable Diffusion's presets: some schedulers end with a step without noise."""
_OWN = ("prompt", "negative_prompt", "generator", "num_inference_steps", "output_type", "latents", "return_dict")
_SCALES = ("guidance_scale", "true_cfg_scale")


class DifferentError(Exception):
    """Two results that must be the same are not."""


class Generated(NamedTuple):
    """What a pipeline generated, `(prompts, ...)` each: samples, and the latents after its last step."""

    samples: Tensor
    latents: Tensor


@dataclass
class Found:
    """What the checks of a pipeline found.

    Attributes:
        figures: figure or remark by check, in order; a check that did not pass is missing.
        failed: the check that did not pass.
        reason: why.
    """

    figures: dict[str, Any] = field(default_factory=dict)
    failed: str = ""
    reason: str = ""
    trace: str = ""


def check_pipeline(pipeline: Any, inputs: dict[str, Any]) -> Found:
    """Check a pipeline with the arguments of one call.

    Args:
        pipeline: with random weights.
        inputs: arguments with which its own call works.
    """
    found = Found()
    door = Door(pipeline, inputs)
    checks = (door.built, door.encoded, door.rows, door.calls, door.unguided, door.decoded, door.sampler, door.guided)
    for check in checks:
        try:
            found.figures[check.__name__] = check()
        except Exception as error:
            found.failed = check.__name__
            found.reason = f"{type(error).__name__}: {error}"
            found.trace = traceback.format_exc()
            break
    return found


class Door:
    """The checks of a pipeline; each one returns its figure and uses what the one before made."""

    model: PipelineModel
    noise: Tensor

    def __init__(self, pipeline: Any, inputs: dict[str, Any]) -> None:
        self.pipeline = pipeline
        self.steps = inputs.get("num_inference_steps", 2)
        parameters = inspect.signature(type(pipeline).__call__).parameters
        self.arguments = {
            name: value
            for name, value in inputs.items()
            if name in parameters
            and not name.startswith(("prompt", "negative_prompt", "callback"))
            and name not in (*_OWN, *_SCALES)
        }
        if "strength" in parameters:  # with less, the start is not noise
            self.arguments["strength"] = 1.0
        self.scale = next((name for name in _SCALES[::-1] if name in parameters), None)
        self.draws_own_noise = False
        self.takes_negative = "negative_prompt" in parameters

    def built(self) -> str:
        """Build the model."""
        self.model = PipelineModel(self.pipeline, type(self.pipeline).__name__, arguments=self.arguments)
        generator = torch.Generator().manual_seed(1)
        self.noise = torch.randn(2, *self.model.latent_shape, generator=generator)
        return str(tuple(self.model.latent_shape))

    def encoded(self) -> str:
        """Encode prompts of different lengths; each tensor has the shape that the model says."""
        self.conditioning = self.model.encode_prompts(PROMPTS)
        for name, value in self.conditioning.items():
            if tuple(value.shape) != (2, *self.model.conditioning_shapes[name]):
                raise DifferentError(
                    f"{name} has shape {tuple(value.shape)}, not {self.model.conditioning_shapes[name]}"
                )
        return ", ".join(f"{name} {tuple(value.shape[1:])}" for name, value in self.conditioning.items())

    def rows(self) -> float:
        """Predict two rows at two timesteps, together and alone, with gradients."""
        timesteps = self._schedule()[[0, -1]]
        self.model.denoiser.requires_grad_(True)
        together = self._predict(self.noise, timesteps, self.conditioning)
        together.square().mean().backward()
        gradients = [weight.grad for weight in self.model.denoiser.parameters() if weight.grad is not None]
        self.model.denoiser.requires_grad_(False)
        if not gradients or not all(bool(one.isfinite().all()) for one in gradients):
            raise DifferentError(f"{len(gradients)} gradients, not all finite")
        if not any(bool(one.any()) for one in gradients):
            raise DifferentError("all gradients are 0")
        alone = [
            self._predict(self.noise[[row]], timesteps[[row]], {k: v[[row]] for k, v in self.conditioning.items()})
            for row in (0, 1)
        ]
        if together.shape != self.noise.shape:
            raise DifferentError(f"output has shape {tuple(together.shape)}, latents {tuple(self.noise.shape)}")
        return _difference(together.detach(), torch.cat(alone).detach())

    def calls(self) -> str:
        """Say which rows one call takes."""
        return {"any": "any", "timestep": "one timestep", "row": "one row"}[self.model._batching or "any"]

    def unguided(self) -> float:
        """Follow the pipeline's scheduler without guidance, and compare with the pipeline's own output."""
        try:
            if "latents" not in self.model.watched.parameters:
                raise DifferentError("no latents")
            self.plain = self._reference({})
        except Exception:  # it takes no latents of the shape that its denoiser sees
            self.draws_own_noise = True
            self.noise = torch.cat(
                [
                    self.model._before_denoiser({"prompt": prompt}, seed)["latents"]
                    for seed, prompt in enumerate(PROMPTS)
                ]
            )
            self.plain = self._reference({})
        return self._compared(self._path(None), self.plain)

    def guided(self) -> float | str:
        """The same with guidance."""
        if self.model.guidance_embeds and self.scale != "true_cfg_scale":
            return "embedded"
        if self.scale is None:
            return "none"
        reference = self._reference({self.scale: SCALE})
        if torch.equal(reference.latents, self.plain.latents) and self.takes_negative:
            reference = self._reference({self.scale: SCALE, "negative_prompt": ""})
        if torch.equal(reference.latents, self.plain.latents):
            return "none"
        return self._compared(self._path(self.model.negative_conditioning()), reference)

    def _compared(self, latents: Tensor, reference: Generated) -> float:
        """Return the largest difference of the last latents, and check the samples too."""
        _difference(self._samples(latents), reference.samples)
        return _difference(latents, reference.latents)

    def decoded(self) -> str:
        """Decode to finite samples."""
        samples = self.model.decode(self.noise)
        if len(samples) != 2 or not bool(samples.float().isfinite().all()):
            raise DifferentError(f"decoded {tuple(samples.shape)}, not all finite")
        return f"{str(samples.dtype).removeprefix('torch.')} {tuple(samples.shape[1:])}"

    def sampler(self) -> str:
        """Read the sampler's table off the pipeline's scheduler, or off one that replaces it."""
        own = type(self.pipeline.scheduler).__name__
        try:
            GaussianSampler.from_model(self.model, self.steps, min_std=_MIN_STD)
            return own
        except (ValueError, TypeError, AttributeError) as error:
            config = self.pipeline.scheduler.config
            is_flow = "Flow" in own or "flow" in str(config.get("prediction_type")) or config.get("use_flow_sigmas")
            other = FlowMatchEulerDiscreteScheduler if is_flow else DDIMScheduler
            replaced = copy.copy(self.pipeline)
            vars(replaced)["scheduler"] = other.from_config(config)
            try:
                model = PipelineModel(replaced, self.model.source, arguments=self.arguments)
                GaussianSampler.from_model(model, self.steps, min_std=_MIN_STD)
            except Exception as second:
                raise DifferentError(f"{own}: {error}; {other.__name__}: {second}") from second
            return f"{other.__name__} in place of {own}"

    def _predict(self, latents: Tensor, timesteps: Tensor, conditioning: dict[str, Tensor]) -> Tensor:
        if self.model.guidance_embeds:
            conditioning = {**conditioning, "guidance": torch.full((len(latents),), 3.5)}
        return self.model.predict(self.model.denoiser, latents, timesteps, conditioning)

    def _scheduler(self) -> Any:
        scheduler = copy.deepcopy(self.pipeline.scheduler)
        arguments = self.model._unprompted() | self.model._arguments | {"num_inference_steps": self.steps}
        scheduler.set_timesteps(**self.model.watched.schedule(self.noise[:1], **arguments))
        return scheduler

    def _schedule(self) -> Tensor:
        return self._scheduler().timesteps

    def _path(self, negative: dict[str, Tensor] | None) -> Tensor:
        """Return the last latents of our own loop, prompt by prompt."""
        return torch.cat([self._path_of(row, negative) for row in (0, 1)])

    @torch.no_grad()
    def _path_of(self, row: int, negative: dict[str, Tensor] | None) -> Tensor:
        scheduler = self._scheduler()
        conditioning = {name: value[[row]] for name, value in self.conditioning.items()}
        latents = self.noise[[row]] * getattr(scheduler, "init_noise_sigma", 1.0)
        takes = inspect.signature(scheduler.step).parameters
        options = {"generator": torch.Generator().manual_seed(0)} if "generator" in takes else {}
        for timestep in scheduler.timesteps:
            scaled = (
                scheduler.scale_model_input(latents, timestep) if hasattr(scheduler, "scale_model_input") else latents
            )
            timesteps = timestep[None]
            output = self._predict(scaled, timesteps, conditioning)
            if negative is not None:
                output = self.model.guide(self._predict(scaled, timesteps, negative), output, SCALE)
            latents = scheduler.step(output, timestep, latents, return_dict=False, **options)[0]
        return latents

    @torch.no_grad()
    def _reference(self, guidance: dict[str, Any]) -> Generated:
        """Return what the pipeline itself generates from the same noise, prompt by prompt."""
        fixed = {name: value for name, value in self.model._arguments.items() if name != "prompt"}
        if self.model.guidance_embeds:
            fixed["guidance_scale"] = 3.5
        given = fixed | guidance | {"num_inference_steps": self.steps, "output_type": "pt", "return_dict": False}
        samples, latents = [], []
        for row, prompt in enumerate(PROMPTS):
            each = given | {"prompt": prompt, "generator": torch.Generator().manual_seed(row)}
            if not self.draws_own_noise:
                each |= {"latents": self.noise[[row]].clone(), "generator": torch.Generator().manual_seed(0)}
            each = {name: value for name, value in each.items() if name in self.model.watched.parameters}
            with _last_latents(self.pipeline.scheduler) as last:
                samples.append(_tensor(self.pipeline(**each)[0]))
            latents.append(last[-1])
        return Generated(torch.cat(samples), torch.cat(latents))

    @torch.no_grad()
    def _samples(self, latents: Tensor) -> Tensor:
        """Return what the pipeline makes of latents, before they are rounded."""
        arguments = self.model._arguments | self.model._unprompted() | {"output_type": "pt"}
        if self.model.guidance_embeds:
            arguments["guidance_scale"] = 3.5
        arguments = {name: value for name, value in arguments.items() if name in self.model.watched.parameters}
        return torch.cat([_tensor(self.model.watched.decoded(one, **arguments)) for one in latents.split(1)])


@contextmanager
def _last_latents(scheduler: Any) -> Iterator[list[Tensor]]:
    """Note the latents that each step of a scheduler returns."""
    step, seen = scheduler.step, []

    @wraps(step)
    def note(*arguments: Any, **options: Any) -> Any:
        result = step(*arguments, **options)
        seen.append(result[0])
        return result

    scheduler.step = note
    try:
        yield seen
    finally:
        del scheduler.step


def _tensor(value: Any) -> Tensor:
    return torch.as_tensor(value) if not isinstance(value, list) else torch.stack([torch.as_tensor(v) for v in value])


def _difference(ours: Tensor, reference: Tensor) -> float:
    """Return the largest difference.

    Raises:
        DifferentError: for different shapes, values that are not finite, or a difference above the tolerance.
    """
    if ours.shape != reference.shape:
        raise DifferentError(f"shapes {tuple(ours.shape)} and {tuple(reference.shape)}")
    if not bool(reference.isfinite().all()):
        raise DifferentError("the pipeline's own output is not finite")
    difference = float((ours.double() - reference.double()).abs().max())
    if not difference <= TOLERANCE * max(1.0, float(reference.abs().max())):
        raise DifferentError(f"max difference {difference:.1e} of values up to {float(reference.abs().max()):.1e}")
    return difference
