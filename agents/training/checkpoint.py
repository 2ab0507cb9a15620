"""Checkpoints of a run: everything that the next iteration depends on, written completely or not at all.

Tensors are stored as safetensors and the rest as JSON, so nothing that is read back can execute code. A manifest holds
the checksums of both files, and the settings that tell one run from another. A checkpoint is written to a hidden folder
and renamed when it is complete. Only then are older ones deleted, under a hidden name too. A kill at any moment leaves
a complete checkpoint, and no half of one under a checkpoint's name. A damaged one is stepped over.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from agents.algorithms.on_policy import TensorOnPolicyAlgorithm
from agents.algorithms.saving.state import Stateful
from agents.algorithms.saving.stored_values import read_json, restore, store
from agents.config.content import PLACES
from agents.config.train_config import TrainConfig
from agents.output.files import fresh_name, remove_leftovers, sync, write_file
from agents.training.checkpoint_state import checkpoint_state, load_checkpoint_state

_NAME = re.compile(r"iteration_(\d{6,12})")
_MAY_CHANGE = {
    *("run_dir", "resume", "iterations", "device", "process_timeout"),
    *(f"{place}{of_content}" for place in PLACES for of_content in ("", "_sha256")),
    *("reward_options", "holdout_reward_options"),  # of which text, such as a server, may be named anew
    "train_batch_size",  # found after the start if it is left open
}
"""Settings that may be others when a run is resumed."""
_TENSORS, _STATE, _MANIFEST = "tensors.safetensors", "state.json", "manifest.json"


@dataclass(frozen=True)
class Snapshot:
    """The content of a checkpoint in memory: a copy that later iterations do not change.

    Attributes:
        iteration: number of finished iterations.
        tensors: copies on the host.
        state: the rest, as JSON.
        settings: that tell this run from others.
    """

    iteration: int
    tensors: dict[str, Tensor]
    state: str
    settings: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        iteration: int,
        algorithm: TensorOnPolicyAlgorithm,
        components: dict[str, Stateful],
        settings: Mapping[str, Any] | None = None,
    ) -> Snapshot:
        """Copy the state of an algorithm between two iterations, and the states of other components, by name.

        Raises:
            FloatingPointError: if what has been learned is NaN or infinite.
            TypeError: if the state of a component cannot be stored.
        """
        tensors, state = checkpoint_state(algorithm)
        stored: dict[str, Tensor] = {}
        states = {name: store(one.state_dict(), f"component.{name}", stored) for name, one in components.items()}
        tensors |= {name: value.detach().cpu().contiguous().clone() for name, value in stored.items()}
        text = json.dumps(state | {"iteration": iteration, "components": states})
        return cls(iteration, tensors, text, settings or {})

    def write(self, folder: Path, keep: int) -> Path:
        """Write `folder/iteration_NNNNNN`, delete all but the last `keep` checkpoints, and return the new one."""
        target = folder / f"iteration_{self.iteration:06d}"
        folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(folder)
        unfinished = fresh_name(target)
        unfinished.mkdir()
        save_file(self.tensors, unfinished / _TENSORS)
        sync(unfinished / _TENSORS)
        write_file(unfinished / _STATE, self.state)
        manifest = {
            "iteration": self.iteration,
            "settings": dict(self.settings),
            "files": {name: _checksum(unfinished / name) for name in (_TENSORS, _STATE)},
        }
        write_file(unfinished / _MANIFEST, json.dumps(manifest, indent=1) + "\n")
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
        settings: that tell this run from others, by name; a checkpoint with other ones is not used.
    """

    def __init__(
        self,
        folder: Path,
        algorithm: TensorOnPolicyAlgorithm,
        components: dict[str, Stateful],
        interval: int,
        keep: int = 2,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        self.folder = folder
        self.algorithm = algorithm
        self.components = components
        self.interval = interval
        self.keep = keep
        self.settings = settings or {}
        self._unwritten: Snapshot | None = None

    def save(self, iteration: int) -> None:
        """Write a checkpoint now."""
        self._unwritten = Snapshot.of(iteration, self.algorithm, self.components, self.settings)
        self.algorithm.processes.from_main(self.write)

    def finished(self, iteration: int) -> None:
        """Note that an iteration is finished, and write its checkpoint if it is due.

        Raises:
            FloatingPointError: if what has been learned is NaN or infinite. The iteration before it is kept.
        """
        self._unwritten = Snapshot.of(iteration, self.algorithm, self.components, self.settings)
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
        checkpoint = self.algorithm.processes.from_main(lambda: latest_checkpoint(self.folder, self.settings))
        load_checkpoint(checkpoint, self.algorithm, self.components)


def latest_checkpoint(folder: Path, settings: Mapping[str, Any] | None = None) -> Path:
    """Return the newest whole checkpoint, and warn of newer ones that are damaged.

    Args:
        folder: of the checkpoints.
        settings: of the run, by name; a checkpoint with other ones belongs to another run.

    Raises:
        ValueError: if there is none.
    """
    damaged = []
    for checkpoint in reversed(_checkpoints(folder)):
        try:
            _check_whole(checkpoint, settings)
        except (ValueError, OSError) as error:
            damaged.append(f"{checkpoint.name}: {error}")
            continue
        if damaged:
            warnings.warn(f"{checkpoint.name} is used, without {'; '.join(damaged)}", stacklevel=2)
        return checkpoint
    why = f" that is whole ({'; '.join(damaged)}): restore one from a backup, or start a new run" if damaged else ""
    raise ValueError(f"resume: there is no checkpoint in {str(folder)!r}{why}")


def run_identity(config: TrainConfig) -> dict[str, Any]:
    """Return the settings that tell one run from another, and that stay when a run is moved or goes on for longer.

    A `config.yaml` that somebody has changed is that of another run.
    """
    return {name: value for name, value in config.flat().items() if name not in _MAY_CHANGE}


def iterations_done(checkpoint: Path) -> int:
    """Return the number of iterations that a checkpoint has finished."""
    return int(checkpoint.name.removeprefix("iteration_"))


def check_resumable(folder: Path, iterations: int, settings: Mapping[str, Any] | None = None) -> None:
    """Refuse to resume a run without a whole checkpoint, or with more finished iterations than it is to have.

    Raises:
        ValueError: naming the folder, or the setting.
    """
    done = iterations_done(latest_checkpoint(folder, settings))
    if iterations < done:
        raise ValueError(f"iterations must be at least {done}, which the run has finished; got {iterations}")


def load_checkpoint(checkpoint: Path, algorithm: TensorOnPolicyAlgorithm, components: dict[str, Stateful]) -> None:
    """Restore algorithm, environment, random generators and components from a checkpoint.

    With several processes the main one reads and tells the others. Their number may differ from when it was written.

    Raises:
        ValueError: if the checkpoint is damaged, does not fit, or lacks something, as one of an older version does.
    """
    tensors, state = algorithm.processes.from_main(lambda: _read(checkpoint))
    try:
        states = state["components"]
        load_checkpoint_state(algorithm, tensors, state)
        for name, component in components.items():
            component.load_state_dict(restore(states[name], tensors))
    except KeyError as error:
        raise ValueError(
            f"checkpoint {str(checkpoint)!r} has no {error}: an older version wrote it, and the run can only be "
            "resumed with that version"
        ) from error
    except (ValueError, TypeError, AttributeError, IndexError, RuntimeError, ArithmeticError) as error:
        raise ValueError(f"checkpoint {str(checkpoint)!r} does not fit this run: {error}") from error


def _read(checkpoint: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        return load_file(checkpoint / _TENSORS), read_json((checkpoint / _STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(f"checkpoint {str(checkpoint)!r} is damaged: {error}") from error


def _check_whole(checkpoint: Path, settings: Mapping[str, Any] | None) -> None:
    """Raise an error that says what is wrong with a checkpoint."""
    names = {path.name for path in checkpoint.iterdir()}
    if lacking := {_MANIFEST, _TENSORS, _STATE} - names:
        raise ValueError(f"{', '.join(sorted(lacking))} is missing")
    if junk := names - {_MANIFEST, _TENSORS, _STATE}:
        raise ValueError(f"{', '.join(sorted(junk))} does not belong there")
    manifest = read_json((checkpoint / _MANIFEST).read_text(encoding="utf-8"))
    own, wanted = manifest.get("settings"), _as_json(settings or {})
    if not isinstance(own, dict) or (wanted and not own):
        raise ValueError("it does not say what run it belongs to")
    for name in sorted(wanted.keys() & own):  # older versions wrote fewer of them
        if own[name] != wanted[name]:
            raise ValueError(
                f"it belongs to another run, with {name}={own[name]!r} instead of {wanted[name]!r} in config.yaml"
            )
    if manifest.get("iteration") != iterations_done(checkpoint):
        raise ValueError(f"it is of iteration {manifest.get('iteration')!r}")
    for name in (_TENSORS, _STATE):
        files = manifest.get("files")
        if not isinstance(files, dict) or files.get(name) != _checksum(checkpoint / name):
            raise ValueError(f"{name} has changed since it was written (checksum)")


def _as_json(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings as they are after JSON."""
    return json.loads(json.dumps(dict(settings)))


def _checksum(file: Path) -> str:
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _delete(checkpoint: Path) -> None:
    hidden = fresh_name(checkpoint)
    checkpoint.rename(hidden)
    shutil.rmtree(hidden)


def _checkpoints(folder: Path) -> list[Path]:
    found = [path for path in folder.glob("iteration_*") if _NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=iterations_done)
