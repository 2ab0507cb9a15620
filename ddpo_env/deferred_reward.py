"""Rewards that are computed while the environment goes on: one thread, in the order of the episodes' ends.

A reward that asks a server or a large model takes longer than many denoising steps. With `deferred_rewards` the
environment hands pictures to `RewardWorker` and returns; whoever needs the number asks `DeferredReward`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from rewards import NonFinite, Reward, evaluate_reward


@dataclass
class _Answer:
    """What `evaluate_reward` returned or raised; `is_known` once the exception has been raised to somebody."""

    scores: npt.NDArray[np.float64]
    details: Mapping[str, Sequence[Any]]
    error: BaseException | None = None
    traceback: TracebackType | None = None
    is_known: bool = False

    def raise_error(self) -> None:
        """Raise the reward's exception, if there is one, with its own traceback and nobody else's."""
        if self.error is not None:
            self.is_known = True
            raise self.error.with_traceback(self.traceback)


class DeferredReward:
    """The reward of one episode, which may still be in the making."""

    def __init__(self, answer: Future[_Answer], row: int) -> None:
        """Take the call that scores the batch, and this episode's row in it."""
        self._answer = answer
        self._row = row

    def done(self) -> bool:
        """Whether `result` and `details` would return, or raise, at once."""
        return self._answer.done()

    def result(self) -> float:
        """Wait for the score and return it.

        Raises:
            Exception: whatever the reward raised, with its traceback.
        """
        return float(self._finished().scores[self._row])

    def details(self) -> dict[str, Any]:
        """Wait, and return this episode's part of the reward's details by name; raises what `result` raises."""
        return {name: values[self._row] for name, values in self._finished().details.items()}

    def _finished(self) -> _Answer:
        answer = self._answer.result()
        answer.raise_error()
        return answer


class RewardWorker:
    """Calls a reward in one thread, so that calls never overlap and keep their order: a reward may have a state."""

    def __init__(self, non_finite: NonFinite = "raise") -> None:
        """Start with nothing to do; `non_finite` is `evaluate_reward`'s."""
        self._non_finite = non_finite
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="deferred-reward")
        self._answers: list[Future[_Answer]] = []

    def submit(
        self, reward: Reward, samples: npt.NDArray[Any], prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
    ) -> list[DeferredReward]:
        """Queue a batch, as `evaluate_reward` takes it, and return one promise a sample."""
        answer = self._executor.submit(_evaluate, reward, samples, prompts, metadata, self._non_finite)
        self._answers.append(answer)
        return [DeferredReward(answer, row) for row in range(len(samples))]

    def raise_failed(self) -> None:
        """Raise the exception of the first finished call that failed and whose failure nobody has seen yet."""
        finished = [answer for answer in self._answers if answer.done()]
        for answer in finished:
            self._answers.remove(answer)
            if not answer.result().is_known:
                answer.result().raise_error()

    def wait(self) -> None:
        """Return when nothing is queued or running; failures are kept for `raise_failed`."""
        wait(self._answers)

    def cancel(self) -> None:
        """Give up what is queued; a call under way goes on."""
        self._answers = [answer for answer in self._answers if not answer.cancel()]

    def forget(self) -> None:
        """Wait, and keep no failures; a `DeferredReward` still raises its own."""
        self.wait()
        self._answers.clear()

    def close(self) -> None:
        """Finish what is queued and end the thread."""
        self.forget()
        self._executor.shutdown()


def _evaluate(
    reward: Reward,
    samples: npt.NDArray[Any],
    prompts: Sequence[str],
    metadata: Sequence[Mapping[str, Any]],
    non_finite: NonFinite,
) -> _Answer:
    try:
        return _Answer(*evaluate_reward(reward, samples, prompts, metadata, non_finite=non_finite))
    except BaseException as error:  # it belongs to whoever asks, not to this thread
        return _Answer(np.zeros(0), {}, error, error.__traceback__)
