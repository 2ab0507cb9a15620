"""Training runs side by side, each in a process of one thread, with their rows in a CSV: what the comparisons share."""

from __future__ import annotations

import contextlib
import csv
import os
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeVar

if TYPE_CHECKING:
    from agents.config.train_config import TrainConfig

Row = dict[str, str]
Run = TypeVar("Run", bound=NamedTuple)


def perform(
    runs: Iterable[Run], train: Callable[[Run], list[Row]], file: Path, fields: Sequence[str], key: int, jobs: int
) -> None:
    """Train what is not in the file yet, a few at a time, and append the rows of each run as it ends.

    Args:
        runs: what to train; a run's first `key` values name it.
        train: trains one, in a process of its own, and returns its rows.
        file: the CSV.
        fields: its columns; the first `key` are those of a run.
        key: how many values tell runs apart.
        jobs: runs at the same time.
    """
    done = {tuple(row[name] for name in fields[:key]) for row in read_rows(file)}
    left = [run for run in runs if tuple(map(str, run[:key])) not in done]
    file.parent.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
        futures = {pool.submit(train, run): run for run in left}
        for count, future in enumerate(as_completed(futures), 1):
            rows = future.result()
            new = not file.is_file()
            with file.open("a", newline="") as table:
                writer = csv.DictWriter(table, fields, lineterminator="\n")
                if new:
                    writer.writeheader()
                writer.writerows(rows)
            print(f"{time.strftime('%H:%M:%S')} {count}/{len(left)} {futures[future]}: {rows[-1]}", flush=True)


def use_one_thread() -> None:
    """To be called before torch computes anything."""
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch

    torch.set_num_threads(1)


def held_out_rewards(config: TrainConfig) -> list[tuple[int, float]]:
    """Train silently; return the evaluations, as pairs of the iteration and the held-out pictures' mean reward.

    A run that diverges, because its learning rate is too high, ends with the worst possible reward.
    """
    from agents.training.preparation import prepare_run

    with open(os.devnull, "w") as silence:
        try:
            with contextlib.redirect_stdout(silence):
                prepared = prepare_run(config)
                prepared.train()
            return prepared.pictures.evaluations
        except FloatingPointError:
            return [(config.iterations, float("-inf"))]


def read_rows(file: Path) -> list[Row]:
    """Return the rows of a CSV; none if it is not there."""
    if not file.is_file():
        return []
    with file.open(newline="") as table:
        return list(csv.DictReader(table))
