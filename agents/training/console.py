"""What a run shows while it trains: a progress bar or plain lines on the screen, and curves in TensorBoard."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from stable_baselines3.common.logger import KVWriter, Logger, TensorBoardOutputFormat
from torch.utils.tensorboard import SummaryWriter

from agents.algorithms.on_policy import TensorOnPolicyAlgorithm
from agents.report.run_data import ITERATION
from agents.training.run_folder import MetricsTable, RunFolder

_SHOWN = (
    ("rollout/reward_mean", "reward", ".3f"),
    ("train/approx_kl", "KL", ".1e"),
    ("rollout/dropped_samples", "dropped", "d"),
)


@contextmanager
def logging_run(
    algorithm: TensorOnPolicyAlgorithm, folder: RunFolder, iterations: int, start: int
) -> Iterator[ConsoleWriter | None]:
    """Log to TensorBoard, `progress.csv` and the screen; a resumed run keeps the rows of finished iterations.

    Only the main process logs; the others get no writer.

    Args:
        algorithm: whose logger is set.
        folder: of the run.
        iterations: number of iterations of the run.
        start: number of iterations that are done already.
    """
    if not algorithm.processes.is_main:
        algorithm.set_logger(Logger(None, []))
        yield None
        return
    table = MetricsTable(folder.progress, MetricsTable.read(folder.progress, start))
    console = ConsoleWriter(iterations, start)
    algorithm.set_logger(Logger(None, [table, TensorBoardCurves(folder.tensorboard, start), console]))
    try:
        yield console
    finally:
        algorithm.logger.close()


class ConsoleWriter(KVWriter):
    """An output format of Stable-Baselines3's logger that shows reward, KL, dropped samples and remaining time.

    Args:
        iterations: number of iterations of the run.
        start: number of iterations that are done already.
        console: where to write; default: standard output.
    """

    def __init__(self, iterations: int, start: int = 0, console: Console | None = None) -> None:
        """Show an empty bar in a terminal."""
        self.console = console or Console()
        self._total = iterations
        self._done = self._start = start
        self._began = time.perf_counter()
        self._progress: Progress | None = None
        if self.console.is_terminal:
            columns = (
                TextColumn("training"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[metrics]}"),
                TimeElapsedColumn(),
                TextColumn("· left"),
                TimeRemainingColumn(),
            )
            self._progress = Progress(*columns, console=self.console)
            self._progress.start()
            self._task = self._progress.add_task("training", total=iterations, completed=start, metrics="")

    def write(self, key_values: dict[str, Any], key_excluded: dict[str, tuple[str, ...]], step: int = 0) -> None:
        """Show the metrics of one iteration."""
        if "rollout/reward_mean" not in key_values:
            return
        self._done += 1
        shown = "  ".join(f"{label} {key_values[key]:{form}}" for key, label, form in _SHOWN if key in key_values)
        if self._progress is not None:
            self._progress.update(self._task, completed=self._done, metrics=shown)
            return
        left = (time.perf_counter() - self._began) / (self._done - self._start) * (self._total - self._done)
        minutes, seconds = divmod(round(left), 60)
        line = f"iteration {self._done}/{self._total}  {shown}  left {minutes}:{seconds:02d}"
        self.console.print(line, highlight=False, markup=False)

    def warn(self, message: str) -> None:
        """Show a warning, above the bar if there is one."""
        self.console.print(f"warning: {message}", style="yellow", highlight=False, markup=False, soft_wrap=True)

    def close(self) -> None:
        """Remove the bar."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


class TensorBoardCurves(TensorBoardOutputFormat):
    """TensorBoard with the iteration as the x axis.

    Args:
        folder: of the event files.
        iteration: of the checkpoint that the run continues from. What a killed run logged after it is hidden, because
            the iterations run again.
    """

    def __init__(self, folder: Path, iteration: int) -> None:
        """Open a new event file."""
        # The evaluation before training belongs to no checkpoint, so a run that continues from 0 repeats it.
        self.writer = SummaryWriter(str(folder), purge_step=iteration + 1 if iteration else 0)
        self._is_closed = False

    def write(self, key_values: dict[str, Any], key_excluded: dict[str, tuple[str, ...]], step: int = 0) -> None:
        """Add a point to every curve; `step`, which Stable-Baselines3 counts in environment steps, is not used."""
        super().write(key_values, key_excluded, int(key_values[ITERATION]))
