"""Rewards of ended episodes, some of which are not known yet when the episode ends.

The environment hands final samples to `RewardCaller`. A reward that asks a server or a large model takes longer than
many denoising steps; with `deferred_rewards` a thread calls it while the environment continues. If several processes
share a batch and a sample's score depends on the other samples (`rewards.TwoStageReward`), a process only measures its
own samples, and whoever has the measurements of all processes forms the scores. `DeferredReward` stands for both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from rewards import NonFinite, Reward, TwoStageReward, evaluate_reward, measure_reward


@dataclass
class _Answer:
    """What a reward returned for a batch, or raised; `is_known` once somebody has seen the exception."""

    scores: npt.NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    measurements: Sequence[Any] = ()
    details: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    error: BaseException | None = None
    traceback: TracebackType | None = None
    is_known: bool = False

    def raise_error(self) -> None:
        """Raise the reward's exception, if there is one, with its own traceback only."""
        if self.error is not None:
            self.is_known = True
            raise self.error.with_traceback(self.traceback)


class DeferredReward:
    """The reward of one episode, which may not be known yet.

    Attributes:
        is_measured: whether the sample is measured and not scored, because several processes form the score.
    """

    def __init__(self, answer: Future[_Answer], row: int, is_measured: bool = False) -> None:
        """Take the call that scores or measures the batch, and this episode's row in it."""
        self._answer = answer
        self._row = row
        self.is_measured = is_measured

    def done(self) -> bool:
        """Return whether the other methods would return, or raise, without waiting."""
        return self._answer.done()

    def result(self) -> float:
        """Wait for the score and return it.

        Raises:
            Exception: whatever the reward raised, with its traceback.
            RuntimeError: if the sample is measured and not scored.
        """
        answer = self._finished()
        if self.is_measured:
            raise RuntimeError(
                "this process has only measured the sample; form the scores from the measurement() of all processes "
                "with rewards.combine_measurements"
            )
        return float(answer.scores[self._row])

    def measurement(self) -> Any:
        """Wait, and return what the two-stage reward measured; `None` at once for a sample that is scored.

        Raises:
            Exception: whatever the reward raised, with its traceback.
        """
        return self._finished().measurements[self._row] if self.is_measured else None

    def details(self) -> dict[str, Any]:
        """Wait, and return the reward's details about this episode by name; raises what the reward raised."""
        return {name: values[self._row] for name, values in self._finished().details.items()}

    def _finished(self) -> _Answer:
        answer = self._answer.result()
        answer.raise_error()
        return answer


class RewardCaller:
    """Calls a reward at once, or in one thread: calls never overlap and keep their order, as a reward may have a state.

    Args:
        in_thread: whether `submit` returns before the reward is called.
        measures: whether two-stage rewards measure and do not score.
        non_finite: as for `rewards.evaluate_reward`.
    """

    def __init__(self, *, in_thread: bool = False, measures: bool = False, non_finite: NonFinite = "raise") -> None:
        """Start the thread if there is one."""
        self._measures = measures
        self._non_finite = non_finite
        self._executor: ThreadPoolExecutor | None = None
        if in_thread:
            self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="deferred-reward")
        self._answers: list[Future[_Answer]] = []

    def __reduce__(self) -> tuple[Any, ...]:
        """Return how a copy is made: it has a thread of its own, and nothing is queued."""
        in_thread = self._executor is not None
        return partial(RewardCaller, in_thread=in_thread, measures=self._measures, non_finite=self._non_finite), ()

    def submit(
        self, reward: Reward, samples: npt.NDArray[Any], prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
    ) -> list[DeferredReward]:
        """Call a reward, or queue the call; return one reward per sample. The arguments are `evaluate_reward`'s.

        Raises:
            Exception: without a thread, whatever the reward raises.
        """
        measures = self._measures and isinstance(reward, TwoStageReward)
        if self._executor is not None:
            answer = self._executor.submit(self._ask_and_catch, reward, samples, prompts, metadata)
            self._answers.append(answer)
        else:
            answer = Future()
            answer.set_result(self._ask(reward, samples, prompts, metadata))
        return [DeferredReward(answer, row, measures) for row in range(len(samples))]

    def raise_failed(self) -> None:
        """Raise the exception of the first finished call that failed, unless somebody has seen it already."""
        finished = [answer for answer in self._answers if answer.done()]
        for answer in finished:
            self._answers.remove(answer)
            if not answer.result().is_known:
                answer.result().raise_error()

    def wait(self) -> None:
        """Return when nothing is queued or running; failures are kept for `raise_failed`."""
        wait(self._answers)

    def cancel(self) -> None:
        """Drop the queued calls; a call that has begun goes on."""
        self._answers = [answer for answer in self._answers if not answer.cancel()]

    def discard(self) -> None:
        """Wait, and drop the failures; a `DeferredReward` still raises its own."""
        self.wait()
        self._answers.clear()

    def close(self) -> None:
        """Finish what is queued and end the thread."""
        self.discard()
        if self._executor is not None:
            self._executor.shutdown()

    def _ask(
        self, reward: Reward, samples: npt.NDArray[Any], prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
    ) -> _Answer:
        if self._measures and isinstance(reward, TwoStageReward):
            measurements, details = measure_reward(reward, samples, prompts, metadata)
            return _Answer(measurements=measurements, details=details)
        scores, details = evaluate_reward(reward, samples, prompts, metadata, non_finite=self._non_finite)
        return _Answer(scores=scores, details=details)

    def _ask_and_catch(self, *batch: Any) -> _Answer:
        try:
            return self._ask(*batch)
        except BaseException as error:  # it belongs to whoever asks for the reward, not to this thread
            return _Answer(error=error, traceback=error.__traceback__)
