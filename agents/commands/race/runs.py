"""One run of a race: it is trained as `ddpo-train` does, what it prints goes to a file, and its curve is read back."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from time import perf_counter
from typing import NamedTuple

import torch
from rich.console import Console

from agents.config.authority import reaching_out
from agents.config.train_config import TrainConfig
from agents.distributed import Processes
from agents.output.files import remove
from agents.output.terminal import escaped
from agents.report.run_data import ITERATION
from agents.training.preparation import prepare_run
from agents.training.run import Run, RunListener
from agents.training.run_folder import MetricsTable


class Evaluated(NamedTuple):
    """An evaluation of a run on its held-out seeds; a value that the run does not measure is `None`."""

    iterations: int
    reward: float
    holdout_reward: float | None
    kl: float | None


class Clock(RunListener):
    """Notes when iterations end, and shows in a terminal which run trains.

    Args:
        label: of the run.
    """

    def __init__(self, label: str) -> None:
        self.label = label
        self.times: list[float] = []
        self._console = Console(file=sys.stdout)
        self._status = self._console.status(escaped(label))

    def on_iteration(self, run: Run) -> None:
        """Note the time."""
        self.times.append(perf_counter())
        self._status.update(escaped(f"{self.label}, iteration {run.iteration} of {run.config.total_iterations}"))

    @contextmanager
    def shown(self, processes: Processes) -> Iterator[None]:
        """Show the run while the block runs."""
        if not (processes.is_main and self._console.is_terminal):
            yield
            return
        with self._status:
            yield


def train_run(config: TrainConfig, clock: Clock, log: Path, processes: Processes) -> None:
    """Train a run to its last iteration.

    Args:
        config: of a new run, or of one that is resumed.
        clock: is told of every iteration, before the evaluation.
        log: file to which the main process appends the label of the run and what it prints.
        processes: that train it together.

    Raises:
        KeyboardInterrupt: if a signal stopped it; it is saved.
        Exception: whatever preparing or training raises.
    """
    gc.collect()  # of the run before
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    with clock.shown(processes), _printing_to(log, clock.label, processes):
        run = prepare_run(config, processes)
        run.listeners.insert(0, clock)
        try:
            stopped = run.train().reward_after is None
        finally:
            assert run.algorithm.env is not None
            run.algorithm.env.close()
    if stopped:
        raise KeyboardInterrupt


def begun_or_resumed(config: TrainConfig, folder: Path, processes: Processes) -> TrainConfig:
    """Return settings that go on with the run of a folder, or that begin it if it has no checkpoint yet.

    What a start without a checkpoint has left is deleted.

    Args:
        config: of the run, without a folder.
        folder: of the run.
        processes: that train it together.
    """

    def has_checkpoint() -> bool:
        if any((folder / "checkpoints").glob("iteration_*")):
            return True
        remove(folder)
        return False

    if not processes.from_main(has_checkpoint):
        return config.changed(run_dir=folder)
    again = {name: config.flat()[name] for name in reaching_out(config, folder)}
    return TrainConfig().changed(resume=folder, iterations=config.iterations, **again)


def evaluations(folder: Path, iterations: int) -> list[Evaluated]:
    """Return the evaluations of a run in its first iterations, from its `progress.csv`.

    Raises:
        ValueError: if the file is damaged, or has none.
    """
    found = [
        Evaluated(
            int(row[ITERATION]),
            float(row["eval/reward_mean"]),
            _number(row.get("eval/holdout_reward_mean")),
            _number(row.get("eval/kl_to_pretrained")),
        )
        for row in MetricsTable.read(folder / "progress.csv", iterations)
        if row.get("eval/reward_mean")
    ]
    if not found:
        raise ValueError(f"{str(folder / 'progress.csv')!r} must have evaluations; it has none")
    return found


def _number(text: str | None) -> float | None:
    return float(text) if text else None


@contextmanager
def _printing_to(log: Path, label: str, processes: Processes) -> Iterator[None]:
    if not processes.is_main:
        yield
        return
    with log.open("a", encoding="utf-8") as file, redirect_stdout(file), redirect_stderr(file):
        print(label)
        yield
