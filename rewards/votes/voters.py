"""Who votes: the protocol, and a simulated person, with whom the cost of an improvement can be measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeAlias

import numpy as np

from rewards.formulas.preference import tiny_preference
from rewards.votes.ballot import Comparison, Side

Cast: TypeAlias = Callable[[Comparison, Side], None]
"""Takes a vote as soon as it is cast, in any thread."""


class Voters(Protocol):
    """Who is asked."""

    def open(self) -> None:
        """Get ready, so that errors appear early."""
        ...

    def ask(self, comparisons: Sequence[Comparison], cast: Cast, patience: float | None) -> None:
        """Ask about pairs, in the place of those that are still open.

        Args:
            comparisons: The pairs, in the order in which they are asked.
            cast: Is called for every vote, also for those that come after this method has returned.
            patience: Seconds after which this method returns although votes are missing; None: it waits for all.

        Raises:
            CancelledError: `close` was called.
        """
        ...

    def close(self) -> None:
        """Ask nobody any more, and end a call of `ask` that waits. It may be called from any thread, and twice."""
        ...


class SimulatedPerson:
    """Prefers the image with the higher `tiny_preference`, seen with an error; answers at once.

    Args:
        noise: Standard deviation of the error with which each image of a pair is judged, in points of
            `tiny_preference`. The error depends on the pair alone, so the same pair gets the same vote again.
    """

    def __init__(self, noise: float) -> None:
        """Take the noise; see the class docstring."""
        self._noise = noise

    def open(self) -> None:
        """Do nothing."""

    def ask(self, comparisons: Sequence[Comparison], cast: Cast, patience: float | None) -> None:
        """Vote on every pair."""
        for comparison in comparisons:
            images = np.stack([comparison.left.image, comparison.right.image])
            preference, _ = tiny_preference(images, [comparison.prompt] * 2, [{}] * 2)
            seed = [int(one.digest[:16], 16) for one in (comparison.left, comparison.right)]
            left, right = preference + self._noise * np.random.default_rng(seed).standard_normal(2)
            cast(comparison, "left" if left > right else "right")

    def close(self) -> None:
        """Do nothing."""
