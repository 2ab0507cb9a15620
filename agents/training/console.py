"""A run on the screen: a progress bar in a terminal, one plain line per iteration elsewhere."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from stable_baselines3.common.logger import KVWriter

_SHOWN = (
    ("rollout/reward_mean", "reward", ".3f"),
    ("train/approx_kl", "KL", ".1e"),
    ("rollout/dropped_samples", "dropped", "d"),
)


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
        self.console.print(line, highlight=False)

    def close(self) -> None:
        """Remove the bar."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
