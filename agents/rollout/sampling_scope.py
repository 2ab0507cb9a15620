"""The context in which a rollout is sampled, and the callbacks that look at the algorithm between two steps of it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack

from stable_baselines3.common.callbacks import BaseCallback, CallbackList


class SamplingScope(ExitStack):
    """A context that is left while a callback runs.

    What samples may be another policy than the one that learns: an older one, one without noise in some steps, or one
    whose adapters are merged. A callback that saves or evaluates needs the one that learns.

    Args:
        sampling: returns the context; called again after each callback.
    """

    def __init__(self, sampling: Callable[[], AbstractContextManager[None]]) -> None:
        """Enter the context once this one is entered."""
        super().__init__()
        self._sampling = sampling

    def __enter__(self) -> SamplingScope:
        """Enter the context."""
        self.enter_context(self._sampling())
        return self

    def on_step(self, callback: BaseCallback) -> bool:
        """Call a callback outside of the context; return False if it asks to stop."""
        if isinstance(callback, CallbackList) and not callback.callbacks:  # leaving would be for nothing
            return callback.on_step()
        self.close()
        goes_on = callback.on_step()
        self.enter_context(self._sampling())
        return goes_on
