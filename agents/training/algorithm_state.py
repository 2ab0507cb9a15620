"""The state of an algorithm and its environment between two iterations: tensors, and plain values for JSON."""

from __future__ import annotations

import random
from collections import deque
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from agents.algorithms.on_policy import TensorOnPolicyAlgorithm
from agents.policy.weight_copies import AVERAGE, LAGGING
from agents.rollout.vec_env import denoising_env_of
from agents.training.stored_values import check_like, restore, store
from ddpo_env.vector_env import DenoisingVectorEnv

_COUNTERS = ("num_timesteps", "_n_updates", "_episode_num", "_current_progress_remaining")
_WEIGHTS = ("policy.", f"{AVERAGE}.", f"{LAGGING}.")
_LEARNED = (*_WEIGHTS, "optimizer.")


@runtime_checkable
class Stateful(Protocol):
    """Anything whose state is numbers, text, arrays and tensors, in lists and dictionaries."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        ...


def algorithm_state(algorithm: TensorOnPolicyAlgorithm) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return copies of the tensors on the host, and the rest for JSON.

    Raises:
        FloatingPointError: if a weight, an average or the optimizer's state is NaN or infinite.
    """
    tensors = _learned(algorithm)
    check_finite(tensors)
    optimizer = algorithm.policy.optimizer.state_dict()
    averages, _ = _averages(algorithm)
    tensors["random.torch"] = torch.get_rng_state()
    if algorithm.device.type == "cuda":
        tensors["random.cuda"] = torch.cuda.get_rng_state(algorithm.device)
    advantage = algorithm.advantage
    env_tensors, env_state = _env_state(algorithm)
    state = {
        "counters": {name: getattr(algorithm, name) for name in _COUNTERS},
        "episodes": list(algorithm.ep_info_buffer or []),
        "successes": list(algorithm.ep_success_buffer or []),
        "optimizer": optimizer["param_groups"],
        "averages": averages,
        "scaler": algorithm.scaler.state_dict(),
        "advantage": store(advantage.state_dict(), "advantage", tensors) if isinstance(advantage, Stateful) else {},
        "generators": algorithm.generator_state(),
        # The algorithm draws from none of these; a user's reward or callback may.
        "random": {"python": random.getstate(), "numpy": _numpy_state()},
        "env": env_state,
    }
    # Cloned, because safetensors refuses tensors that share memory.
    return {name: value.detach().cpu().contiguous().clone() for name, value in (tensors | env_tensors).items()}, state


def check_learned(algorithm: TensorOnPolicyAlgorithm) -> None:
    """Refuse an algorithm that has diverged; see `check_finite` for the error."""
    check_finite(_learned(algorithm))


def _learned(algorithm: TensorOnPolicyAlgorithm) -> dict[str, Tensor]:
    """Return the weights that learn, the optimizer's state and the averages."""
    tensors = {f"policy.{name}": value for name, value in algorithm.policy.state_dict().items()}
    for index, values in algorithm.policy.optimizer.state_dict()["state"].items():
        for name, value in values.items():
            tensors[f"optimizer.{index}.{name}"] = torch.as_tensor(value)
    return tensors | _averages(algorithm)[1]


def _averages(algorithm: TensorOnPolicyAlgorithm) -> tuple[dict[str, dict[str, Any]], dict[str, Tensor]]:
    """Return the settings and counters of the averages of the weights, and their tensors."""
    states = {name: one.state_dict() for name, one in algorithm.averages().items()}
    shadows = {name: one.pop("shadow_params") for name, one in states.items()}
    return states, {f"{name}.{index}": value for name, one in shadows.items() for index, value in enumerate(one)}


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


def load_algorithm_state(algorithm: TensorOnPolicyAlgorithm, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
    """Restore what `algorithm_state` returned; first it is checked against the algorithm's own state.

    Raises:
        ValueError: if a tensor or a value does not fit.
    """
    _check_fits(algorithm, tensors, state)

    def below(prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}

    algorithm.policy.load_state_dict(below("policy."))
    optimizer_state: dict[int, dict[str, Tensor]] = {}
    for name, value in below("optimizer.").items():
        index, key = name.split(".", 1)
        optimizer_state.setdefault(int(index), {})[key] = value
    algorithm.policy.optimizer.load_state_dict({"state": optimizer_state, "param_groups": state["optimizer"]})
    for name, average in algorithm.averages().items():
        shadow = below(f"{name}.")
        parameters = [shadow[str(index)].to(algorithm.device) for index in range(len(shadow))]
        average.load_state_dict({**state["averages"][name], "shadow_params": parameters})
    algorithm.scaler.load_state_dict(state["scaler"])
    for name in _COUNTERS:
        setattr(algorithm, name, state["counters"][name])
    algorithm.ep_info_buffer = deque(state["episodes"], maxlen=algorithm._stats_window_size)
    algorithm.ep_success_buffer = deque(state["successes"], maxlen=algorithm._stats_window_size)
    if isinstance(algorithm.advantage, Stateful):
        algorithm.advantage.load_state_dict(restore(state["advantage"], tensors))
    _load_env_state(algorithm, below("env."), state["env"])
    algorithm.load_generator_state(state["generators"])
    version, internal, gauss = state["random"]["python"]
    random.setstate((version, tuple(internal), gauss))
    np.random.set_state(state["random"]["numpy"])
    torch.set_rng_state(tensors["random.torch"])
    if "random.cuda" in tensors and algorithm.device.type == "cuda":
        torch.cuda.set_rng_state(tensors["random.cuda"], algorithm.device)


def _check_fits(algorithm: TensorOnPolicyAlgorithm, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
    own = {f"policy.{name}": value for name, value in algorithm.policy.state_dict().items()}
    averages, shadows = _averages(algorithm)
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
    check_like(state["counters"], {name: getattr(algorithm, name) for name in _COUNTERS}, "counters")
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
