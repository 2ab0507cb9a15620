"""Several processes that act as one: each computes some rows of every batch, and all hold the same numbers.

`accelerate launch` or `torchrun` starts the processes, and accelerate connects them. Every process draws the random
numbers of the whole batch from the same generator state and keeps its own rows, so the result does not depend on the
number of processes, except for the rounding of sums. If one process fails, all of them fail at the end of the current
`fail_together` block.
"""

from __future__ import annotations

import math
import os
import re
import signal
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather, gather_object, reduce
from torch import Tensor

_T = TypeVar("_T")

_SIZE_VARIABLES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
"""Environment variables in which launchers give the number of processes; accelerate reads the same ones."""
_UNUSED_SETTINGS = {
    "ACCELERATE_USE_FSDP": (
        "false",
        "FSDP does not fit an update that every process computes whole: see docs/scaling.md",
    ),
    "ACCELERATE_USE_DEEPSPEED": ("false", "DeepSpeed is not supported: see docs/scaling.md"),
    "ACCELERATE_USE_MEGATRON_LM": ("false", "Megatron-LM is not supported"),
    "ACCELERATE_MIXED_PRECISION": ("no", "use the script's --autocast bfloat16 or float16 for mixed precision"),
    "ACCELERATE_DYNAMO_BACKEND": ("no", "use the script's --compile-denoiser to compile"),
}
"""Launcher settings that would have no effect here: the value that asks for nothing, and what to do instead."""
_LAUNCHER_NUMBERS = {
    **dict.fromkeys((*_SIZE_VARIABLES, "LOCAL_WORLD_SIZE", "MPI_LOCALNRANKS", "OMPI_COMM_WORLD_LOCAL_SIZE"), 1),
    **dict.fromkeys(("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK"), 0),
    **dict.fromkeys(("LOCAL_RANK", "MPI_LOCALRANKID", "OMPI_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_RANK"), -1),
    "MASTER_PORT": 1,
}
"""Environment variables of launchers with the smallest valid integer of each; accelerate calculates with them."""
_BUCKET_ELEMENTS = 2**25
"""Gradient elements that are summed over the processes at once, so that no second copy of every gradient is needed."""


_STOP_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK") if hasattr(signal, name)]
"""Signals that ask a run to stop: Ctrl-C, a scheduler, a terminal that closes, Ctrl-Break of Windows."""


class OtherProcessError(RuntimeError):
    """Another process of the run failed; `__cause__` holds its traceback as text."""


