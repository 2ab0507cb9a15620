"""Checkpoints of a run: everything that the next iteration depends on, written whole or not at all.

Tensors are safetensors, the rest is JSON: nothing that is read back can execute code. A checkpoint is written to a
hidden folder and renamed when it is complete, and only then are older ones deleted, from a hidden name too: a kill at
any moment leaves a good one, and no half of one under a checkpoint's name.
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
from typing import Any, Protocol

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from agents.algorithms.on_policy import TensorOnPolicyAlgorithm

_NAME = re.compile(r"iteration_(\d+)")


class Stateful(Protocol):
    """Anything whose state is plain values (numbers, strings, lists, dictionaries)."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take a state over."""
        ...


@dataclass(frozen=True)
class Snapshot:
    """What a checkpoint holds, in memory: a copy, which later iterations do not change.

    Attributes:
        iteration: iterations that are done.
        tensors: copies on the host.
        state: the rest, as JSON.
    """

    iteration: int
    tensors: dict[str, Tensor]
    state: str

    @classmethod
    def of(cls, iteration: int, algorithm: TensorOnPolicyAlgorithm, parts: dict[str, Stateful]) -> Snapshot:
        """Copy the state of an algorithm between two iterations, and of what else has one; see `save_checkpoint`."""
        tensors, state = _algorithm_state(algorithm)
        state |= {"iteration": iteration, "parts": {name: value.state_dict() for name, value in parts.items()}}
        return cls(iteration, tensors, json.dumps(state))

    def write(self, folder: Path, keep: int) -> Path:
        """Write `folder/iteration_NNNNNN`, delete all but the last `keep` checkpoints, and return the new one."""
        target = folder / f"iteration_{self.iteration:06d}"
        part = folder / f".{target.name}.part"
        for leftover in folder.glob(".iteration_*"):
            shutil.rmtree(leftover)
        part.mkdir(parents=True)
        save_file(self.tensors, part / "tensors.safetensors")
        (part / "state.json").write_text(self.state)
        for file in part.iterdir():
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
        if target.exists():
            _delete(target)
        part.rename(target)
        for old in _checkpoints(folder)[:-keep]:
            _delete(old)
        return target


def save_checkpoint(
    folder: Path, iteration: int, algorithm: TensorOnPolicyAlgorithm, parts: dict[str, Stateful], keep: int
) -> Path:
    """Write `folder/iteration_NNNNNN` and delete all but the last `keep` checkpoints.

    Args:
        folder: the run's `checkpoints`.
        iteration: iterations that are done.
        algorithm: between two iterations.
        parts: what else has a state, by name; the advantage estimator is found on the algorithm.
        keep: checkpoints to keep, at least 1.

    Returns:
        The new checkpoint's folder.
    """
    snapshot = Snapshot.of(iteration, algorithm, parts)
    return algorithm.processes.from_main(lambda: snapshot.write(folder, keep))


class Checkpoints:
    """A run's checkpoints: every few iterations one is written, and the last iteration can always be gone back to.

    Of an iteration without a checkpoint a snapshot is kept in memory, until the next iteration is done.

    Args:
        folder: the run's `checkpoints`, which holds at least one.
        algorithm: what trains.
        parts: what else has a state, by name.
        interval: iterations between checkpoints; 0 for none.
        keep: checkpoints to keep, at least 1.
    """

    def __init__(
        self, folder: Path, algorithm: TensorOnPolicyAlgorithm, parts: dict[str, Stateful], interval: int, keep: int
    ) -> None:
        """See the class docstring for the arguments."""
        self.folder = folder
        self.algorithm = algorithm
        self.parts = parts
        self.interval = interval
        self.keep = keep
        self._unwritten: Snapshot | None = None

    def finished(self, iteration: int) -> None:
        """Take note that an iteration is done, and write its checkpoint if it is due."""
        self._unwritten = Snapshot.of(iteration, self.algorithm, self.parts)
        if self.interval and iteration % self.interval == 0:
            self.algorithm.processes.from_main(self.write)

    def write(self) -> None:
        """Write the checkpoint of the last finished iteration, if there is none yet, in the main process."""
        if self._unwritten is not None and self.algorithm.processes.is_main:
            self._unwritten.write(self.folder, self.keep)
            self._unwritten = None

    def go_back(self) -> None:
        """Bring everything to where the last finished iteration left it; there is a checkpoint of it then."""
        checkpoint = self.algorithm.processes.from_main(self._written)
        load_checkpoint(checkpoint, self.algorithm, self.parts)

    def _written(self) -> Path:
        self.write()
        return latest_checkpoint(self.folder)


