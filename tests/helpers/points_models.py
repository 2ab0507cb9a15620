"""Environments of points, and the smallest diffusion model of one's own: one step whose mean is its only parameter."""

import itertools
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from diffusers import DDPMScheduler
from torch import Tensor, nn

from agents.config.train_config import TrainConfig, train_config
from ddpo_env.models import ModelAbilities

SCRATCH = {"lora_rank": 0, "guidance_scale": 1.0}


def make_vec(num_envs: int, **arguments: Any) -> Any:
    settings: dict[str, Any] = {"backend": "torch", "autoreset_mode": "SameStep", "device": "cpu"}
    return gym.make_vec("DDPO-Points-v0", num_envs=num_envs, **settings | arguments)


def rightward(points: np.ndarray, prompts: list[str], metadata: list[dict[str, Any]]) -> np.ndarray:
    """How far a point is to the right: a reward without a maximum."""
    return points[:, 0]


def near_one(points: np.ndarray, prompts: list[str], metadata: list[dict[str, Any]]) -> np.ndarray:
    """Best where points are 1 to the right: what training for `rightward` raises first and lowers then."""
    return -np.abs(points[:, 0] - 1)


def points_config(run_dir: Path, **settings: Any) -> TrainConfig:
    """A run that trains points to go right, in moments."""
    quick: dict[str, Any] = {
        "model": "points",
        "device": "cpu",
        "run_dir": run_dir,
        "reward": "helpers.points_models:rightward",
        "lora_rank": 0,
        "num_inference_steps": 4,
        "samples_per_iteration": 64,
        "iterations": 10,
        "learning_rate": 0.01,
        "learning_rate_schedule": "constant",
        "eval_samples": 32,
        "eval_interval": 1,
    }
    return train_config(**quick | settings)


class Constant(nn.Module):
    """A denoiser that says the same point whatever it sees: its bias is the mean of a one-step policy."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.tensor([0.3, -0.2]))

    def forward(self, latents: Tensor) -> Tensor:
        return self.bias.expand_as(latents)


class ConstantModel(ModelAbilities):
    """The smallest `DiffusionModel` of one's own. DDPM's one step of it is N(bias, 0.5² I)."""

    sample_kind = "other"
    latent_shape = (2,)
    conditioning_shapes: dict[str, tuple[int, ...]] = {}  # noqa: RUF012
    scheduler = DDPMScheduler(
        num_train_timesteps=2,
        trained_betas=[0.1, 1 / 6],  # ᾱ = 0.75
        prediction_type="sample",
        variance_type="fixed_large",
        clip_sample=False,
        timestep_spacing="trailing",
    )

    _numbers = itertools.count()

    def __init__(self) -> None:
        self.source = f"constant-{next(self._numbers)}"
        self.denoiser: nn.Module = Constant()

    def encode_prompts(self, prompts: Any) -> dict[str, Tensor]:
        return {}

    def decode(self, latents: Tensor) -> Tensor:
        return latents

    def predict(self, denoiser: nn.Module, latents: Tensor, timestep: Tensor, conditioning: Any) -> Tensor:
        return denoiser(latents)

    def save_lora(self, denoiser: nn.Module, folder: Path) -> None:
        raise ValueError("no LoRA")
