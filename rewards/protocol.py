"""What a reward is, and the one place where its answer is checked: between the decoded picture and the algorithm.

A reward is a function of a batch of pictures (or of whatever else the model draws), their prompts and the prompts'
metadata. Whatever it returns goes through `evaluate_reward`, so that a wrong shape, a NaN or a text is an error that
names the reward, never a gradient.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Protocol, TypeAlias, TypeVar, runtime_checkable

import numpy as np
from numpy.typing import ArrayLike, NDArray

Images: TypeAlias = NDArray[np.uint8]
"""Pictures, (batch, height, width, 3), 0 to 255, RGB."""

Samples: TypeAlias = NDArray[Any]
"""What a model draws: pictures, or any other array whose first axis is the batch, such as points (batch, 2)."""

Metadata: TypeAlias = Sequence[Mapping[str, Any]]
"""One dictionary a picture: what the prompt set knows about the prompt, often nothing."""

Details: TypeAlias = Mapping[str, Sequence[Any]]
"""Whatever else is worth logging, by name, one value a picture."""

NonFinite: TypeAlias = Literal["raise", "keep"]
"""What becomes of scores that are NaN or infinite: an error, or the caller's business."""

_Marked = TypeVar("_Marked", bound=Callable[..., Any])


@runtime_checkable
class Reward(Protocol):
    """Scores a batch of pictures; higher is better. A plain function is a reward."""

    def __call__(
        self, images: Samples, prompts: Sequence[str], metadata: Metadata
    ) -> ArrayLike | tuple[ArrayLike, Details]:
        """Return one finite number a picture, (batch,), alone or with details."""
        ...


@runtime_checkable
class StatefulReward(Protocol):
    """A reward whose scores depend on what it has scored before; a checkpoint must hold its state.

    Several processes can have it if it is a `TwoStageReward` too.
    """

    def state_dict(self) -> dict[str, Any]:
        """Return that state as plain values for JSON."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        ...


@runtime_checkable
class TwoStageReward(Protocol):
    """A reward that several processes can share although a picture's score depends on other pictures.

    Each process measures its own pictures; then every one of them combines the measurements of the whole batch, so that
    all have the same scores, and a state moves in the same way everywhere. Calling the reward, which one process does,
    must return what `combine` makes of the measurements.
    """

    def measure(
        self, images: Samples, prompts: Sequence[str], metadata: Metadata
    ) -> Sequence[Any] | tuple[Sequence[Any], Details]:
        """Look at each picture by itself; no state changes.

        Returns:
            One measurement a picture, a list or an array of `batch` values of any kind that can be pickled; alone or
            with details.
        """
        ...

    def combine(self, measurements: Sequence[Any]) -> ArrayLike | tuple[ArrayLike, Details]:
        """Score a batch from its pictures' measurements; a state changes here alone.

        Returns:
            What a reward returns: one number a picture, (batch,), alone or with details.
        """
        ...


def per_sample(score: Callable[[NDArray[np.uint8], str, Mapping[str, Any]], Any]) -> Reward:
    """Make a reward from a function that scores a single picture.

        @per_sample
        def brightness(image, prompt, metadata):
            return image.mean() / 255

    Args:
        score: `(image, prompt, metadata)` to a number, or to a number and a dictionary of details; `image` is
            (height, width, 3) uint8. Every picture must have the same details.
    """

    @functools.wraps(score)
    def batched(images: Images, prompts: Sequence[str], metadata: Metadata) -> ArrayLike | tuple[ArrayLike, Details]:
        answers = [split_answer(score(*sample)) for sample in zip(images, prompts, metadata, strict=True)]
        scores = [one for one, _ in answers]
        details = [one for _, one in answers]
        if len({frozenset(one) for one in details}) > 1:
            raise ValueError(
                f"reward {reward_name(score)} must return the same details for every picture; got {details}"
            )
        return scores, {name: [one[name] for one in details] for name in (details[0] if details else ())}

    # Not `score`: its signature takes one picture, and a signature check would follow the link there.
    del batched.__wrapped__
    return batched


def reward_name(reward: object) -> str:
    """Return the name of a reward for messages and logs."""
    return str(getattr(reward, "__name__", type(reward).__name__))


def are_images(samples: object) -> bool:
    """Whether samples are pictures: a uint8 array (batch, height, width, 3)."""
    return (
        isinstance(samples, np.ndarray) and samples.dtype == np.uint8 and samples.ndim == 4 and samples.shape[-1] == 3
    )


def images_only(reward: _Marked) -> _Marked:
    """Mark a reward function, or a class of rewards, as one of pictures: `evaluate_reward` gives it nothing else."""
    reward.images_only = True  # type: ignore[attr-defined]
    return reward


def is_images_only(reward: object) -> bool:
    """Whether a reward is marked by `images_only`."""
    return bool(getattr(reward, "images_only", False))


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
        reward: Returns scores as an array, a list or a tensor on any device, of floats, integers or booleans.
        samples: Pictures, (batch, height, width, 3) uint8, or what else the reward takes, (batch, ...).
        prompts: One a sample.
        metadata: One dictionary a sample.
        non_finite: What becomes of NaN and infinity: `raise`, or `keep` for a caller that leaves those samples out.
            With `keep` there is a detail `non_finite`, true for each of them, whose sum is their number.

    Returns:
        Scores, (batch,) float64, all finite unless kept, and the details, by name, each a list of `batch` values.

    Raises:
        Exception: Whatever the reward raises, with a note that names the reward.
        TypeError: The reward returned something other than numbers.
        ValueError: The samples are no array, or not of the kind that the reward takes, or the answer has the wrong
            length or is not finite.
    """
    name = reward_name(reward)
    if non_finite not in ("raise", "keep"):
        raise ValueError(f"non_finite must be raise or keep; got {non_finite!r}")
    shape, dtype = getattr(samples, "shape", None), getattr(samples, "dtype", type(samples).__name__)
    if not isinstance(samples, np.ndarray) or not samples.ndim:
        raise ValueError(f"samples must be a NumPy array whose first axis is the batch; got {dtype} of shape {shape}")
    if is_images_only(reward) and not are_images(samples):
        raise ValueError(
            f"reward {name} scores pictures, a uint8 array (batch, height, width, 3); got {dtype} of shape {shape}"
        )
    batch = len(samples)
    if len(prompts) != batch or len(metadata) != batch:
        raise ValueError(
            f"there must be one prompt and one metadata dictionary for each of {batch} samples;"
            f" got {len(prompts)} prompts and {len(metadata)} dictionaries"
        )
    try:
        answer = reward(samples, prompts, metadata)
    except Exception as error:
        error.add_note(f"raised by the reward {name}, asked about {batch} samples")
        raise
    scores, details = check_answer(answer, name, batch)
    return scores, treat_non_finite(scores, details, name, prompts, non_finite)


