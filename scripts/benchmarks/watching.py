"""Measure what it costs to watch a pipeline: `predict` next to the bare call of the same denoiser.

    python scripts/benchmarks/watching.py

The two alternate, with the same inputs, and the figure is the median of their ratios. The default is the architecture
of Stable Diffusion 1.4 with random weights at 128 × 128 pixels, where a call is short and the overhead counts most.
"""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
import tyro
from measuring.figures import machine, print_figures
from torch import Tensor

from ddpo_env import load_model


@dataclass(kw_only=True)
class Arguments:
    """One call of the denoiser."""

    model: str = "sd14-random"
    """Bundled name of a Stable Diffusion, or its folder."""
    resolution: int = 128
    """Side of the images in pixels."""
    rows: int = 2
    """Latents in a call."""
    pairs: int = 30
    """Pairs of calls."""
    device: str = "auto"
    """auto, cpu, cuda, ..."""


def seconds(call: Callable[[], Tensor], device: torch.device) -> float:
    """Return the time of a call, with the work that it leaves to the device."""
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def measure(arguments: Arguments) -> dict[str, Any]:
    """Return the times of both calls and their ratio."""
    model: Any = load_model(arguments.model, arguments.device, "float32", arguments.resolution)
    latents = torch.randn(arguments.rows, *model.latent_shape, device=model.device)
    timestep = torch.full((arguments.rows,), 500.0, device=model.device)
    conditioning = model.encode_prompts(["a cat"] * arguments.rows)

    def bare() -> Tensor:
        output: Tensor = model.denoiser(latents, timestep, conditioning["prompt_embeds"], return_dict=False)[0]
        return output

    def watched() -> Tensor:
        output: Tensor = model.predict(model.denoiser, latents, timestep, conditioning)
        return output

    with torch.no_grad():
        same = bool(torch.equal(bare(), watched()))
        times = [(seconds(bare, model.device), seconds(watched, model.device)) for _ in range(arguments.pairs)]
    return {
        "bare call, ms": 1000 * median(one for one, _ in times),
        "predict, ms": 1000 * median(two for _, two in times),
        "ratio, median of the pairs": median(two / one for one, two in times),
        "the same bits": same,
        "machine": machine(model.device),
    }


if __name__ == "__main__":
    given = tyro.cli(Arguments, description=__doc__)
    sys.exit(print_figures(lambda: measure(given)))
