"""What an iteration of a contender costs, and how many iterations a budget buys it.

Contenders differ in the samples of an iteration and in what an update computes, so the same budget is another number of
iterations for each. It is rounded down: no contender ever spends more than the budget. Evaluations do not count,
because they are no part of an algorithm and cost all contenders the same.
"""

from __future__ import annotations

from agents.commands.race.halving import Unit
from agents.config.train_config import TrainConfig
from agents.planning.plan import denoiser_rows

_MOST_ITERATIONS = 1_000_000
"""As the setting has it."""


def cost_of(config: TrainConfig, iterations: int, unit: Unit, seconds: float | None = None) -> float:
    """Return what the first iterations of a run cost.

    Args:
        config: resolved.
        iterations: number of them.
        unit: what counts. Rows are those of the denoiser's calls that sample, train and measure, as planned; a guided
            call has two for each latent, and an early end of an update (target_kl) does not count.
        seconds: that an iteration takes, for this unit.
    """
    if unit == "queries":
        return iterations * config.samples_per_iteration
    if unit == "rows":
        if iterations == 0:
            return 0
        rows = denoiser_rows(config.changed(iterations=iterations))
        return rows.sampling + rows.training + rows.measuring
    assert seconds is not None
    return iterations * seconds


def iterations_within(config: TrainConfig, budget: float, unit: Unit, seconds: float | None = None) -> int:
    """Return the largest number of iterations that cost at most the budget; the arguments are those of `cost_of`."""
    low, high = 0, 1  # the cost of `low` iterations is within the budget
    while high <= _MOST_ITERATIONS and cost_of(config, high, unit, seconds) <= budget:
        low, high = high, 2 * high
    while low + 1 < min(high, _MOST_ITERATIONS + 1):
        middle = (low + min(high, _MOST_ITERATIONS + 1)) // 2
        if cost_of(config, middle, unit, seconds) <= budget:
            low = middle
        else:
            high = middle
    return low
