"""A finished run as its folder shows it: settings, outcome, curve, and the LoRA to use. No model is loaded."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from agents.algorithms.saving.stored_values import read_json
from agents.config.authority import resume_flags
from agents.config.settings import MOST
from agents.config.train_config import TrainConfig
from agents.output.files import refuse_links
from agents.output.terminal import quoted
from agents.report.run_data import ITERATION
from agents.training.checkpoint import iterations_done, latest_checkpoint
from agents.training.result import NO_GRADIENT, advised_iteration, best_of
from agents.training.run_folder import MetricsTable
from ddpo_env.models.lora.lora_file import PEFT_FILE, find_lora
from ddpo_env.validation.options import NOT_NEGATIVE, check_value

Which = Literal["last", "best"]
"""The weights after the last iteration, or those of the best evaluation."""
Curve = Sequence[tuple[int, float]]
"""Iterations, and what was measured after each of them."""

_SUMMARY: Mapping[str, Any] = {
    "iterations": Annotated[int, MOST],
    "reward_queries": Annotated[int, NOT_NEGATIVE],
    "wall_clock_seconds": Annotated[float, NOT_NEGATIVE],
    "eval_samples": Annotated[int, MOST],
    "stopped_early": str | None,
    "has_learned": bool | None,
}
"""What is read of `summary.json`; older ones do not have `has_learned`."""


@dataclass(frozen=True)
class FinishedRun:
    """What a finished run has left.

    Attributes:
        folder: of the run.
        config: its settings.
        summary: the entries of `_SUMMARY`, and `versions`.
        training: (iteration, mean reward of its samples).
        evaluations: (iteration, mean reward on the held-out seeds).
        holdout: the same of the held-out reward; empty if there is none.
    """

    folder: Path
    config: TrainConfig
    summary: Mapping[str, Any]
    training: Curve
    evaluations: Curve
    holdout: Curve

    @property
    def images(self) -> Path | None:
        """The grid before, during and after training; `None` for a model that draws none."""
        grid = self.folder / "samples" / "before_after.png"
        return grid if grid.is_file() else None

    def lora(self, which: Which | None) -> tuple[int, Path]:
        """Return the iteration and the file of the LoRA to use.

        Args:
            which: the weights; `None` takes those that the run advised when it ended.

        Raises:
            ValueError: if nothing was learned, or the pretrained model is better than what was learned; for a file that
                is missing or that only peft reads.
        """
        last = self.summary["iterations"]
        advised = advised_iteration(self.holdout, last)
        best = best_of(list(self.holdout or self.evaluations))
        useless = None
        if self.summary.get("has_learned") is False:
            useless = f"has learned nothing: no iteration had a gradient, {NO_GRADIENT}"
        elif advised == 0:
            reward = self.config.run.holdout_reward
            useless = f"has learned nothing worth using: by its held-out reward {reward} the pretrained model is better"
        if which is None and useless is not None:
            raise ValueError(
                f"run {str(self.folder)!r} {useless}. To use it all the same, give "
                f"--weights last to ddpo-export, and --lora {quoted(self.folder / 'lora')} to other commands"
            )
        if which == "best" and (best is None or best[0] == 0):
            raise ValueError("weights must be last: in this run no evaluation was better than before training")
        is_best = which == "best" or (which is None and advised != last)
        assert not is_best or best is not None
        file = find_lora(self.folder / "best" / "lora" if is_best else self.folder / "lora", "run")
        if file.name == PEFT_FILE:
            raise ValueError(
                f"run {str(self.folder)!r} has a LoRA in peft's format, because its pipeline reads no LoRA by itself; "
                f"PeftModel.from_pretrained({str(file.parent)!r}) does"
            )
        return (best[0] if is_best and best else last), file


def read_run(folder: Path) -> FinishedRun:
    """Read the folder of a finished run.

    Raises:
        ValueError: for a folder that is no run's, has links in it or is damaged; for a run that is not finished, or
            that has trained every weight.
    """
    config = TrainConfig.read(folder, "run")
    refuse_links(folder)
    if config.policy.lora_rank == 0:
        raise ValueError(
            f"run must have trained a LoRA; {str(folder)!r} has trained every weight (lora_rank=0). Its policy is "
            f"loaded by agents.DiffusionPolicy.load({str(folder / 'policy')!r})"
        )
    if not (folder / "summary.json").is_file():
        raise ValueError(_unfinished(folder, config))
    try:
        found = read_json((folder / "summary.json").read_text(encoding="utf-8"))
        for name, hint in _SUMMARY.items():
            check_value(name, found.get(name), hint)
        check_value("versions", tuple(dict(found.get("versions", {})).items()), tuple[tuple[str, str], ...])
        rows = MetricsTable.read(folder / "progress.csv", sys.maxsize)
        training, evaluations, holdout = (
            _curve(rows, name) for name in ("rollout/reward_mean", "eval/reward_mean", "eval/holdout_reward_mean")
        )
        if not training or not evaluations:
            raise ValueError("progress.csv has no rewards")
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"run {str(folder)!r} is damaged: {error}") from error
    return FinishedRun(folder, config, found, training, evaluations, holdout)


def _unfinished(folder: Path, config: TrainConfig) -> str:
    """Say how a run ends properly, at its last planned iteration or where it stands."""
    command = ["ddpo-train", "--resume", folder, *resume_flags(config.changed(run_dir=folder))]
    try:
        done = iterations_done(latest_checkpoint(folder / "checkpoints"))
    except ValueError:
        done = 0
    here = f", or end it after the {done} iterations that it has: {quoted(*command, '--iterations', done)}"
    return (
        f"run must be finished; {str(folder)!r} has no summary.json. Resume it: {quoted(*command)}"
        f"{here if done else ''}"
    )


def _curve(rows: Sequence[Mapping[str, str]], name: str) -> list[tuple[int, float]]:
    return [(int(row[ITERATION]), float(row[name])) for row in rows if row.get(name)]
