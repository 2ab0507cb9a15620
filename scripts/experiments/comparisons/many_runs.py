"""Trains several runs at the same time, each in a process with one thread, and collects their rows in a CSV file."""

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
    """Train the runs that are not in the file yet, and append the rows of each run when it ends; say what is kept.

    The error of a run ends this, after the runs that have begun; the same call goes on with what is left.

    Args:
        runs: the runs; the first `key` values of a run identify it.
        train: trains one run, in a process of its own, and returns its rows.
        file: the CSV file.
        fields: its columns; the first `key` columns identify a run.
        key: number of values that identify a run.
        jobs: number of runs at the same time.
    """
    done = {tuple(row[name] for name in fields[:key]) for row in read_rows(file)}
    runs = list(runs)
    left = [run for run in runs if tuple(map(str, run[:key])) not in done]
    if kept := len(runs) - len(left):
        print(f"{kept} of {len(runs)} runs are in {file} already and are not repeated; another --output repeats them.")
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
        futures = {pool.submit(train, run): run for run in left}
        for count, future in enumerate(as_completed(futures), 1):
            if future.exception() is not None:  # now, and not when all others have finished
                pool.shutdown(cancel_futures=True)
            rows = future.result()
            append_rows(file, fields, rows)
            print(f"{time.strftime('%H:%M:%S')} {count}/{len(left)} {futures[future]}: {rows[-1]}", flush=True)


def use_one_thread() -> None:
    """Make this process use one thread; call this before torch computes anything."""
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch

    torch.set_num_threads(1)


def held_out_rewards(config: TrainConfig) -> list[tuple[int, float]]:
    """Train without output; return the evaluations as pairs `(iteration, mean reward of the held-out images)`.

    A run whose learning rate is too high may diverge. It then has one evaluation, minus infinity after its last
    iteration.
    """
    from agents.training.preparation import prepare_run

    with open(os.devnull, "w") as silence:
        try:
            with contextlib.redirect_stdout(silence):
                run = prepare_run(config)
                run.train()
            return run.evaluations
        except FloatingPointError:
            return [(config.resolved().total_iterations, float("-inf"))]


def append_rows(file: Path, fields: Sequence[str], rows: list[Row]) -> None:
    """Append rows to a CSV file, which gets its header with the first ones."""
    file.parent.mkdir(parents=True, exist_ok=True)
    new = not file.is_file()
    with file.open("a", newline="") as table:
        writer = csv.DictWriter(table, fields, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(rows)


def read_rows(file: Path) -> list[Row]:
    """Return the rows of a CSV file, or no rows if there is no such file."""
    if not file.is_file():
        return []
    with file.open(newline="") as table:
        return list(csv.DictReader(table))
