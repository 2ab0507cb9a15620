"""Measure how many images per second a reward scores: the table of docs/rewards.md, for any reward.

    python scripts/benchmarks/reward_speed.py
    python scripts/benchmarks/reward_speed.py --rewards clip_score --reward-options model=tiny

There are two kinds of images, because the cost of some rewards depends on the content. `noise` is the worst case for a
JPEG encoder. `smooth` is noise of an eighth of the size, enlarged. The first call is not timed, because it loads the
model.
"""

import platform
import statistics
import sys
import time
from dataclasses import dataclass
from importlib.metadata import version

import numpy as np
import torch
import tyro
from measuring.figures import processor
from numpy.typing import NDArray
from PIL import Image

from rewards import Reward, configured_reward, evaluate_reward, parse_options

METADATA = {"questions": ("How many animals are in this image?",), "answers": ("two",)}


@dataclass(kw_only=True)
class Arguments:
    """What is measured; the defaults need no download."""

    rewards: tuple[str, ...] = ("jpeg_compressibility",)
    """Built-in names, module:function, or weighted sums."""
    reward_options: tuple[str, ...] = ()
    """Arguments of the reward's class as key=value, such as model=tiny device=cpu."""
    sizes: tuple[int, ...] = (64, 512)
    """Sides of the images in pixels."""
    batch_sizes: tuple[int, ...] = (1, 16, 64)
    """Images per call."""
    repeats: int = 7
    """Timed calls; the table shows the median."""
    threads: int = torch.get_num_threads()
    """CPU threads of PyTorch; the JPEG rewards use every core that the process may use."""


def make_images(kind: str, batch: int, size: int) -> NDArray[np.uint8]:
    """Return images of a kind, `(batch, size, size, 3)` uint8, the same in every run."""
    generator = np.random.default_rng(0)
    small = size if kind == "noise" else max(size // 8, 1)
    noise = generator.integers(0, 256, (batch, small, small, 3), dtype=np.uint8)
    return np.stack([np.asarray(Image.fromarray(one).resize((size, size), Image.Resampling.BICUBIC)) for one in noise])


def images_per_second(reward: Reward, images: NDArray[np.uint8], repeats: int) -> float:
    """Return the median rate; the time includes the checks of the reward's result."""
    prompts, metadata = ["two dogs"] * len(images), [METADATA] * len(images)
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        evaluate_reward(reward, images, prompts, metadata)  # the result is on the host, so a device has finished
        times.append(time.perf_counter() - start)
    return len(images) / statistics.median(times[1:])


def measure(arguments: Arguments) -> list[str]:
    """Return the lines of a Markdown table."""
    torch.set_num_threads(arguments.threads)
    options = parse_options(arguments.reward_options)
    heads = [f"batch {batch}" for batch in arguments.batch_sizes]
    lines = [f"| reward | images | {' | '.join(heads)} |", "| --- | --- |" + " --- |" * len(heads)]
    for name in arguments.rewards:
        reward = configured_reward(name, options)
        for size in arguments.sizes:
            for kind in ("noise", "smooth"):
                cells = [
                    f"{images_per_second(reward, make_images(kind, batch, size), arguments.repeats):.0f}"
                    for batch in arguments.batch_sizes
                ]
                lines.append(f"| `{name}` | {size}², {kind} | {' | '.join(cells)} |")
    return lines


def main() -> int:
    """Measure and print the table."""
    arguments = tyro.cli(Arguments, description=__doc__)
    try:
        lines = measure(arguments)
    except (ValueError, TypeError, ImportError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    versions = ", ".join(f"{name} {version(name)}" for name in ("pillow", "numpy", "torch", "transformers"))
    threads = f"{arguments.threads} PyTorch threads"
    print(*lines, f"\nimages/s; {processor()}, {threads}; Python {platform.python_version()}, {versions}", sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
