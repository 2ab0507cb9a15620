"""What a reward is, and the functions that call a reward and check its answer.

A reward is called with a batch of decoded images (or of other arrays), their prompts and the prompts' metadata.
`evaluate_reward` returns checked scores, so that a wrong shape, a text or a NaN is an error that names the reward. When
several processes share a reward, `measure_reward` and `combine_measurements` do the same in two steps.
"""

from __future__ import annotations

import copy
import math
import os
import reprlib
import sys
from collections.abc import Iterator, Mapping, Sequence, Sized
from contextlib import AbstractContextManager, contextmanager, suppress
from numbers import Real
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias, runtime_checkable

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rewards.kinds import described, kind_of, kinds_of

Images: TypeAlias = NDArray[np.uint8]
"""RGB images, (batch, height, width, 3), with values from 0 to 255."""

Samples: TypeAlias = NDArray[Any]
"""What a reward is given: images, or another array whose first axis is the batch, such as points (batch, 2)."""

Metadata: TypeAlias = Sequence[Mapping[str, Any]]
"""One dictionary per sample with what the prompt set knows about the prompt; it is often empty."""

Details: TypeAlias = Mapping[str, Sequence[Any]]
"""Further values to log: by name, one value per sample."""

NonFinite: TypeAlias = Literal["raise", "keep"]
"""What happens to a score that is NaN or infinite: it is an error, or it is returned with a flag."""

LARGEST_SCORE = float(np.finfo(np.float32).max)
"""Training computes with float32, in which a larger score is infinite."""


@runtime_checkable
class Reward(Protocol):
    """Scores a batch of samples; a higher score is better. A plain function is a reward."""

    def __call__(
        self, images: Samples, prompts: Sequence[str], metadata: Metadata
    ) -> ArrayLike | tuple[ArrayLike, Details]:
        """Return one finite number per sample, (batch,), with or without details."""
        ...


@runtime_checkable
class StatefulReward(Protocol):
    """A reward whose scores depend on earlier batches. A checkpoint must contain its state.

    Several processes can share it only if it is also a `TwoStageReward`.
    """

    def state_dict(self) -> dict[str, Any]:
        """Return the state: numbers, text, NumPy arrays and tensors, in lists and dictionaries."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state that `state_dict` returned."""
        ...


@runtime_checkable
class TwoStageReward(Protocol):
    """A reward that several processes can share although the score of a sample depends on other samples.

    Each process measures its own samples. Then every process combines the measurements of the whole batch, so that all
    processes have the same scores and the same state. A single process calls the reward itself, which must return what
    `combine` returns for the batch's measurements.
    """

    def measure(
        self, images: Samples, prompts: Sequence[str], metadata: Metadata
    ) -> Sequence[Any] | tuple[Sequence[Any], Details]:
        """Measure each sample independently of the others. This must not change the state.

        Returns:
            A list or an array with one measurement per sample, of any type that can be pickled, with or without
            details.
        """
        ...

    def combine(self, measurements: Sequence[Any]) -> ArrayLike | tuple[ArrayLike, Details]:
        """Score a whole batch from its measurements. Only this method may change the state.

        Returns:
            What calling the reward returns: one number per sample, (batch,), with or without details.
        """
        ...


@runtime_checkable
class Loadable(Protocol):
    """A reward that can load its model before the first batch, so that errors appear early."""

    def load(self) -> None:
        """Load the model now."""
        ...


@runtime_checkable
class ChecksPrompts(Protocol):
    """A reward that can score only some prompts, and can refuse the others before anything is loaded."""

    def check_prompts(self, prompts: Sequence[str], metadata: Metadata) -> None:
        """Raise a `ValueError` if the reward cannot score one of the prompts. Nothing may be loaded for this."""
        ...


@runtime_checkable
class Unloadable(Protocol):
    """A reward that can release its model."""

    def unload(self) -> None:
        """Release the model; the next call loads it again."""
        ...


@runtime_checkable
class LogsAnswers(Protocol):
    """A reward that can write files for people to read, such as a judge's answers."""

    def log_to(self, folder: Path) -> None:
        """Write to this folder from now on, unless the reward already has a folder."""
        ...


@runtime_checkable
class Freezable(Protocol):
    """A reward whose state can be kept unchanged for a while, such as during an evaluation."""

    def frozen(self) -> AbstractContextManager[None]:
        """Return a context in which calls do not change the state."""
        ...


@runtime_checkable
class AsksPeople(Protocol):
    """A reward whose calls may wait for a person, so it must be possible to end them."""

    def cancel(self) -> None:
        """Let a call that waits raise an exception, now and from now on. It may come from any thread."""
        ...


def reward_name(reward: object) -> str:
    """Return the name of a reward for messages and logs."""
    return str(getattr(reward, "__name__", type(reward).__name__))


