"""Measure how much longer an iteration takes with a slow reward, with and without overlap.

    python scripts/benchmarks/overlap.py --repeats 7
    python scripts/benchmarks/overlap.py --no-overlap

The slow reward sleeps as long as a batch takes to sample, like a reward that waits for a server. With overlap, the
environment computes a batch's reward while the next batch is sampled. Iterations with the slow reward and with an
instant one take turns in one process, and the script reports the ratio of their times.
"""

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import tyro
from numpy.typing import NDArray
from stable_baselines3.common.logger import Logger

from agents import VectorEnvAdapter, train_config
from agents.config.sizes import must_divide
from agents.distributed import Processes
from agents.training.build import build_algorithm
from ddpo_env import DenoisingVectorEnv


@dataclass(kw_only=True)
class Arguments:
    """The work of an iteration."""

    samples: int = 72
    """Images per iteration."""
    batches: int = 12
    """Batches in which they are sampled. Nothing overlaps with the last batch's reward."""
    num_inference_steps: int = 10
    """Denoising steps."""
    repeats: int = 5
    """Iterations of each kind."""
    overlap: bool = True
    """Whether the environment computes rewards while the next batch is sampled (`deferred_rewards`)."""
    model: str = "tiny"
    """Bundled name, a folder in diffusers' layout, or a Hub id."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, ..."""


class SlowBrightness:
    """A reward that sleeps for `delay` seconds and returns the mean pixel of each image."""

    delay = 0.0

    def __call__(self, images: NDArray[Any], prompts: list[str], metadata: list[dict[str, Any]]) -> NDArray[Any]:
        """Return scores `(batch,)` of images `(batch, height, width, 3)`."""
        time.sleep(self.delay)
        scores: NDArray[Any] = images.mean(axis=(1, 2, 3)) / 255
        return scores


def iteration_of(arguments: Arguments, reward: SlowBrightness) -> Callable[[], tuple[float, float]]:
    """Return a function that runs an iteration and returns the seconds of its sampling and of the whole iteration.

    Raises:
        ValueError: for samples that the batches do not divide.
    """
    must_divide("batches", arguments.batches, "samples", arguments.samples)
    config = train_config(
        num_inference_steps=arguments.num_inference_steps,
        samples_per_iteration=arguments.samples,
        sample_batch_size=arguments.samples // arguments.batches,
        eval_samples=1,
        learning_rate=1e-5,
    ).resolved()
    env = DenoisingVectorEnv(
        config.training.sample_batch_size,
        model=arguments.model,
        reward=reward,
        num_inference_steps=config.num_inference_steps,
        samples_per_prompt=config.training.samples_per_prompt,
        device=arguments.device,
        backend="torch",
        autoreset_mode="SameStep",
        deferred_rewards=arguments.overlap,
    )
    adapter = VectorEnvAdapter(env)
    algorithm = build_algorithm(config, adapter, Processes())
    algorithm.set_logger(Logger(None, []))
    _, callback = algorithm._setup_learn(1)

    def iteration() -> tuple[float, float]:
        start = time.perf_counter()
        algorithm.collect_rollouts(adapter, callback, algorithm.rollout_buffer, algorithm.n_steps)
        sampled = time.perf_counter()
        algorithm.train()
        return sampled - start, time.perf_counter() - start

    return iteration


def compare(arguments: Arguments) -> list[float]:
    """Print the times of pairs of iterations, and return how many times as long the slow reward's takes."""
    reward = SlowBrightness()
    iteration = iteration_of(arguments, reward)
    iteration()  # the first one warms up
    delay = statistics.median(iteration()[0] for _ in range(3)) / arguments.batches
    ratios = []
    for _ in range(arguments.repeats):
        reward.delay = 0.0
        _, instant = iteration()
        reward.delay = delay
        _, slow = iteration()
        ratios.append(slow / instant)
        times = f"instant {instant:.2f} s, slow ({delay:.2f} s per batch) {slow:.2f} s"
        print(f"{times}: {ratios[-1]:.3f}", flush=True)
    return ratios


def main() -> int:
    """Measure and print."""
    arguments = tyro.cli(Arguments, description=__doc__)
    try:
        ratio = statistics.median(compare(arguments))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    size = arguments.samples // arguments.batches
    print(
        f"\n{arguments.batches} batches of {size} images, overlap {'on' if arguments.overlap else 'off'}: with a "
        f"reward as slow as sampling, an iteration takes {ratio:.3f} times as long (median of {arguments.repeats})"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
