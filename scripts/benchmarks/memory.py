"""The memory of a training call as it was counted, next to what it takes.

    python scripts/benchmarks/memory.py --model tiny --rows 8 32

`agents.planning.activations` counts a call without a model; here the same call runs on real weights. `live_bytes` are counted
in the same way on real tensors, `saved_bytes` by autograd's own hooks. Growth is from the smaller call to the larger
one: of the process's largest resident memory on a CPU, of the allocator's peak on a GPU. Run it in a process of its
own, because a peak never falls. On a CPU glibc keeps small blocks that were freed; `MALLOC_MMAP_THRESHOLD_=65536` in
the environment makes it give them back, and what is left of the difference is what kernels take inside.
"""

import sys
from dataclasses import dataclass
from typing import Any

import torch
import tyro
from agents.planning.activations import Denoiser, LiveBytes, call_bytes, training_call, training_inputs
from benchmark_figures import machine, peak_memory_mb, print_figures
from torch import nn

from agents.config.settings import Dtype
from agents.policy.lora import LoraTargets, add_lora, copy_for_full_training
from ddpo_env.models.loading import DiffusionModel, load_model
from rewards.devices import resolve_device, resolve_dtype


@dataclass(kw_only=True)
class Arguments:
    """The call."""

    model: str = "tiny"
    """Bundled name, sd14-random, or a folder in diffusers' layout."""
    resolution: int | None = None
    """Side of the pictures in pixels. Default: the model's own."""
    device: str = "auto"
    """auto, cpu, cuda, ..."""
    dtype: Dtype = "auto"
    """Of the frozen weights."""
    lora_rank: int = 8
    """Rank of the LoRA; 0: every weight learns."""
    lora_targets: LoraTargets = "attention+convolutions"
    """Which layers get an adapter."""
    gradient_checkpointing: bool = False
    """Recompute activations."""
    rows: tuple[int, int] = (8, 32)
    """Rows of the smaller and of the larger call."""
    threads: int = torch.get_num_threads()
    """CPU threads."""


def real_network(model: DiffusionModel, denoiser: Denoiser) -> nn.Module:
    """Return a loaded model's network as it is trained."""
    if denoiser.lora_rank:
        network: nn.Module = add_lora(model.denoiser, denoiser.lora_rank, denoiser.lora_targets)
    else:
        network = copy_for_full_training(model.denoiser)
    if denoiser.gradient_checkpointing:
        network.enable_gradient_checkpointing()
    return network.to(next(model.denoiser.parameters()).device).train()


def saved_bytes(
    model: DiffusionModel,
    network: nn.Module,
    inputs: dict[str, torch.Tensor],
    autocast: torch.dtype | None = None,
) -> int:
    """Return the bytes that autograd keeps of a call, by its own hooks: every storage once, no weight, no input."""
    known = {tensor.untyped_storage().data_ptr() for tensor in (*network.parameters(), *inputs.values())}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        training_call(model, network, inputs, autocast)
    network.zero_grad()
    return sum(kept.values())


def compare(arguments: Arguments) -> dict[str, Any]:
    """Return bytes of both calls as counted, and as taken."""
    torch.set_num_threads(arguments.threads)
    device = resolve_device(arguments.device)
    dtype = resolve_dtype(arguments.dtype, device)
    named = {name: getattr(arguments, name) for name in ("model", "resolution", "lora_rank", "lora_targets")}
    denoiser = Denoiser(
        **named,
        gradient_checkpointing=arguments.gradient_checkpointing,
        autocast=None,
        dtype=dtype,
        device="cuda" if device.type == "cuda" else "cpu",
    )
    counted = [call_bytes(denoiser, rows) for rows in arguments.rows]
    model = load_model(arguments.model, device, dtype, arguments.resolution)
    network = real_network(model, denoiser)
    figures: dict[str, list[float]] = {"peak_memory_bytes": [], "saved_bytes": [], "live_bytes": []}
    for rows in (1, *arguments.rows):  # the first call alone makes what libraries keep
        inputs = {
            name: tensor.to(device).normal_() for name, tensor in training_inputs(model, rows, str(device)).items()
        }
        training_call(model, network, inputs)
        network.zero_grad()
        figures["peak_memory_bytes"].append(peak_memory_mb(device) * 1e6)
    for rows in arguments.rows:
        inputs = {name: tensor.normal_() for name, tensor in training_inputs(model, rows, str(device)).items()}
        figures["saved_bytes"].append(saved_bytes(model, network, inputs))
        counter = LiveBytes([*network.parameters(), *network.buffers(), *inputs.values()])
        with counter:
            training_call(model, network, inputs)
        network.zero_grad()
        figures["live_bytes"].append(counter.peak)
    grown = figures["peak_memory_bytes"][2] - figures["peak_memory_bytes"][1]
    return {
        "counted_bytes": counted,
        **figures,
        "counted_growth_over_measured": (counted[1] - counted[0]) / grown if grown else None,
        "arguments": {name: str(value) for name, value in vars(arguments).items()},
        "machine": machine(device),
    }


def main() -> int:
    """Count, measure and print."""
    return print_figures(lambda: compare(tyro.cli(Arguments, description=__doc__)))


if __name__ == "__main__":
    sys.exit(main())
