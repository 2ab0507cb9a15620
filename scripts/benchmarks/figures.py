"""What benchmark.py and benchmark_trl.py share: the arguments, taking turns, the figures.

It needs torch and the standard library and nothing else, because benchmark_trl.py runs where this package is not.
"""

import json
import os
import platform
import resource
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

PARTS = ("sampling", "training")


@dataclass(kw_only=True)
class Work:
    """An iteration of a trainer in two parts, and the bare denoiser calls of each.

    Attributes:
        sampling: draws and scores the pictures.
        training: updates on them.
        bare: makes the denoiser calls that sampling takes, as plain diffusers with peft's LoRA and nothing else, and
            those of training, forward and backward. Called once, after the peak of the memory was read.
        samples: pictures of an iteration.
        pairs: (sample, timestep) pairs that it trains on.
        device: where it runs.
        chosen: settings that were left open.
    """

    sampling: Callable[[], Any]
    training: Callable[[], Any]
    bare: Callable[[], tuple[Callable[[], Any], Callable[[], Any]]]
    samples: int
    pairs: int
    device: torch.device
    chosen: dict[str, Any] = field(default_factory=dict)

    def iteration(self, with_bare: bool) -> dict[str, float]:
        """Return the seconds of the parts of an iteration; with `with_bare`, of the bare calls between them too.

        `sampling` is by the clock, `sampling_cpu` the time of all of the process's threads on a processor, and so on.
        """
        parts = {"sampling": self.sampling, "training": self.training}
        if with_bare:
            bare_sampling, bare_training = self.bare_calls
            parts["bare_sampling"], parts["bare_training"] = bare_sampling, bare_training
        order = ("sampling", "bare_sampling", "training", "bare_training")
        times: dict[str, float] = {}
        for name in order:
            if name in parts:
                times[name], times[f"{name}_cpu"] = seconds(parts[name], self.device)
        return times

    @cached_property
    def bare_calls(self) -> tuple[Callable[[], Any], Callable[[], Any]]:
        """Those of sampling and of training."""
        return self.bare()


def seconds(work: Callable[[], Any], device: torch.device) -> tuple[float, float]:
    """Time `work` by the clock and by the processor, with the device's queue empty before and after."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start, start_cpu = time.perf_counter(), time.process_time()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start, time.process_time() - start_cpu


def measure(work: Work, repeats: int, on_request: bool, packages: tuple[str, ...]) -> dict[str, Any]:
    """Run one iteration that is not timed and then those that are; return the figures.

    Args:
        work: what is timed.
        repeats: iterations, with the bare calls.
        on_request: take the iterations from standard input instead, so that two processes can take turns: every line,
            `iteration` or `bare` (with the bare calls), is answered by a line with its seconds as JSON. The first line
            of output, `ready`, comes after the iteration that is not timed.
        packages: whose versions are told.
    """
    work.iteration(with_bare=False)
    memory = peak_memory_mb(work.device)  # of a trainer's iteration, before the bare calls
    times = []
    if on_request:
        print("ready", flush=True)
        for line in sys.stdin:
            times.append(work.iteration(with_bare=line.strip() == "bare"))
            print(json.dumps(times[-1]), flush=True)
    else:
        times = [work.iteration(with_bare=True) for _ in range(repeats)]
    return summary(times, work.samples, work.pairs) | {
        "peak_memory_mb": memory,
        "chosen": work.chosen,
        "versions": {name: version(name) for name in packages},
        "machine": machine(work.device),
    }


def summary(times: list[dict[str, float]], samples: int, pairs: int) -> dict[str, float]:
    """Return medians over the iterations; ratios are of what ran one after the other."""
    figures = {}
    if times:
        middle = {name: statistics.median(one[name] for one in times) for name in PARTS}
        figures["sampling_images_per_second"] = samples / middle["sampling"]
        figures["training_pairs_per_second"] = pairs / middle["training"]
        figures["iteration_seconds"] = statistics.median(one["sampling"] + one["training"] for one in times)
        figures["iteration_cpu_seconds"] = statistics.median(one["sampling_cpu"] + one["training_cpu"] for one in times)
    for name in PARTS:
        for clock in ("", "_cpu"):
            ratios = [one[name + clock] / one[f"bare_{name}{clock}"] for one in times if f"bare_{name}" in one]
            if ratios:
                figures[f"{name}_over_unet{clock}"] = statistics.median(ratios)
    return figures


def peak_memory_mb(device: torch.device) -> float:
    """Return the most memory so far, in 10^6 bytes: of the device, or on a CPU the whole process's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def machine(device: torch.device) -> dict[str, Any]:
    """Describe what it ran on."""
    info = Path("/proc/cpuinfo")
    names = info.read_text().splitlines() if info.is_file() else []
    models = [line.split(":")[1].strip() for line in names if line.startswith("model name")]
    return {
        "platform": platform.platform(),
        "processor": models[0] if models else platform.processor(),
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
    }


def report(figures: dict[str, Any], arguments: dict[str, Any], output: Path | None) -> str:
    """Return the figures with the arguments as JSON, and write them to `output`, if it is given."""
    text = json.dumps(figures | {"arguments": {name: str(value) for name, value in arguments.items()}}, indent=2)
    if output is not None:
        output.write_text(text + "\n")
    return text


def print_figures(compute: Callable[[], dict[str, Any]]) -> int:
    """Print what `compute` returns as JSON, or the error that the arguments are; return the exit status."""
    try:
        figures = compute()
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(figures, indent=2))
    return 0
