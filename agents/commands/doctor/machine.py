"""Checks of what a run stands on: the machine, the disk, the loaded model, the prompts, the weights that learn."""

from __future__ import annotations

import os
import platform
import shutil
import time
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from agents.commands.doctor.examination import Examination
from agents.commands.doctor.finding import Finding, Level
from ddpo_env.models.files.pipelines import pipeline_of
from ddpo_env.models.protocol import encode
from ddpo_env.models.quantization import loaded_dtype, quantization_of, stored_bytes
from ddpo_env.prompts import Prompt
from rewards.networks.devices import has_bfloat16, resolve_device, resolve_dtype
from rewards.networks.pretrained import stored_tensors

_LIBRARIES = ("torch", "diffusers", "transformers", "peft", "accelerate", "stable_baselines3", "gymnasium")
_SMALLEST_DISK = 2**30
_STATES, _KEPT = 4, 3
"""Copies of what learns in a checkpoint (weights, two moments of Adam, averaged weights), and checkpoints at a time."""


def check_machine(examination: Examination) -> Finding:
    """Name the versions and the device, and look for a dtype that the device is slow in."""
    config = examination.config
    device = resolve_device(config.device)
    dtype = resolve_dtype(config.policy.autocast or config.run.dtype, device)
    numbers: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "dtype": _name(dtype),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **{name: version(name) for name in _LIBRARIES},
    }
    meaning = f"The run computes on {numbers['device']} in {numbers['dtype']}"
    if device.type == "cpu" and dtype != torch.float32:
        advice = "Set --dtype float32."
        return Finding("machine", "amber", numbers, f"{meaning}, in which CPUs are slow.", advice, {"dtype": "float32"})
    if device.type == "cpu" and torch.cuda.is_available():
        return Finding("machine", "amber", numbers, f"{meaning}, but there is a GPU.", "Add --device cuda.")
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        numbers |= {"device_memory_gb": _gb(total), "free_device_memory_gb": _gb(free)}
        numbers["bfloat16"] = has_bfloat16(device)
    return Finding("machine", "green", numbers, f"{meaning}.")


def check_disk(examination: Examination) -> Finding:
    """Compare the free space of the run's disk with what its checkpoints need."""
    config = examination.config
    assert config.run_dir is not None
    place = next(path for path in (config.run_dir, *config.run_dir.absolute().parents) if path.exists())
    free = shutil.disk_usage(place).free
    learning = sum(parameter.nbytes for parameter in examination.policy.trainable_parameters())
    needed = learning * _STATES * _KEPT + _SMALLEST_DISK // 10
    numbers = {"free_gb": _gb(free), "needed_gb": _gb(needed), "folder": str(place)}
    if free < needed:
        level: Level = "red"
    else:
        level = "amber" if free < needed + _SMALLEST_DISK else "green"
    meaning = f"{_gb(free)} GB are free for the run folder, and its checkpoints need about {_gb(needed)} GB."
    return Finding("disk", level, numbers, meaning, "" if level == "green" else "Free some space, or set --run-dir.")


def check_model(examination: Examination) -> Finding:
    """Load and place the model, and count its memory."""
    start = time.perf_counter()
    model = examination.model
    seconds = time.perf_counter() - start
    device = next(model.denoiser.parameters()).device
    dtype = loaded_dtype(model.denoiser)
    pipeline = pipeline_of(model)
    parts = {"denoiser": model.denoiser} if pipeline is None else pipeline.components
    networks = {name: part for name, part in parts.items() if isinstance(part, nn.Module)}
    away = [name for name, part in networks.items() if next(part.parameters()).device != device]
    numbers: dict[str, Any] = {
        "seconds": round(seconds, 2),
        "latent_shape": list(model.latent_shape),
        **{f"{name}_gb": _gb(stored_bytes(part)) for name, part in networks.items()},
        "offloaded": away,
    }
    if device.type == "cuda":
        numbers["allocated_gb"] = _gb(torch.cuda.memory_allocated(device))
    broken = [
        f"{name}.{key}"
        for name, part in networks.items()
        for key, weight in part.named_parameters()
        if not all(bool(stored.isfinite().all()) for stored in stored_tensors(weight))
    ]
    if broken:
        meaning = f"{len(broken)} weights are NaN or infinite in {_name(dtype)}, such as {broken[0]}."
        settings = {} if dtype == torch.float32 else {"dtype": "float32"}
        return Finding("model", "red", numbers, meaning, "Load the model in float32, or another file.", settings)
    offloaded = f"; {', '.join(away)} on the CPU between calls" if away else ""
    size = _gb(sum(stored_bytes(part) for part in networks.values()))
    quantization = quantization_of(model.denoiser)
    quantized = f", the denoiser in {quantization}" if quantization else ""
    return Finding("model", "green", numbers, f"The model loads ({size} GB in {_name(dtype)}{quantized}){offloaded}.")


