"""Several processes that train as one: each samples and differentiates a share, and all hold the same numbers.

`accelerate launch` or `torchrun` starts the processes; accelerate joins them. What is drawn, is drawn in every process
for the whole batch, from equal random states, and each takes its rows: the result does not depend on how many processes
there are, up to the rounding of sums. Whatever fails in one process fails in all at the next `agreement`.
"""

from __future__ import annotations

import math
import os
import signal
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather, gather_object, reduce
from torch import Tensor

if TYPE_CHECKING:
    from agents.config.train_config import TrainConfig

_T = TypeVar("_T")

_SIZE_VARIABLES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
"""Where launchers say how many processes there are; the same that accelerate looks at."""
_UNUSED_SETTINGS = {
    "ACCELERATE_USE_FSDP": (
        "false",
        "FSDP does not fit an update that every process computes whole: see docs/scaling.md",
    ),
    "ACCELERATE_USE_DEEPSPEED": ("false", "DeepSpeed is not supported: see docs/scaling.md"),
    "ACCELERATE_USE_MEGATRON_LM": ("false", "Megatron-LM is not supported"),
    "ACCELERATE_MIXED_PRECISION": ("no", "mixed precision is --autocast bfloat16 or float16 of the script"),
    "ACCELERATE_DYNAMO_BACKEND": ("no", "compilation is not the launcher's business here"),
}
"""What `accelerate launch` or its configuration file may ask for and would not get: without effect, and what to do."""
_BUCKET = 2**25
"""Numbers that are summed over the processes at once, so that full training needs no second copy of every gradient."""


class OtherProcessError(RuntimeError):
    """Another process of the run failed; `__cause__` is its traceback as a text."""


