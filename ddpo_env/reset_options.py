"""What a caller may give to `DenoisingVectorEnv.reset` and `step`, checked before anything changes.

Every function returns the checked value in the form that the environment works with, or raises a `ValueError` that
names the parameter, what is valid and what came.
"""

from __future__ import annotations

import numbers
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ddpo_env.prompts.distributions import Prompt, PromptDistribution, PromptSet, load_prompts

RESET_OPTIONS = ("prompts", "latents", "reset_mask")


def check_names(options: Mapping[str, Any]) -> None:
    """Refuse options that `reset` does not know."""
    if unknown := set(options) - set(RESET_OPTIONS):
        raise ValueError(
            f"reset options must be among {', '.join(RESET_OPTIONS)}; got {', '.join(sorted(map(repr, unknown)))}"
        )


def slot_seeds(seed: int | Sequence[int | None] | None, num_envs: int, first_slot: int = 0) -> list[int | None]:
    """Return one seed a slot: slot `i` of an integer seed `s` has `s + first_slot + i`."""
    if seed is None:
        return [None] * num_envs
    if isinstance(seed, numbers.Integral):
        return [int(seed) + first_slot + slot for slot in range(num_envs)]
    if not isinstance(seed, Sequence | np.ndarray) or len(seed) != num_envs:
        raise ValueError(f"seed must be None, an integer, or one a slot ({num_envs}); got {seed!r}")
    return [int(one) if isinstance(one, numbers.Integral) else one for one in seed]


def reset_mask(mask: Any, num_envs: int, samples_per_prompt: int, first_slot: int = 0) -> npt.NDArray[np.bool_]:
    """Return which slots begin anew, `(num_envs,)`: at least one, and whole groups that share a prompt."""
    if mask is None:
        return np.ones(num_envs, dtype=np.bool_)
    if not isinstance(mask, np.ndarray) or mask.dtype != np.bool_ or mask.shape != (num_envs,):
        raise ValueError(f"options['reset_mask'] must be a boolean array of shape ({num_envs},); got {mask!r}")
    groups = (first_slot + np.arange(num_envs)) // samples_per_prompt
    chosen = np.unique(groups[mask])
    if not mask.any() or not mask[np.isin(groups, chosen)].all():
        raise ValueError(
            f"options['reset_mask'] must select at least one slot, and whole groups of samples_per_prompt="
            f"{samples_per_prompt} slots; got {mask!r}"
        )
    return mask


def given_prompts(prompts: Any, num_envs: int, own: PromptDistribution) -> list[Prompt] | None:
    """Return one prompt a slot; a prompt of the environment's `own` set keeps its metadata."""
    if prompts is None:
        return None
    one_a_slot = [prompts] * num_envs if isinstance(prompts, str) else prompts
    if not isinstance(one_a_slot, Sequence | np.ndarray) or len(one_a_slot) != num_envs:
        raise ValueError(f"options['prompts'] must be a string or one a slot ({num_envs}); got {prompts!r}")
    try:
        given = load_prompts(list(one_a_slot))
    except (TypeError, ValueError) as error:
        raise ValueError(f"options['prompts'] must be a string or one a slot ({num_envs}): {error}") from error
    assert isinstance(given, PromptSet)
    known = dict(own) if isinstance(own, PromptSet) else {}
    return [(prompt, metadata or known.get(prompt, {})) for prompt, metadata in given]


def given_latents(latents: Any, num_envs: int, shape: tuple[int, ...]) -> Tensor | None:
    """Return one latent a slot, `(num_envs, *shape)` on the CPU."""
    if latents is None:
        return None
    tensor = as_float(latents, "options['latents']")
    if tuple(tensor.shape) not in (shape, (num_envs, *shape)):
        raise ValueError(
            f"options['latents'] must have shape {shape} or {(num_envs, *shape)}; got {tuple(tensor.shape)}"
        )
    if not bool(torch.isfinite(tensor).all()):
        raise ValueError("options['latents'] must be finite; got NaN or infinite values")
    return tensor.cpu().expand(num_envs, *shape)


def as_float(values: Any, name: str) -> Tensor:
    """Return numbers as a float32 tensor, wherever they are; it may share memory with `values`."""
    try:
        return torch.as_tensor(values).detach().to(torch.float32)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name} must be an array or a tensor of numbers; got {values!r}") from error
