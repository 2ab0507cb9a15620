"""Measure how much faster several processes are than one: samples per second of iterations of the same total size.

    python scripts/benchmarks/scaling.py --processes 2

One process and several processes take turns, with one thread per process, so that other users of the machine slow both
down equally. The reported ratio is the median over the turns. Every turn starts new processes. Their first iteration is
not timed.
"""

from __future__ import annotations

import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

if TYPE_CHECKING:  # the process that starts the others does not need torch, so it does not wait for its import
    from agents import TrainConfig

WORKER = "--worker"


@dataclass(kw_only=True)
class Arguments:
    """The work of an iteration; the defaults are those of train_ppo.py."""

    processes: int = 2
    """Number of processes that are compared with one."""
    model: str = "tiny"
    """Bundled name, a folder in diffusers' layout, or a Hub id."""
    device: str = "cpu"
    """cpu, or cuda: one GPU per process."""
    samples: int = 72
    """Images per iteration. All sizes are totals over the processes."""
    sample_batch_size: int = 72
    """Images generated at once."""
    train_batch_size: int = 45
    """(sample, timestep) pairs in one training call."""
    updates: int = 4
    """Optimizer steps per iteration."""
    num_inference_steps: int = 10
    """Denoising steps."""
    guidance_scale: float = 1.0
    """Scale of classifier-free guidance; 1 is off."""
    iterations: int = 3
    """Timed iterations per turn, after one that is not timed."""
    repeats: int = 5
    """Number of turns."""
    json: Path | None = None
    """File that the figures are written to as well."""


def configuration(arguments: Arguments, run_dir: Path) -> TrainConfig:
    """Return the training configuration that does this work."""
    from agents import train_config

    return train_config(
        run_dir=run_dir,
        device=arguments.device,
        eval_samples=arguments.processes,
        model=arguments.model,
        num_inference_steps=arguments.num_inference_steps,
        guidance_scale=arguments.guidance_scale,
        samples_per_iteration=arguments.samples,
        sample_batch_size=arguments.sample_batch_size,
        train_batch_size=arguments.train_batch_size,
        updates_per_iteration=arguments.updates,
    )


def run_iterations(arguments: Arguments, output: Path) -> None:
    """Run iterations in this process, which may be one of several; the main process writes the seconds of each."""
    import torch
    from stable_baselines3.common.logger import Logger

    from agents import prepare_run

    torch.set_num_threads(1)
    algorithm = prepare_run(configuration(arguments, output.with_name("run"))).algorithm
    algorithm.set_logger(Logger(None, []))
    _, callback = algorithm._setup_learn(1)
    env, processes = algorithm.env, algorithm.processes
    assert env is not None
    seconds: dict[str, list[float]] = {"sampling": [], "training": []}
    for iteration in range(arguments.iterations + 1):
        start = time.perf_counter()
        algorithm.collect_rollouts(env, callback, algorithm.rollout_buffer, algorithm.n_steps)
        middle = time.perf_counter()
        algorithm.train()
        processes.gather_objects(None)  # wait for the slowest process
        if iteration:
            seconds["sampling"].append(middle - start)
            seconds["training"].append(time.perf_counter() - middle)
    if processes.is_main:
        output.write_text(json.dumps(seconds))
    processes.shutdown()


def as_json(arguments: Arguments) -> str:
    """Return the arguments as JSON, for the command line of a worker."""
    return json.dumps(
        {field.name: getattr(arguments, field.name) for field in fields(Arguments) if field.name != "json"}
    )


def launch(command: list[str], count: int) -> None:
    """Start `count` processes of a Python script, with one thread each, and wait until they end.

    Raises:
        subprocess.CalledProcessError: if one of them fails; its error is on standard error.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={count}", f"--master-port={port}"]
    subprocess.run(launcher + command, check=True, stdout=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})


def turn(arguments: Arguments, count: int) -> dict[str, float]:
    """Start `count` processes and return their samples per second."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "seconds.json"
        launch([__file__, WORKER, as_json(arguments), str(output)], count)
        seconds = json.loads(output.read_text())
    median = {name: statistics.median(values) for name, values in seconds.items()}
    both = statistics.median(a + b for a, b in zip(seconds["sampling"], seconds["training"], strict=True))
    return {name: arguments.samples / value for name, value in (median | {"iteration": both}).items()}


def measure(arguments: Arguments) -> dict[str, Any]:
    """Let one process and several take turns; return samples per second and their ratios."""
    rates: dict[int, list[dict[str, float]]] = {1: [], arguments.processes: []}
    for repeat in range(arguments.repeats):
        for count in rates if repeat % 2 == 0 else reversed(rates):
            rates[count].append(turn(arguments, count))
        one, many = rates[1][-1]["iteration"], rates[arguments.processes][-1]["iteration"]
        print(f"one {one:.2f} samples/s, {arguments.processes} processes {many:.2f}: {many / one:.2f} x", flush=True)
    names = ("sampling", "training", "iteration")
    ratios = {
        name: [many[name] / one[name] for one, many in zip(rates[1], rates[arguments.processes], strict=True)]
        for name in names
    }
    return {
        "samples_per_second": {
            count: {name: statistics.median(rate[name] for rate in turns) for name in names}
            for count, turns in rates.items()
        },
        "ratio": {name: statistics.median(values) for name, values in ratios.items()},
        "ratios_of_iterations": ratios["iteration"],
        "arguments": {name: str(value) for name, value in vars(arguments).items()},
        **describe_machine(),
    }


def describe_machine() -> dict[str, Any]:
    """Return the date, the versions and the machine that the figures are from."""
    return {
        "date": time.strftime("%Y-%m-%d"),
        "versions": {name: version(name) for name in ("torch", "accelerate", "diffusers", "peft")},
        "machine": {"platform": platform.platform(), "cpu_count": os.cpu_count()},
    }


def main() -> int:
    """Measure, and print and write the figures."""
    if sys.argv[1:2] == [WORKER]:
        run_iterations(Arguments(**json.loads(sys.argv[2])), Path(sys.argv[3]))
        return 0
    arguments = tyro.cli(Arguments, description=__doc__)
    text = json.dumps(measure(arguments), indent=2)
    print(text)
    if arguments.json is not None:
        arguments.json.write_text(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