def evaluate_reward(
    reward: Reward,
    samples: Samples,
    prompts: Sequence[str],
    metadata: Metadata,
    *,
    non_finite: NonFinite = "raise",
) -> tuple[NDArray[np.float64], dict[str, list[Any]]]:
    """Score a batch of samples and check the answer.

    Args:
        reward: May return scores as an array, a list or a tensor on any device, of floats, integers or booleans.
        samples: Images, (batch, height, width, 3) uint8, or another array that the reward takes, (batch, ...).
        prompts: One per sample.
        metadata: One dictionary per sample.
        non_finite: `raise` makes a NaN or infinite score an error. `keep` returns it and adds the detail `non_finite`,
            which is true for each such sample, so that the caller can drop these samples.

    Returns:
        Scores, (batch,) float64, all finite unless they are kept; and the details by name, lists of `batch` values.

    Raises:
        Exception: The reward raised it; a note with the reward's name is added.
        TypeError: The reward returned something other than numbers.
        ValueError: The samples are not an array, or not images although the reward takes only images; or the answer has
            the wrong length or is not finite.
    """
    if non_finite not in ("raise", "keep"):
        raise ValueError(f"non_finite must be raise or keep; got {non_finite!r}")
    _check_batch(reward, samples, prompts, metadata)
    batch = _own_copy(samples, prompts, metadata)
    with _calling(reward, f"asked about {len(samples)} samples"):
        answer = reward(*batch)
    scores, details = _check_answer(answer, reward_name(reward), len(samples))
    return scores, raise_or_flag_non_finite(scores, details, reward_name(reward), prompts, non_finite)


def measure_reward(
    reward: TwoStageReward, samples: Samples, prompts: Sequence[str], metadata: Metadata
) -> tuple[list[Any], dict[str, list[Any]]]:
    """Measure the samples of one process, given as for `evaluate_reward`. The state of the reward does not change.

    Returns:
        One measurement per sample for `combine_measurements`, and the details by name, lists of `batch` values.

    Raises:
        Exception: As `evaluate_reward`.
        ValueError: The samples are not what the reward takes, or there is not one measurement per sample.
    """
    _check_batch(reward, samples, prompts, metadata)
    name, batch, own = reward_name(reward), len(samples), _own_copy(samples, prompts, metadata)
    with _calling(reward, f"measuring {batch} samples"):
        measurements, details = split_answer(reward.measure(*own))
    if (count := _length(measurements)) != batch:
        raise ValueError(f"reward {name}: measure must return {batch} measurements, one per sample; got {count}")
    return list(_as_numpy(measurements)), _check_details(details, name, batch)


def combine_measurements(
    reward: TwoStageReward,
    measurements: Sequence[Any],
    details: Details,
    prompts: Sequence[str],
    non_finite: NonFinite,
) -> tuple[NDArray[np.float64], dict[str, list[Any]]]:
    """Score a whole batch from its measurements. Every process calls this with the same batch.

    Args:
        reward: The reward that measured the samples.
        measurements: What `measure_reward` returned, for the whole batch in its order.
        details: The details that `measure_reward` returned, for the whole batch.
        prompts: One per sample.
        non_finite: As for `evaluate_reward`.

    Returns:
        What `evaluate_reward` returns for the whole batch.

    Raises:
        Exception: As `evaluate_reward`, for the answer of `combine`.
    """
    name = reward_name(reward)
    with _calling(reward, f"combining {len(measurements)} measurements"):
        answer = reward.combine(list(measurements))
    scores, added = _check_answer(answer, name, len(measurements))
    known = {key: list(values) for key, values in details.items()}
    return scores, raise_or_flag_non_finite(scores, known | added, name, prompts, non_finite)


def raise_or_flag_non_finite(
    scores: NDArray[np.float64],
    details: dict[str, list[Any]],
    name: str,
    prompts: Sequence[str],
    non_finite: NonFinite,
) -> dict[str, list[Any]]:
    """Return the details; with `keep`, the detail `non_finite` is among them.

    Raises:
        ValueError: With `raise`, a score is NaN or infinite. The message names the reward, the prompt and each detail
            of this sample that is not finite either.
    """
    invalid = ~(np.abs(scores) <= LARGEST_SCORE)
    if non_finite == "keep":
        return {**details, "non_finite": invalid.tolist()}
    if invalid.any():
        first = int(np.flatnonzero(invalid)[0])
        values = {key: column[first] for key, column in details.items() if isinstance(column[first], float)}
        causes = [f"; {key} is {value}" for key, value in values.items() if not math.isfinite(value)]
        limit = f" in float32, at most {LARGEST_SCORE:.3g}" if math.isfinite(scores[first]) else ""
        raise ValueError(
            f"reward {name} must be finite{limit}; got {scores[first]} for prompt {prompts[first]!r}"
            f" (sample {first} of {len(scores)}, {invalid.sum()} not finite){''.join(causes)};"
            " an environment and training can leave such samples out (non_finite_rewards)"
        )
    return details


