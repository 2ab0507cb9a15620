"""Watches a diffusers pipeline call its own denoiser, so that nobody has to write that call again.

Every pipeline knows how to prepare latents, call its denoiser and decode. A watched call is the pipeline's own
`__call__` on a shallow copy of the pipeline whose scheduler is replaced: its timesteps are those that are asked for,
and its `step` takes the denoiser's output and ends the call. Weights are shared with the pipeline, which never changes.
"""

from __future__ import annotations

import ast
import copy
import inspect
import sys
import textwrap
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache, partial, wraps
from typing import Any

import torch
from accelerate.utils import recursively_apply
from diffusers import DiffusionPipeline
from diffusers.utils import BaseOutput
from torch import Tensor, nn

from ddpo_env.models.families.parity import record_steps
from ddpo_env.models.files.pipelines import DENOISERS, TEXT_ENCODERS

_PREPARED = 16
"""For so many sizes of batches it is kept what a pipeline prepares beside its latents: positions, encoded images."""
_PROCESSORS = {"image_processor", "video_processor"}


class _Ended(BaseException):
    """The watched call has shown what was asked for. It is no error, so no pipeline handles it."""


class WatchedPipeline:
    """A pipeline whose call can be looked into.

    Attributes:
        pipeline: the pipeline; it is not changed.
        denoiser_name: name of its denoiser.
        call: its call, without `torch.no_grad`.
        parameters: the parameters of its call, with their defaults.
    """

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
        self._scheduler: Any = copy.copy(vars(pipeline)["scheduler"])
        scheduler_class: Any = type(self._scheduler)
        self._scheduler.__class__ = _watched_scheduler(scheduler_class)
        self._prepared: dict[Any, Any] = {}
        self._takes_prepared_latents = False
        self._decodes_without_steps = True

    def before_denoiser(self, **arguments: Any) -> dict[str, Any]:
        """Return the local variables of the pipeline's call when it calls the denoiser for the first time.

        Those that `encode_prompt` returned have the values that it returned.
        """
        found: dict[str, Any] = {}
        watched = self._copy(None)

        def look(*_: Any) -> None:
            frame = sys._getframe(1)
            while frame is not None and not _is_call_of(frame, watched):
                frame = frame.f_back  # type: ignore[assignment]
            found.update(frame.f_locals)
            found.update(watched.encoded)
            raise _Ended

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
        self, denoiser: nn.Module, latents: Tensor, timestep: Tensor, dtype: torch.dtype, **arguments: Any
    ) -> Tensor:
        """Return what the pipeline hands to its scheduler's `step`, when each row has its own timestep `(batch,)`.

        Args:
            denoiser: is called instead of the pipeline's.
            latents: `(batch, ...)`, as the pipeline has them when it calls the denoiser.
            timestep: of each row.
            dtype: of the denoiser's inputs.
            **arguments: of the pipeline's call.
        """
        watched = self._copy(timestep[None], latents, arguments)
        vars(watched)[self.denoiser_name] = denoiser
        arguments |= self._same_noise()
        for name in TEXT_ENCODERS & vars(watched).keys():  # pipelines give the prompt's conditioning their dtype
            vars(watched)[name] = _WithDtype(vars(watched)[name], dtype)
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

    def decoded(self, latents: Tensor, **arguments: Any) -> Any:
        """Return the samples that the pipeline makes of latents.

        The denoiser is not called, except for a pipeline that needs a step: it makes one, whose result is replaced.
        """
        for steps in (0, 1) if self._decodes_without_steps else (1,):
            given = arguments | self._same_noise() | {"return_dict": False}
            watched = self._copy(torch.zeros(steps, device=latents.device), latents, given)
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
        self, timesteps: Tensor | None, latents: Tensor | None = None, arguments: dict[str, Any] | None = None
    ) -> Any:
        """Return a pipeline with the same components, and a scheduler with these timesteps: `None` is its own.

        The latents are handed over where the pipeline prepares its own, or among the arguments of its call.
        """
        watched = copy.copy(self.pipeline)
        own_class: Any = type(self.pipeline)
        watched.__class__ = _watched_pipeline(own_class)
        scheduler = copy.copy(self._scheduler)
        scheduler.given_timesteps = timesteps
        if latents is not None and arguments is not None and not self._takes_prepared_latents:
            arguments["latents"] = latents
            latents = None
        vars(watched).update(
            scheduler=scheduler,
            given_latents=latents,
            made_latents=None,
            encoded={},
            prepared=self._prepared,
            denoiser_device=_device(getattr(self.pipeline, self.denoiser_name)),
        )
        for name in _PROCESSORS & vars(watched).keys():
            processor = copy.copy(vars(watched)[name])
            processor_class: Any = type(processor)
            processor.__class__ = _watched_processor(processor_class)
            vars(watched)[name] = processor
        return watched

    def _run(self, watched: Any, arguments: Mapping[str, Any]) -> Any:
        try:
            return self.call(watched, **arguments)
        except _Ended:
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


def _is_call_of(frame: Any, pipeline: Any) -> bool:
    return frame.f_code.co_name == "__call__" and frame.f_locals.get("self") is pipeline


def _device(network: nn.Module) -> torch.device:
    """Return where a network takes its inputs: at its weights, or where a hook of accelerate says."""
    hook = vars(network).get("_hf_hook")
    place = None if hook is None else vars(hook).get("execution_device")
    return next(network.parameters()).device if place is None else torch.device(place)


