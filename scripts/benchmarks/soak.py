"""Soak test: memory, open files, threads and tensors of a long run stay flat after a warm-up.

It trains the points model for many iterations in one process, with a reward in a thread, evaluations and checkpoints.
Then it encodes many prompts and steps an environment with many sub-environments. It prints a table, and exits with 1 if
a figure grows by more than its tolerance between the end of the warm-up and the end of the run.
"""

import gc
import sys
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path

import gymnasium as gym
import psutil
import torch
import tyro

import ddpo_env  # noqa: F401  (registers the environments)
from agents import RunListener, prepare_run, train_config
from agents.training.run import Run
from ddpo_env.prompts import PromptSet

TOLERANCES = {"memory (MB)": 40.0, "open files": 2.0, "threads": 2.0, "tensors": 20.0}
"""Growth that is allowed: allocators keep some memory, and the log of metrics grows by a row an iteration."""


@dataclass
class Arguments:
    """How long the test lasts."""

    iterations: int = 200
    """Iterations of the run."""
    warm_up: int = 20
    """Iterations before the first measurement."""
    prompts: int = 10_000
    """Distinct prompts of an environment."""
    sub_environments: int = 1_000
    """Sub-environments that step together."""


def measure() -> dict[str, float]:
    """Return the process's resident memory, open files, threads, and the tensors that are alive."""
    gc.collect()
    process = psutil.Process()
    handles = process.num_fds() if hasattr(process, "num_fds") else process.num_handles()
    tensors = sum(issubclass(type(one), torch.Tensor) for one in gc.get_objects())
    return {
        "memory (MB)": process.memory_info().rss / 2**20,
        "open files": handles,
        "threads": threading.active_count(),
        "tensors": tensors,
    }


class Sampler(RunListener):
    """Measures after the warm-up, and every tenth of a run."""

    def __init__(self, arguments: Arguments) -> None:
        """Choose the moments."""
        self.warm_up = arguments.warm_up
        self.interval = max(1, arguments.iterations // 10)
        self.rows: list[tuple[str, dict[str, float]]] = []

    def on_iteration(self, run: Run) -> None:
        """Measure if it is time."""
        if (run.iteration >= self.warm_up and (run.iteration - self.warm_up) % self.interval == 0) or run.is_finished:
            self.rows.append((f"iteration {run.iteration}", measure()))


def soak_run(arguments: Arguments, folder: Path) -> list[tuple[str, dict[str, float]]]:
    """Train in one process, and return what was measured."""
    config = train_config(
        model="points",
        reward="points_ring",
        lora_rank=0,
        iterations=arguments.iterations,
        samples_per_iteration=64,
        sample_batch_size=32,
        num_inference_steps=4,
        eval_samples=16,
        run_dir=folder,
    )
    run = prepare_run(config)
    sampler = Sampler(arguments)
    run.listeners.append(sampler)
    run.train()
    return sampler.rows


def soak_environment(arguments: Arguments) -> list[tuple[str, dict[str, float]]]:
    """Step many sub-environments through many prompts, twice, and return what was measured after each pass."""
    prompts = PromptSet([f"prompt {index}" for index in range(arguments.prompts)])
    env = gym.make_vec(
        "DDPO-Points-v0", arguments.sub_environments, reward="points_ring", prompts=prompts, backend="torch"
    )
    rows = []
    env.reset(seed=0)
    for label in ("first", "second", "third"):
        for _ in range(11 * -(-arguments.prompts // arguments.sub_environments)):
            env.step(torch.zeros(env.action_space.shape))
        rows.append((f"{label} pass over {arguments.prompts} prompts", measure()))
    env.close()
    return rows[1:]


def grown(rows: list[tuple[str, dict[str, float]]]) -> list[str]:
    """Print a table, and return what grew by more than its tolerance from the first row to the last."""
    print(f"{'':34}" + "".join(f"{name:>14}" for name in TOLERANCES))
    for label, values in rows:
        print(f"{label:34}" + "".join(f"{values[name]:14.0f}" for name in TOLERANCES))
    growth = {name: rows[-1][1][name] - rows[0][1][name] for name in TOLERANCES}
    return [f"{name} grew by {growth[name]:.0f}" for name, most in TOLERANCES.items() if growth[name] > most]


def main() -> int:
    """Parse the command line, run both parts, and return the exit code."""
    arguments = tyro.cli(Arguments, description=__doc__)
    with tempfile.TemporaryDirectory() as folder:
        failures = grown(soak_run(arguments, Path(folder) / "run"))
    failures += grown(soak_environment(arguments))
    print("\n".join(failures) or "flat")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
