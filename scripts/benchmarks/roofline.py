"""Compute the least time that a sample can take on this machine: its operations divided by the machine's rate.

    python scripts/benchmarks/roofline.py --model tiny

torch counts the floating-point operations of a sample (one forward pass per step, two with guidance, and the decoder)
and of its update (forward and backward), without computing anything. The script measures the machine's rate of matrix
products and of copying memory. It also counts the bytes of the denoiser's weights and of its layers' outputs, which a
call has to move at least once.
"""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import tyro
from measuring.figures import machine, print_figures
from torch import nn

from agents.config.settings import Dtype
from agents.planning.flops import count_flops, matmul_rate
from agents.policy.lora import add_lora
from agents.policy.options import LoraTargets
from ddpo_env.models import DiffusionModel, abilities_of
from ddpo_env.models.outline import outline_model
from rewards.networks.devices import resolve_device, resolve_dtype


@dataclass(kw_only=True)
class Arguments:
    """One sample, and the machine."""

    model: str = "tiny"
    """Bundled name, a folder in diffusers' layout, or a Hub id whose architecture is known."""
    resolution: int | None = None
    """Side of the images in pixels. Default: the model's own."""
    device: str = "auto"
    """auto, cpu, cuda, ..."""
    dtype: Dtype = "auto"
    """Dtype of the arithmetic. auto: float32 on a CPU, bfloat16 on an accelerator."""
    num_inference_steps: int = 10
    """Denoising steps."""
    trained_steps: int = 5
    """Steps of a sample that are trained on."""
    guidance_scale: float = 1.0
    """Scale of classifier-free guidance; 1 is off, other values double the rows of every call."""
    lora_rank: int = 8
    """Rank of the LoRA; 0 trains every weight."""
    lora_targets: LoraTargets = "attention+convolutions"
    """Layers that get an adapter."""
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
    if abilities_of(model).guidance_embeds:
        conditioning["guidance"] = torch.zeros(1, device="meta")
    with torch.no_grad():
        latents = torch.zeros(1, *model.latent_shape, device="meta")
        model.predict(denoiser, latents, torch.zeros(1, device="meta"), conditioning)
    return sum(weight.numel() for weight in denoiser.parameters()) * size, outputs


def copy_rate(device: torch.device) -> float:
    """Measure how many bytes per second a copy reads and writes."""
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


def roofline(arguments: Arguments) -> dict[str, Any]:
    """Return operations, bytes, rates, and the seconds that follow from them: the least possible times.

    Raises:
        ValueError: for a model whose architecture is not known without a download.
    """
    torch.set_num_threads(arguments.threads)
    model = outline_model(arguments.model, arguments.resolution)
    if model is None:
        raise ValueError(f"model must be one whose architecture is known without a download; got {arguments.model!r}")
    device = resolve_device(arguments.device)
    dtype = resolve_dtype(arguments.dtype, device)
    flops = count_flops(model, arguments.lora_rank, arguments.lora_targets)
    rows = 1 if arguments.guidance_scale == 1 or abilities_of(model).guidance_embeds else 2
    sampling = arguments.num_inference_steps * rows * flops.forward + flops.decoding
    training = arguments.trained_steps * rows * flops.training
    weights, outputs = bytes_of_call(model, arguments, dtype.itemsize)
    rate, bandwidth = matmul_rate(device, dtype), copy_rate(device)
    return {
        "forward_operations": flops.forward,
        "training_operations": flops.training,
        "sample_operations": sampling,
        "update_operations": training,
        "weight_bytes": weights,
        "output_bytes_per_row": outputs,
        "matmul_operations_per_second": rate,
        "copied_bytes_per_second": bandwidth,
        "least_sample_seconds": sampling / rate,
        "least_update_seconds": training / rate,
        "least_sample_memory_seconds": arguments.num_inference_steps * rows * 2 * outputs / bandwidth,
        "dtype": str(dtype),
        "machine": machine(device),
    }


def main() -> int:
    """Count, measure and print."""
    return print_figures(lambda: roofline(tyro.cli(Arguments, description=__doc__)))


if __name__ == "__main__":
    sys.exit(main())
