"""What takes the place of a watched pipeline's parts: its class, its scheduler, its image processor, a text encoder.

Each is a class of the same name that derives from the pipeline's own, so that a call goes on as it would.
"""

from __future__ import annotations

import ast
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
"""For so many sizes of batches it is kept what a pipeline prepares beside its latents: positions, encoded images."""


class Ended(BaseException):
    """The watched call has shown what was asked for. It is no error, so no pipeline handles it."""


def is_call_of(frame: Any, pipeline: Any) -> bool:
    """Return whether a frame is that of a pipeline's call."""
    return frame.f_code.co_name == "__call__" and frame.f_locals.get("self") is pipeline


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
            frame = sys._getframe(1)
            names = _assigned_at(frame.f_code, frame.f_lineno)
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
    was prepared of each row's own image, take the place of the pipeline's; the rest is prepared once for a size of
    batches.
    """
    parameters = inspect.signature(prepare).parameters
    is_start = prepare.__name__ == "prepare_latents" and "generator" in parameters

    @wraps(prepare)
    def watched(self: Any, *arguments: Any, **options: Any) -> Any:
        starts_here = is_start and self.given_latents is not None
        names: list[str] = []
        if self.given_images or not starts_here:
            caller = sys._getframe(1)
            names = _assigned_at(caller.f_code, caller.f_lineno) if is_call_of(caller, self) else []
        own = [self.given_images.get(name) for name in names]
        has_own = starts_here or any(value is not None for value in own)
        key = (prepare.__name__, *self.batch, *sorted(self.given_images))
        is_kept = has_own and (starts_here or not is_start)  # else the call's own latents are among what it returns
        if is_kept and key in self.prepared:
            values, is_tuple = self.prepared[key]
        else:
            if has_own:
                bound = inspect.signature(prepare).bind(self, *arguments, **options)
                bound.arguments |= {"generator": torch.Generator().manual_seed(0)} if "generator" in parameters else {}
                bound.arguments |= {"latents": None} if starts_here and "latents" in parameters else {}
                made = prepare(*bound.args, **bound.kwargs)
            else:
                made = prepare(self, *arguments, **options)
            is_tuple = isinstance(made, tuple)
            values = made if is_tuple else (made,)
            if not has_own:
                self.note(names, values, is_start)
        if starts_here:
            own = [self.given_latents, *own[1:]]
        values = [one if value is None else value for one, value in zip_longest(values, own)]
        if is_kept and key not in self.prepared:
            if len(self.prepared) == _PREPARED:
                self.prepared.clear()
            missing = [value is not None for value in own]
            kept = [None if is_own else one for one, is_own in zip_longest(values, missing, fillvalue=False)]
            self.prepared[key] = kept, is_tuple
        return tuple(values) if is_tuple else values[0]

    return watched


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

        def resize(self, image: Any, *arguments: Any, **options: Any) -> Any:
            return self.once("resize", image, arguments, options)

        def preprocess(self, image: Any, *arguments: Any, **options: Any) -> Any:
            return self.once("preprocess", image, arguments, options)

        def once(self, name: str, image: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
            method = getattr(processor_class, name)
            if self.known is None:
                return method(self, image, *arguments, **options)
            key = name, repr(arguments), repr(options)
            if key not in self.known or self.known[key][0] is not image:
                self.known[key] = image, method(self, image, *arguments, **options)
            return self.known[key][1]

        def postprocess(self, image: Tensor, *arguments: Any, **options: Any) -> Any:
            visible = torch.where(image.isfinite(), image, torch.nan)
            return processor_class.postprocess(self, visible, *arguments, **options)

    for name in ("resize", "preprocess"):
        if not hasattr(processor_class, name):
            delattr(Watched, name)
    Watched.__name__ = Watched.__qualname__ = processor_class.__name__
    return Watched
