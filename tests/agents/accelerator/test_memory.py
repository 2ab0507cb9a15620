"""What a run keeps in the memory of the pretend accelerator, and what it does when there is little."""

import gc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.algorithms import collected
from helpers.micro_agents import micro_config, micro_env
from helpers.micro_pipeline import micro_pipeline
from helpers.pretend_accelerator import Accelerator

from agents import run_training
from agents.algorithms.advantages import BatchAdvantage
from agents.algorithms.policy_gradient.ppo import PPO
from agents.planning.memory import _training_call
from agents.policy.diffusion_policy import DiffusionPolicy
from agents.rollout.vec_env import VectorEnvAdapter
from ddpo_env.models.loading import load_model


def new_ppo(model: Path, lora_rank: int, **arguments: Any) -> PPO:
    env = VectorEnvAdapter(micro_env(model, 4, num_inference_steps=2, device="cuda", dtype="float32"))
    settings: dict[str, Any] = {
        "n_steps": 2,
        "batch_size": 8,
        "micro_batch_size": 4,
        "n_epochs": 1,
        "gamma": 1.0,
        "advantage": BatchAdvantage(),
        "policy_kwargs": {"lora_rank": lora_rank, "guidance_scale": 3.0},
        "seed": 0,
        "device": "cuda",
    }
    return PPO(DiffusionPolicy, env, **settings | arguments)


def peak_above(idle: int) -> int:
    peak = torch.cuda.max_memory_allocated() - idle
    torch.cuda.reset_peak_memory_stats()
    return peak


@pytest.mark.usefixtures("accelerator")
@pytest.mark.parametrize(
    ("lora_rank", "options"),
    [
        (0, {"kl_coef": 0.1, "ema_decay": 0.9}),
        pytest.param(0, {}, marks=pytest.mark.slow),
        pytest.param(2, {}, marks=pytest.mark.slow),
        pytest.param(2, {"kl_coef": 0.1, "ema_decay": 0.9}, marks=pytest.mark.slow),
    ],
)
def test_trial_of_a_call_needs_the_memory_of_an_update(
    lora_rank: int, options: dict[str, float], micro_pipeline_folder: Path
) -> None:
    model = new_ppo(micro_pipeline_folder, lora_rank, **options)
    model._setup_learn(1)
    gc.collect()
    idle = torch.cuda.memory_allocated()
    peak_above(idle)
    _training_call(model, model.policy, 4)  # type: ignore[arg-type]
    trial = peak_above(idle)
    collected(model)
    gc.collect()
    peak_above(idle)
    model.train()
    assert peak_above(idle) <= 1.03 * trial, "the rest is numbers of single transitions, a block of 512 bytes each"


@pytest.mark.slow
def test_run_trains_in_the_memory_in_which_its_size_was_tried(
    accelerator: Accelerator, micro_pipeline_folder: Path, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"train_batch_size": 0, "iterations": 1, "device": "cuda", "dtype": "float32"}
    settings |= {"lora_rank": 0, "eval_samples": 1, "samples_per_iteration": 32, "updates_per_iteration": 1}
    sizes = []
    for megabytes in (8, 4):
        accelerator.limit_memory(megabytes * 2**20)
        run = run_training(micro_config(micro_pipeline_folder, tmp_path / str(megabytes), **settings))
        sizes.append(run.config.training.train_batch_size)
        gc.collect()
    assert 1 <= sizes[1] < sizes[0]


@pytest.mark.usefixtures("accelerator")
def test_text_encoder_is_on_the_device_only_while_it_encodes() -> None:
    pipeline = micro_pipeline()
    size = sum(weight.nbytes for weight in pipeline.text_encoder.parameters())
    model: Any = load_model(pipeline, "cuda", "float32")
    encoder = model.pipeline.text_encoder
    assert {weight.device.type for weight in encoder.parameters()} == {"cpu"}
    assert next(model.denoiser.parameters()).device.type == "cuda"
    gc.collect()
    away = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    embeds = model.encode_prompts(["a cat"])["prompt_embeds"]
    assert embeds.device.type == "cuda"
    assert torch.cuda.max_memory_allocated() - away > size
    assert torch.cuda.memory_allocated() - away < 4096
    load_model(pipeline, "cuda", "float32", offload_text_encoder=False)
    assert torch.cuda.memory_allocated() - away > size
    expected = load_model(micro_pipeline(), "cpu", "float32").encode_prompts(["a cat"])["prompt_embeds"]
    torch.testing.assert_close(embeds.cpu(), expected)


@pytest.mark.usefixtures("accelerator")
@pytest.mark.parametrize("vae_tiling", [False, True])
def test_images_are_decoded_as_on_the_cpu(vae_tiling: bool) -> None:
    latents = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    images = [
        load_model(micro_pipeline(), device, "float32", vae_tiling=vae_tiling).decode(latents.to(device)).cpu().numpy()
        for device in ("cpu", "cuda")
    ]
    assert np.abs(images[0].astype(int) - images[1]).max() <= 1
