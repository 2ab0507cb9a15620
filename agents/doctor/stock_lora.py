"""Pipelines with a LoRA as diffusers loads it: the one that a run starts from, and the one that it saves."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.loaders.lora_base import LoraBaseMixin
from peft import PeftModel
from torch import Tensor, nn

from agents.policy.lora import continue_lora, share_weights, starting_adapters
from ddpo_env.models import DiffusionModel, abilities_of, load_model
from ddpo_env.models.lora.adapters import quiet


def with_starting_lora(model: DiffusionModel, pipeline: DiffusionPipeline, lora: Path) -> DiffusionPipeline:
    """Return a copy of a model's pipeline with the LoRA that a run goes on from; its weights are shared."""
    adapters = starting_adapters(model, lora)
    if not isinstance(pipeline, LoraBaseMixin):
        stock = copy.copy(pipeline)
        vars(stock)[_part(pipeline, model.denoiser)] = continue_lora(model.denoiser, adapters)
        return stock
    part = _part(pipeline, model.denoiser)
    return _loaded(pipeline, {f"{part}.{name}": value for name, value in adapters.items()})


def with_saved_lora(model: DiffusionModel, folder: Path) -> DiffusionPipeline:
    """Return a copy of a model's pipeline that has read a LoRA which the model saved; its weights are shared.

    What was merged into the model is part of the file, so the pipeline is one without it.
    """
    if (merged := abilities_of(model).merged_lora) is not None:
        weight, own = next(model.denoiser.parameters()), abilities_of(model)
        model = load_model(merged.model, weight.device, weight.dtype, own.resolution, own.arguments)
    pipeline: Any = model.pipeline  # type: ignore[attr-defined]
    if isinstance(pipeline, LoraBaseMixin):
        return _loaded(pipeline, str(folder))
    stock = copy.copy(pipeline)
    carrier = PeftModel.from_pretrained(share_weights(model.denoiser), folder)
    vars(stock)[_part(pipeline, model.denoiser)] = carrier.get_base_model()  # merged, weights would change
    return stock


def _loaded(pipeline: Any, lora: str | dict[str, Tensor]) -> DiffusionPipeline:
    stock = copy.copy(pipeline)
    for name in pipeline._lora_loadable_modules:
        if isinstance(component := getattr(pipeline, name, None), nn.Module):
            vars(stock)[name] = share_weights(component)
    with quiet(), torch.random.fork_rng(devices=[]):
        stock.load_lora_weights(lora)
    return stock


def _part(pipeline: DiffusionPipeline, denoiser: nn.Module) -> str:
    (part,) = [name for name, component in pipeline.components.items() if component is denoiser]
    return part