@dataclass(frozen=True)
class Share:
    """The rows of a batch that are this process's: `start` to `stop` of `total`.

    Attributes:
        total: rows of the whole batch.
        start: the first row.
        stop: behind the last. There is always a row: who has none to do gets one, and `count` is then 0.
        count: rows that count.
    """

    total: int
    start: int
    stop: int
    count: int

    @classmethod
    def of_worker(cls, total: int, worker: int, workers: int) -> Share:
        """Return the share of one of several workers."""
        start, stop = (total * edge // workers for edge in (worker, worker + 1))
        return cls(total, start, max(stop, start + 1), stop - start)

    def of(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return this process's part of an array of `total` rows."""
        return rows[self.start : self.stop]

    def draw(self, draw: Callable[[int], Tensor]) -> Tensor:
        """Draw for the whole batch, as every process does, and return this process's rows."""
        return draw(self.total)[self.start : self.stop]


def noise_like(rows: Tensor, share: Share | None) -> Tensor:
    """Return standard normal noise for some rows: all there are, or a share of a batch."""
    if share is None or share.total == len(rows):
        return torch.randn_like(rows)
    return share.draw(lambda total: torch.randn(total, *rows.shape[1:], dtype=rows.dtype, device=rows.device))


@contextmanager
def sharing(policy: Any, share: Share) -> Iterator[None]:
    """Let a policy draw for a whole batch, and take its share of it, as long as this context lasts."""
    policy.share = share
    try:
        yield
    finally:
        policy.share = None


class Processes:
    """The processes of a run, seen from one of them; without arguments, the only one.

    Args:
        index: this process's number; 0 is the main one, which writes and prints.
        count: how many there are.
        device: this process's, where `--device` leaves it open; `None` if there is one process.
    """

    def __init__(self, index: int = 0, count: int = 1, device: str | None = None) -> None:
        """Describe the processes; `start_processes` joins them."""
        self.index = index
        self.count = count
        self.device = device
        self._interrupted = False
        self._agreed: BaseException | None = None

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.index == 0

    def share(self, total: int) -> Share:
        """Return this process's share of `total` rows, which are at least one; shares differ by a row at most."""
        return Share.of_worker(total, self.index, self.count)

    def deal(self, calls: Sequence[int]) -> list[Share | None]:
        """Deal out calls of the policy, given by their rows: return this process's share of each, `None` for no share.

        As long as there are enough of them calls stay whole, so that a call is the same, to the bit, whatever the
        number of processes. If not, several processes share the rows of one.
        """
        number = len(calls)
        if number >= self.count:
            return [
                Share.of_worker(rows, 0, 1) if call % self.count == self.index else None
                for call, rows in enumerate(calls)
            ]
        workers = len(range(self.index % number, self.count, number))
        return [
            Share.of_worker(rows, self.index // number, workers) if call == self.index % number else None
            for call, rows in enumerate(calls)
        ]

    def gather_objects(self, value: _T) -> list[_T]:
        """Return the values of all processes, in their order, to all of them."""
        return [value] if self.count == 1 else gather_object([value])

    def gather_rows(self, rows: Tensor, axis: int = 0) -> Tensor:
        """Join tensors of the same shape along an axis, in the order of the processes."""
        return rows if self.count == 1 else gather(rows.movedim(axis, 0).contiguous()).movedim(0, axis).contiguous()

    def sum(self, values: Tensor) -> Tensor:
        """Add up tensors of the same shape."""
        return values if self.count == 1 else reduce(values, "sum")

    def from_main(self, work: Callable[[], _T]) -> _T:
        """Do something in the main process alone, and return its result to all; if it fails, all do."""
        if self.count == 1:
            return work()
        result: list[Any] = [None]
        with self.agreement():
            if self.is_main:
                result = [work()]
        return broadcast_object_list(result)[0]

    @contextmanager
    def agreement(self) -> Iterator[None]:
        """What is inside succeeds in all processes, or ends with an exception in all.

        Inside, no process may wait for another.

        Raises:
            OtherProcessError: if it failed in other processes only.
            KeyboardInterrupt: if Ctrl-C came, to any process.
        """
        if self.count == 1:
            yield
            return
        error: BaseException | None = None
        try:
            yield
        except (Exception, KeyboardInterrupt) as raised:
            error = raised
        self._settle(error)

    def combine(
        self, parameters: Sequence[torch.nn.Parameter], metrics: dict[str, Tensor], error: Exception | None
    ) -> dict[str, Tensor]:
        """Add up the gradients of all processes, in place, and their metrics; raise if any of them has failed.

        A metric whose name ends in `_deviation` is the largest of all instead.

        Args:
            parameters: what learns, in the same order everywhere; a gradient may be missing.
            metrics: scalars, of the same names everywhere.
            error: what kept this process from computing its part.

        Raises:
            Exception: `error`.
            OtherProcessError: if another process has one.
            KeyboardInterrupt: if Ctrl-C came, to any process.
        """
        if error is not None and self.count == 1:
            raise error
        if self.count == 1:
            return metrics
        self._settle(error)
        device = parameters[0].device
        present = torch.tensor([float(p.grad is not None) for p in parameters], device=device)
        own = torch.stack([value.detach().to(device, torch.float32) for value in metrics.values()])
        # One row a process, so that sums and largest values come out of one exchange.
        table = torch.zeros(self.count, len(present) + len(own), device=device)
        table[self.index] = torch.cat([present, own])
        table = self.sum(table)
        learning = [p for p, known in zip(parameters, table[:, : len(present)].sum(0).tolist(), strict=True) if known]
        self._sum_gradients(learning)
        values = table[:, len(present) :]
        return {
            name: values[:, column].max() if name.endswith("_deviation") else values[:, column].sum()
            for column, name in enumerate(metrics)
        }

    def _sum_gradients(self, parameters: list[torch.nn.Parameter]) -> None:
        for bucket in _buckets(parameters):
            gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in bucket]
            total = self.sum(torch.cat([gradient.flatten() for gradient in gradients]))
            parts = total.split([p.numel() for p in bucket])
            for parameter, part in zip(bucket, parts, strict=True):
                parameter.grad = part.view_as(parameter)

    def equalize(self, tensors: Sequence[Tensor]) -> None:
        """Give all processes the main one's values, in place."""
        if self.count > 1:
            for tensor in tensors:
                torch.distributed.broadcast(tensor.data, src=0)

    @contextmanager
    def keeping_interrupts(self) -> Iterator[None]:
        """Keep Ctrl-C until the processes agree on it: an exception at any other moment would part them."""
        if self.count == 1:
            yield
            return
        before = signal.signal(signal.SIGINT, lambda *_: setattr(self, "_interrupted", True))
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def raise_interrupt(self) -> None:
        """Raise the Ctrl-C that was kept, inside an `agreement`, where it reaches all."""
        if self._interrupted:
            raise KeyboardInterrupt

    def leave(self, error: BaseException | None = None) -> None:
        """Wait for the other processes, which may still be writing, and part.

        A launcher kills what is left when a process ends with an error. Whoever fails alone does not wait.

        Args:
            error: with which this process ends.
        """
        if self.count > 1 and (error is None or error is self._agreed):
            self.gather_objects(None)
            PartialState().destroy_process_group()

    def _settle(self, error: BaseException | None) -> None:
        """Raise in all processes if one of them has failed, or was interrupted."""
        reports = self.gather_objects((_described(error), self._interrupted or _is_interrupt(error)))
        failed = [(index, failure) for index, (failure, _) in enumerate(reports) if failure is not None]
        if failed and (error is None or _is_interrupt(error)):
            index, (message, text) = failed[0]
            error = OtherProcessError(f"{message} (in process {index} of {self.count})")
            error.__cause__ = RuntimeError(f"\n{text}")
        elif not failed and any(interrupted for _, interrupted in reports):
            self._interrupted = False
            error = KeyboardInterrupt()
        if error is not None:
            raise self.alike(error)

    def alike(self, error: BaseException) -> BaseException:
        """Take note that all processes raise an error, because they hold the same numbers, and return it."""
        self._agreed = error
        return error


def start_processes(device: str = "auto", timeout: float = 1800.0) -> Processes:
    """Join the processes that a launcher started, or return the only one.

    Args:
        device: `auto`, `cpu` or `cuda`; with one process any.
        timeout: seconds that processes wait for each other before the run ends with an error; the slowest batch's
            reward must take less.

    Raises:
        ValueError: for a device that several processes cannot have, or a launcher's setting that would have no effect.
    """
    for name, (none, reason) in _UNUSED_SETTINGS.items():
        value = os.environ.get(name, none)
        if value.lower() != none:
            raise ValueError(f"{name} must be {none!r}, or not asked of the launcher; got {value!r}: {reason}")
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


def check_shares(config: TrainConfig, processes: int) -> None:
    """Refuse sizes that the processes cannot share; they are totals.

    Raises:
        ValueError: naming the setting.
    """
    training = config.training
    eval_slots = min(config.run.eval_samples, training.sample_batch_size)
    for name, value in (
        ("samples_per_iteration", training.samples_per_iteration),
        ("sample_batch_size", training.sample_batch_size),
        ("eval_samples", eval_slots),
    ):
        if value % processes:
            raise ValueError(f"{name} must be a multiple of the number of processes, {processes}; got {value}")


def _described(error: BaseException | None) -> tuple[str, str] | None:
    """What other processes are told of an error: a line, and the traceback. Ctrl-C is none."""
    if error is None or _is_interrupt(error):
        return None
    notes = "".join(f" ({note})" for note in getattr(error, "__notes__", ()))
    return f"{type(error).__name__}: {error}{notes}", "".join(traceback.format_exception(error))


def _is_interrupt(error: BaseException | None) -> bool:
    return isinstance(error, KeyboardInterrupt)


def _buckets(parameters: Sequence[torch.nn.Parameter]) -> list[list[torch.nn.Parameter]]:
    buckets: list[list[torch.nn.Parameter]] = []
    size = _BUCKET
    for parameter in parameters:
        if size + parameter.numel() > _BUCKET:
            buckets.append([])
            size = 0
        buckets[-1].append(parameter)
        size += parameter.numel()
    return buckets
