"""How much faster two processes are than one: samples per second of whole iterations, on the same total sizes.

One process with one thread and several processes with one thread each take turns, so that a busy machine disturbs both
alike; the ratio is the median over the turns. Every turn starts anew, warms up with an iteration and times the others.
"""

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

if TYPE_CHECKING:  # what takes seconds is imported where it is used: the processes are started by one that needs it not
    from agents.config.train_config import TrainConfig

WORKER = "--worker"


@dataclass(kw_only=True)
class Arguments:
    """The work of an iteration; the defaults are those of train_ppo.py."""

    processes: int = 2
    """How many are compared with one."""
    model: str = "tiny"
    """Bundled name, a folder in diffusers' layout, or a Hub id."""
    device: str = "cpu"
    """cpu, or cuda: a GPU a process."""
    samples: int = 72
    """Pictures in an iteration, of all processes together; so are the other sizes."""
    sample_batch_size: int = 72
    """Pictures drawn at once."""
    train_batch_size: int = 45
    """(sample, timestep) pairs in one call of the denoiser in training."""
    updates: int = 4
    """Optimizer steps in an iteration."""
    num_inference_steps: int = 10
    """Denoising steps."""
    guidance_scale: float = 1.0
    """Of classifier-free guidance; 1 is off."""
    iterations: int = 3
    """Iterations that are timed in every turn, after one that is not."""
    repeats: int = 5
    """Turns."""
    json: Path | None = None
    """Where to write the figures."""


def configuration(arguments: Arguments, run_dir: Path) -> "TrainConfig":
    """Return the training configuration that does this work."""
    from agents.config.settings import PolicySettings, RunSettings, TaskSettings, TrainingSettings
    from agents.config.train_config import TrainConfig

    return TrainConfig(
        run=RunSettings(run_dir=run_dir, device=arguments.device, eval_samples=arguments.processes),
        task=TaskSettings(model=arguments.model, num_inference_steps=arguments.num_inference_steps),
        policy=PolicySettings(guidance_scale=arguments.guidance_scale),
        training=TrainingSettings(
            samples_per_iteration=arguments.samples,
            sample_batch_size=arguments.sample_batch_size,
            train_batch_size=arguments.train_batch_size,
            updates_per_iteration=arguments.updates,
        ),
    )


def work(arguments: Arguments, output: Path) -> None:
    """Run iterations in this process, which may be one of several, and let the main one write the seconds of each."""
    import torch
    from stable_baselines3.common.logger import Logger

    from agents.training.preparation import prepare_run

    torch.set_num_threads(1)
    config = configuration(arguments, output.with_name("run"))
    algorithm = prepare_run(config).algorithm
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
        processes.gather_objects(None)  # the slowest counts
        if iteration:
            seconds["sampling"].append(middle - start)
            seconds["training"].append(time.perf_counter() - middle)
    if processes.is_main:
        output.write_text(json.dumps(seconds))
    processes.leave()


def as_json(arguments: Arguments) -> str:
    """Return what a worker is told of the work."""
    return json.dumps(
        {field.name: getattr(arguments, field.name) for field in fields(Arguments) if field.name != "json"}
    )


def launch(command: list[str], count: int) -> None:
    """Start `count` processes of a Python script, with one thread each, and wait for their end.

    Raises:
        subprocess.CalledProcessError: if one of them failed; it has said why.
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
    """Let one process and several take turns, and return samples per second and their ratios."""
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
    """Return the versions and the machine that figures are of."""
    return {
        "date": time.strftime("%Y-%m-%d"),
        "versions": {name: version(name) for name in ("torch", "accelerate", "diffusers", "peft")},
        "machine": {"platform": platform.platform(), "cpu_count": os.cpu_count()},
    }


def main() -> int:
    """Measure, print and write."""
    if sys.argv[1:2] == [WORKER]:
        work(Arguments(**json.loads(sys.argv[2])), Path(sys.argv[3]))
        return 0
    arguments = tyro.cli(Arguments, description=__doc__)
    text = json.dumps(measure(arguments), indent=2)
    print(text)
    if arguments.json is not None:
        arguments.json.write_text(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