def _check_batch(reward: object, samples: Samples, prompts: Sequence[str], metadata: Metadata) -> None:
    if not isinstance(samples, np.ndarray) or not samples.ndim:
        given = "one without axes" if isinstance(samples, np.ndarray) else type(samples).__name__
        raise ValueError(f"samples must be a NumPy array whose first axis is the batch; got {given}")
    if kind_of(samples) not in (kinds := kinds_of(reward)):
        raise ValueError(
            f"reward {reward_name(reward)} scores {described(kinds)}; got {samples.dtype} of shape {samples.shape}"
        )
    if not len(prompts) == len(metadata) == len(samples):
        raise ValueError(
            f"there must be one prompt and one metadata dictionary for each of {len(samples)} samples;"
            f" got {len(prompts)} prompts and {len(metadata)} dictionaries"
        )


@contextmanager
def calling_user_code(note: str) -> Iterator[None]:
    """Add a note to every exception, make `sys.exit` an error, and undo a change of the working directory.

    Raises:
        RuntimeError: The code inside called `sys.exit`.
    """
    try:
        folder = os.getcwd()
    except OSError:
        folder = None  # somebody has deleted it
    try:
        yield
    except SystemExit as error:
        raise RuntimeError(f"sys.exit({error.code!r}) was {note}") from error
    except BaseException as error:
        error.add_note(note)
        raise
    finally:
        if folder is not None:
            with suppress(OSError):
                os.chdir(folder)


def _calling(reward: object, occasion: str) -> AbstractContextManager[None]:
    return calling_user_code(f"raised by the reward {reward_name(reward)}, {occasion}")


def _own_copy(
    samples: Samples, prompts: Sequence[str], metadata: Metadata
) -> tuple[Samples, list[str], list[dict[str, Any]]]:
    """Return a batch that a reward may write into: others still need the samples and the metadata."""
    try:
        return samples.copy(), list(prompts), [copy.deepcopy(dict(one)) for one in metadata]
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(
            "metadata must be dictionaries that copy.deepcopy can copy, as every reward gets its own; "
            f"got {reprlib.repr(list(metadata))} ({error})"
        ) from error


def split_answer(answer: Any) -> tuple[Any, Mapping[str, Any]]:
    """Separate the scores from the details, if there are any: a tuple of two numbers is two scores."""
    if isinstance(answer, tuple) and len(answer) == 2 and isinstance(answer[1], Mapping):
        return answer
    return answer, {}


def _check_answer(answer: Any, name: str, batch: int) -> tuple[NDArray[np.float64], dict[str, list[Any]]]:
    """Return the scores, (batch,) float64, finite or not, and the details of what a reward returned."""
    raw_scores, details = split_answer(answer)
    scores = _as_numbers(raw_scores, name)
    if scores.shape != (batch,):
        raise ValueError(f"reward {name} must return shape ({batch},), one score per sample; got {scores.shape}")
    return scores, _check_details(details, name, batch)


def _check_details(details: Mapping[str, Any], name: str, batch: int) -> dict[str, list[Any]]:
    lists: dict[str, list[Any]] = {}
    for key, given in details.items():
        if not isinstance(key, str) or not key.strip():
            raise ValueError(f"reward {name} must name its details by text that is not empty; got the name {key!r}")
        values = _as_numpy(given)
        if _length(values) != batch:
            raise ValueError(
                f"reward {name} must return {batch} values of the detail {key!r}, one per sample; got {values!r}"
            )
        lists[key] = list(values)
    return lists


def _length(values: object) -> int | None:
    """Return the length of an array or a list, and None for a text or a single value."""
    return len(values) if isinstance(values, Sized) and not isinstance(values, str) else None


def _as_numbers(scores: Any, name: str) -> NDArray[np.float64]:
    if scores is None:
        raise TypeError(f"reward {name} must return scores; got None: is a return statement missing?")
    if isinstance(scores, list | tuple):
        scores = [_as_numpy(score) for score in scores]
    try:
        array = np.ma.filled(np.asanyarray(_as_numpy(scores)), np.nan)
        if array.dtype == object and all(isinstance(one, Real) for one in array.flat):
            array = array.astype(np.float64)
    except (ValueError, TypeError, RuntimeError, OverflowError) as error:
        raise TypeError(f"reward {name} must return one number per sample; got {scores!r}") from error
    if array.dtype.kind not in "fiub":
        raise TypeError(f"reward {name} must return one number per sample; got {scores!r}")
    return array.astype(np.float64)


def _as_numpy(value: Any) -> Any:
    """Copy a torch tensor or an array to NumPy, as its owner may write into it; return everything else as it is."""
    torch = sys.modules.get("torch")  # not imported, as this takes longer than everything else here
    if torch is not None and isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        value = (value.double() if value.is_floating_point() else value).numpy()
    return value.copy() if isinstance(value, np.ndarray) else value


def is_torch_module(value: object) -> bool:
    """Whether a value is a `torch.nn.Module`, without importing torch."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.nn.Module)
