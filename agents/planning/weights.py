"""The memory that a run's weights take, counted on the meta device before anything is loaded."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from agents.config.train_config import TrainConfig
from agents.policy.lora import add_lora
from ddpo_env.models.files.pipelines import DENOISERS, pipeline_of
from ddpo_env.models.outline import outline_model
from ddpo_env.models.quantization import cast_outline, quantize_network, stored_bytes
from rewards.networks.devices import resolve_device, resolve_dtype

_COPIES = 4
"""What learns is there as weight, gradient and two moments of AdamW, all in float32."""


class WeightBytes(NamedTuple):
    """Bytes of the weights of a run; activations, and the models of the reward, come on top.

    Attributes:
        frozen: of each network of the pipeline, by name, the denoiser first.
        learning: of what learns, with its gradient and AdamW's state; with an averaged copy if there is one.
    """

    frozen: dict[str, int]
    learning: int


def count_weights(config: TrainConfig) -> WeightBytes | None:
    """Count the weights of a resolved configuration; `None` if the model's architecture is not known here."""
    settings, policy = config.run, config.policy
    model = outline_model(config.model, *settings.size)
    if model is None:
        return None
    dtype = resolve_dtype(settings.dtype, resolve_device(config.device))
    pipeline = pipeline_of(model)
    components = {} if pipeline is None else pipeline.components
    networks = {name: part for name, part in components.items() if isinstance(part, nn.Module)}
    networks = networks or {"denoiser": model.denoiser}
    with torch.device("meta"):
        learning: nn.Module = (
            add_lora(model.denoiser, policy.lora_rank, policy.lora_targets)
            if policy.lora_rank
            else model.denoiser.requires_grad_()
        )
    learned = 4 * sum(weight.numel() for weight in learning.parameters() if weight.requires_grad)
    for network in networks.values():
        cast_outline(network, dtype)
    if settings.quantization is not None:
        quantize_network(model.denoiser, settings.quantization, config.model)
    frozen = {name: stored_bytes(network) for name, network in networks.items()}
    ordered = dict(sorted(frozen.items(), key=lambda one: one[0] not in (*DENOISERS, "denoiser")))
    return WeightBytes(ordered, learned * (_COPIES + bool(config.update.ema_decay)))


def describe_weights(config: TrainConfig) -> str:
    """Describe the memory that the weights of a resolved configuration take, without loading the model."""
    counted = count_weights(config)
    if counted is None:
        return f"not known before {config.model} is loaded"
    quantized = f" in {config.run.quantization}" if config.run.quantization else ""
    parts = [f"{_size(number)} {name}" for name, number in counted.frozen.items()]
    parts[0] += quantized
    return f"{', '.join(parts)}; {_size(counted.learning)} what learns, with gradients and optimizer"


def _size(number: float) -> str:
    """Return a number of bytes in MB or GB, powers of ten."""
    return f"{number / 1e9:.3g} GB" if number >= 1e9 else f"{number / 1e6:.3g} MB"
