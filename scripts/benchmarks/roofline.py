"""The least time that a sample can take on a machine: its floating-point operations over the rate of matrix products.

    python scripts/benchmarks/roofline.py --model tiny

Counts the operations of a sample (one forward pass a step, two with guidance, and the decoder) and of its update
(forward and backward) by torch's FlopCounterMode on the meta device; measures the rate of a matrix product and of
copying memory; and counts the bytes that the denoiser's weights and outputs of layers take, which have to be moved at
least once in a call.
"""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import tyro
from benchmark_figures import machine, print_figures
from torch import nn

from agents.config.settings import Dtype
from agents.planning.flops import count_work, matmul_rate
from agents.policy.lora import LoraTargets, add_lora
from ddpo_env.models.loading import DiffusionModel
from ddpo_env.models.outline import outline_model
from rewards.devices import resolve_device, resolve_dtype


@dataclass(kw_only=True)
class Arguments:
    """The work of one sample, and the machine."""

    model: str = "tiny"
    """Bundled name, a folder in diffusers' layout, or a Hub id whose architecture is known."""
    resolution: int | None = None
    """Side of the pictures in pixels. Default: the model's own."""
    device: str = "auto"
    """auto, cpu, cuda, ..."""
    dtype: Dtype = "auto"
    """Of the arithmetic."""
    num_inference_steps: int = 10
    """Denoising steps."""
    trained_steps: int = 5
    """Steps of a sample that are trained on."""
    guidance_scale: float = 1.0
    """Of classifier-free guidance; 1 is off, others double every call."""
    lora_rank: int = 8
    """Rank of the LoRA; 0: full training."""
    lora_targets: LoraTargets = "attention+convolutions"
    """Which layers get an adapter."""
    threads: int = torch.get_num_threads()
    """CPU threads."""


def bytes_of_call(model: DiffusionModel, arguments: Arguments, size: int) -> tuple[int, int]:
    """Return the bytes of the denoiser's weights, and of the outputs of its layers for one row."""
    with torch.device("meta"):
        denoiser: nn.Module = model.denoiser
        if arguments.lora_rank:
            denoiser = add_lora(denoiser, arguments.lora_rank, arguments.lora_targets)
    outputs = 0

    def count(_module: nn.Module, _inputs: Any, output: Any) -> None:
        nonlocal outputs
        outputs += output.numel() * size if isinstance(output, torch.Tensor) else 0

    for layer in denoiser.modules():
        if not list(layer.children()):
            layer.register_forward_hook(count)
    conditioning = {name: torch.zeros(1, *shape, device="meta") for name, shape in model.conditioning_shapes.items()}
    if getattr(model, "guidance_embeds", False):
        conditioning["guidance"] = torch.zeros(1, device="meta")
    with torch.no_grad():
        latents = torch.zeros(1, *model.latent_shape, device="meta")
        model.predict(denoiser, latents, torch.zeros(1, device="meta"), conditioning)
    return sum(weight.numel() for weight in denoiser.parameters()) * size, outputs


def copy_rate(device: torch.device) -> float:
    """Measure the bytes a second that copying reads and writes."""
    source = torch.ones(2**26 if device.type == "cuda" else 2**24, device=device)
    target = torch.empty_like(source)

    def copy() -> None:
        target.copy_(source)
        target[0].item()  # waits for the device

    return 2 * source.nbytes / min(_seconds(copy) for _ in range(5))


def _seconds(work: Callable[[], None]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def floor(arguments: Arguments) -> dict[str, Any]:
    """Return operations, bytes, rates, and the seconds that follow from them."""
    torch.set_num_threads(arguments.threads)
    model = outline_model(arguments.model, arguments.resolution)
    if model is None:
        raise ValueError(f"model must be one whose architecture is known without a download; got {arguments.model!r}")
    device = resolve_device(arguments.device)
    dtype = resolve_dtype(arguments.dtype, device)
    work = count_work(model, arguments.lora_rank, arguments.lora_targets)
    rows = 1 if arguments.guidance_scale == 1 or getattr(model, "guidance_embeds", False) else 2
    sampling = arguments.num_inference_steps * rows * work.forward + work.decoding
    training = arguments.trained_steps * rows * work.training
    weights, outputs = bytes_of_call(model, arguments, dtype.itemsize)
    rate, bandwidth = matmul_rate(device, dtype), copy_rate(device)
    return {
        "forward_operations": work.forward,
        "training_operations": work.training,
        "sample_operations": sampling,
        "update_operations": training,
        "weight_bytes": weights,
        "output_bytes_of_a_row": outputs,
        "matmul_operations_per_second": rate,
        "copied_bytes_per_second": bandwidth,
        "sample_floor_seconds": sampling / rate,
        "update_floor_seconds": training / rate,
        "sample_memory_floor_seconds": arguments.num_inference_steps * rows * 2 * outputs / bandwidth,
        "dtype": str(dtype),
        "machine": machine(device),
    }


def main() -> int:
    """Count, measure and print."""
    return print_figures(lambda: floor(tyro.cli(Arguments, description=__doc__)))


if __name__ == "__main__":
    sys.exit(main())
