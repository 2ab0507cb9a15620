"""Checks what a caller gives to the constructor, to `reset` and to `step`, before anything is loaded or changed.

Every function raises a `ValueError` that names the parameter, what is valid and what came. Those for `reset` and `step`
return the checked value in the form that the environment works with.
"""

from __future__ import annotations

import numbers
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
import numpy.typing as npt
import torch
from gymnasium.vector import AutoresetMode
from torch import Tensor

from ddpo_env.prompts.distributions import Prompt, PromptDistribution, PromptSet, load_prompts
from ddpo_env.prompts.images import IMAGE
from rewards import NonFinite

BACKENDS = ("numpy", "torch")
RESET_OPTIONS = ("prompts", "latents", "reset_mask")


MOST = 1_000_000
"""Largest count: a larger one is a mistake, and would fail later for lack of memory."""


def check_counts(
    num_envs: int,
    samples_per_prompt: int,
    num_inference_steps: int,
    part: tuple[int, int],
    max_episode_steps: int | None = None,
) -> None:
    """Refuse counts that are not integers from 1 to `MOST`, and incomplete groups of `samples_per_prompt`."""
    counts = {
        "num_envs": num_envs,
        "samples_per_prompt": samples_per_prompt,
        "num_inference_steps": num_inference_steps,
    }
    if max_episode_steps is not None:
        raise ValueError(
            "max_episode_steps must be None, because an episode always has num_inference_steps steps; "
            f"got {max_episode_steps!r}"
        )
    for name, count in counts.items():
        if not _is_integer(count) or not 1 <= count <= MOST:
            raise ValueError(f"{name} must be an integer from 1 to {MOST}; got {count!r}")
    is_pair = isinstance(part, tuple | list) and len(part) == 2 and all(map(_is_integer, part))
    if not is_pair or not 0 <= part[0] < part[1]:
        raise ValueError(f"part must be (index, count) with 0 <= index < count; got {part!r}")
    if num_envs * part[1] % samples_per_prompt:
        raise ValueError(f"samples_per_prompt must divide num_envs={num_envs * part[1]}; got {samples_per_prompt}")


def check_settings(backend: str, deferred_rewards: bool, non_finite_rewards: str, render_mode: str | None) -> None:
    """Refuse values that are not among the valid ones."""
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


def check_shared_noise(shared_noise: bool, samples_per_prompt: int) -> None:
    """Refuse what is no flag, and noise to share where no sub-environments share a prompt."""
    if not isinstance(shared_noise, bool):
        raise ValueError(f"shared_noise must be True or False; got {shared_noise!r}")
    if shared_noise and samples_per_prompt == 1:
        raise ValueError(
            "samples_per_prompt must be at least 2 with shared_noise, which is noise that samples of a prompt share; "
            "got 1"
        )


def autoreset_mode_of(mode: str | AutoresetMode) -> AutoresetMode:
    """Return the mode that a value such as `"SameStep"` stands for."""
    try:
        return AutoresetMode(mode)
    except ValueError:
        valid = ", ".join(repr(m.value) for m in AutoresetMode)
        raise ValueError(f"autoreset_mode must be one of {valid}; got {mode!r}") from None


