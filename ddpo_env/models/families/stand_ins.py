"""What takes the place of a watched pipeline's parts: its class, its scheduler, its image processor, a text encoder.

Each is a class of the same name that derives from the pipeline's own, so that a call goes on as it would.
"""

from __future__ import annotations

import ast
import copy
import inspect
import sys
import textwrap
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache, wraps
from itertools import zip_longest
from typing import Any

import torch
from diffusers.utils import BaseOutput
from torch import Tensor

_PREPARED = 16
"""So much of what pipelines prepare beside their latents is kept, for sizes of batches: positions, encoded images."""


class Ended(BaseException):
    """The watched call has shown what was asked for. It is no error, so no pipeline handles it."""


def is_call_of(frame: Any, pipeline: Any) -> bool:
    """Return whether a frame is that of a pipeline's call."""
    return frame.f_code.co_name == "__call__" and frame.f_locals.get("self") is pipeline


def stand_in(part: Any, watched: Callable[[Any], type[Any]]) -> Any:
    """Return a shallow copy of a part whose class is the watched one: `watched_pipeline` and the like return it."""
    copied = copy.copy(part)
    copied.__class__ = watched(type(part))
    return copied


class WithDtype:
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
def watched_pipeline(pipeline_class: Any) -> type[Any]:
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
            names = _assigned_by(sys._getframe(1))
            self.encoded |= zip(names, encoded if isinstance(encoded, tuple) else [encoded], strict=False)
            return encoded

        def note(self, names: Sequence[str], values: Sequence[Any], is_start: bool) -> None:
            """Note what was prepared by its name in the call; a name that is used twice says nothing."""
            if is_start:
                self.made_latents = values[0]
            if len(names) == len(values):
                for name, value in [*zip(names, values, strict=True)][is_start:]:
                    self.made[name] = None if name in self.made else value

    if not hasattr(pipeline_class, "encode_prompt"):
        del Watched.encode_prompt
    for name in dir(pipeline_class):
        if name.startswith("prepare_") and inspect.isfunction(inspect.getattr_static(pipeline_class, name)):
            setattr(Watched, name, _watched_preparation(getattr(pipeline_class, name)))
    Watched.__name__ = Watched.__qualname__ = pipeline_class.__name__
    return Watched


def _watched_preparation(prepare: Callable[..., Any]) -> Callable[..., Any]:
    """Return a pipeline's method that prepares something, such as its latents or encoded images.

    What it returns is noted by the names that the pipeline's call gives to it. The latents of a watched call, and what
    was prepared of each row's own image, take the place of the pipeline's. The rest, and what is the same for every
    prompt, is prepared once for a size of batches.
    """
    signature = inspect.signature(prepare)
    is_start = prepare.__name__ == "prepare_latents" and "generator" in signature.parameters

    @wraps(prepare)
    def watched(self: Any, *arguments: Any, **options: Any) -> Any:
        caller = sys._getframe(1)
        names = _assigned_by(caller) if is_call_of(caller, self) else []
        starts_here = is_start and self.given_latents is not None
        own = [self.given_images.get(name) for name in names]
        if starts_here:
            own[:1] = [self.given_latents]
        has_own = any(value is not None for value in own)
        is_constant = bool(self.batch and names) and self.constants.issuperset(names)
        is_kept = starts_here or ((has_own or is_constant) and not is_start)  # else the call's own latents are in it
        key = (prepare.__name__, *names, *self.batch, *sorted(self.given_images))
        kept = self.prepared.get(key) if is_kept else None
        if kept is None:
            bound = signature.bind(self, *arguments, **options)
            if has_own and "generator" in signature.parameters:
                bound.arguments["generator"] = torch.Generator().manual_seed(0)
            if starts_here and "latents" in signature.parameters:
                bound.arguments["latents"] = None
            made = prepare(*bound.args, **bound.kwargs)
            values = made if isinstance(made, tuple) else (made,)
            if not has_own:
                self.note(names, values, is_start)
            others = [one if value is None else None for one, value in zip_longest(values, own)]
            kept = others, isinstance(made, tuple)
            if is_kept:
                if len(self.prepared) == _PREPARED:
                    self.prepared.clear()
                self.prepared[key] = kept
        others, is_tuple = kept
        whole = tuple(one if value is None else value for one, value in zip_longest(others, own))
        return whole if is_tuple else whole[0]

    return watched


def _assigned_by(frame: Any) -> list[str]:
    """Return the names of the variables to which a frame assigns the result of the call that it is in."""
    return _assigned_at(frame.f_code, frame.f_lineno)


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


@cache
def watched_scheduler(scheduler_class: Any) -> type[Any]:
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
                raise Ended
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
            raise Ended

    Watched.__name__ = Watched.__qualname__ = scheduler_class.__name__
    return Watched


@cache
def watched_processor(processor_class: Any) -> type[Any]:
    """Return a class of image processors that process the same image once for all denoiser calls.

    They leave infinite values visible, which they would clamp to a color.
    """

    class Watched(processor_class):
        known: dict[Any, tuple[Any, Any]] | None = None

        def postprocess(self, image: Tensor, *arguments: Any, **options: Any) -> Any:
            visible = torch.where(image.isfinite(), image, torch.nan)
            return processor_class.postprocess(self, visible, *arguments, **options)

    def once(name: str) -> Callable[..., Any]:
        def process(self: Any, image: Any, *arguments: Any, **options: Any) -> Any:
            method = getattr(super(Watched, self), name)
            if self.known is None:
                return method(image, *arguments, **options)
            key = name, repr(arguments), repr(options)
            if key not in self.known or self.known[key][0] is not image:
                self.known[key] = image, method(image, *arguments, **options)
            return self.known[key][1]

        return process

    for name in ("_resize_to_target_area", "resize", "preprocess"):
        if hasattr(processor_class, name):
            setattr(Watched, name, once(name))
    Watched.__name__ = Watched.__qualname__ = processor_class.__name__
    return Watched
