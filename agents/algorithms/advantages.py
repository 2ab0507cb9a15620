"""Advantage estimators: how good each action was. Every algorithm of this package takes any of them.

Seventh stop of the data's path. An estimator reads a finished rollout and returns one advantage per step. DDPO's own is
`PerPromptAdvantage`: the reward of the final image, standardised among samples of the same prompt, for every step of
the trajectory (Black et al. 2023, section 4.3 and appendix C).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from agents.algorithms.options import check_whole_episodes
from agents.policy.abilities import PolicyAbilities
from agents.rollout.buffer import TensorRolloutBuffer
from ddpo_env.validation.options import POSITIVE, Range, check_value

_ROUNDING = float(np.finfo(np.float32).eps)
"""Rewards are float32, so differences below this fraction of a reward are rounding."""

Scale = Literal["group", "batch", "none"]
"""Whose standard deviation divides the advantages of a group."""


class AdvantageEstimator(Protocol):
    """What an algorithm calls an estimator with."""

    def __call__(self, rollout: TensorRolloutBuffer) -> Tensor:
        """Return advantages `(buffer_size, n_envs)` float32 on the rollout's device."""
        ...


@dataclass
class PerPromptAdvantage:
    """Episode returns standardised by the running statistics of their own prompt.

    Each prompt keeps its last `buffer_size` returns, including the current rollout's. Until it has `min_count` of them,
    mean and standard deviation of the whole rollout are used.

    Args:
        buffer_size: returns kept per prompt; DDPO uses 16 or 32.
        min_count: returns that a prompt's own statistics need, at least 2.
        clip: advantages are clipped to plus/minus this; 5 in DDPO's PyTorch code, 10 in the original.

    Raises:
        ValueError: for an argument out of range; when called on a rollout that cuts episodes, or whose episodes have no
            prompt, or one that is neither text nor a number.
    """

    buffer_size: int = 32
    min_count: int = 8
    clip: float = 5.0
    history: dict[Hashable, deque[float]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        check_value("buffer_size", self.buffer_size, Annotated[int, Range(at_least=2, at_most=10**6)])
        check_value("min_count", self.min_count, int)
        if not 2 <= self.min_count <= self.buffer_size:
            raise ValueError(f"min_count must be between 2 and buffer_size={self.buffer_size}; got {self.min_count}")
        _check_clip(self.clip)

    def __call__(self, rollout: TensorRolloutBuffer) -> Tensor:
        """Return the advantages, and add this rollout to the prompts' statistics."""
        returns = _episode_returns(rollout)
        if None in rollout.contexts:
            raise ValueError(
                "PerPromptAdvantage needs every episode's prompt, and the environment's reset infos have none: "
                "name their key with context_key=..., or use BatchAdvantage"
            )
        for prompt, value in zip(rollout.contexts, returns, strict=True):
            if not isinstance(prompt, str | int | float | np.number):
                raise ValueError(
                    "context_key must name text or numbers in the reset infos with PerPromptAdvantage, which saves "
                    f"the returns of each; got {prompt!r}"
                )
            self.history.setdefault(prompt, deque(maxlen=self.buffer_size)).append(float(value))
        advantages = np.empty_like(returns)
        for row, prompt in enumerate(rollout.contexts):
            known = self.history[prompt]
            sample = np.asarray(known) if len(known) >= self.min_count else returns
            advantages[row] = standardized(returns[row], sample)
        return rollout.per_step(advantages.clip(-self.clip, self.clip))

    def state_dict(self) -> dict[str, list[Any]]:
        """Return the prompts and their kept returns, for a checkpoint."""
        prompts = [prompt.item() if isinstance(prompt, np.generic) else prompt for prompt in self.history]
        return {"prompts": prompts, "returns": [list(values) for values in self.history.values()]}

    def load_state_dict(self, state: dict[str, list[Any]]) -> None:
        """Restore what `state_dict` returned."""
        kept = zip(state["prompts"], state["returns"], strict=True)
        self.history = {prompt: deque(values, maxlen=self.buffer_size) for prompt, values in kept}


@dataclass
class BatchAdvantage:
    """Episode returns standardised over the rollout, for tasks without prompts.

    Args:
        clip: advantages are clipped to plus/minus this.
    """

    clip: float = 5.0

    def __post_init__(self) -> None:
        _check_clip(self.clip)

    def __call__(self, rollout: TensorRolloutBuffer) -> Tensor:
        """Return the advantages."""
        returns = _episode_returns(rollout)
        return rollout.per_step(standardized(returns, returns).clip(-self.clip, self.clip))


@dataclass
class GroupRelativeAdvantage:
    """Episode returns minus the mean of the rollout's episodes of the same prompt, divided by a standard deviation.

        A = (r − mean of the prompt's r) / std

    The environment's `samples_per_prompt` makes several episodes per prompt. With `scale="group"`, a group whose
    returns hardly differ has as much weight as any other (GRPO, Shao et al. 2024, section 4.1). With `"batch"` and
    `"none"`, groups whose returns differ more have more weight.

    Args:
        scale: the standard deviation: `"group"`, that of the prompt's returns; `"batch"`, that of all returns of the
            rollout (`global_std` in the code of Flow-GRPO); `"none"`, none, and advantages have the reward's unit
            (Dr. GRPO, Liu et al. 2025, arXiv 2503.20783).
        clip: advantages are clipped to plus/minus this, also those in the reward's unit. Default: 5, and infinite with
            `scale="none"`.

    Raises:
        ValueError: when called on a rollout that cuts episodes, whose episodes have no prompt, or with a single episode
            of some prompt.
    """

    scale: Scale = "group"
    clip: float | None = None

    def __post_init__(self) -> None:
        check_value("scale", self.scale, Scale)
        if self.clip is not None:
            _check_clip(self.clip)

    def __call__(self, rollout: TensorRolloutBuffer) -> Tensor:
        """Return the advantages."""
        returns = _episode_returns(rollout)
        advantages = np.empty_like(returns)
        for members in prompt_groups(rollout, "GroupRelativeAdvantage"):
            group = returns[members]
            divisor = 1.0 if self.scale == "none" else spread(group if self.scale == "group" else returns)
            advantages[members] = (group - group.mean()) / divisor
        default = np.inf if self.scale == "none" else 5.0
        limit = default if self.clip is None else self.clip
        return rollout.per_step(advantages.clip(-limit, limit))


@dataclass
class DecoupledAdvantage:
    """Several rewards, each standardised among the episodes of the same prompt, and their weighted sum (GDPO).

        A_k = (r_k − mean of the prompt's r_k) / std of the prompt's r_k
        A   = (Σ_k w_k A_k − mean) / std,                               mean and std over the rollout

    A sum of rewards that is standardised as one number hides the terms with a small spread. Here each has the influence
    of its weight in every group (Liu et al. 2026, arXiv 2601.05242). The return itself is not used: the terms come from
    the details that the reward reports, `TensorRolloutBuffer.details`.

    Args:
        weights: of the rewards, by the names of their details. A weighted sum of rewards has a detail for each term.
        clip: advantages are clipped to plus/minus this.

    Raises:
        ValueError: for weights that are no numbers; and when called as `GroupRelativeAdvantage`, or on a rollout
            without one of the details.
    """

    weights: Mapping[str, float]
    clip: float = 5.0

    def __post_init__(self) -> None:
        if not isinstance(self.weights, Mapping) or not self.weights:
            raise ValueError(f"weights must be one number for each reward, by its name; got {self.weights!r}")
        for name, weight in self.weights.items():
            check_value(f"weights[{name!r}]", weight, Annotated[float, Range(at_least=-1e6, at_most=1e6)])
        _check_clip(self.clip)

    def __call__(self, rollout: TensorRolloutBuffer) -> Tensor:
        """Return the advantages."""
        combined = np.zeros_like(_episode_returns(rollout))
        groups = prompt_groups(rollout, "DecoupledAdvantage")
        for name, weight in self.weights.items():
            values = self._values(rollout, name)
            for members in groups:
                combined[members] += weight * standardized(values[members], values[members])
        return rollout.per_step(standardized(combined, combined).clip(-self.clip, self.clip))

    def _values(self, rollout: TensorRolloutBuffer, name: str) -> npt.NDArray[np.float64]:
        values = rollout.details.get(name)
        if values is None or not np.isfinite(values).all():
            state = "is not finite for every sample" if values is not None else "is not reported"
            raise ValueError(
                f"DecoupledAdvantage needs the reward's detail {name!r}, which {state}; numbers that it reports are: "
                f"{', '.join(rollout.details) or 'none'}"
            )
        return values


@dataclass
class LeaveOneOutAdvantage:
    """Episode return minus the mean of the rollout's other episodes of the same prompt (RLOO, Kool et al. 2019).

    The baseline is unbiased, because an episode is not part of its own. Advantages have the reward's unit, and so does
    `clip`.

    Args:
        clip: advantages are clipped to plus/minus this; infinite by default.

    Raises:
        ValueError: as `GroupRelativeAdvantage`.
    """

    clip: float = np.inf

    def __post_init__(self) -> None:
        _check_clip(self.clip)

    def __call__(self, rollout: TensorRolloutBuffer) -> Tensor:
        """Return the advantages."""
        returns = _episode_returns(rollout)
        advantages = np.empty_like(returns)
        for members in prompt_groups(rollout, "LeaveOneOutAdvantage"):
            group = returns[members]
            advantages[members] = (group - group.mean()) * len(group) / max(1, len(group) - 1)
        return rollout.per_step(advantages.clip(-self.clip, self.clip))


@dataclass
class RawReturn:
    """Episode returns without a baseline. They stand in DDPO's equations; the paper's runs standardise them."""

    def __call__(self, rollout: TensorRolloutBuffer) -> Tensor:
        """Return each episode's return for all of its steps."""
        return rollout.per_step(_episode_returns(rollout))


@dataclass
class GeneralizedAdvantage:
    """GAE(λ) with the policy's critic (Schulman et al. 2016, eq. 16), standardised over the rollout.

    Also sets the rollout's `returns`, the critic's targets. `gamma` and `gae_lambda` are the algorithm's.

    Args:
        normalize: whether to standardise.
    """

    normalize: bool = True

    def __post_init__(self) -> None:
        check_value("normalize", self.normalize, bool)

    def __call__(self, rollout: TensorRolloutBuffer) -> Tensor:
        """Return the advantages."""
        ends = np.append(rollout.episode_starts[1:], rollout.last_dones[None], axis=0)
        alive = torch.as_tensor(~ends, dtype=torch.float32, device=rollout.device)
        rewards = torch.as_tensor(rollout.rewards, device=rollout.device)
        next_values = torch.cat([rollout.values[1:], rollout.last_values[None]])
        deltas = rewards + rollout.gamma * next_values * alive - rollout.values
        advantages = torch.empty_like(deltas)
        running = torch.zeros_like(deltas[0])
        for step in reversed(range(rollout.buffer_size)):
            running = deltas[step] + rollout.gamma * rollout.gae_lambda * alive[step] * running
            advantages[step] = running
        rollout.returns = advantages + rollout.values
        if not self.normalize or len(rollout.kept_steps()) == 1:
            return advantages
        values = advantages.cpu().numpy().astype(np.float64)
        kept = values.ravel()[rollout.kept_steps()]
        scaled = standardized(values, kept, ddof=1)  # as Stable-Baselines3 does
        return torch.as_tensor(scaled, dtype=torch.float32, device=rollout.device)


def fitting_estimator(given: AdvantageEstimator | None, policy: PolicyAbilities, n_steps: int) -> AdvantageEstimator:
    """Return the estimator that was given, or the default one, once it fits the policy.

    Without a critic all values are 0. Then generalized advantages depend on how far a step is from the end of its
    episode, and hardly on the sample, so the default is DDPO's own estimator, as on the command line.

    Args:
        given: `None`: the default, `GeneralizedAdvantage` with a critic and `PerPromptAdvantage` without.
        policy: abilities of the policy.
        n_steps: steps of each sub-environment in a rollout.

    Raises:
        ValueError: for generalized advantages without a critic, or an `n_steps` that cuts the episodes of an estimator
            that needs whole ones.
    """
    if given is None:
        given = GeneralizedAdvantage() if policy.has_critic else PerPromptAdvantage()
    if isinstance(given, GeneralizedAdvantage) and not policy.has_critic:
        raise ValueError(
            "advantage must not be GeneralizedAdvantage without a critic: give the policy one, such as with "
            f"policy_kwargs={{'critic': True}}, or take PerPromptAdvantage(); got {given!r}"
        )
    if isinstance(given, _OF_WHOLE_EPISODES):
        check_whole_episodes(n_steps, policy.stochastic_steps(), type(given).__name__)
    return given


COMPARING_SAMPLES = GroupRelativeAdvantage, DecoupledAdvantage, LeaveOneOutAdvantage
"""These need several samples of each prompt in a rollout."""
_OF_WHOLE_EPISODES = (
    PerPromptAdvantage,
    BatchAdvantage,
    GroupRelativeAdvantage,
    DecoupledAdvantage,
    LeaveOneOutAdvantage,
    RawReturn,
)
"""These refuse a rollout that cuts episodes when they rate it; `fitting_estimator` does before one is sampled."""


def _check_clip(clip: float) -> None:
    if clip != np.inf:  # no clipping
        check_value("clip", clip, Annotated[float, POSITIVE])


def standardized(values: npt.ArrayLike, sample: npt.NDArray[np.float64], ddof: int = 0) -> npt.NDArray[np.float64]:
    """Return values minus the mean of a sample, in its standard deviations, whatever the scale of the rewards.

    Nothing is added to the standard deviation, so a reward multiplied by any constant gives the same advantages. Where
    the sample's spread is below the rounding of its largest value in float32, its values count as equal, and the result
    is 0. `ddof` is NumPy's.
    """
    difference = np.asarray(values, np.float64) - sample.mean()
    return np.asarray(difference / spread(sample, ddof))


def spread(sample: npt.NDArray[np.float64], ddof: int = 0) -> float:
    """Return the standard deviation of a sample; infinite where its values count as equal, so that quotients are 0."""
    std = float(sample.std(ddof=ddof))
    return std if std > _ROUNDING * np.abs(sample).max() else np.inf


def prompt_groups(rollout: TensorRolloutBuffer, name: str) -> list[list[int]]:
    """Return the rollout's episodes grouped by prompt, each group as indices into `rollout.contexts`.

    A group has at least two episodes, unless the others were dropped.
    """
    groups: dict[Hashable, list[int]] = {}
    for episode, prompt in enumerate(rollout.contexts):
        groups.setdefault(prompt, []).append(episode)
    if None in groups:
        raise ValueError(f"{name} needs every episode's prompt, and the environment's reset infos have none")
    lonely = {prompt for prompt, members in groups.items() if len(members) < 2}
    alone = [prompt for prompt in groups if prompt in lonely - set(rollout.dropped_contexts)]
    if alone:
        raise ValueError(
            f"{name} needs at least 2 episodes per prompt in a rollout, and {len(alone)} prompts have one, such as "
            f"{alone[0]!r}: set the environment's samples_per_prompt to 2 or more"
        )
    return list(groups.values())


def _episode_returns(rollout: TensorRolloutBuffer) -> npt.NDArray[np.float64]:
    if not rollout.complete_segments().all():
        raise ValueError(
            f"n_steps={rollout.buffer_size} cuts episodes, and this advantage needs whole ones: "
            "n_steps must be a multiple of the episode's length (num_inference_steps)"
        )
    return rollout.segment_returns()
