"""The kinds of samples: images, videos and sounds. A reward may say which of them it takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, Protocol, TypeAlias, TypeVar, get_args, runtime_checkable

import numpy as np
from numpy.typing import NDArray

SampleKind: TypeAlias = Literal["image", "video", "audio", "other"]
KINDS: dict[SampleKind, str] = {
    "image": "images, uint8 (batch, height, width, 3)",
    "video": "videos, uint8 (batch, frames, height, width, 3)",
    "audio": "sounds, floating-point (batch, channels, samples)",
    "other": "samples of another kind",
}
"""What a sample of each kind is, for messages."""

_Marked = TypeVar("_Marked", bound=Callable[..., Any])


@runtime_checkable
class MarkedReward(Protocol):
    """A reward that says which kinds of samples it takes."""

    @property
    def sample_kinds(self) -> tuple[SampleKind, ...]:
        """The kinds."""
        ...


def takes(*kinds: SampleKind) -> Callable[[_Marked], _Marked]:
    """Mark a reward function or class with the kinds of samples that it takes; others are then refused by its name."""

    def mark(reward: _Marked) -> _Marked:
        reward.sample_kinds = kinds  # type: ignore[attr-defined]
        return reward

    return mark


def images_only(reward: _Marked) -> _Marked:
    """Mark a reward function or class as one that takes only images."""
    return takes("image")(reward)


def kinds_of(reward: object) -> tuple[SampleKind, ...]:
    """Return the kinds of samples that a reward takes: all of them, if it is not marked."""
    return tuple(reward.sample_kinds) if isinstance(reward, MarkedReward) else get_args(SampleKind)


def described(kinds: tuple[SampleKind, ...]) -> str:
    """Return the kinds in words."""
    return " or ".join(KINDS[kind] for kind in kinds) or "nothing, because its terms take different kinds"


def kind_of(samples: NDArray[Any]) -> SampleKind:
    """Return what samples `(batch, ...)` are, from their dtype and their axes."""
    if samples.dtype == np.uint8 and samples.ndim in (4, 5) and samples.shape[-1] == 3:
        return "image" if samples.ndim == 4 else "video"
    return "audio" if samples.ndim == 3 and np.issubdtype(samples.dtype, np.floating) else "other"


def are_images(samples: object) -> bool:
    """Whether samples are images: a uint8 array (batch, height, width, 3)."""
    return isinstance(samples, np.ndarray) and kind_of(samples) == "image"
