"""A weighted sum of rewards, in which running statistics bring every term to a common scale.

On the command line it is written `--reward "aesthetic:1,clip_score:0.5"`. Rewards of different units (a rating, a
cosine, a file size) cannot be added directly. The term `jpeg_compressibility:0.1:raw` is added without scaling.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from rewards.differentiable import DifferentiableReward, refuse_without_gradient, score_with_gradient
from rewards.kinds import KINDS, SampleKind, kinds_of
from rewards.protocol import (
    AsksPeople,
    ChecksPrompts,
    Details,
    Freezable,
    Loadable,
    LogsAnswers,
    Metadata,
    Reward,
    Samples,
    StatefulReward,
    TwoStageReward,
    Unloadable,
    combine_measurements,
    evaluate_reward,
    is_torch_module,
    measure_reward,
    reward_name,
)
from rewards.registry import configured_reward
from rewards.sums.terms import RunningStatistics, Term, named_once, parse_terms

if TYPE_CHECKING:  # a sum of rewards without a model needs no torch
    from torch import Tensor


def is_stateful(reward: object) -> bool:
    """Whether a reward has a state that a checkpoint must contain.

    A `torch.nn.Module` has a `state_dict` of its weights, which do not change; it is stateful only if its class
    overrides `state_dict`.
    """
    inherited = is_torch_module(reward) and type(reward).state_dict.__module__.startswith("torch.")  # type: ignore[attr-defined]
    return isinstance(reward, StatefulReward) and not inherited


def asking_people(reward: object) -> list[AsksPeople]:
    """Return the reward if its calls may wait for a person; of a weighted sum, the terms whose calls may."""
    if isinstance(reward, Composite):
        return [found for term in reward.rewards.values() for found in asking_people(term)]
    return [reward] if isinstance(reward, AsksPeople) else []


def check_shareable(reward: Reward) -> None:
    """Check that several processes can share a reward.

    Raises:
        ValueError: The reward, or a term of a weighted sum, has a state but no `measure` and `combine`.
    """
    if names := _unshareable(reward, reward_name(reward)):
        raise ValueError(
            f"reward {', '.join(names)} keeps a state (state_dict), and each of several processes would keep its own: "
            "it must have measure(images, prompts, metadata) and combine(measurements), see rewards.TwoStageReward; "
            "or start one process"
        )


def _unshareable(reward: Reward, name: str) -> list[str]:
    if isinstance(reward, Composite):
        return [found for key, term in reward.rewards.items() for found in _unshareable(term, key)]
    return [name] if is_stateful(reward) and not isinstance(reward, TwoStageReward) else []


def check_prompts(reward: Reward, prompts: Iterable[tuple[str, Mapping[str, Any]]]) -> None:
    """Check that a reward, or each term of a weighted sum, can score prompts. Nothing is loaded.

    Args:
        reward: Rewards that are not `ChecksPrompts` are not asked.
        prompts: Each with its metadata.

    Raises:
        ValueError: A reward refuses a prompt.
    """
    pairs = list(prompts)
    if isinstance(reward, Composite):
        for term in reward.rewards.values():
            check_prompts(term, pairs)
    elif isinstance(reward, ChecksPrompts):
        reward.check_prompts([prompt for prompt, _ in pairs], [metadata for _, metadata in pairs])


def check_differentiable(reward: Reward) -> DifferentiableReward:
    """Return a reward if it can be differentiated, and each of its terms if it is a weighted sum.

    Raises:
        ValueError: The reward or a term cannot; the message names it, and those that can.
    """
    refuse_without_gradient(_without_gradient(reward, reward_name(reward)))
    return cast(DifferentiableReward, reward)


def _without_gradient(reward: Reward, name: str) -> list[str]:
    if isinstance(reward, Composite):
        return [found for key, term in reward.rewards.items() for found in _without_gradient(term, key)]
    return [] if isinstance(reward, DifferentiableReward) else [name]


class Composite:
    """A weighted sum of rewards. The details contain each term's own scores, by the term's name, and its details.

    Attributes:
        terms: The terms of the sum, in their order.
        rewards: The reward of each term, by the term's name.
        statistics: The running statistics of each term that is not raw, by the term's name.
    """

    __name__ = "composite"

    def __init__(
        self,
        terms: str | Sequence[Term],
        options: Mapping[str, Mapping[str, Any]] | None = None,
        setting: str = "reward",
    ) -> None:
        """Create the reward of every term.

        Args:
            terms: `name:weight,...` as for `parse_terms`, or a sequence of `Term`.
            options: Arguments of each term's class, by the term's name.
            setting: What the user calls the sum, for errors.

        Raises:
            ValueError: The spelling is wrong, every weight is 0, there is no such reward, or an option does not belong
                to a term.
        """
        options = options or {}
        if isinstance(terms, str):
            self.terms = parse_terms(terms)
        elif isinstance(terms, Sequence) and terms and all(isinstance(term, Term) for term in terms):
            self.terms = named_once(tuple(cast(Sequence[Term], terms)), terms)
        else:
            raise ValueError(f"terms must be a text such as aesthetic:1,clip_score:0.5, or Terms; got {terms!r}")
        names = [term.name for term in self.terms]
        if not any(term.weight for term in self.terms):
            raise ValueError(f"{setting} must have a term whose weight is not 0; got {terms!r}")
        if unknown := set(options) - set(names):
            raise ValueError(f"options must be of {', '.join(names)}; got {', '.join(unknown)}")
        self.rewards: dict[str, Reward] = {
            name: configured_reward(name, options.get(name, {}), setting) for name in names
        }
        self.statistics = {term.name: RunningStatistics() for term in self.terms if not term.raw}
        self._is_frozen = False

    @property
    def sample_kinds(self) -> tuple[SampleKind, ...]:
        """The kinds of samples that every term takes."""
        return tuple(kind for kind in KINDS if all(kind in kinds_of(reward) for reward in self.rewards.values()))

    def __call__(
        self, images: Samples, prompts: Sequence[str], metadata: Metadata
    ) -> tuple[NDArray[np.float64], Details]:
        """Score a batch.

        The batch's scores enter the statistics before they are standardised. If a term's score is not finite, the sum
        of that sample is NaN, and none of the sample's scores enters the statistics.

        Returns:
            The weighted sum, (batch,); and as details each term's scores before standardisation, by the term's name,
            and each term's details as `term/detail`.
        """
        measurements, details = self.measure(images, prompts, metadata)
        total, added = self.combine(measurements)
        return total, {**details, **added}

    def measure(
        self, images: Samples, prompts: Sequence[str], metadata: Metadata
    ) -> tuple[list[tuple[Any, ...]], Details]:
        """Measure or score a batch by each term.

        Returns:
            One tuple per sample with a value per term: a measurement if the term is a `TwoStageReward`, else a score;
            and the details that are known so far.
        """
        columns: list[list[Any]] = []
        details: dict[str, Sequence[Any]] = {}
        for name, reward in self.rewards.items():
            if isinstance(reward, TwoStageReward):
                column, own = measure_reward(reward, images, prompts, metadata)
            else:
                scores, own = evaluate_reward(reward, images, prompts, metadata, non_finite="keep")
                details[name] = column = scores.tolist()
            columns.append(column)
            details.update(_details_of(name, own))
        return list(zip(*columns, strict=True)), details

    def combine(self, measurements: Sequence[tuple[Any, ...]]) -> tuple[NDArray[np.float64], Details]:
        """Form the sums of a whole batch and update the statistics.

        Args:
            measurements: What `measure` returned, for the whole batch.

        Returns:
            The weighted sum, (batch,), and the details that `measure` did not know yet.
        """
        columns: list[NDArray[np.float64]] = []
        details: dict[str, Sequence[Any]] = {}
        for index, (name, reward) in enumerate(self.rewards.items()):
            column = [one[index] for one in measurements]
            if isinstance(reward, TwoStageReward):
                scores, own = combine_measurements(reward, column, {}, (), "keep")
                details[name] = scores.tolist()
                details.update(_details_of(name, own))
            else:
                scores = np.array(column, np.float64)
            columns.append(scores)
        finite = np.isfinite(columns).all(axis=0)
        total = np.where(finite, 0.0, np.nan)
        for term, scores in zip(self.terms, columns, strict=True):
            scaled = scores[finite] if term.raw else self._standardised(term.name, scores[finite])
            total[finite] += term.weight * scaled
        return total, details

    def differentiable_score(self, samples: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return the sums with a gradient, (batch,), by the statistics as they are: these scores do not enter them."""
        total = samples.new_zeros(len(samples))
        for term in self.terms:
            scores = score_with_gradient(check_differentiable(self.rewards[term.name]), samples, prompts)
            if not term.raw:
                statistics = self.statistics[term.name]
                scores = (scores - statistics.mean) / statistics.std if statistics.std > 0 else 0 * scores
            total = total + term.weight * scores
        return total

    def _standardised(self, name: str, scores: NDArray[np.float64]) -> NDArray[np.float64]:
        joined = self.statistics[name].joined(scores)
        if not self._is_frozen:
            self.statistics[name] = joined
        statistics = self.statistics[name] if self.statistics[name].count else joined
        return statistics.standardise(scores)

    def log_to(self, folder: Path) -> None:
        """Give every term that writes files a folder of its own inside this folder."""
        for name, reward in self.rewards.items():
            if isinstance(reward, LogsAnswers):
                reward.log_to(folder / name.replace(":", "-"))

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Keep the statistics unchanged inside this context, and the states of terms that are `Freezable`."""
        before, self._is_frozen = self._is_frozen, True
        try:
            with ExitStack() as stack:
                for reward in self.rewards.values():
                    if isinstance(reward, Freezable):
                        stack.enter_context(reward.frozen())
                yield
        finally:
            self._is_frozen = before

    def load(self) -> None:
        """Load the models of all terms now."""
        for reward in self.rewards.values():
            if isinstance(reward, Loadable):
                reward.load()

    def unload(self) -> None:
        """Release the models of all terms."""
        for reward in self.rewards.values():
            if isinstance(reward, Unloadable):
                reward.unload()

    def state_dict(self) -> dict[str, Any]:
        """Return the statistics and the states of stateful terms, as plain values for JSON."""
        return {
            "statistics": {name: asdict(one) for name, one in self.statistics.items()},
            "rewards": {
                name: cast(StatefulReward, reward).state_dict()
                for name, reward in self.rewards.items()
                if is_stateful(reward)
            },
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state that `state_dict` of a composite with the same terms returned.

        Raises:
            ValueError: The state belongs to other terms, or its numbers are no statistics.
        """
        stateful = {name: reward for name, reward in self.rewards.items() if is_stateful(reward)}
        for key, expected in (("statistics", self.statistics), ("rewards", stateful)):
            if set(state[key]) != set(expected):
                names = (", ".join(each) or "no term" for each in (expected, state[key]))
                raise ValueError("state must have {} of {}; got {}".format(key, *names))
        self.statistics = {name: RunningStatistics(**state["statistics"][name]) for name in self.statistics}
        for name, reward in stateful.items():
            cast(StatefulReward, reward).load_state_dict(state["rewards"][name])


def _details_of(name: str, details: Details) -> dict[str, Sequence[Any]]:
    return {f"{name}/{key}": values for key, values in details.items() if key != "non_finite"}
