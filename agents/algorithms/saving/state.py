"""The state of an algorithm between two iterations: tensors, and plain values for JSON.

A file that `save` writes and a checkpoint of a run hold it in the same form; the checkpoint adds the environment.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from agents.algorithms.saving.stored_values import restore, store

COUNTERS = ("num_timesteps", "_n_updates", "_episode_num", "_current_progress_remaining")


@runtime_checkable
class Stateful(Protocol):
    """Anything whose state is numbers, text, arrays and tensors, in lists and dictionaries."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        ...


def algorithm_state(algorithm: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors, which are the algorithm's own, and the rest for JSON."""
    tensors, estimator = learned_tensors(algorithm), algorithm.advantage
    state = {
        "counters": {name: getattr(algorithm, name) for name in COUNTERS},
        "optimizer": algorithm.policy.optimizer.state_dict()["param_groups"],
        "averages": averages_of(algorithm)[0],
        "scaler": algorithm.scaler.state_dict(),
        "advantage": store(estimator.state_dict(), "advantage", tensors) if isinstance(estimator, Stateful) else None,
        "generators": algorithm.generator_state(),
    }
    return tensors, state


def learned_tensors(algorithm: Any) -> dict[str, Tensor]:
    """Return the policy's weights, the optimizer's state and the averages."""
    tensors = {f"policy.{name}": value for name, value in algorithm.policy.state_dict().items()}
    for index, values in algorithm.policy.optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": torch.as_tensor(value) for name, value in values.items()}
    return tensors | averages_of(algorithm)[1]


def averages_of(algorithm: Any) -> tuple[dict[str, dict[str, Any]], dict[str, Tensor]]:
    """Return the settings and counters of the averages of the weights, and their tensors."""
    states = {name: one.state_dict() for name, one in algorithm.averages().items()}
    shadows = {name: one.pop("shadow_params") for name, one in states.items()}
    return states, {f"{name}.{index}": value for name, one in shadows.items() for index, value in enumerate(one)}


def to_store(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return copies on the host; safetensors refuses tensors that share memory."""
    return {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}


def load_algorithm_state(algorithm: Any, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """Restore what `algorithm_state` returned.

    Raises:
        Exception: of many kinds, for a state that does not fit; the algorithm is not usable then.
    """
    algorithm.policy.load_state_dict(below("policy.", tensors))
    algorithm.policy.optimizer.load_state_dict(optimizer_state(tensors, state))
    for name, average in algorithm.averages().items():
        shadow = below(f"{name}.", tensors)
        parameters = [shadow[str(index)].to(algorithm.device) for index in range(len(shadow))]
        average.load_state_dict({**state["averages"][name], "shadow_params": parameters})
    if state["scaler"]:  # of a device that scales gradients
        algorithm.scaler.load_state_dict(state["scaler"])
    for name in COUNTERS:
        value = state["counters"][name]
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError(f"{name} must be a number; got {value!r}")
        setattr(algorithm, name, value)
    algorithm.load_generator_state(state["generators"])
    if state["advantage"] is not None and isinstance(algorithm.advantage, Stateful):
        algorithm.advantage.load_state_dict(restore(state["advantage"], tensors))


def optimizer_state(tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> dict[str, Any]:
    """Return the optimizer's state as its `load_state_dict` takes it."""
    moments: dict[int, dict[str, Tensor]] = {}
    for name, value in below("optimizer.", tensors).items():
        index, key = name.split(".", 1)
        moments.setdefault(int(index), {})[key] = value
    return {"state": moments, "param_groups": state["optimizer"]}


def below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors whose names begin with `prefix`, by the rest of their names."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
