"""Whether a model, a reward and the settings of a run fit together, found out on the meta device: nothing is loaded."""

from __future__ import annotations

from pathlib import Path

import torch

from agents.config.train_config import TrainConfig
from agents.policy.guidance import check_guidance
from agents.policy.lora import add_lora, continue_lora, starting_adapters
from ddpo_env.models import DiffusionModel, abilities_of
from ddpo_env.models.families.pipeline_model import PipelineModel
from ddpo_env.models.loading import is_object
from ddpo_env.models.lora.adapters import check_mergeable
from ddpo_env.models.lora.lora_file import find_lora
from ddpo_env.models.outline import outline_model
from ddpo_env.models.protocol import check_reward_and_rendering
from rewards import Reward
from rewards.networks.devices import resolve_device, resolve_dtype


def check_fit(config: TrainConfig, reward: Reward) -> None:
    """Refuse what the run would refuse once its model is loaded, in the same words.

    A Hub id whose architecture is not known here, and an object of this process, are checked when they are used.

    Args:
        config: resolved.
        reward: of the run, not loaded.

    Raises:
        ValueError: naming the setting, its value and what is valid.
    """
    options, settings = config.policy, config.run
    if options.autocast is not None:
        resolve_dtype(options.autocast, resolve_device(config.device))
    if is_object(config.model):
        return
    model = outline_model(config.model, *settings.size)
    if model is None:
        return
    if settings.base_lora is not None:
        _check_base_lora(model, find_lora(settings.base_lora, "base_lora"))
    abilities_of(model).save_memory(settings.offload_text_encoder, settings.vae_tiling)
    check_reward_and_rendering(model, reward, None)
    check_guidance(model, options.guidance_scale)
    config.check_noise(options.sampler_table(model, config.num_inference_steps).is_stochastic.numpy())
    if options.gradient_checkpointing and not getattr(model.denoiser, "_supports_gradient_checkpointing", False):
        raise ValueError(
            f"gradient_checkpointing must be False with model {config.model!r}, whose "
            f"{type(model.denoiser).__name__} has none; got True"
        )
    if options.lora_rank > 0:
        adapters = None if options.lora is None else starting_adapters(model, options.lora)
        with torch.device("meta"):
            if adapters is not None:
                continue_lora(model.denoiser, adapters)
                return
            add_lora(model.denoiser, options.lora_rank, options.lora_targets)


def _check_base_lora(model: DiffusionModel, lora: Path) -> None:
    if not isinstance(model, PipelineModel):
        raise ValueError(f"base_lora must be None with model {model.source!r}, which reads no LoRA; got {str(lora)!r}")
    check_mergeable(model.pipeline, model.watched.denoiser_name, lora, model.source)
