"""Where the host waits for the pretend device."""

import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from helpers.paths import ROOT

PACKAGES = tuple(str(ROOT / name) for name in ("agents", "ddpo_env", "rewards"))
OUTSIDE = "outside the project"
MESSAGE = "called a synchronizing CUDA operation"
"""As torch words it."""


class Waits:
    """Counts waits by the function of this project that caused them, and fills what was copied without waiting."""

    def __init__(self) -> None:
        self.places: Counter[str] = Counter()
        self.mode = "default"
        self._unfinished: list[tuple[Tensor, Tensor]] = []

    def note(self) -> None:
        """Count one wait, as `torch.cuda.set_sync_debug_mode` would report it."""
        self.finish()
        if self.mode == "error":
            raise RuntimeError(MESSAGE)
        self.places[_place()] += 1
        if self.mode == "warn":
            warnings.warn(MESSAGE, stacklevel=_depth_outside_torch())

    def later(self, host: Tensor, values: Tensor) -> Tensor:
        """Return `host` with garbage in it; the values arrive when the host waits next."""
        self._unfinished.append((host, values))
        host.view(-1).view(dtype=torch.uint8).fill_(0xAB) if host.numel() else None
        return host

    def finish(self) -> None:
        """Complete all copies to the host."""
        for host, values in self._unfinished:
            host.copy_(values)
        self._unfinished.clear()

    @contextmanager
    def counted(self) -> Iterator[Counter[str]]:
        """Count the waits inside this context alone."""
        outer, self.places = self.places, Counter()
        inner = self.places
        try:
            yield inner
        finally:
            self.places = outer + inner


def _place() -> str:
    frame: Any = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename.startswith(PACKAGES):
            return str(frame.f_code.co_qualname)
        frame = frame.f_back
    return OUTSIDE


def _depth_outside_torch() -> int:
    """Return the `stacklevel` of the first frame that is neither torch's nor of this helper."""
    frame: Any = sys._getframe(1)
    depth = 0
    own, library = str(Path(__file__).parent), str(Path(sys.modules["torch"].__file__ or "").parent)
    while frame.f_back is not None and frame.f_code.co_filename.startswith((own, library)):
        frame, depth = frame.f_back, depth + 1
    return depth + 1
