"""The settings of the update that all algorithms share; their signatures and the command line read them here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from ddpo_env.validation.options import DECAY, NOT_NEGATIVE, POSITIVE, Range, check_fields

_FRACTION = Range(at_least=0, at_most=1)


@dataclass(frozen=True, kw_only=True)
class UpdateOptions:
    """One iteration's update: which timesteps it trains on, and how far the policy may move.

    The last step of a denoising trajectory has almost no noise. Its gradient is by far the largest and its effect on
    the image the smallest, so `timestep_window=(0.0, 0.9)` can learn much faster than `(0.0, 1.0)`. In half precision a
    log-probability depends on the batch's shape, and the ratio starts at 1 only with `recompute_log_probs`.

    Raises:
        ValueError: for a value that is not valid, naming the option.
    """

    timestep_window: tuple[Annotated[float, _FRACTION], Annotated[float, _FRACTION]] = (0.0, 1.0)
    """Start and end of the steps that are trained on, as fractions of each trajectory."""
    timestep_fraction: Annotated[float, Range(above=0, at_most=1)] = 1.0
    """Fraction of each trajectory's steps that is trained on, chosen at random inside the window."""
    target_kl: Annotated[float | None, POSITIVE] = None
    """An iteration's updates end when the estimated KL from the sampling policy exceeds 1.5 times this."""
    kl_coef: Annotated[float, NOT_NEGATIVE] = 0.0
    """Weight of the KL divergence from the pretrained policy in the loss, reduced like the log-probability."""
    recompute_log_probs: bool | None = None
    """Compute log-probabilities again before the first update. Default: in half precision, for a loss with a ratio."""
    ema_decay: Annotated[float, DECAY] = 0.0
    """Decay of averaged weights, which are then evaluated and saved; 0: none."""

    def __post_init__(self) -> None:
        check_fields(self)
        start, end = self.timestep_window
        if start >= end:
            raise ValueError(
                f"timestep_window must be two fractions, 0 <= start < end <= 1; got {self.timestep_window}"
            )
