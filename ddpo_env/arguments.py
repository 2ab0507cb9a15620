"""What a caller may give to the constructor of `DenoisingVectorEnv`, checked before anything heavy is loaded.

Every function raises a `ValueError` that names the argument, what is valid and what came.
"""

from __future__ import annotations

import numbers
from typing import get_args

from gymnasium.vector import AutoresetMode

from ddpo_env.models.loading import DiffusionModel
from rewards import NonFinite, Reward, is_images_only, reward_name

BACKENDS = ("numpy", "torch")


def check_counts(num_envs: int, samples_per_prompt: int, num_inference_steps: int, part: tuple[int, int]) -> None:
    """Refuse counts that are no integers above 0, and batches that are no whole groups of `samples_per_prompt`."""
    counts = {
        "num_envs": num_envs,
        "samples_per_prompt": samples_per_prompt,
        "num_inference_steps": num_inference_steps,
    }
    for name, count in counts.items():
        if isinstance(count, bool) or not isinstance(count, numbers.Integral) or count < 1:
            raise ValueError(f"{name} must be an integer of at least 1; got {count!r}")
    if len(part) != 2 or not 0 <= part[0] < part[1]:
        raise ValueError(f"part must be (index, count) with 0 <= index < count; got {part!r}")
    if num_envs * part[1] % samples_per_prompt:
        raise ValueError(f"samples_per_prompt must divide num_envs={num_envs * part[1]}; got {samples_per_prompt}")


def check_settings(backend: str, deferred_rewards: bool, non_finite_rewards: str, render_mode: str | None) -> None:
    """Refuse values that are none of the valid ones."""
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}; got {backend!r}")
    if not isinstance(deferred_rewards, bool):
        raise ValueError(f"deferred_rewards must be True or False; got {deferred_rewards!r}")
    if non_finite_rewards not in get_args(NonFinite):
        raise ValueError(
            f"non_finite_rewards must be one of {', '.join(get_args(NonFinite))}; got {non_finite_rewards!r}"
        )
    if render_mode not in (None, "rgb_array"):
        raise ValueError(f"render_mode must be None or 'rgb_array'; got {render_mode!r}")


def autoreset_mode_of(mode: str | AutoresetMode) -> AutoresetMode:
    """Return the mode that a value such as `"SameStep"` stands for."""
    try:
        return AutoresetMode(mode)
    except ValueError:
        valid = ", ".join(repr(m.value) for m in AutoresetMode)
        raise ValueError(f"autoreset_mode must be one of {valid}; got {mode!r}") from None


def check_reward_and_rendering(model: DiffusionModel, reward: Reward, render_mode: str | None) -> None:
    """Refuse a reward of pictures, and rendering, for a model that draws none."""
    if getattr(model, "draws_pictures", True):
        return
    if is_images_only(reward):
        raise ValueError(
            f"reward {reward_name(reward)} scores pictures, uint8 (batch, height, width, 3), and model "
            f"{model.source!r} draws none; give a reward of what it draws"
        )
    if render_mode is not None and not hasattr(model, "render"):
        raise ValueError(
            f"render_mode must be None with model {model.source!r}, which draws no pictures and has no method "
            f"render(latents); got {render_mode!r}"
        )