@dataclass(frozen=True)
class Rows:
    """The rows of a batch that one process computes: `start` to `stop` of `total`.

    Attributes:
        total: rows of the whole batch.
        start: first row of this process.
        stop: one past its last row. There is always at least one row, also where a process has none to compute.
        count: rows that count in sums and means; 0 where the one row only keeps the process busy.
    """

    total: int
    start: int
    stop: int
    count: int

    @classmethod
    def of_process(cls, total: int, index: int, count: int) -> Rows:
        """Return the rows of process `index` of `count` processes."""
        start, stop = (total * edge // count for edge in (index, index + 1))
        return cls(total, start, max(stop, start + 1), stop - start)

    def of(self, values: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return this process's rows of an array with `total` rows."""
        return values[self.start : self.stop]

    def draw(self, draw: Callable[[int], Tensor]) -> Tensor:
        """Draw random numbers for the whole batch, as every process does, and return this process's rows."""
        return draw(self.total)[self.start : self.stop]


@dataclass(frozen=True)
class Maximum:
    """A metric of a loss that is combined by its largest value, where plain tensors are averaged.

    Attributes:
        value: scalar.
    """

    value: Tensor


Metric = Tensor | Maximum


class Processes:
    """The processes of a run, seen from one of them; without arguments, the only one.

    Args:
        index: number of this process; 0 is the main one, which writes files and prints.
        count: number of processes.
        device: device of this process where `--device` leaves it open; `None` with one process.

    Attributes:
        stopped_by: number of the signal that asked to stop, the same in all processes; `None` if there was none.
        agreed: the last error that all processes raised together; `None` if there was none.
    """

    def __init__(self, index: int = 0, count: int = 1, device: str | None = None) -> None:
        """Describe the processes; `start_processes` connects them."""
        self.index = index
        self.count = count
        self.device = device
        self.stopped_by: int | None = None
        self._interrupted = False
        self._holds = False
        self._is_ending = False
        self.agreed: BaseException | None = None

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and prints."""
        return self.index == 0

    def rows(self, total: int) -> Rows:
        """Return this process's rows of `total`, at least one; processes differ by at most one row."""
        return Rows.of_process(total, self.index, self.count)

    def assign_calls(self, sizes: Sequence[int]) -> list[Rows | None]:
        """Assign calls of the policy to processes; return this process's rows of each call, `None` for no rows.

        While there are enough calls, each stays whole in one process, so that a call is bit-identical for any number
        of processes. Otherwise several processes compute the rows of one call.

        Args:
            sizes: rows of each call.
        """
        number = len(sizes)
        if number >= self.count:
            return [
                Rows.of_process(size, 0, 1) if call % self.count == self.index else None
                for call, size in enumerate(sizes)
            ]
        workers = len(range(self.index % number, self.count, number))
        return [
            Rows.of_process(size, self.index // number, workers) if call == self.index % number else None
            for call, size in enumerate(sizes)
        ]

    def gather_objects(self, value: _T) -> list[_T]:
        """Return the values of all processes, in their order, to all of them."""
        return [value] if self.count == 1 else gather_object([value])

    def gather_rows(self, rows: Tensor, axis: int = 0) -> Tensor:
        """Concatenate tensors of the same shape along an axis, in the order of the processes."""
        return rows if self.count == 1 else gather(rows.movedim(axis, 0).contiguous()).movedim(0, axis).contiguous()

    def sum(self, values: Tensor) -> Tensor:
        """Add up tensors of the same shape."""
        return values if self.count == 1 else reduce(values, "sum")

    def from_main(self, work: Callable[[], _T]) -> _T:
        """Run `work` in the main process only and return its result to all; if it fails, all processes fail."""
        if self.count == 1:
            return work()
        result: list[Any] = [None]
        with self.fail_together():
            if self.is_main:
                result = [work()]
        return broadcast_object_list(result)[0]

    @contextmanager
    def fail_together(self) -> Iterator[None]:
        """Make the block succeed in all processes, or raise in all of them.

        Inside the block no process may wait for another.

        Raises:
            OtherProcessError: if the block failed in other processes only.
            KeyboardInterrupt: if any process was asked to stop.
        """
        if self.count == 1:
            yield
            return
        error: BaseException | None = None
        try:
            yield
        except BaseException as raised:  # SystemExit too: the others would wait for this process
            error = raised
        self._raise_together(error)

    def combine(
        self, parameters: Sequence[torch.nn.Parameter], metrics: Mapping[str, Metric], error: BaseException | None
    ) -> dict[str, Tensor]:
        """Add up the gradients of all processes, in place, and combine their metrics; raise if any has failed.

        Args:
            parameters: the weights that learn, in the same order everywhere; a gradient may be missing.
            metrics: scalars, with the same names everywhere. Tensors are added up, a `Maximum` is the largest of all.
            error: what kept this process from computing its rows.

        Returns:
            The combined metrics, scalars.

        Raises:
            Exception: `error`.
            OtherProcessError: if another process has one.
            KeyboardInterrupt: if any process was asked to stop.
        """
        if error is not None and self.count == 1:
            raise error
        values = {name: one.value if isinstance(one, Maximum) else one for name, one in metrics.items()}
        if self.count == 1:
            return values
        self._raise_together(error)
        present = torch.tensor([float(p.grad is not None) for p in parameters], device=parameters[0].device)
        own = torch.stack([value.detach().to(present) for value in values.values()])
        # One row per process, so that sums and largest values come out of one exchange.
        table = present.new_zeros(self.count, len(present) + len(own))
        table[self.index] = torch.cat([present, own])
        table = self.sum(table)
        learning = [p for p, known in zip(parameters, table[:, : len(present)].sum(0).tolist(), strict=True) if known]
        self._sum_gradients(learning)
        columns = table[:, len(present) :].unbind(1)
        return {
            name: column.max() if isinstance(metrics[name], Maximum) else column.sum()
            for name, column in zip(metrics, columns, strict=True)
        }

    def _sum_gradients(self, parameters: list[torch.nn.Parameter]) -> None:
        for bucket in _buckets(parameters):
            gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in bucket]
            total = self.sum(torch.cat([gradient.flatten() for gradient in gradients]))
            summed = total.split([p.numel() for p in bucket])
            for parameter, gradient in zip(bucket, summed, strict=True):
                parameter.grad = gradient.view_as(parameter)

    def broadcast_weights(self, tensors: Sequence[Tensor]) -> None:
        """Give all processes the main one's values, in place."""
        if self.count > 1:
            for tensor in tensors:
                torch.distributed.broadcast(tensor.data, src=0)

    @contextmanager
    def stop_signals(self) -> Iterator[None]:
        """Turn the first Ctrl-C, SIGTERM or SIGHUP into a `KeyboardInterrupt`, and ignore later ones, while it stops.

        One process raises it at once. Several raise it together, at the next `raise_interrupt` or end of a
        `fail_together` block, because an exception elsewhere would stop one process only. A signal that the program
        ignores, as `nohup` makes it, stays ignored. Outside the main thread Python allows no handlers, and nothing
        changes.
        """
        self.stopped_by, self._is_ending = None, False
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.getsignal(number) for number in _STOP_SIGNALS}
        for number, handler in before.items():
            if handler not in (signal.SIG_IGN, None):  # `None`: a library in C handles it
                signal.signal(number, self._stop)
        try:
            yield
        finally:
            for number, handler in before.items():
                if handler is not None:
                    signal.signal(number, handler)

    @contextmanager
    def hold_interrupts(self) -> Iterator[None]:
        """Finish the block before a signal stops the run; one process raises at its end, several as everywhere."""
        self._holds = True
        try:
            yield
        finally:
            self._holds = False
        if self.count == 1:
            self.raise_interrupt()

    def ignore_interrupts(self) -> None:
        """Ignore signals from now on, because the run is ending and saves what it has."""
        self._is_ending, self._interrupted = True, False

    def raise_interrupt(self) -> None:
        """Raise a stop that was held back; call it inside `fail_together`, so that it reaches all processes."""
        if self._is_due:
            self._interrupted = False
            raise KeyboardInterrupt

    @property
    def _is_due(self) -> bool:
        return self._interrupted and not self._holds

    def _stop(self, number: int, _: object) -> None:
        if not self._is_ending:
            self.stopped_by = number
            self._is_ending = self._interrupted = True
            if self.count == 1:
                self.raise_interrupt()

    def shutdown(self, error: BaseException | None = None) -> None:
        """Wait for the other processes, which may still be writing, and disconnect.

        A launcher kills the remaining processes when one ends with an error. A process that fails alone does not wait.

        Args:
            error: the error with which this process ends.
        """
        if self.count > 1 and (error is None or error is self.agreed):
            self.gather_objects(None)
            PartialState().destroy_process_group()

    def mark_agreed(self, error: BaseException) -> BaseException:
        """Note that all processes raise this error, because they hold the same numbers, and return it."""
        self.agreed = error
        return error

    def _raise_together(self, error: BaseException | None) -> None:
        """Raise in all processes if one of them failed or was interrupted."""
        stop = self.stopped_by or signal.SIGINT if self._is_due or _is_interrupt(error) else None
        reports = self.gather_objects((_report(error), stop))
        failed = [(index, failure) for index, (failure, _) in enumerate(reports) if failure is not None]
        if failed and (error is None or _is_interrupt(error)):
            index, (message, text) = failed[0]
            error = OtherProcessError(f"{message} (in process {index} of {self.count})")
            error.__cause__ = RuntimeError(f"\n{text}")
        elif not failed and (stops := [int(one) for _, one in reports if one is not None]):
            self.ignore_interrupts()
            self.stopped_by = stops[0]
            error = KeyboardInterrupt()
        if error is not None:
            raise self.mark_agreed(error)


def start_processes(device: str = "auto", timeout: float = 1800.0) -> Processes:
    """Connect the processes that a launcher started, or return the only one.

    Args:
        device: `auto`, `cpu` or `cuda`; with one process any device.
        timeout: seconds that processes wait for each other before the run ends with an error. The reward of the
            slowest batch must take less.

    Raises:
        ValueError: for a device that several processes cannot have, a launcher setting that would have no effect, or
            an environment variable of a launcher that is no valid number.
    """
    for name, (none, reason) in _UNUSED_SETTINGS.items():
        value = os.environ.get(name, none)
        if value.lower() != none:
            raise ValueError(f"{name} must be {none!r}, or not asked of the launcher; got {value!r}: {reason}")
    for name, least in _LAUNCHER_NUMBERS.items():
        value = os.environ.get(name, str(least))
        if not re.fullmatch(r"-?[0-9]{1,9}", value) or int(value) < least:
            raise ValueError(f"{name} must be an integer of at least {least}, as a launcher sets it; got {value!r}")
    if max(int(os.environ.get(name, 1)) for name in _SIZE_VARIABLES) == 1:
        return Processes()
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device must be auto, cpu or cuda with several processes, one GPU each; got {device!r}")
    if not 0 < timeout < math.inf:
        raise ValueError(f"process_timeout must be above 0; got {timeout}")
    on_cpu = device == "cpu" or not torch.cuda.is_available()
    state = PartialState(cpu=on_cpu, timeout=timedelta(seconds=timeout))
    chosen = device if device == "cuda" and on_cpu else str(state.device)
    return Processes(state.process_index, state.num_processes, chosen)


def _report(error: BaseException | None) -> tuple[str, str] | None:
    """Return what other processes are told about an error: one line, and the traceback. Ctrl-C is no error."""
    if error is None or _is_interrupt(error):
        return None
    notes = "".join(f" ({note})" for note in getattr(error, "__notes__", ()))
    return f"{type(error).__name__}: {error}{notes}", "".join(traceback.format_exception(error))


def _is_interrupt(error: BaseException | None) -> bool:
    return isinstance(error, KeyboardInterrupt)


def _buckets(parameters: Sequence[torch.nn.Parameter]) -> list[list[torch.nn.Parameter]]:
    buckets: list[list[torch.nn.Parameter]] = []
    size = _BUCKET_ELEMENTS
    for parameter in parameters:
        if size + parameter.numel() > _BUCKET_ELEMENTS:
            buckets.append([])
            size = 0
        buckets[-1].append(parameter)
        size += parameter.numel()
    return buckets
