"""Count the denoiser's rows for each trained sample, with a window of noise (MixGRPO) and with a shared prefix.

    python scripts/benchmarks/shared_prefix.py                                       # the bundled model
    python scripts/benchmarks/shared_prefix.py --model sd14-random --resolution 128 --samples 8

Three arms train on the same model: every step has noise, and those inside the timestep window are trained on; a window
of noise; and the same window where samples of a prompt start from the same noise, so that what they share is computed
once. The window of noise is in each of its places once. Rows are counted at the denoiser itself. A guided call has two
rows for each latent. Time is given relative to the first arm, which runs in the same process: the arms take turns.
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import numpy as np
import torch
import tyro

from agents import DiffusionPolicy, Run, prepare_run, train_config

ARMS: dict[str, dict[str, Any]] = {
    "every step": {"noise_window": None, "noise_window_iterations": 25, "shared_noise": False},
    "window": {"shared_noise": False},
    "window, shared prefix": {"shared_noise": True},
}


@dataclass(kw_only=True)
class Arguments:
    """The run."""

    model: str = "tiny"
    """Bundled name, sd14-random (Stable Diffusion 1.4 with random weights), a folder, or a Hub id."""
    resolution: int | None = None
    """Side of the images in pixels. Default: the model's own."""
    reward: str = "jpeg_compressibility"
    """What scores the samples."""
    samples: int = 72
    """Samples per iteration."""
    samples_per_prompt: int = 8
    """Samples of a prompt, which start from the same noise in the last arm."""
    num_inference_steps: int = 10
    """Denoising steps."""
    noise_window: int = 3
    """Steps with noise in the last two arms."""
    guidance_scale: float = 1.0
    """Of classifier-free guidance; 1 is off."""
    threads: int = torch.get_num_threads()
    """CPU threads."""


@dataclass
class Cost:
    """What an arm has cost so far: rows of the denoiser, and seconds."""

    sampled_rows: int = 0
    trained_rows: int = 0
    seconds: float = 0.0
    iterations: int = 0


def prepare(arguments: Arguments, arm: str, folder: Path) -> Run:
    """Return a run of an arm that is ready to train; its window moves in every iteration."""
    settings = {"noise_window": arguments.noise_window, "noise_window_iterations": 1} | ARMS[arm]
    return prepare_run(
        train_config(
            model=arguments.model,
            resolution=arguments.resolution,
            reward=arguments.reward,
            samples_per_iteration=arguments.samples,
            samples_per_prompt=arguments.samples_per_prompt,
            num_inference_steps=arguments.num_inference_steps,
            guidance_scale=arguments.guidance_scale,
            timestep_window=(0.0, 0.9),
            timestep_fraction=1.0,
            eval_samples=2,
            eval_interval=0,
            run_dir=folder / arm.replace(", ", "-").replace(" ", "-"),
            device="cpu",
            **settings,
        )
    )


def count_rows(run: Run, cost: Cost) -> None:
    """Add the rows of every call of the policy's denoiser to a cost; calls with gradients are training."""
    policy = run.algorithm.policy
    assert isinstance(policy, DiffusionPolicy)

    def count(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        rows = len(next(value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor) and value.ndim))
        if torch.is_grad_enabled():
            cost.trained_rows += rows
        else:
            cost.sampled_rows += rows

    policy.denoiser.register_forward_pre_hook(count, with_kwargs=True)


def iterate(run: Run, cost: Cost) -> None:
    """Sample and update once, without what is measured beside training."""
    algorithm = run.algorithm
    _, callback = algorithm._setup_learn(0, None, reset_num_timesteps=cost.iterations == 0)
    with mock.patch.object(algorithm, "random_steps", return_value=np.zeros(0, np.int64)):
        began = time.perf_counter()
        algorithm.iterate(callback, 1, 10**9, log_interval=None)
        cost.seconds += time.perf_counter() - began
    cost.iterations += 1


def measure(arguments: Arguments, folder: Path) -> dict[str, Cost]:
    """Return the cost of each arm, the window in each of its places once."""
    runs = {arm: prepare(arguments, arm, folder) for arm in ARMS}
    costs = {arm: Cost() for arm in ARMS}
    for arm, run in runs.items():
        count_rows(run, costs[arm])
    start, end = runs["window"].algorithm.options.trained_range(arguments.num_inference_steps)
    for _ in range(end - start - arguments.noise_window + 1):
        for arm, run in runs.items():
            iterate(run, costs[arm])
    return costs


def main() -> int:
    """Measure and print."""
    arguments = tyro.cli(Arguments, description=__doc__)
    torch.set_num_threads(arguments.threads)
    try:
        with TemporaryDirectory() as folder:
            costs = measure(arguments, Path(folder))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    first = costs["every step"]
    samples = arguments.samples * first.iterations
    print(f"{'denoiser rows a sample':<24}{'sampling':>10}{'training':>10}{'together':>10}{'relative':>10}{'time':>10}")
    for arm, cost in costs.items():
        rows = cost.sampled_rows + cost.trained_rows
        relative = rows / (first.sampled_rows + first.trained_rows)
        print(
            f"{arm:<24}{cost.sampled_rows / samples:>10.2f}{cost.trained_rows / samples:>10.2f}{rows / samples:>10.2f}"
            f"{relative:>10.2f}{cost.seconds / first.seconds:>10.2f}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