def reset_options(options: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the options of `reset`, all of them known."""
    if options is not None and not isinstance(options, Mapping):
        raise ValueError(f"reset options must be a dictionary or None; got {options!r}")
    options = dict(options or {})
    if unknown := set(options) - set(RESET_OPTIONS):
        raise ValueError(
            f"reset options must be among {', '.join(RESET_OPTIONS)}; got {', '.join(sorted(map(repr, unknown)))}"
        )
    return options


def seeds_of(seed: int | Sequence[int | None] | None, num_envs: int, first_index: int = 0) -> list[int | None]:
    """Return one seed per sub-environment: an integer seed `s` gives `s + first_index + i` to sub-environment `i`."""
    if seed is None:
        return [None] * num_envs
    if _is_integer(seed) and seed >= 0:  # type: ignore[operator]
        return [int(seed) + first_index + index for index in range(num_envs)]  # type: ignore[arg-type]
    is_list = isinstance(seed, Sequence | np.ndarray) and len(seed) == num_envs
    if not is_list or not all(one is None or (_is_integer(one) and one >= 0) for one in seed):  # type: ignore[union-attr]
        raise ValueError(
            f"seed must be None, an integer of at least 0, or one per sub-environment ({num_envs}); got {seed!r}"
        )
    return [None if one is None else int(one) for one in seed]  # type: ignore[union-attr]


def _is_integer(value: object) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def reset_mask(mask: Any, num_envs: int, samples_per_prompt: int, first_index: int = 0) -> npt.NDArray[np.bool_]:
    """Return which sub-environments are reset, `(num_envs,)`: at least one, and whole groups that share a prompt."""
    if mask is None:
        return np.ones(num_envs, dtype=np.bool_)
    if not isinstance(mask, np.ndarray) or mask.dtype != np.bool_ or mask.shape != (num_envs,):
        raise ValueError(f"options['reset_mask'] must be a boolean array of shape ({num_envs},); got {mask!r}")
    groups = (first_index + np.arange(num_envs)) // samples_per_prompt
    chosen = np.unique(groups[mask])
    if not mask.any() or not mask[np.isin(groups, chosen)].all():
        raise ValueError(
            f"options['reset_mask'] must select at least one sub-environment, and whole groups of samples_per_prompt="
            f"{samples_per_prompt} sub-environments; got {mask!r}"
        )
    return mask


def given_prompts(prompts: Any, num_envs: int, own: PromptDistribution) -> list[Prompt] | None:
    """Return one prompt per sub-environment; a prompt of the environment's `own` set keeps its metadata.

    Raises:
        ValueError: for other values, or for a text that several prompts of the set have with different images.
    """
    if prompts is None:
        return None
    valid = f"options['prompts'] must be a string or one per sub-environment ({num_envs})"
    per_env = [prompts] * num_envs if isinstance(prompts, str) else prompts
    if not isinstance(per_env, Sequence | np.ndarray) or len(per_env) != num_envs:
        raise ValueError(f"{valid}; got {prompts!r}")
    try:
        given = load_prompts(list(per_env))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{valid}: {error}") from error
    assert isinstance(given, PromptSet)
    known: dict[str, dict[str, Any]] = {}
    ambiguous = set()
    for text, metadata in own if isinstance(own, PromptSet) else ():
        before, image = known.get(text, metadata).get(IMAGE), metadata.get(IMAGE)
        if before is not image and not (isinstance(image, str | Path) and before == image):
            ambiguous.add(text)
        known[text] = metadata
    if unclear := [text for text, metadata in given if text in ambiguous and not metadata]:
        raise ValueError(
            f"{valid}; several prompts are {unclear[0]!r}: say which {IMAGE} it has, as the pair "
            f"({unclear[0]!r}, {{{IMAGE!r}: ...}})"
        )
    return [(prompt, metadata or known.get(prompt, {})) for prompt, metadata in given]


def given_latents(latents: Any, num_envs: int, shape: tuple[int, ...]) -> Tensor | None:
    """Return one latent per sub-environment, `(num_envs, *shape)` on the CPU."""
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
    """Return numbers as a float32 tensor on their device; it may share memory with `values`."""
    try:
        tensor = torch.as_tensor(values).detach()
        if tensor.is_complex():
            raise TypeError("complex numbers")
        return tensor.to(torch.float32)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name} must be an array or a tensor of real numbers; got {values!r}") from error


def checked_actions(actions: Any, shape: tuple[int, ...], device: torch.device, stalls: bool) -> Tensor:
    """Return a copy of the actions of a batch on the device, as a tensor.

    Args:
        actions: an array or a tensor.
        shape: that it must have, `(num_envs, *latent_shape)`.
        device: of the result.
        stalls: whether an accelerator is waited for anyway, so that values can be checked there too.

    Raises:
        ValueError: for another shape, or for NaN or infinite values where they are checked.
    """
    given = as_float(actions, "actions")
    if tuple(given.shape) != shape:
        raise ValueError(f"actions must have shape {shape}; got {tuple(given.shape)}")
    latents = given.to(device, copy=True)
    if (stalls or latents.device.type == "cpu") and not bool(torch.isfinite(latents).all()):
        indices = np.flatnonzero(~torch.isfinite(latents).flatten(1).all(1).cpu().numpy()).tolist()
        raise ValueError(f"actions must be finite; got NaN or infinite values in sub-environments {indices}")
    return latents
