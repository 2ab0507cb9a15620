"""What a checkpoint holds: an algorithm, its environment and the global generators, as tensors and plain values."""

from __future__ import annotations

import random
from collections import deque
from typing import Any

import numpy as np
import torch
from torch import Tensor

from agents.algorithms.on_policy import TensorOnPolicyAlgorithm
from agents.algorithms.saving.state import (
    COUNTERS,
    algorithm_state,
    averages_of,
    below,
    learned_tensors,
    load_algorithm_state,
    to_store,
)
from agents.algorithms.saving.stored_values import check_like
from agents.policy.weight_copies import AVERAGE, LAGGING
from agents.rollout.vec_env import denoising_env_of
from ddpo_env.vector_env import DenoisingVectorEnv

_WEIGHTS = ("policy.", f"{AVERAGE}.", f"{LAGGING}.")
_LEARNED = (*_WEIGHTS, "optimizer.")


def checkpoint_state(algorithm: TensorOnPolicyAlgorithm) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return copies of the tensors on the host, and the rest for JSON.

    Raises:
        FloatingPointError: if a weight, an average or the optimizer's state is NaN or infinite.
    """
    tensors, state = algorithm_state(algorithm)
    check_finite(tensors)
    tensors["random.torch"] = torch.get_rng_state()
    if algorithm.device.type == "cuda":
        tensors["random.cuda"] = torch.cuda.get_rng_state(algorithm.device)
    env_tensors, env_state = _env_state(algorithm)
    state |= {
        "episodes": list(algorithm.ep_info_buffer or []),
        "successes": list(algorithm.ep_success_buffer or []),
        # The algorithm draws from none of these; a user's reward or callback may.
        "random": {"python": random.getstate(), "numpy": _numpy_state()},
        "env": env_state,
    }
    return to_store(tensors | env_tensors), state


def check_learned(algorithm: TensorOnPolicyAlgorithm) -> None:
    """Refuse an algorithm that has diverged; see `check_finite` for the error."""
    check_finite(learned_tensors(algorithm))


def check_finite(tensors: dict[str, Tensor]) -> None:
    """Refuse learned tensors that are NaN or infinite: training from them can only fail.

    Raises:
        FloatingPointError: naming some of them, and what to try.
    """
    wrong = [name for name, value in tensors.items() if name.startswith(_LEARNED) and not value.isfinite().all()]
    if wrong:
        raise FloatingPointError(
            f"training diverged: {len(wrong)} of {len(tensors)} tensors are NaN or infinite, such as {wrong[0]}; the "
            "last good iteration is kept. Try a lower learning_rate, a smaller max_grad_norm, or smaller rewards"
        )


def load_checkpoint_state(
    algorithm: TensorOnPolicyAlgorithm, tensors: dict[str, Tensor], state: dict[str, Any]
) -> None:
    """Restore what `checkpoint_state` returned; first it is checked against the algorithm's own state.

    Raises:
        ValueError: if a tensor or a value does not fit.
    """
    _check_fits(algorithm, tensors, state)
    load_algorithm_state(algorithm, tensors, state)
    algorithm.ep_info_buffer = deque(state["episodes"], maxlen=algorithm._stats_window_size)
    algorithm.ep_success_buffer = deque(state["successes"], maxlen=algorithm._stats_window_size)
    _load_env_state(algorithm, below("env.", tensors), state["env"])
    version, internal, gauss = state["random"]["python"]
    random.setstate((version, tuple(internal), gauss))
    np.random.set_state(state["random"]["numpy"])
    torch.set_rng_state(tensors["random.torch"])
    if "random.cuda" in tensors and algorithm.device.type == "cuda":
        torch.cuda.set_rng_state(tensors["random.cuda"], algorithm.device)


def _check_fits(algorithm: TensorOnPolicyAlgorithm, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
    own = {f"policy.{name}": value for name, value in algorithm.policy.state_dict().items()}
    averages, shadows = averages_of(algorithm)
    own |= shadows
    for name, value in own.items():
        if name not in tensors:
            raise ValueError(f"it has no tensor {name!r}")
        saved = tensors[name]
        if (saved.shape, saved.dtype) != (value.shape, value.dtype):
            raise ValueError(
                f"{name} must be {value.dtype} {tuple(value.shape)}; got {saved.dtype} {tuple(saved.shape)}"
            )
    parameters = [one for group in algorithm.policy.optimizer.param_groups for one in group["params"]]
    for name, value in tensors.items():
        if name.startswith("optimizer."):
            index = int(name.split(".")[1])
            shape = parameters[index].shape if index < len(parameters) else None
            if value.shape not in (shape, torch.Size()) or not value.is_floating_point():
                raise ValueError(f"{name} does not fit the optimizer: {value.dtype} {tuple(value.shape)}")
        elif name.startswith(_WEIGHTS) and name not in own:
            raise ValueError(f"{name} is no tensor of this run")
    check_finite(tensors)
    groups = [
        {name: value for name, value in group.items() if name != "params"}
        for group in algorithm.policy.optimizer.state_dict()["param_groups"]
    ]
    saved_groups = [{name: value for name, value in group.items() if name != "params"} for group in state["optimizer"]]
    check_like(
        {str(i): one for i, one in enumerate(saved_groups)}, {str(i): one for i, one in enumerate(groups)}, "optimizer"
    )
    check_like(state["counters"], {name: getattr(algorithm, name) for name in COUNTERS}, "counters")
    check_like(state["averages"], averages, "averages")
    check_like(state["scaler"], algorithm.scaler.state_dict(), "scaler")
    for episode in (*state["episodes"], *state["successes"]):
        if isinstance(episode, dict) and not all(isinstance(value, int | float) for value in episode.values()):
            raise ValueError(f"episodes must hold numbers; got {episode!r}")


def _numpy_state() -> list[Any]:
    return [value.tolist() if isinstance(value, np.ndarray) else value for value in np.random.get_state()]


def _denoising_env(algorithm: TensorOnPolicyAlgorithm) -> DenoisingVectorEnv:
    assert algorithm.env is not None
    env = denoising_env_of(algorithm.env)
    if env is None:
        raise TypeError(f"checkpoints need a DenoisingVectorEnv; got a {type(algorithm.env).__name__}")
    return env


def _env_state(algorithm: TensorOnPolicyAlgorithm) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the state of the whole batch; every process has some of its sub-environments."""
    tensors, state = _denoising_env(algorithm).state_dict()
    gathered = algorithm.processes.gather_objects(({name: value.cpu() for name, value in tensors.items()}, state))
    whole = {f"env.{name}": torch.cat([one[name] for one, _ in gathered]) for name in tensors}
    return whole, {name: [value for _, one in gathered for value in one[name]] for name in state}


def _load_env_state(algorithm: TensorOnPolicyAlgorithm, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
    env = _denoising_env(algorithm)
    env.load_state_dict(tensors, state)
    algorithm._last_obs = env.observe()
    algorithm._last_episode_starts = np.ones(env.num_envs, dtype=bool)
    algorithm.env.reset_infos = env.reset_infos()  # type: ignore[union-attr]