def latest_checkpoint(folder: Path) -> Path:
    """Return the newest complete checkpoint.

    Raises:
        ValueError: if there is none.
    """
    found = _checkpoints(folder)
    if not found:
        raise ValueError(f"resume: there is no checkpoint in {str(folder)!r}")
    return found[-1]


def iterations_done(checkpoint: Path | None) -> int:
    """Return how many iterations a checkpoint has behind it; 0 for none."""
    return int(checkpoint.name.removeprefix("iteration_")) if checkpoint is not None else 0


def load_checkpoint(checkpoint: Path, algorithm: TensorOnPolicyAlgorithm, parts: dict[str, Stateful]) -> None:
    """Bring algorithm, environment, random generators and `parts` to where the checkpoint was written.

    Of several processes the main one reads, and tells the others; there may be more or fewer than when it was written.

    Raises:
        ValueError: if the checkpoint lacks something, as one of an older version may.
    """
    tensors, state = algorithm.processes.from_main(lambda: _read(checkpoint))
    try:
        _load_algorithm_state(algorithm, tensors, state)
        for name, value in parts.items():
            value.load_state_dict(state["parts"][name])
    except KeyError as error:
        raise ValueError(
            f"checkpoint {str(checkpoint)!r} lacks {error}: it was written by an older version, with which the run can "
            "go on"
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
    advantage_state: dict[str, Any] = getattr(algorithm.advantage, "state_dict", dict)()
    env_tensors, env_state = _env_state(algorithm)
    state = {
        "counters": {name: getattr(algorithm, name) for name in _COUNTERS},
        "episodes": list(algorithm.ep_info_buffer or []),
        "successes": list(algorithm.ep_success_buffer or []),
        "optimizer": optimizer["param_groups"],
        "average": averages,
        "scaler": algorithm.scaler.state_dict(),
        "advantage": advantage_state,
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
    for name, value in state["counters"].items():
        setattr(algorithm, name, value)
    algorithm.ep_info_buffer = deque(state["episodes"], maxlen=algorithm._stats_window_size)
    algorithm.ep_success_buffer = deque(state["successes"], maxlen=algorithm._stats_window_size)
    if hasattr(algorithm.advantage, "load_state_dict"):
        algorithm.advantage.load_state_dict(state["advantage"])
    env = _batch(algorithm)
    env.load_state_dict(below("env."), state["env"])
    algorithm._last_obs = env.observe()
    algorithm._last_episode_starts = np.ones(env.num_envs, dtype=bool)
    own = state["env"]["prompts"][env.first_slot : env.first_slot + env.num_envs]
    algorithm.env.reset_infos = [{"prompt": prompt} for prompt in own]  # type: ignore[union-attr]
    version, internal, gauss = state["random"]["python"]
    random.setstate((version, tuple(internal), gauss))
    np.random.set_state(state["random"]["numpy"])
    torch.set_rng_state(tensors["random.torch"])
    if "random.cuda" in tensors and algorithm.device.type == "cuda":
        torch.cuda.set_rng_state(tensors["random.cuda"], algorithm.device)


_COUNTERS = ("num_timesteps", "_n_updates", "_episode_num", "_current_progress_remaining")


def _numpy_state() -> list[Any]:
    return [part.tolist() if isinstance(part, np.ndarray) else part for part in np.random.get_state()]


def _batch(algorithm: TensorOnPolicyAlgorithm) -> Any:
    return algorithm.env.vector_env.unwrapped  # type: ignore[union-attr]


def _env_state(algorithm: TensorOnPolicyAlgorithm) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state of the whole batch, of which every process has a part."""
    tensors, state = _batch(algorithm).state_dict()
    parts = algorithm.processes.gather_objects(({name: value.cpu() for name, value in tensors.items()}, state))
    whole = {f"env.{name}": torch.cat([part[name] for part, _ in parts]) for name in tensors}
    return whole, {name: [value for _, part in parts for value in part[name]] for name in state}
