"""A denoiser inside a wrapper, as `torch.compile` makes one: what is saved has the names that stock diffusers reads."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from helpers.micro_agents import micro_env
from helpers.paths import LORA_FILE
from safetensors.torch import load_file
from torch.nn.parallel import DataParallel

from agents import DiffusionPolicy
from ddpo_env import DenoisingVectorEnv


def compiled(pipeline: StableDiffusionPipeline) -> None:
    pipeline.unet = torch.compile(pipeline.unet)


def parallel(pipeline: StableDiffusionPipeline) -> None:
    pipeline.unet = DataParallel(torch.compile(pipeline.unet))


def block_compiled(pipeline: StableDiffusionPipeline) -> None:
    pipeline.unet.mid_block = torch.compile(pipeline.unet.mid_block)


def policy_of(pipeline: Any, **options: Any) -> DiffusionPolicy:
    env = DenoisingVectorEnv(2, model=pipeline, num_inference_steps=2, prompts=["a cat"])
    return DiffusionPolicy(
        env.single_observation_space, env.single_action_space, lambda _: 1e-3, guidance_scale=1.0, **options
    )


@pytest.mark.parametrize("wrap", [compiled, parallel, block_compiled])
def test_stock_diffusers_reads_the_lora_of_a_wrapped_denoiser(
    micro_pipeline_folder: Path, tmp_path: Path, wrap: Any
) -> None:
    pipeline, stock = (StableDiffusionPipeline.from_pretrained(micro_pipeline_folder) for _ in range(2))
    wrap(pipeline)
    policy = policy_of(pipeline)
    with torch.no_grad():
        for parameter in policy.trainable_parameters():
            parameter.add_(0.1)
    policy.save_lora(tmp_path / "lora")
    keys = list(load_file(tmp_path / "lora" / "pytorch_lora_weights.safetensors"))
    assert keys
    assert not any("_orig_mod" in key or "module." in key for key in keys)
    stock.load_lora_weights(tmp_path / "lora", weight_name=LORA_FILE)
    adapters = {name for name, _ in stock.unet.named_parameters() if "lora_" in name}
    assert len(adapters) == len(keys) == len(policy.trainable_parameters())


def test_full_training_of_a_compiled_denoiser_saves_the_networks_own_names(micro_pipeline_folder: Path) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(micro_pipeline_folder)
    expected = {f"denoiser.{name}" for name in pipeline.unet.state_dict()}
    compiled(pipeline)
    assert set(policy_of(pipeline, lora_rank=0).state_dict()) == expected


def test_a_folder_that_is_a_file_is_an_error(micro_pipeline_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "lora").write_text("a file")
    env = micro_env(micro_pipeline_folder, 2)
    policy = DiffusionPolicy(env.single_observation_space, env.single_action_space, lambda _: 1e-3)
    with pytest.raises(ValueError, match=r"must be a folder or a new name; '.*lora' is a file"):
        policy.save_lora(tmp_path / "lora")


def test_a_lora_that_was_not_written_is_an_error(
    micro_pipeline_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(micro_pipeline_folder)
    policy = policy_of(pipeline)
    monkeypatch.setattr(StableDiffusionPipeline, "save_lora_weights", lambda *_, **__: None)
    with pytest.raises(ValueError, match=r"must hold the \d+ adapters that were trained.*missing"):
        policy.save_lora(tmp_path / "lora")
