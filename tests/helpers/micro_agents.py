"""What the tests of `agents` share: environments, policies and weights so small that a test takes a moment."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from gymnasium.vector import AutoresetMode
from torch import Tensor

from agents.config.train_config import TrainConfig, train_config
from agents.policy.diffusion_policy import DiffusionPolicy
from ddpo_env.vector_env import DenoisingVectorEnv
from rewards.sums.composite import Composite

STEPS = 5


def brightness(images: np.ndarray, prompts: list[str], metadata: list[dict[str, Any]]) -> np.ndarray:
    """Mean pixel, 0 to 1: a reward that is cheap and smooth. Of points, the mean coordinate in the same unit."""
    return images.mean(axis=tuple(range(1, images.ndim))) / 255


def _brightness_with_gradient(samples: Tensor, prompts: list[str]) -> Tensor:
    """The same of a decoder's images, which are in [0, 1], and of points."""
    return samples.flatten(1).mean(1) / (1 if samples.ndim == 4 else 255)


brightness.differentiable_score = _brightness_with_gradient  # type: ignore[attr-defined]


def contrast(images: np.ndarray, prompts: list[str], metadata: list[dict[str, Any]]) -> tuple[Any, dict[str, Any]]:
    """Spread of the pixels, in levels, and a detail."""
    return images.std(axis=(1, 2, 3)), {"letters": [len(prompt) for prompt in prompts]}


def extent(images: np.ndarray, prompts: list[str], metadata: list[dict[str, Any]]) -> np.ndarray:
    """Largest value of a sample: a second reward for points and images alike."""
    return images.reshape(len(images), -1).max(axis=1)


def spotty(images: np.ndarray, prompts: list[str], metadata: list[dict[str, Any]]) -> np.ndarray:
    """Contrast, but images whose prompt's length is a multiple of 3 have no score."""
    return np.where([len(prompt) % 3 for prompt in prompts], contrast(images, prompts, metadata)[0], np.nan)


class Pair(Composite):
    """A weighted sum that can be a part of another."""

    def __init__(self) -> None:
        super().__init__("helpers.micro_agents:brightness:1,helpers.micro_agents:contrast:0.5")


class InterruptedReward:
    """Brightness, but its `n`-th call is where Ctrl-C comes."""

    _reward = staticmethod(brightness)  # this one, whatever takes its place in the module
    differentiable_score = staticmethod(_brightness_with_gradient)

    def __init__(self, n: int) -> None:
        self.left = n
        self.__name__ = "brightness"

    def __call__(self, images: np.ndarray, prompts: list[str], metadata: list[dict[str, Any]]) -> np.ndarray:
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt
        return self._reward(images, prompts, metadata)


def micro_env(model: Any, num_envs: int = 4, **arguments: Any) -> DenoisingVectorEnv:
    """The native batch as the algorithms take it: same-step reset, tensors."""
    settings: dict[str, Any] = {
        "reward": brightness,
        "num_inference_steps": STEPS,
        "backend": "torch",
        "autoreset_mode": AutoresetMode.SAME_STEP,
        "device": "cpu",
    }
    return DenoisingVectorEnv(num_envs, model=model, **settings | arguments)


def micro_policy(env: DenoisingVectorEnv, seed: int = 0, **arguments: Any) -> DiffusionPolicy:
    """A policy for the environment, with adapters of rank 2 on everything unless told otherwise."""
    settings: dict[str, Any] = {"lora_rank": 2, "lora_targets": "attention+convolutions", "guidance_scale": 3.0}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return DiffusionPolicy(
            env.single_observation_space, env.single_action_space, lambda _: 1e-2, **settings | arguments
        )


def stir(policy: DiffusionPolicy, scale: float = 0.2, seed: int = 1) -> DiffusionPolicy:
    """Move everything that learns at random, as long training would: fresh adapters are the identity."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.trainable_parameters():
            parameter += scale * torch.randn(parameter.shape, generator=generator).to(parameter.device)
    return policy


def train_a_step(policy: DiffusionPolicy, observation: dict[str, Tensor]) -> None:
    """One optimizer step towards larger latents."""
    policy.optimizer.zero_grad()
    (-policy.get_distribution(observation).mode().mean() + policy.predict_values(observation).mean()).backward()
    policy.optimizer.step()


def weights(policy: DiffusionPolicy) -> dict[str, Tensor]:
    """A copy of what learns."""
    return {name: value.detach().clone() for name, value in policy.state_dict().items()}


def files_below(folder: Path) -> set[str]:
    """Names of all files, relative to the folder."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def micro_config(model: Path | str, run_dir: Path | None, **settings: Any) -> TrainConfig:
    """A run of moments: 3 iterations of 8 samples in 3 steps; `settings` replace some by name.

    The model may also be "points", all of whose weights learn: a run takes a fifth of the time of the micro pipeline's.
    """
    micro: dict[str, Any] = {
        "run_dir": run_dir,
        "iterations": 3,
        "eval_samples": 6,
        "eval_interval": 2,
        "device": "cpu",
        "model": str(model),
        "reward": "helpers.micro_agents:brightness",
        "num_inference_steps": 3,
        **({} if "lora" in settings else {"lora_rank": 0 if model == "points" else 2}),
        "guidance_scale": 1.0 if model == "points" else 2.0,
        "samples_per_iteration": 8,
        "samples_per_prompt": 2,
        "sample_batch_size": 4,
        "train_batch_size": 5,
        "updates_per_iteration": 2,
        "stat_min_count": 2,
        "timestep_window": (0.0, 0.9),
        "timestep_fraction": 0.7,
    }
    return train_config(**micro | settings).with_given(settings)


def resume_config(folder: Path, **settings: Any) -> TrainConfig:
    """Settings that continue a run, with everything named again that a run folder alone must not choose."""
    own = TrainConfig.read(folder)
    outside = ("model", "prompts", "reward", "reward_options", "holdout_reward", "holdout_reward_options")
    named = {name: value for name, value in own.flat().items() if name in outside}
    return train_config(resume=folder, **named | settings)
