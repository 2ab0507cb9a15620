"""Successive halving: who trains with which budget, and who goes on (Jamieson & Talwalkar 2016, arXiv 1502.07943).

All contenders train with a small part of the budget. The best of them, one in `reduction`, rounded up, go on to a
budget that is `reduction` times as large, and so on until one can be chosen with the whole budget. Nothing here trains.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, TypeAlias

from ddpo_env.validation.options import NOT_NEGATIVE, check_fields

Unit: TypeAlias = Literal["queries", "rows", "seconds"]
"""What a budget counts: scored samples, rows of the denoiser's calls, or seconds of training."""


@dataclass(frozen=True)
class Rung:
    """One round of a race.

    Attributes:
        contenders: at most so many train in it.
        budget: of one run from its first iteration to the end of this rung, in the race's unit.
        seeds: each contender has a run with each of them.
    """

    contenders: int
    budget: float
    seeds: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Result:
    """A run at the end of a rung, on the held-out seeds.

    Raises:
        ValueError: for a value that no run has, naming it.
    """

    contender: str
    rung: Annotated[int, NOT_NEGATIVE]
    """Number of the rung, from 0."""
    seed: Annotated[int, NOT_NEGATIVE]
    iterations: Annotated[int, NOT_NEGATIVE]
    """Number of iterations that the run has finished."""
    before: float
    """Mean reward before training."""
    reward: float
    """Mean reward now."""
    holdout_reward: float | None = None
    """Mean of the second reward; `None`: there is none."""
    kl: float | None = None
    """KL divergence from the pretrained policy; `None`: it has none."""

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True, kw_only=True)
class Failure:
    """Why a contender is out before its rung has ended."""

    contender: str
    rung: Annotated[int, NOT_NEGATIVE]
    reason: str

    def __post_init__(self) -> None:
        check_fields(self)


def plan_rungs(
    contenders: int, budget: float, reduction: int, seeds: tuple[int, ...], final_seeds: tuple[int, ...]
) -> list[Rung]:
    """Return the rungs of a race; the last one has at most `reduction` contenders and the whole budget.

    Args:
        contenders: their number, at least 1.
        budget: of a run that trains to the end.
        reduction: one in so many goes on, at least 2.
        seeds: of all rungs but the last.
        final_seeds: of the last rung, which is the only one of few contenders.
    """
    sizes = [contenders]
    while sizes[-1] > reduction:
        sizes.append(-(-sizes[-1] // reduction))
    last = len(sizes) - 1
    return [
        Rung(size, budget / reduction ** (last - index), final_seeds if index == last else seeds)
        for index, size in enumerate(sizes)
    ]


class Standings:
    """Who is in which rung, and who is ahead, from the results so far.

    Args:
        names: of the contenders; of two with the same mean reward the first one is ahead.
        rungs: of the race.
        results: one for each run and rung that has ended.
        failures: contenders that are out.
    """

    def __init__(
        self,
        names: Sequence[str],
        rungs: Sequence[Rung],
        results: Sequence[Result],
        failures: Sequence[Failure],
    ) -> None:
        self.names = names
        self.rungs = rungs
        self.failures = {failure.contender: failure for failure in failures}
        self._results: dict[tuple[str, int], dict[int, Result]] = {}
        for result in results:
            self._results.setdefault((result.contender, result.rung), {})[result.seed] = result

    def results(self, name: str, rung: int) -> list[Result]:
        """Return a contender's results at the end of a rung in the order of the seeds; empty if a seed lacks one."""
        found, seeds = self._results.get((name, rung), {}), self.rungs[rung].seeds
        return [found[seed] for seed in seeds] if found.keys() >= set(seeds) else []

    def mean_reward(self, name: str, rung: int) -> float:
        """Return the mean over seeds of a contender's held-out reward at the end of a rung.

        Raises:
            ValueError: if a seed has no result.
        """
        if not (results := self.results(name, rung)):
            raise ValueError(f"contender {name!r} has no result in rung {rung + 1}")
        return statistics.fmean(one.reward for one in results)

    def starters(self, rung: int) -> list[str]:
        """Return who trains in a rung, in the order of the names; all contenders of the rung before have ended it.

        A contender that fails is not replaced: the places of a rung are given away once, when the rung before ends.
        """
        if rung == 0:
            return list(self.names)
        best = self.ranked(rung - 1)[: self.rungs[rung].contenders]
        return [name for name in self.names if name in best]

    def ended(self, rung: int) -> bool:
        """Whether every starter of a rung, which itself has begun, has a result for each seed or failed."""
        return all(self._is_out(name, rung) or self.results(name, rung) for name in self.starters(rung))

    @property
    def current(self) -> int | None:
        """The rung that trains now; `None`: the race is over."""
        return next((rung for rung in range(len(self.rungs)) if not self.ended(rung)), None)

    def reached(self, name: str) -> int:
        """Return the last rung that a contender has trained in, or trains in now."""
        last = len(self.rungs) - 1 if self.current is None else self.current
        return max(rung for rung in range(last + 1) if name in self.starters(rung))

    def order(self) -> list[str]:
        """Return the names from the winner to the worst; those that failed come last, the last failure first.

        Those without a result in the rung that trains now follow those that have one, as they ended the rung before.
        """
        order: list[str] = []
        for rung in reversed(range(len(self.rungs) if self.current is None else self.current + 1)):
            order += [name for name in self.ranked(rung) if name not in order and name not in self.failures]
        order += [name for name in self.names if name not in order and name not in self.failures]
        return order + sorted(self.failures, key=lambda name: (-self.failures[name].rung, self.names.index(name)))

    @property
    def winner(self) -> str | None:
        """The best of the last rung; `None` while the race goes on, and if nobody is left."""
        ranked = self.ranked(len(self.rungs) - 1) if self.current is None else []
        return ranked[0] if ranked else None

    def _is_out(self, name: str, rung: int) -> bool:
        """Whether a contender has failed in a rung or before."""
        return name in self.failures and self.failures[name].rung <= rung

    def ranked(self, rung: int) -> list[str]:
        """Return those who have ended a rung with every seed and without a failure, from the best to the worst."""
        there = [name for name in self.starters(rung) if not self._is_out(name, rung) and self.results(name, rung)]
        return sorted(there, key=lambda name: -self.mean_reward(name, rung))
