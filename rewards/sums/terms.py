"""The terms of a weighted sum of rewards: how they are written, and the statistics that scale them."""

from __future__ import annotations

import math
import sys
from collections import Counter
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rewards.registry import check_number, check_text

_RAW = ":raw"
LARGEST_WEIGHT = 1e6
"""Of a term, in size. A sum of larger terms says nothing about the others, and can be infinite."""


@dataclass(frozen=True)
class Term:
    """One term of the sum.

    Attributes:
        name: What `load_reward` takes.
        weight: Its factor, which may be negative.
        raw: Whether its scores are added as they are, without standardisation.

    Raises:
        ValueError: The name is no text, or the weight no number of at most a million.
    """

    name: str
    weight: float
    raw: bool = False

    def __post_init__(self) -> None:
        check_text("name", self.name)
        check_number("weight", self.weight, -LARGEST_WEIGHT, LARGEST_WEIGHT)


@dataclass(frozen=True)
class RunningStatistics:
    """Mean and variance of all values so far (Welford's method; batches are joined as in Chan et al. 1983).

    Attributes:
        count: Number of values.
        mean: Their mean.
        squares: Sum of their squared deviations from the mean.

    Raises:
        ValueError: These are not the statistics of any values.
    """

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0

    def __post_init__(self) -> None:
        check_number("count", self.count, 0, 2**63)
        check_number("mean", self.mean, -sys.float_info.max, sys.float_info.max)
        check_number("squares", self.squares, 0.0, sys.float_info.max)

    @property
    def std(self) -> float:
        """Standard deviation with divisor `count`; 0 before the first value."""
        return math.sqrt(self.squares / self.count) if self.count else 0.0

    def joined(self, values: NDArray[np.float64]) -> RunningStatistics:
        """Return the statistics of the values so far and these values, (batch,)."""
        if not len(values):
            return self
        count = self.count + len(values)
        difference = float(values.mean()) - self.mean
        return RunningStatistics(
            count,
            self.mean + difference * len(values) / count,
            self.squares
            + float(((values - values.mean()) ** 2).sum())
            + difference**2 * self.count * len(values) / count,
        )

    def standardise(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return (value - mean) / std; zeros if all values so far are equal."""
        return (values - self.mean) / self.std if self.std > 0 else np.zeros_like(values)


def parse_terms(spec: str) -> tuple[Term, ...]:
    """Read `name:weight,name:weight:raw,...`, where a name may be `module:function`.

    Raises:
        ValueError: A term has no name or no finite weight, or a name occurs twice; the message quotes the term.
    """
    return named_once(tuple(_parse_term(text.strip(), spec) for text in spec.split(",")), spec)


def weights_by_term(spec: str, purpose: str) -> dict[str, float]:
    """Return the weights of a weighted sum by the names of its terms, for a use that standardises the terms itself.

    Args:
        spec: `name:weight,...` as for `parse_terms`.
        purpose: what needs them, for the error.

    Raises:
        ValueError: It is no weighted sum, or a term is raw.
    """
    try:
        terms = parse_terms(spec)
    except ValueError as error:
        raise ValueError(
            f"reward must be a weighted sum with {purpose}, such as aesthetic:1,clip_score:0.5; got {spec!r}"
        ) from error
    if raw := [term.name for term in terms if term.raw]:
        raise ValueError(
            f"reward must have no raw terms with {purpose}, which standardises every term; got {', '.join(raw)}:raw"
        )
    return {term.name: term.weight for term in terms}


def named_once(terms: tuple[Term, ...], spec: object) -> tuple[Term, ...]:
    """Return the terms.

    Raises:
        ValueError: A name occurs twice.
    """
    counts = Counter(term.name for term in terms)
    if twice := [name for name, count in counts.items() if count > 1]:
        raise ValueError(f"reward {spec!r} must name each term once; {', '.join(twice)} occurs more often")
    return terms


def _parse_term(text: str, spec: str) -> Term:
    name, _, number = text.removesuffix(_RAW).rpartition(":")
    try:
        weight = float(number)
    except ValueError:
        weight = math.nan
    if not name.strip() or not abs(weight) <= LARGEST_WEIGHT:
        raise ValueError(
            f"each term of reward {spec!r} must be name:weight or name:weight:raw with a finite number of at most "
            f"{LARGEST_WEIGHT:g}, such as aesthetic:1,clip_score:0.5; got {text!r}"
        )
    return Term(name.strip(), weight, raw=text.endswith(_RAW))
