"""What an evaluation scored, as JSON in the run folder: prompts, rewards of every sample, and details of those shown.

`samples/images/iteration_NNNN.json` is beside the images of the evaluation. The report reads it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from agents.output.files import write_file
from rewards.kinds import KINDS, SampleKind, kind_of

if TYPE_CHECKING:  # it needs torch, which a reader of files does not
    from agents.evaluation.evaluate import Evaluation

SHOWN = 9
"""Samples of an evaluation that people see, at most: the first ones."""
_LONGEST = 2000
"""Characters of a detail that are kept: a judge may answer with any number of them."""


@dataclass(frozen=True)
class EvaluationRecord:
    """What an evaluation scored.

    Attributes:
        iteration: after which it was.
        kind: of the samples.
        prompts: one per sample.
        rewards: `(samples,)` float64; NaN for a reward that was not finite.
        holdout_rewards: `(samples,)` float64; `None`: there is no held-out reward.
        details: of the samples that are shown, the first ones: the reward's details by name, one value per sample.
    """

    iteration: int
    kind: SampleKind
    prompts: Sequence[str]
    rewards: npt.NDArray[np.float64]
    holdout_rewards: npt.NDArray[np.float64] | None
    details: Mapping[str, Sequence[str | float | None]]


def evaluation_name(iteration: int) -> str:
    """Return the name, without an ending, of the files of an evaluation."""
    return f"iteration_{iteration:04d}"


def write_evaluation(path: Path, evaluation: Evaluation, iteration: int, shown: int) -> None:
    """Write the record of an evaluation.

    Args:
        path: of the JSON file.
        evaluation: what was scored.
        iteration: after which.
        shown: number of samples of which the details are kept, the first ones.
    """
    content = {
        "iteration": iteration,
        "kind": kind_of(evaluation.images),
        "prompts": evaluation.prompts,
        "rewards": [_finite(value) for value in evaluation.rewards.tolist()],
        "holdout_rewards": None if evaluation.holdout_rewards is None else evaluation.holdout_rewards.tolist(),
        "details": {name: [_cut(_plain(one)) for one in values[:shown]] for name, values in evaluation.details.items()},
    }
    write_file(path, json.dumps(content, allow_nan=False) + "\n")


def read_evaluation(path: Path) -> EvaluationRecord:
    """Read the record of an evaluation.

    Raises:
        ValueError: if the file holds something else.
        OSError: if it cannot be read.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        prompts, holdout = content["prompts"], content["holdout_rewards"]
        if content["kind"] not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}; got {content['kind']!r}")
        record = EvaluationRecord(
            iteration=int(content["iteration"]),
            kind=content["kind"],
            prompts=[str(prompt) for prompt in prompts],
            rewards=_numbers(content["rewards"], len(prompts)),
            holdout_rewards=None if holdout is None else _numbers(holdout, len(prompts)),
            details={str(name): [_plain(one) for one in values] for name, values in content["details"].items()},
        )
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"{str(path)!r} must be the record of an evaluation; {type(error).__name__}: {error}"
        ) from None
    return record


def _numbers(values: Sequence[float | None], count: int) -> npt.NDArray[np.float64]:
    numbers = np.array([math.nan if value is None else value for value in values], np.float64)
    if numbers.shape != (count,):
        raise ValueError(f"it must have one reward for each of its {count} prompts; got shape {numbers.shape}")
    return numbers


def _plain(value: Any) -> str | float | None:
    """Return a detail as JSON has it: a number or a text; of several answers, one."""
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, bool | int | float):
        return None if value is None else _finite(float(value))
    return " · ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _cut(value: str | float | None) -> str | float | None:
    if not isinstance(value, str) or len(value) <= _LONGEST:
        return value
    return f"{value[:_LONGEST]} [cut: {_LONGEST} of {len(value)} characters]"


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
