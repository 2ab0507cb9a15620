"""Other values for the weights that learn: an average, an older policy. They take the weights' place without a copy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

AVERAGE, LAGGING = "average", "lagging"
"""Names of the copies in a checkpoint: the averaged weights that are evaluated, and `LaggingWeights`."""


@contextmanager
def using_weights(parameters: Sequence[nn.Parameter], values: Sequence[Tensor] | None) -> Iterator[None]:
    """Compute with other values of the weights inside this context; `None` changes nothing.

    The parameters point to the values for a while, so nothing is copied. A graph that was made outside is still
    differentiated with the parameters' own values, if that happens outside.

    Args:
        parameters: that learn.
        values: one for each, of its shape, dtype and device.
    """
    if values is None:
        yield
        return
    own = [parameter.data for parameter in parameters]
    try:
        for parameter, value in zip(parameters, values, strict=True):
            parameter.data = value
        yield
    finally:
        for parameter, value in zip(parameters, own, strict=True):
            parameter.data = value


class LaggingWeights(EMAModel):
    """A copy of the weights that follows them: θ_lagging ← d · θ_lagging + (1 − d) · θ, with d = min(rate · n, limit).

    `n` is the number of updates so far, so that the copy is close behind at first, and slower later.

    Args:
        parameters: that learn.
        rate: growth of d with each update.
        limit: largest d, below 1.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], rate: float, limit: float) -> None:
        """Copy the weights as they are now."""
        super().__init__(parameters, decay=limit)
        self.rate = rate

    def get_decay(self, optimization_step: int) -> float:
        """Return d after so many updates."""
        return min(self.rate * optimization_step, self.decay)

    def follow(self, parameters: Sequence[nn.Parameter], updates: int) -> None:
        """Move towards the weights, which have had so many updates in all."""
        self.optimization_step = updates - 1  # `step` counts one more
        self.step(parameters)

    @torch.no_grad()
    def restart(self, parameters: Sequence[nn.Parameter]) -> None:
        """Take the weights as they are."""
        for own, parameter in zip(self.shadow_params, parameters, strict=True):
            own.copy_(parameter)


class WeightSnapshot:
    """The weights as they were after a number of updates, such as those that sampled a rollout.

    Args:
        parameters: that learn; none: the snapshot always has the current weights.
        updates: that they have had so far.
    """

    def __init__(self, parameters: Sequence[nn.Parameter] = (), updates: int = 0) -> None:
        """Copy the weights as they are now."""
        self._parameters, self._updates = parameters, updates
        self._values = [parameter.detach().clone() for parameter in parameters]

    def is_current(self, updates: int) -> bool:
        """Return whether the weights are still the same after so many updates."""
        return updates == self._updates

    def in_use(self) -> AbstractContextManager[None]:
        """Return a context in which the weights are those of the snapshot."""
        return using_weights(self._parameters, self._values)
