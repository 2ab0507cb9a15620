"""Checkpoints of a run: everything that the next iteration depends on, written completely or not at all.

Tensors are stored as safetensors and the rest as JSON, so nothing that is read back can execute code. A checkpoint is
written to a hidden folder and renamed when it is complete. Only then are older ones deleted, under a hidden name too.
A kill at any moment leaves a complete checkpoint, and no half of one under a checkpoint's name.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from agents.algorithms.on_policy import TensorOnPolicyAlgorithm
from agents.rollout.vec_env import denoising_env_of
from ddpo_env.vector_env import DenoisingVectorEnv

_NAME = re.compile(r"iteration_(\d+)")
_COUNTERS = ("num_timesteps", "_n_updates", "_episode_num", "_current_progress_remaining")


@runtime_checkable
class Stateful(Protocol):
    """Anything whose state is plain values (numbers, strings, lists, dictionaries)."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        ...


@dataclass(frozen=True)
class Snapshot:
    """The content of a checkpoint in memory: a copy that later iterations do not change.

    Attributes:
        iteration: number of finished iterations.
        tensors: copies on the host.
        state: the rest, as JSON.
    """

    iteration: int
    tensors: dict[str, Tensor]
    state: str

    @classmethod
    def of(cls, iteration: int, algorithm: TensorOnPolicyAlgorithm, components: dict[str, Stateful]) -> Snapshot:
        """Copy the state of an algorithm between two iterations, and the states of other components, by name."""
        tensors, state = _algorithm_state(algorithm)
        states = {name: component.state_dict() for name, component in components.items()}
        return cls(iteration, tensors, json.dumps(state | {"iteration": iteration, "components": states}))

    def write(self, folder: Path, keep: int) -> Path:
        """Write `folder/iteration_NNNNNN`, delete all but the last `keep` checkpoints, and return the new one."""
        target = folder / f"iteration_{self.iteration:06d}"
        unfinished = folder / f".{target.name}.part"
        for leftover in folder.glob(".iteration_*"):
            shutil.rmtree(leftover)
        unfinished.mkdir(parents=True)
        save_file(self.tensors, unfinished / "tensors.safetensors")
        (unfinished / "state.json").write_text(self.state)
        for file in unfinished.iterdir():
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
        if target.exists():
            _delete(target)
        unfinished.rename(target)
        for old in _checkpoints(folder)[:-keep]:
            _delete(old)
        return target


class Checkpoints:
    """A run's checkpoints. One is written every few iterations, and a run can always go back to the last iteration.

    A snapshot of the last finished iteration stays in memory until its checkpoint is written.

    Args:
        folder: the run's `checkpoints`.
        algorithm: what trains.
        components: what else has a state, by name; the advantage estimator's is saved with the algorithm.
        interval: iterations between checkpoints; 0 for none.
        keep: checkpoints to keep, at least 1.
    """

    def __init__(
        self,
        folder: Path,
        algorithm: TensorOnPolicyAlgorithm,
        components: dict[str, Stateful],
        interval: int,
        keep: int = 2,
    ) -> None:
        self.folder = folder
        self.algorithm = algorithm
        self.components = components
        self.interval = interval
        self.keep = keep
        self._unwritten: Snapshot | None = None

    def save(self, iteration: int) -> None:
        """Write a checkpoint now."""
        self._unwritten = Snapshot.of(iteration, self.algorithm, self.components)
        self.algorithm.processes.from_main(self.write)

    def finished(self, iteration: int) -> None:
        """Note that an iteration is finished, and write its checkpoint if it is due."""
        self._unwritten = Snapshot.of(iteration, self.algorithm, self.components)
        if self.interval and iteration % self.interval == 0:
            self.algorithm.processes.from_main(self.write)

    def write(self) -> None:
        """Write the checkpoint of the last finished iteration in the main process, if it is not written yet."""
        if self._unwritten is not None and self.algorithm.processes.is_main:
            self._unwritten.write(self.folder, self.keep)
            self._unwritten = None

    def restore(self) -> None:
        """Restore the state of the last finished iteration, and make sure that it has a checkpoint."""
        self.algorithm.processes.from_main(self.write)
        checkpoint = self.algorithm.processes.from_main(lambda: latest_checkpoint(self.folder))
        load_checkpoint(checkpoint, self.algorithm, self.components)


def latest_checkpoint(folder: Path) -> Path:
    """Return the newest complete checkpoint.

    Raises:
        ValueError: if there is none.
    """
    found = _checkpoints(folder)
    if not found:
        raise ValueError(f"resume: there is no checkpoint in {str(folder)!r}")
    return found[-1]


