"""Several rewards as one: a weighted sum, each part brought to a common scale by its own running statistics.

On the command line it is spelled `--reward "aesthetic:1,clip_score:0.5"`. Rewards of different units (a rating, a
cosine, a file size) cannot be added as they are; a part to be taken as it is says so: `jpeg_compressibility:0.1:raw`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rewards.protocol import (
    Details,
    Images,
    Metadata,
    Reward,
    StatefulReward,
    TwoStageReward,
    evaluate_reward,
    is_images_only,
)
from rewards.shared import MEASUREMENT, SharedReward, combine

_RAW = "raw"


@dataclass(frozen=True)
class Part:
    """One summand.

    Attributes:
        name: What `load_reward` takes.
        weight: Its factor, of any sign.
        raw: Taken as it is, and not standardised.
    """

    name: str
    weight: float
    raw: bool = False


@dataclass
class RunningStatistics:
    """Mean and variance of everything seen so far (Welford; batches joined as in Chan et al. 1983).

    Attributes:
        count: How many values.
        mean: Their mean.
        squares: Sum of the squared deviations from it.
    """

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0

    @property
    def std(self) -> float:
        """Standard deviation with divisor `count`; 0 before the first value."""
        return math.sqrt(self.squares / self.count) if self.count else 0.0

    def joined(self, values: NDArray[np.float64]) -> RunningStatistics:
        """Return the statistics with these values, (batch,), added."""
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
        """Return (value - mean) / std; zeros where there has been no variation."""
        return (values - self.mean) / self.std if self.std > 0 else np.zeros_like(values)


def parse_parts(spec: str) -> tuple[Part, ...]:
    """Read `name:weight,name:weight:raw,...`; a name may be `module:function`.

    Raises:
        ValueError: A part has no name or no number, or a name occurs twice; the message quotes the part.
    """
    parts = tuple(_parse_part(text.strip(), spec) for text in spec.split(","))
    names = [part.name for part in parts]
    twice = [name for name in dict.fromkeys(names) if names.count(name) > 1]
    if twice:
        raise ValueError(f"reward {spec!r} must name each part once; {', '.join(twice)} occurs more often")
    return parts


def _parse_part(text: str, spec: str) -> Part:
    name, raw = (text[: -len(_RAW) - 1], True) if text.endswith(f":{_RAW}") else (text, False)
    name, _, number = name.rpartition(":")
    try:
        weight = float(number)
    except ValueError:
        weight = math.nan
    if not name.strip() or not math.isfinite(weight):
        raise ValueError(
            f"each part of reward {spec!r} must be name:weight or name:weight:raw with a finite number, such as "
            f"aesthetic:1,clip_score:0.5; got {text!r}"
        )
    return Part(name.strip(), weight, raw)


def _of_part(part: Part, details: Details) -> dict[str, Sequence[Any]]:
    return {f"{part.name}/{key}": values for key, values in details.items() if key != "non_finite"}


class Composite:
    """Weighted sum of rewards; each part's own score, and its details, are among the details."""

    __name__ = "composite"

    def __init__(self, parts: str | Sequence[Part], options: Mapping[str, Mapping[str, Any]] | None = None) -> None:
        """Load every part.

        Args:
            parts: `name:weight,...` as in `parse_parts`, or `Part`s.
            options: Arguments of each part's class, by name.

        Raises:
            ValueError: The spelling is wrong, there is no such reward, or options for a part that is not there.
        """
        from rewards.registry import load_reward

        options = options or {}
        self.parts = parse_parts(parts) if isinstance(parts, str) else tuple(parts)
        if unknown := set(options) - {part.name for part in self.parts}:
            raise ValueError(f"options must be of {', '.join(p.name for p in self.parts)}; got {', '.join(unknown)}")
        self.rewards: dict[str, Reward] = {
            part.name: load_reward(part.name, **options.get(part.name, {})) for part in self.parts
        }
        self.statistics = {part.name: RunningStatistics() for part in self.parts if not part.raw}
        self._is_frozen = False

    @property
    def images_only(self) -> bool:
        """Whether any part is of pictures alone."""
        return any(is_images_only(reward) for reward in self.rewards.values())

    def __call__(
        self, images: Images, prompts: Sequence[str], metadata: Metadata
    ) -> tuple[NDArray[np.float64], Details]:
        """Score a batch.

        Statistics take in the batch before they standardise it. A part's score that is not finite makes the sum of that
        picture so, which is then an error that names the part; where such pictures are kept, to be dropped, they stay
        out of every part's statistics.

        Returns:
            The weighted sum, (batch,), and as details each part's score as it is, by the part's name, and its details
            as `part/detail`.
        """
        measurements, details = self.measure(images, prompts, metadata)
        total, added = self.combine(measurements)
        return total, {**details, **added}

    def measure(
        self, images: Images, prompts: Sequence[str], metadata: Metadata
    ) -> tuple[list[tuple[Any, ...]], Details]:
        """Score a batch by each part.

        Returns:
            One tuple a picture: each part's score as it is, or its measurement, if it is of two stages itself. And as
            details these scores by the part's name, and the parts' details as `part/detail`.
        """
        columns: list[Sequence[Any]] = []
        details: dict[str, Sequence[Any]] = {}
        for part in self.parts:
            reward = self.rewards[part.name]
            if isinstance(reward, TwoStageReward):
                _, own = evaluate_reward(SharedReward(reward), images, prompts, metadata, non_finite="keep")
                columns.append([one.value for one in own.pop(MEASUREMENT)])
            else:
                scores, own = evaluate_reward(reward, images, prompts, metadata, non_finite="keep")
                columns.append(scores.tolist())
                details[part.name] = columns[-1]
            details.update(_of_part(part, own))
        return list(zip(*columns, strict=True)), details

    def combine(self, measurements: Sequence[tuple[Any, ...]]) -> tuple[NDArray[np.float64], Details]:
        """Form a batch's sums, and let its scores into the statistics.

        Args:
            measurements: what `measure` returned, of all pictures of the batch.

        Returns:
            The weighted sum, (batch,), and as details the scores and the details that `measure` did not know yet.
        """
        columns: list[NDArray[np.float64]] = []
        details: dict[str, Sequence[Any]] = {}
        for index, part in enumerate(self.parts):
            reward, scores = self.rewards[part.name], [one[index] for one in measurements]
            if isinstance(reward, TwoStageReward):
                combined, own = combine(reward, scores)
                details[part.name] = scores = combined.tolist()
                details.update(_of_part(part, own))
            columns.append(np.array(scores, np.float64))
        finite = np.isfinite(columns).all(axis=0)
        total = np.where(finite, 0.0, np.nan)
        for part, column in zip(self.parts, columns, strict=True):
            total[finite] += part.weight * (
                column[finite] if part.raw else self._standardised(part.name, column[finite])
            )
        return total, details

    def _standardised(self, name: str, scores: NDArray[np.float64]) -> NDArray[np.float64]:
        joined = self.statistics[name].joined(scores)
        if not self._is_frozen:
            self.statistics[name] = joined
        statistics = self.statistics[name] if self.statistics[name].count else joined
        return statistics.standardise(scores)

    def log_to(self, folder: Path) -> None:
        """Let every part that keeps a log keep it in a folder of its own, unless it has one already."""
        for name, reward in self.rewards.items():
            getattr(reward, "log_to", lambda _: None)(folder / name.replace(":", "-"))

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Leave the statistics as they are inside this context, as for an evaluation between two iterations.

        So do the parts that have a method `frozen`.
        """
        before, self._is_frozen = self._is_frozen, True
        try:
            with ExitStack() as parts:
                for reward in self.rewards.values():
                    parts.enter_context(getattr(reward, "frozen", nullcontext)())
                yield
        finally:
            self._is_frozen = before

    def load(self) -> None:
        """Load the models of all parts now."""
        for reward in self.rewards.values():
            getattr(reward, "load", lambda: None)()

    def unload(self) -> None:
        """Let the models of all parts go."""
        for reward in self.rewards.values():
            getattr(reward, "unload", lambda: None)()

    def state_dict(self) -> dict[str, Any]:
        """Return the statistics, and the state of parts that have one, as plain values for JSON."""
        return {
            "statistics": {
                name: {"count": one.count, "mean": one.mean, "squares": one.squares}
                for name, one in self.statistics.items()
            },
            "rewards": {
                name: reward.state_dict() for name, reward in self.rewards.items() if isinstance(reward, StatefulReward)
            },
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` of a composite with the same parts returned.

        Raises:
            ValueError: It is of other parts.
        """
        if set(state["statistics"]) != set(self.statistics):
            raise ValueError(
                f"state must have statistics of {', '.join(self.statistics)}; got {', '.join(state['statistics'])}"
            )
        self.statistics = {name: RunningStatistics(**state["statistics"][name]) for name in self.statistics}
        for name, own in state["rewards"].items():
            reward = self.rewards[name]
            if isinstance(reward, StatefulReward):
                reward.load_state_dict(own)
