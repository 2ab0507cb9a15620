"""Watches a diffusers pipeline call its own denoiser, so that nobody has to write that call again.

Every pipeline knows how to prepare latents, call its denoiser and decode. A watched call is the pipeline's own
`__call__` on a shallow copy of the pipeline whose scheduler is replaced: its timesteps are those that are asked for,
and its `step` takes the denoiser's output and ends the call. Weights are shared with the pipeline, which never changes.
"""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from accelerate.utils import recursively_apply
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from ddpo_env.models.families.parity import record_steps
from ddpo_env.models.families.stand_ins import (
    Ended,
    WithDtype,
    is_call_of,
    stand_in,
    watched_pipeline,
    watched_processor,
    watched_scheduler,
)
from ddpo_env.models.files.pipelines import DENOISERS, TEXT_ENCODERS

_PROCESSORS = {"image_processor", "video_processor"}


class WatchedPipeline:
    """A pipeline whose call can be looked into.

    Attributes:
        pipeline: the pipeline; it is not changed.
        denoiser_name: name of its denoiser.
        call: its call, without `torch.no_grad`.
        parameters: the parameters of its call, with their defaults.
        constants: names of what its methods `prepare_...` return for every prompt, which is therefore prepared once.
    """

    constants: frozenset[str] = frozenset()

    def __init__(self, pipeline: DiffusionPipeline, source: str) -> None:
        """Check the form of the pipeline.

        Raises:
            ValueError: as `check_form`.
        """
        self.pipeline = pipeline
        self.denoiser_name = check_form(type(pipeline), source)
        second = f"{self.denoiser_name}_2"
        if pipeline.components.get(second) is not None:
            raise ValueError(
                f"model {source!r} must have one denoiser; it has a {second} too, for some of the timesteps, and a "
                f"LoRA of one of the two would not reach the other. Leave it out: {second}=None, boundary_ratio=None"
            )
        self.call = _call_of(type(pipeline))
        self.parameters = _parameters(self.call)
        self._scheduler = stand_in(vars(pipeline)["scheduler"], watched_scheduler)
        self._prepared: dict[Any, Any] = {}
        self._processed: dict[Any, Any] = {}
        self._takes_prepared_latents = False
        self._decodes_without_steps = True

    def before_denoiser(self, **arguments: Any) -> dict[str, Any]:
        """Return the local variables of the pipeline's call when it calls the denoiser for the first time.

        Those that `encode_prompt` returned have the values that it returned. The attribute `made` of its `self` has, by
        name, what the pipeline's methods `prepare_...` returned, without the latents.
        """
        found: dict[str, Any] = {}
        watched = self._copy(None)

        def look(*_: Any) -> None:
            frame = sys._getframe(1)
            while frame is not None and not is_call_of(frame, watched):
                frame = frame.f_back  # type: ignore[assignment]
            found.update(frame.f_locals)
            found.update(watched.encoded)
            raise Ended

        denoiser: nn.Module = getattr(self.pipeline, self.denoiser_name)
        hook = denoiser.register_forward_pre_hook(look)
        try:
            with torch.no_grad():
                self._run(watched, arguments)
        finally:
            hook.remove()
        if "latents" not in found:
            seen = ", ".join(sorted(found)) or "ended before"
            raise ValueError(f"it must call its {self.denoiser_name} with latents; it had {seen}")
        self._scheduler = watched.scheduler
        self._takes_prepared_latents = watched.made_latents is not None and watched.made_latents is found["latents"]
        return found

    def schedule(self, latents: Tensor, **arguments: Any) -> dict[str, Any]:
        """Return the arguments with which the pipeline asks its scheduler for timesteps."""
        watched = self._copy(None, latents, arguments)
        watched.scheduler.ends_when_asked, watched.denoiser_device = True, latents.device
        try:
            with torch.no_grad():
                self._run(watched, arguments)
        except RuntimeError:
            if latents.device.type != "meta":
                raise
            zeros = partial(torch.zeros_like, device="cpu")  # the pipeline reads a mask
            return self.schedule(zeros(latents), **recursively_apply(zeros, arguments))
        return dict(watched.scheduler.asked)

    def output(
        self,
        denoiser: nn.Module,
        latents: Tensor,
        timestep: Tensor,
        dtype: torch.dtype,
        given_images: Mapping[str, Tensor] | None = None,
        **arguments: Any,
    ) -> Tensor:
        """Return what the pipeline hands to its scheduler's `step`, when each row has its own timestep `(batch,)`.

        Args:
            denoiser: is called instead of the pipeline's.
            latents: `(batch, ...)`, as the pipeline has them when it calls the denoiser.
            timestep: of each row.
            dtype: of the denoiser's inputs.
            given_images: what the pipeline prepares of the rows' own images, `(batch, ...)`, by its name in the call.
            **arguments: of the pipeline's call.
        """
        watched = self._copy(timestep[None], latents, arguments, given_images)
        vars(watched)[self.denoiser_name] = denoiser
        arguments |= self._same_noise()
        for name in TEXT_ENCODERS & vars(watched).keys():  # pipelines give the prompt's conditioning their dtype
            vars(watched)[name] = WithDtype(vars(watched)[name], dtype)
        self._run(watched, arguments)
        if watched.scheduler.output is None:
            raise ValueError("it must hand the output of its denoiser to its scheduler's step")
        output: Tensor = watched.scheduler.output
        return output

    def recorded(self, **arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Call the pipeline as it is, see `record_steps`."""
        watched = self._copy(None)
        vars(watched)["scheduler"] = self.pipeline.scheduler
        return record_steps(watched, self.call, **arguments)

    def decoded(self, latents: Tensor, given_images: Mapping[str, Tensor] | None = None, **arguments: Any) -> Any:
        """Return the samples that the pipeline makes of latents.

        The denoiser is not called, except for a pipeline that needs a step: it makes one, whose result is replaced.
        `given_images` are as for `output`.
        """
        for steps in (0, 1) if self._decodes_without_steps else (1,):
            given = arguments | self._same_noise() | {"return_dict": False}
            watched = self._copy(torch.zeros(steps, device=latents.device), latents, given, given_images)
            watched.scheduler.last_latents = latents
            try:
                return self._run(watched, given)[0]
            except (ValueError, RuntimeError, NameError) as error:
                if steps == 1 or isinstance(error, torch.OutOfMemoryError):
                    raise
            self._decodes_without_steps = False

    def _same_noise(self) -> dict[str, Any]:
        """Return a generator for what a pipeline draws beside its latents: encoded images are samples."""
        return {"generator": torch.Generator().manual_seed(0)} if "generator" in self.parameters else {}

    def _copy(
        self,
        timesteps: Tensor | None,
        latents: Tensor | None = None,
        arguments: dict[str, Any] | None = None,
        given_images: Mapping[str, Tensor] | None = None,
    ) -> Any:
        """Return a pipeline with the same components, and a scheduler with these timesteps: `None` is its own.

        The latents are handed over where the pipeline prepares its own, or among the arguments of its call.
        """
        watched = stand_in(self.pipeline, watched_pipeline)
        scheduler = copy.copy(self._scheduler)
        scheduler.given_timesteps = timesteps
        batch = () if latents is None else (len(latents), latents.dtype, latents.device)
        if latents is not None and arguments is not None and not self._takes_prepared_latents:
            arguments["latents"] = latents
            latents = None
        vars(watched).update(
            scheduler=scheduler,
            given_latents=latents,
            given_images=given_images or {},
            batch=batch,
            made={},
            made_latents=None,
            encoded={},
            prepared=self._prepared,
            constants=self.constants,
            denoiser_device=_device(getattr(self.pipeline, self.denoiser_name)),
        )
        for name in _PROCESSORS & vars(watched).keys():
            vars(watched)[name] = stand_in(vars(watched)[name], watched_processor)
            vars(watched)[name].known = self._processed if batch else None
        return watched

    def _run(self, watched: Any, arguments: Mapping[str, Any]) -> Any:
        try:
            return self.call(watched, **arguments)
        except Ended:
            return None


def check_form(pipeline_class: type[Any], source: str) -> str:
    """Return the name of a pipeline's denoiser.

    Raises:
        ValueError: for a pipeline without a denoiser or a scheduler, or whose call takes no latents.
    """
    components = list(inspect.signature(pipeline_class.__init__).parameters)[1:]
    parameters = _parameters(_call_of(pipeline_class))
    found = [name for name in DENOISERS if name in components]
    takes_latents = "latents" in parameters or hasattr(pipeline_class, "prepare_latents")
    if not found or "scheduler" not in components or not takes_latents:
        raise ValueError(
            f"model {source!r} must be a pipeline with a scheduler and a {' or '.join(DENOISERS)} whose call takes "
            f"latents; a {pipeline_class.__name__} has {', '.join(components)}, and its call takes "
            f"{', '.join(parameters)}"
        )
    return found[0]


def _call_of(pipeline_class: type[Any]) -> Callable[..., Any]:
    """Return a pipeline's call without `torch.no_grad`."""
    call: Callable[..., Any] = pipeline_class.__call__
    return getattr(call, "__wrapped__", call)


def _parameters(call: Callable[..., Any]) -> dict[str, Any]:
    return {
        name: parameter.default
        for name, parameter in inspect.signature(call).parameters.items()
        if parameter.kind is not inspect.Parameter.VAR_KEYWORD and name != "self"
    }


def _device(network: nn.Module) -> torch.device:
    """Return where a network takes its inputs: at its weights, or where a hook of accelerate says."""
    hook = vars(network).get("_hf_hook")
    place = None if hook is None else vars(hook).get("execution_device")
    return next(network.parameters()).device if place is None else torch.device(place)