class _WithDtype:
    """A network that says it has another dtype."""

    def __init__(self, network: Any, dtype: torch.dtype) -> None:
        self._network = network
        self.dtype = dtype

    def __getattr__(self, name: str) -> Any:
        return getattr(self._network, name)


@dataclass
class _SchedulerStep(BaseOutput):
    """What a step of a scheduler returns."""

    prev_sample: Tensor
    pred_original_sample: Tensor


class _Silent:
    """A progress bar that shows nothing."""

    def update(self, steps: int = 1) -> None:
        """Show nothing."""


@cache
def _watched_pipeline(pipeline_class: Any) -> type[Any]:
    """Return a class of pipelines that run where their denoiser is, whatever else was offloaded, and are silent."""

    class Watched(pipeline_class):
        @property
        def _execution_device(self) -> Any:
            return self.denoiser_device

        @property
        def device(self) -> Any:
            return self.denoiser_device

        def progress_bar(self, iterable: Any = None, total: int | None = None) -> Any:
            return iterable if iterable is not None else nullcontext(_Silent())

        def maybe_free_model_hooks(self) -> None:
            pass

        def encode_prompt(self, *arguments: Any, **options: Any) -> Any:
            encoded = pipeline_class.encode_prompt(self, *arguments, **options)
            frame = sys._getframe(1)
            names = _assigned_at(frame.f_code, frame.f_lineno)
            self.encoded |= zip(names, encoded if isinstance(encoded, tuple) else [encoded], strict=False)
            return encoded

        def prepare_latents(self, *arguments: Any, **options: Any) -> Any:
            prepare = pipeline_class.prepare_latents
            if self.given_latents is None:
                made = prepare(self, *arguments, **options)
                self.made_latents = made[0] if isinstance(made, tuple) else made
                return made
            latents = self.given_latents
            key = (len(latents), latents.dtype, latents.device)
            if key not in self.prepared:
                bound = inspect.signature(prepare).bind(self, *arguments, **options)
                bound.arguments["generator"] = torch.Generator().manual_seed(0)
                bound.arguments |= {"latents": None} if "latents" in parameters else {}
                made = prepare(*bound.args, **bound.kwargs)
                if len(self.prepared) == _PREPARED:
                    self.prepared.clear()
                self.prepared[key] = made[1:] if isinstance(made, tuple) else None
            others = self.prepared[key]
            return latents if others is None else (latents, *others)

    if not hasattr(pipeline_class, "encode_prompt"):
        del Watched.encode_prompt
    parameters = inspect.signature(getattr(pipeline_class, "prepare_latents", _nothing)).parameters
    if "generator" not in parameters:
        del Watched.prepare_latents
    Watched.__name__ = Watched.__qualname__ = pipeline_class.__name__
    return Watched


@cache
def _assigned_at(code: Any, line: int) -> list[str]:
    """Return the names of the variables to which code assigns the result of the call in one of its lines."""
    try:
        lines, first = inspect.getsourcelines(code)
    except OSError:
        return []
    line += 1 - first
    for node in ast.walk(ast.parse(textwrap.dedent("".join(lines)))):
        if isinstance(node, ast.Assign) and node.lineno <= line <= (node.end_lineno or node.lineno):
            target = node.targets[0]
            return [ast.unparse(name) for name in (target.elts if isinstance(target, ast.Tuple) else [target])]
    return []


def _nothing() -> None:
    """Stand for a method that a pipeline does not have."""


@cache
def _watched_scheduler(scheduler_class: Any) -> type[Any]:
    """Return a class of schedulers that have the timesteps that they are given, and end the call at the first step."""

    class Watched(scheduler_class):
        init_noise_sigma = 1.0
        order = 1
        given_timesteps: Tensor | None = None
        ends_when_asked = False
        was_set = False
        last_latents: Tensor | None = None
        output: Tensor | None = None

        @wraps(scheduler_class.set_timesteps)
        def set_timesteps(self, *arguments: Any, **options: Any) -> None:
            bound = inspect.signature(scheduler_class.set_timesteps).bind(self, *arguments, **options)
            self.asked = {name: value for name, value in bound.arguments.items() if name != "self"}
            if self.ends_when_asked:
                raise _Ended
            if str(bound.arguments.get("device")) == "meta":  # schedulers copy their tables to the CPU
                bound.arguments["device"] = "cpu"
            if self.given_timesteps is None or not self.was_set:  # once, as its tables are copied to the device
                scheduler_class.set_timesteps(*bound.args, **bound.kwargs)
                self.was_set = True
            if self.given_timesteps is not None:
                self.timesteps = self.given_timesteps
                self.num_inference_steps = len(self.timesteps)

        def scale_model_input(self, sample: Tensor, *_: Any, **__: Any) -> Tensor:
            return sample

        def step(self, model_output: Tensor, *_: Any, **options: Any) -> Any:
            self.output = model_output
            if self.last_latents is not None:
                last = _SchedulerStep(prev_sample=self.last_latents, pred_original_sample=self.last_latents)
                return last if options.get("return_dict", True) else last.to_tuple()
            raise _Ended

    Watched.__name__ = Watched.__qualname__ = scheduler_class.__name__
    return Watched


@cache
def _watched_processor(processor_class: Any) -> type[Any]:
    """Return a class of image processors that leave infinite values visible, which they would clamp to a color."""

    class Watched(processor_class):
        def postprocess(self, image: Tensor, *arguments: Any, **options: Any) -> Any:
            visible = torch.where(image.isfinite(), image, torch.nan)
            return processor_class.postprocess(self, visible, *arguments, **options)

    Watched.__name__ = Watched.__qualname__ = processor_class.__name__
    return Watched