def check_answer(answer: Any, name: str, batch: int) -> tuple[NDArray[np.float64], dict[str, list[Any]]]:
    """Bring what a reward returned to scores, (batch,) float64, finite or not, and details, lists of `batch` values.

    Raises:
        TypeError: The reward returned something other than numbers.
        ValueError: Something has the wrong length.
    """
    raw_scores, raw_details = split_answer(answer)
    scores = _as_numbers(raw_scores, name)
    if scores.shape != (batch,):
        raise ValueError(f"reward {name} must return shape ({batch},), one score a picture; got {scores.shape}")
    return scores, {key: _as_list(values, key, name, batch) for key, values in raw_details.items()}


def treat_non_finite(
    scores: NDArray[np.float64],
    details: dict[str, list[Any]],
    name: str,
    prompts: Sequence[str],
    non_finite: NonFinite,
) -> dict[str, list[Any]]:
    """Return the details, with `non_finite` among them if such scores are kept.

    Raises:
        ValueError: With `raise`, for a score that is NaN or infinite, naming the reward, the prompt and the details
            that are not finite either.
    """
    invalid = ~np.isfinite(scores)
    if non_finite == "keep":
        return {**details, "non_finite": invalid.tolist()}
    if invalid.any():
        first = int(np.flatnonzero(invalid)[0])
        raise ValueError(
            f"reward {name} must be finite; got {scores[first]} for prompt {prompts[first]!r}"
            f" (picture {first} of {len(scores)}, {invalid.sum()} in all){_culprits(details, first)};"
            " the option non_finite_rewards can leave such samples out"
        )
    return details


def _culprits(details: Mapping[str, Sequence[Any]], index: int) -> str:
    """Name the details that are not finite either: the parts of a sum that spoiled it."""
    values = {key: column[index] for key, column in details.items() if isinstance(column[index], float)}
    spoiled = [f"{key} is {value}" for key, value in values.items() if not math.isfinite(value)]
    return f"; {', '.join(spoiled)}" if spoiled else ""


def split_answer(answer: Any) -> tuple[Any, Mapping[str, Any]]:
    """Separate the details, if there are any, from the scores: a pair of plain numbers is two scores."""
    if isinstance(answer, tuple) and len(answer) == 2 and isinstance(answer[1], Mapping):
        return answer
    return answer, {}


def _off_device(value: Any) -> Any:
    """Bring a torch tensor to NumPy; torch itself is not imported for it."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        return (value.double() if value.is_floating_point() else value).numpy()
    return value


def _as_numbers(scores: Any, name: str) -> NDArray[np.float64]:
    if scores is None:
        raise TypeError(f"reward {name} must return scores; got None: is a return statement missing?")
    if isinstance(scores, list | tuple):
        scores = [_off_device(score) for score in scores]
    try:
        array = np.asarray(_off_device(scores))
    except ValueError as error:
        raise TypeError(f"reward {name} must return one number a picture; got {scores!r}") from error
    if array.dtype.kind not in "fiub":
        raise TypeError(f"reward {name} must return one number a picture; got {scores!r}")
    return array.astype(np.float64)


def _as_list(values: Any, key: str, name: str, batch: int) -> list[Any]:
    values = _off_device(values)
    if isinstance(values, str) or not hasattr(values, "__len__") or len(values) != batch:
        raise ValueError(
            f"reward {name} must return {batch} values of the detail {key!r}, one a picture; got {values!r}"
        )
    return list(values)
