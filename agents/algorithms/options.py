"""The settings of the update that all algorithms share; their signatures and the command line read them here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt

from ddpo_env.validation.options import DECAY, POSITIVE, Range, check_fields, check_value

NonFiniteRewards = Literal["raise", "drop"]
TrustRegion = Literal["clip", "guard", "dppo"]
"""What keeps an update near the policy that sampled, for PPO and GRPO."""
_FRACTION = Range(at_least=0, at_most=1)
_COUNT = Range(at_least=1, at_most=10**7)
_WEIGHT = Range(at_least=0, at_most=1e6)
RATE = Range(at_least=0, at_most=1e6)
PERCENTILE = Range(at_least=0, below=100)
"""Valid percentiles for `RWR(weighting="percentile")`."""
BETA = Range(above=0, at_most=100)
"""Valid values of NFT's beta: the distance of its implicit policies from the one that samples."""
LAST_STEPS = Range(at_least=1, at_most=1_000_000)
"""Valid numbers of the last steps that DRaFT differentiates."""
DPO_BETA = Range(above=0, at_most=1e8)
"""Valid values of DPO's beta. They are large because it multiplies a small difference of denoising losses."""
_VALID_ARGUMENTS: dict[str, Any] = {
    "n_steps": Annotated[int, _COUNT],
    "gamma": Annotated[float, _FRACTION],
    "gae_lambda": Annotated[float, _FRACTION],
    "ent_coef": Annotated[float, _WEIGHT],
    "vf_coef": Annotated[float, _WEIGHT],
    "max_grad_norm": Annotated[float, POSITIVE],
    "non_finite_rewards": NonFiniteRewards,
    "context_key": str,
    "stats_window_size": Annotated[int, _COUNT],
    "verbose": Annotated[int, Range(at_least=0, at_most=2)],
    "seed": Annotated[int | None, Range(at_least=0, below=2**32)],
}


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
    noise_window: Annotated[int | None, _COUNT] = None
    """Number of steps that have noise, one after another; the others are deterministic (MixGRPO). ppo, grpo and
    reinforce train on these alone; rwr, nft, awm and dpo on finished samples. They move on inside timestep_window, from
    its start to its end and then from its start again. Default: all."""
    noise_window_iterations: Annotated[int, _COUNT] = 25
    """Iterations after which the steps with noise move on."""
    noise_window_stride: Annotated[int, _COUNT] = 1
    """Number of steps by which they move on; fewer for the last move, so that the end of timestep_window is reached."""
    target_kl: Annotated[float | None, Range(above=0, at_most=1e12)] = None
    """An iteration's updates end when the estimated KL from the sampling policy exceeds 1.5 times this. Where the loss
    has no log-probabilities (rwr, nft, awm, dpo, draft) it is measured between the updates, as train/kl_to_sampling."""
    kl_coef: Annotated[float, Range(at_least=0, at_most=1e6)] = 0.0
    """Weight of the KL divergence from the pretrained policy in the loss, reduced like the log-probability; for
    nft, awm, dpo and draft, of the squared distance of the denoiser's outputs."""
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

    def trained_range(self, steps: int) -> tuple[int, int]:
        """Return the first step inside `timestep_window` and one past its last, of a trajectory of so many steps.

        Raises:
            ValueError: if there is no step inside.
        """
        start, end = (round(edge * steps) for edge in self.timestep_window)
        if start == end:
            raise ValueError(
                f"timestep_window must contain at least one of the {steps} steps; got {self.timestep_window}"
            )
        return start, end

    def noise_window_at(self, iteration: int, steps: int) -> tuple[int, int] | None:
        """Return the first step with noise in an iteration, and one past the last; `None`: every step may have noise.

        Where the window stands follows from the iteration alone (MixGRPO, arXiv 2507.21802, "progressive" with
        "roll_back" in its code), so a resumed run needs no state for it. It is always whole: its last place is the
        last one inside `timestep_window`. A stride that does not divide the room before that place, or is larger, gets
        a shorter last move. MixGRPO's code shrinks the window instead.

        Args:
            iteration: from 0.
            steps: of a trajectory.

        Raises:
            ValueError: if the window does not fit.
        """
        if self.noise_window is None:
            return None
        start, end = self.trained_range(steps)
        room = end - start - self.noise_window
        if room < 0:
            raise ValueError(
                f"noise_window must be at most {end - start}, the number of steps inside "
                f"timestep_window={self.timestep_window} of {steps}; got {self.noise_window}"
            )
        places = -(-room // self.noise_window_stride) + 1
        place = iteration // self.noise_window_iterations % places
        first = start + min(place * self.noise_window_stride, room)
        return first, first + self.noise_window


def check_noise(
    options: UpdateOptions,
    stochastic: npt.NDArray[np.bool_] | None,
    algorithm: str,
    needs_log_probs: bool,
    penalises_steps: bool = True,
) -> None:
    """Refuse a window that does not fit, and options that need noise where there is none.

    Args:
        options: of the update.
        stochastic: which steps of an episode have noise, `(steps,)`; `None`: the policy has no such steps.
        algorithm: its name, for the error.
        needs_log_probs: whether the loss trains on log-probabilities, which steps without noise do not have.
        penalises_steps: whether `kl_coef` is the weight of the divergence of the sampler's steps.

    Raises:
        ValueError: naming the option.
    """
    if stochastic is None:
        if options.noise_window is not None:
            raise ValueError(
                "noise_window must be None with a policy that does not say which of its steps have noise "
                f"(PolicyAbilities.stochastic_steps); got {options.noise_window}"
            )
        return
    steps, places = len(stochastic), 1 if options.noise_window is None else len(stochastic)
    for place in range(places):
        iteration = place * options.noise_window_iterations
        start, end = options.noise_window_at(iteration, steps) or options.trained_range(steps)
        if stochastic[start:end].any():
            continue
        for name, needs_noise in {
            "algorithm": needs_log_probs,
            "kl_coef": options.kl_coef > 0 and penalises_steps,
            "target_kl": options.target_kl is not None,
        }.items():
            if needs_noise:
                value = algorithm if name == "algorithm" else getattr(options, name)
                others = (
                    ", or an algorithm without log-probabilities: nft, awm, dpo or rwr" if name == "algorithm" else ""
                )
                raise ValueError(
                    f"{name} must not be {value} with a sampler without noise in the steps that are trained on, "
                    f"{start} to {end - 1} of {steps}: such steps have no log-probability. Choose a sampler with noise "
                    f"there or another timestep_window{others}"
                )
    if options.noise_window is not None and not stochastic.any():
        raise ValueError(
            "noise_window must be None with a sampler without noise, which leaves nothing to limit; "
            f"got {options.noise_window}"
        )


def check_whole_episodes(n_steps: int, stochastic: npt.NDArray[np.bool_] | None, needing: str) -> None:
    """Refuse a rollout that cuts episodes, before it is sampled.

    Args:
        n_steps: steps of each sub-environment in a rollout.
        stochastic: which steps of an episode have noise, `(steps,)`; `None`: the policy does not know their number.
        needing: name of what needs whole episodes, for the error.

    Raises:
        ValueError: naming the nearest numbers of steps that are valid.
    """
    if stochastic is None or n_steps % len(stochastic) == 0:
        return
    length = len(stochastic)
    below = n_steps - n_steps % length
    nearest = f"{below} and {below + length} are" if below else f"{length} is"
    raise ValueError(
        f"n_steps must be a multiple of {length}, the length of an episode, with {needing}; got {n_steps}: "
        f"{nearest} the nearest"
    )


def with_fixed(given: Mapping[str, Any], algorithm: str, reason: str, **fixed: Any) -> dict[str, Any]:
    """Return an algorithm's arguments and those that it fixes.

    Args:
        given: by name; a fixed one may be among them, with its one value.
        algorithm: its name, for the error.
        reason: for the error.
        **fixed: the arguments that have one value.

    Raises:
        ValueError: for another value of them.
    """
    for name, value in fixed.items():
        if given.get(name, value) != value:
            raise ValueError(f"{name} must be {value!r} with {algorithm}, {reason}; got {given[name]!r}")
    return {**given, **fixed}


def check_arguments(given: Mapping[str, Any]) -> None:
    """Check the arguments that every algorithm has, by name.

    Raises:
        ValueError: naming the argument, its value and what is valid.
    """
    for name, valid in _VALID_ARGUMENTS.items():
        check_value(name, given[name], valid)
    if not callable(given["learning_rate"]):
        check_value("learning_rate", given["learning_rate"], Annotated[float, RATE])
    if given["advantage"] is not None and not callable(given["advantage"]):
        raise ValueError(
            f"advantage must be an estimator such as agents.PerPromptAdvantage(), or None; got {given['advantage']!r}"
        )
    # Imported here because a command line reads the options above without torch.
    from rewards.networks.devices import resolve_device

    resolve_device(given["device"])  # Stable-Baselines3 would take the CPU instead of a device that is not there


def check_timesteps(total_timesteps: float) -> None:
    """Refuse what is no number of timesteps; `1e5` is one, as in Stable-Baselines3.

    Raises:
        ValueError: naming the argument and its value.
    """
    check_value("total_timesteps", total_timesteps, Annotated[float, Range(at_least=0, at_most=1e15)])
    if total_timesteps != int(total_timesteps):
        raise ValueError(f"total_timesteps must be a whole number; got {total_timesteps!r}")
