"""`train_batch_size=0`: as many (sample, timestep) pairs a call of the denoiser as fit into the memory that is free.

What is free is asked of the device before anything is loaded; from it comes off what training holds all the time, and
a share of the rest is left alone. Of that rest a call may take all: `agents.planning.activations` counts what it would.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from dataclasses import replace

import psutil
import torch
from torch import nn

from agents.config.sizes import divisors
from agents.config.train_config import TrainConfig
from agents.distributed import Processes
from agents.planning.activations import Denoiser, Outline, call_bytes, outline_denoiser
from agents.planning.plan import pairs_per_update
from ddpo_env.models.loading import DiffusionModel
from rewards.devices import resolve_device, resolve_dtype

SAFETY = 0.8
"""Share of the memory that a call may have: the rest is for what kernels take inside, for what an allocator wastes, and
for a reward of a CLIP's size. A larger judge on the same device is not reckoned with."""
CPU_ROWS = 32
"""Rows of a call on a CPU, at most: from 8 to 32 an iteration took 16 % less (docs/performance.md); beyond, no
gain was measured."""


def settle_train_batch_size(config: TrainConfig, processes: Processes) -> TrainConfig:
    """Return a checked configuration whose `train_batch_size` is a number, the same in all processes.

    Where it is 0, it becomes the largest divisor of an update's pairs that fits, in the process that has least room.

    Raises:
        ValueError: if not one pair fits, or if the model's architecture is not known before it is downloaded.
    """
    if config.training.train_batch_size:
        return config
    with processes.agreement():
        fitting = fitting_pairs(config, processes)
    smallest = min(processes.gather_objects(fitting))
    return replace(config, training=replace(config.training, train_batch_size=smallest))


def fitting_pairs(config: TrainConfig, processes: Processes) -> int:
    """Return the largest divisor of an update's pairs that this process has room for in one call.

    Raises:
        ValueError: see `settle_train_batch_size`.
    """
    denoiser, outline = _outlined(config, processes)
    rows = rows_of_pair(config, outline.model)
    device = resolve_device(processes.device or config.run.device)
    free, standing = free_bytes(device, processes.count), standing_bytes(config, outline, denoiser.dtype)
    room = SAFETY * (free - standing)
    pairs = pairs_per_update(config)
    sizes = divisors(pairs, max(1, CPU_ROWS // rows) if device.type == "cpu" else pairs)
    fitting = bisect_right(sizes, room, key=lambda size: _bytes(denoiser, size * rows))
    if not fitting:
        raise ValueError(
            f"train_batch_size must not be 0, as many pairs as fit, where not one fits: a call of one holds "
            f"{gibibytes(_bytes(denoiser, rows))}, and may hold {SAFETY:.0%} of the {gibibytes(free)} free on {device} "
            f"less {gibibytes(standing)} of weights, optimizer and rollout. {_remedies(config, denoiser)}"
        )
    return sizes[fitting - 1]


def describe_call(config: TrainConfig, processes: Processes) -> str:
    """Say how much a call of the chosen `train_batch_size` holds, and what it was chosen by."""
    denoiser, outline = _outlined(config, processes)
    size = config.training.train_batch_size
    taken = _bytes(denoiser, size * rows_of_pair(config, outline.model))
    standing = standing_bytes(config, outline, denoiser.dtype)
    limit = f", in at most {CPU_ROWS} rows" if denoiser.device == "cpu" else ""
    return (
        f"{gibibytes(taken)} for a training call of {size:,} {'pair' if size == 1 else 'pairs'}, chosen to fit in "
        f"{SAFETY:.0%} of what weights, optimizer and rollout ({gibibytes(standing)}) leave free{limit}"
    )


def rows_of_pair(config: TrainConfig, model: DiffusionModel) -> int:
    """Return the rows of the denoiser that are differentiated for one pair: guidance takes a second one.

    Reward-weighted regression regresses without guidance; its KL penalty is on a step of its own, with guidance.
    """
    policy, training = config.policy, config.training
    is_guided = policy.guidance_scale != 1 and not getattr(model, "guidance_embeds", False)
    guided = 2 if is_guided and policy.unconditional_gradient else 1
    if training.algorithm.startswith("rwr"):
        return 1 + (guided if training.kl_coef else 0)
    return guided


def standing_bytes(config: TrainConfig, outline: Outline, dtype: torch.dtype) -> int:
    """Return the bytes that training holds all the time: weights, what the optimizer remembers, and the rollout."""
    training, model = config.training, outline.model
    pipeline = getattr(model, "pipeline", None)
    parts = [model.denoiser] if pipeline is None else list(pipeline.components.values())
    frozen = sum(weight.numel() for part in parts if isinstance(part, nn.Module) for weight in part.parameters())
    learning = sum(weight.numel() for weight in outline.network.parameters() if weight.requires_grad)
    copies = 3 + bool(training.ema_decay)  # itself, two moments, the average; its gradient is the call's
    latent = torch.Size(model.latent_shape).numel()
    conditioning = sum(torch.Size(shape).numel() for shape in model.conditioning_shapes.values())
    rollout = training.samples_per_iteration * ((config.task.num_inference_steps + 1) * latent + conditioning)
    return frozen * dtype.itemsize + 4 * (learning * copies + rollout)


def free_bytes(device: torch.device, processes: int) -> int:
    """Return the bytes that are free on a device, for one process; the memory of a CPU is shared by those of a machine.

    A limit that is put on a container is not seen on a CPU: the machine's memory is.

    Args:
        device: of this process.
        processes: of the run, all of which are taken to be on this machine unless the launcher says how many are.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available // int(os.environ.get("LOCAL_WORLD_SIZE", processes))


def gibibytes(size: float) -> str:
    """Return a number of bytes in GiB, with two digits behind the point."""
    return f"{size / 2**30:.2f} GiB"


def _outlined(config: TrainConfig, processes: Processes) -> tuple[Denoiser, Outline]:
    task, policy = config.task, config.policy
    device = resolve_device(processes.device or config.run.device)
    denoiser = Denoiser(
        model=task.model,
        resolution=task.resolution,
        lora_rank=policy.lora_rank,
        lora_targets=policy.lora_targets,
        gradient_checkpointing=policy.gradient_checkpointing,
        autocast=getattr(torch, policy.autocast) if policy.autocast else None,
        dtype=resolve_dtype(config.run.dtype, device),
        device="cuda" if device.type == "cuda" else "cpu",
    )
    outline = outline_denoiser(denoiser)
    if outline is None:
        raise ValueError(
            f"train_batch_size must be at least 1 with model {task.model!r}, whose architecture is not known before it "
            "is downloaded; got 0, which is as many pairs as fit"
        )
    return denoiser, outline


def _bytes(denoiser: Denoiser, rows: int) -> int:
    size = call_bytes(denoiser, rows)
    assert size is not None
    return size


def _remedies(config: TrainConfig, denoiser: Denoiser) -> str:
    said = [] if denoiser.gradient_checkpointing else ["add --gradient-checkpointing"]
    said += ["lower --resolution"]
    if denoiser.dtype == torch.float32:
        said += ["take --dtype bfloat16"]
    if config.policy.lora_rank == 0:
        said += ["train an adapter in place of every weight (--lora-rank)"]
    text = ", or ".join(said)
    return f"{text[0].upper()}{text[1:]}"
