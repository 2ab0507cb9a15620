"""What overhead.py, trl_trainer.py and roofline.py share: iterations are timed, and the figures are reported.

This file imports torch and the standard library only, because trl_trainer.py runs where ddpo-env is not installed.
"""

import json
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

PHASES = ("sampling", "training")


@dataclass(kw_only=True)
class TrainerIteration:
    """An iteration of a trainer in two phases, and the bare calls of the networks in each phase.

    Attributes:
        sampling: generates and scores the images.
        training: updates the weights.
        bare: returns two functions. The first makes the denoiser calls of sampling, decodes, and does nothing else.
            The second makes those of training, forward and backward. `bare` is called once, after the peak memory was
            read.
        samples: number of images per iteration.
        pairs: number of (sample, timestep) pairs that are trained on.
        device: device of the trainer.
        chosen: values of settings that the arguments left open.
    """

    sampling: Callable[[], Any]
    training: Callable[[], Any]
    bare: Callable[[], tuple[Callable[[], Any], Callable[[], Any]]]
    samples: int
    pairs: int
    device: torch.device
    chosen: dict[str, Any] = field(default_factory=dict)

    def run(self, with_bare: bool) -> dict[str, float]:
        """Run both phases once and return the seconds of each.

        `sampling` is wall-clock time. `sampling_cpu` is the CPU time of all threads of the process. The other names
        follow the same rule.

        Args:
            with_bare: run and time the bare calls of each phase too, right after the phase.
        """
        calls = {"sampling": self.sampling, "training": self.training}
        if with_bare:
            bare_sampling, bare_training = self.bare_calls
            calls = {
                "sampling": self.sampling,
                "bare_sampling": bare_sampling,
                "training": self.training,
                "bare_training": bare_training,
            }
        times: dict[str, float] = {}
        for name, call in calls.items():
            times[name], times[f"{name}_cpu"] = seconds(call, self.device)
        return times

    @cached_property
    def bare_calls(self) -> tuple[Callable[[], Any], Callable[[], Any]]:
        """The bare calls of sampling and of training."""
        return self.bare()


def seconds(work: Callable[[], Any], device: torch.device) -> tuple[float, float]:
    """Return the wall-clock and the CPU seconds of `work`; the device's queue is empty before and after."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start, start_cpu = time.perf_counter(), time.process_time()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start, time.process_time() - start_cpu


def measure(iteration: TrainerIteration, repeats: int, on_request: bool, packages: tuple[str, ...]) -> dict[str, Any]:
    """Run one iteration that is not timed, then iterations that are timed, and return the figures.

    Args:
        iteration: of a trainer.
        repeats: number of timed iterations, each with its bare calls.
        on_request: run an iteration for every line of standard input instead, so that two processes can take turns.
            The line is `iteration`, or `bare` for an iteration with its bare calls. The answer is a line of JSON with
            the seconds. The first line of output is `ready`; it follows the iteration that is not timed.
        packages: packages whose versions are reported.
    """
    iteration.run(with_bare=False)
    memory = peak_memory_mb(iteration.device)  # of the trainer, without the bare calls
    times = []
    if on_request:
        print("ready", flush=True)
        for line in sys.stdin:
            times.append(iteration.run(with_bare=line.strip() == "bare"))
            print(json.dumps(times[-1]), flush=True)
    else:
        times = [iteration.run(with_bare=True) for _ in range(repeats)]
    return summary(times, iteration.samples, iteration.pairs) | {
        "peak_memory_mb": memory,
        "chosen": iteration.chosen,
        "versions": {name: version(name) for name in packages},
        "machine": machine(iteration.device),
    }


def summary(times: list[dict[str, float]], samples: int, pairs: int) -> dict[str, float]:
    """Return medians over the iterations.

    A phase is divided by the bare calls that followed it, and the median is taken of these ratios.
    """
    figures = {}
    if times:
        middle = {name: statistics.median(one[name] for one in times) for name in PHASES}
        figures["sampling_images_per_second"] = samples / middle["sampling"]
        figures["training_pairs_per_second"] = pairs / middle["training"]
        figures["iteration_seconds"] = statistics.median(one["sampling"] + one["training"] for one in times)
        figures["iteration_cpu_seconds"] = statistics.median(one["sampling_cpu"] + one["training_cpu"] for one in times)
    for name in PHASES:
        for clock in ("", "_cpu"):
            ratios = [one[name + clock] / one[f"bare_{name}{clock}"] for one in times if f"bare_{name}" in one]
            if ratios:
                figures[f"{name}_over_bare{clock}"] = statistics.median(ratios)
    return figures


def peak_memory_mb(device: torch.device) -> float:
    """Return the peak memory in 10^6 bytes: of a GPU's allocator, or on a CPU of the whole process.

    NaN on a CPU where Python has no `resource`, as on Windows.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    try:
        import resource
    except ImportError:
        return math.nan
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def machine(device: torch.device) -> dict[str, Any]:
    """Describe the machine that the figures are from."""
    return {
        "platform": platform.platform(),
        "processor": processor(),
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
    }


def processor() -> str:
    """Return the name of the CPU."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def report(figures: dict[str, Any], arguments: dict[str, Any], output: Path | None) -> str:
    """Return the figures and the arguments as JSON, and write them to `output` if it is given."""
    text = json.dumps(figures | {"arguments": {name: str(value) for name, value in arguments.items()}}, indent=2)
    if output is not None:
        output.write_text(text + "\n")
    return text


def print_figures(compute: Callable[[], dict[str, Any]]) -> int:
    """Print the result of `compute` as JSON, or the error in the arguments; return the exit status."""
    try:
        figures = compute()
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(figures, indent=2))
    return 0