def check_prompts(examination: Examination) -> Finding:
    """Encode prompts: shapes as declared, finite, different for different prompts, and the denoiser sees them."""
    model = examination.model
    if not model.conditioning_shapes:
        return Finding("prompts", "green", {}, "The model takes no prompt.")
    chosen = examination.chosen_prompts(8)
    prompts = list({text: (text, metadata) for text, metadata in [*chosen, ("a red apple", chosen[0][1])]}.values())[:8]
    start = time.perf_counter()
    encoded = encode(model, prompts)
    seconds = (time.perf_counter() - start) / len(prompts)
    shapes = {name: tuple(tensor.shape[1:]) for name, tensor in encoded.items()}
    finite = all(bool(tensor.isfinite().all()) for tensor in encoded.values())
    apart = max(float((tensor[:1] - tensor[1:]).abs().max()) for tensor in encoded.values())
    effect = _effect_of_prompts(examination, prompts[:2])
    numbers = {
        "seconds_per_prompt": round(seconds, 4),
        "shapes": {name: list(shape) for name, shape in shapes.items()},
        "largest_difference": apart,
        "relative_effect_on_denoiser": effect,
    }
    if shapes != model.conditioning_shapes or not finite:
        meaning = f"The conditioning must be finite and of shapes {model.conditioning_shapes}; got {shapes}."
        return Finding("prompts", "red", numbers, meaning, "Mend encode_prompts of the model.")
    if apart == 0 or effect == 0:
        what = "Different prompts have the same conditioning" if apart == 0 else "The denoiser ignores the prompt"
        advice = "Mend encode_prompts or predict of the model: no reward about the prompt can be learned."
        return Finding("prompts", "red", numbers, f"{what}.", advice)
    return Finding("prompts", "green", numbers, f"Prompts are encoded in {seconds:.2g} s each, and change the output.")


@torch.no_grad()
def _effect_of_prompts(examination: Examination, prompts: Sequence[Prompt]) -> float:
    """Return the relative difference of the denoiser's outputs for two prompts at the same noise."""
    model = examination.model
    noise = examination.initial_noise(1).expand(2, *model.latent_shape)
    policy = examination.policy
    policy.set_training_mode(False)
    timestep = policy.sampler.timesteps[:1].to(policy.device).float().expand(2)
    output = policy.predict_output(noise, timestep, encode(model, prompts))
    return float((output[0] - output[1]).norm() / output[0].norm())


def check_policy(examination: Examination) -> Finding:
    """Count the weights that learn, and look for frozen ones and for ones that the optimizer does not know."""
    policy = examination.policy
    expected = learning_names(examination)
    named = dict(policy.denoiser.named_parameters())
    held = {id(weight) for group in policy.optimizer.param_groups for weight in group["params"]}
    frozen = [name for name in expected if not named[name].requires_grad]
    unknown = [name for name in expected if id(named[name]) not in held and name not in frozen]
    count = sum(named[name].numel() for name in expected)
    numbers = {"weights": count, "tensors": len(expected), "frozen": frozen, "unknown_to_optimizer": unknown}
    numbers["optimizer_gb"] = _gb(3 * 4 * count)
    if frozen or unknown or not expected:
        wrong = [*frozen, *unknown]
        meaning = (
            f"{len(wrong)} of {len(expected)} tensors do not learn, such as {wrong[0]}" if wrong else "None learns"
        )
        advice = "Set requires_grad and give them to the optimizer; choose other --lora-targets if there are none."
        return Finding("weights that learn", "red", numbers, f"{meaning}.", advice)
    what = f"LoRA of rank {policy.options.lora_rank}" if policy.options.lora_rank else "Every weight of the denoiser"
    return Finding("weights that learn", "green", numbers, f"{what}: {count:,} weights in {len(expected)} tensors.")


def learning_names(examination: Examination) -> list[str]:
    """Return the names of the denoiser's tensors that must learn: those of the adapters, or all."""
    policy = examination.policy
    if not policy.options.lora_rank:
        return [name for name, _ in policy.denoiser.named_parameters()]
    layers = [name for name, layer in policy.denoiser.named_modules() if isinstance(layer, LoraLayer)]
    return [f"{layer}.lora_{half}.default.weight" for layer in layers for half in "AB"]


def _gb(size: float) -> float:
    return float(f"{size / 2**30:.3g}")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