def iterations_done(checkpoint: Path) -> int:
    """Return the number of iterations that a checkpoint has finished."""
    return int(checkpoint.name.removeprefix("iteration_"))


def check_resumable(folder: Path, iterations: int) -> None:
    """Refuse to resume a run without a checkpoint, or with more finished iterations than it is to have.

    Raises:
        ValueError: naming the folder, or the setting.
    """
    done = iterations_done(latest_checkpoint(folder))
    if iterations < done:
        raise ValueError(f"iterations must be at least {done}, which the run has finished; got {iterations}")


def load_checkpoint(checkpoint: Path, algorithm: TensorOnPolicyAlgorithm, components: dict[str, Stateful]) -> None:
    """Restore algorithm, environment, random generators and components from a checkpoint.

    With several processes the main one reads and tells the others. Their number may differ from when it was written.

    Raises:
        ValueError: if the checkpoint lacks something, as one of an older version does.
    """
    tensors, state = algorithm.processes.from_main(lambda: _read(checkpoint))
    try:
        states = state["components"]
        _load_algorithm_state(algorithm, tensors, state)
        for name, component in components.items():
            component.load_state_dict(states[name])
    except KeyError as error:
        raise ValueError(
            f"checkpoint {str(checkpoint)!r} has no {error}: an older version wrote it, and the run can only be "
            "resumed with that version"
        ) from error


def _read(checkpoint: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    return load_file(checkpoint / "tensors.safetensors"), json.loads((checkpoint / "state.json").read_text())


def _delete(checkpoint: Path) -> None:
    hidden = checkpoint.with_name(f".{checkpoint.name}.old")
    checkpoint.rename(hidden)
    shutil.rmtree(hidden)


def _checkpoints(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("iteration_*") if _NAME.fullmatch(path.name))


def _algorithm_state(algorithm: TensorOnPolicyAlgorithm) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors = {f"policy.{name}": value for name, value in algorithm.policy.state_dict().items()}
    optimizer = algorithm.policy.optimizer.state_dict()
    for index, values in optimizer["state"].items():
        for name, value in values.items():
            tensors[f"optimizer.{index}.{name}"] = torch.as_tensor(value)
    averages = algorithm.ema.state_dict() if algorithm.ema is not None else {}
    for index, value in enumerate(averages.pop("shadow_params", [])):
        tensors[f"average.{index}"] = value
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
        "average": averages,
        "scaler": algorithm.scaler.state_dict(),
        "advantage": advantage.state_dict() if isinstance(advantage, Stateful) else {},
        "random": {"python": random.getstate(), "numpy": _numpy_state()},
        "env": env_state,
    }
    # Cloned, because safetensors refuses tensors that share memory.
    return {name: value.detach().cpu().contiguous().clone() for name, value in (tensors | env_tensors).items()}, state


def _load_algorithm_state(
    algorithm: TensorOnPolicyAlgorithm, tensors: dict[str, Tensor], state: dict[str, Any]
) -> None:
    def below(prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}

    algorithm.policy.load_state_dict(below("policy."))
    optimizer_state: dict[int, dict[str, Tensor]] = {}
    for name, value in below("optimizer.").items():
        index, key = name.split(".", 1)
        optimizer_state.setdefault(int(index), {})[key] = value
    algorithm.policy.optimizer.load_state_dict({"state": optimizer_state, "param_groups": state["optimizer"]})
    if algorithm.ema is not None:
        shadow = below("average.")
        parameters = [shadow[str(index)].to(algorithm.device) for index in range(len(shadow))]
        algorithm.ema.load_state_dict({**state["average"], "shadow_params": parameters})
    algorithm.scaler.load_state_dict(state["scaler"])
    for name in _COUNTERS:
        setattr(algorithm, name, state["counters"][name])
    algorithm.ep_info_buffer = deque(state["episodes"], maxlen=algorithm._stats_window_size)
    algorithm.ep_success_buffer = deque(state["successes"], maxlen=algorithm._stats_window_size)
    if isinstance(algorithm.advantage, Stateful):
        algorithm.advantage.load_state_dict(state["advantage"])
    _load_env_state(algorithm, below("env."), state["env"])
    version, internal, gauss = state["random"]["python"]
    random.setstate((version, tuple(internal), gauss))
    np.random.set_state(state["random"]["numpy"])
    torch.set_rng_state(tensors["random.torch"])
    if "random.cuda" in tensors and algorithm.device.type == "cuda":
        torch.cuda.set_rng_state(tensors["random.cuda"], algorithm.device)


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
    own = state["prompts"][env.first_index : env.first_index + env.num_envs]
    algorithm.env.reset_infos = [{"prompt": prompt} for prompt in own]  # type: ignore[union-attr]
