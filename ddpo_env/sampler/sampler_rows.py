"""The coefficients of a sampler's steps in float64, before they become a `GaussianSampler`; and their noise by step."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from ddpo_env.validation.choices import SMALLEST_STD

Noise: TypeAlias = float | Sequence[float]
"""How noisy a sampler's steps are: one value for all of them, or one for each in denoising order; 0 is no noise."""


class SamplerRows(NamedTuple):
    """The table in float64, before it is checked."""

    timesteps: Tensor
    sample_to_x0: Tensor
    output_to_x0: Tensor
    sample_to_mean: Tensor
    output_to_mean: Tensor
    x0_to_mean: Tensor
    std: Tensor
    flow_step: Tensor

    def with_x0_folded(self) -> SamplerRows:
        """Return the same sampler with the predicted clean latent written in terms of latent and output."""
        return self._replace(
            sample_to_mean=self.sample_to_mean + self.x0_to_mean * self.sample_to_x0,
            output_to_mean=self.output_to_mean + self.x0_to_mean * self.output_to_x0,
            x0_to_mean=torch.zeros_like(self.x0_to_mean),
        )

    def with_least_std(self, min_std: float | None, noise: Tensor) -> SamplerRows:
        """Return the same sampler whose standard deviations are 0 or at least `SMALLEST_STD`.

        Args:
            min_std: lower bound of the steps that are to have noise; `None`: there is none.
            noise: of each step, `(steps,)`; steps where it is 0 keep none.
        """
        std = self.std
        if min_std is not None:
            std = torch.where(noise > 0, std.clamp(min=min_std), std)
        return self._replace(std=torch.where(std < SMALLEST_STD, 0.0, std))


def noise_by_step(name: str, value: Noise, steps: int) -> Tensor:
    """Return the noise of each step, `(steps,)` float64.

    Args:
        name: of the setting, for the error.
        value: one number for all steps, or one for each.
        steps: number of steps.

    Raises:
        ValueError: for a wrong number of values, or one that is negative or not finite.
    """
    values = [value] * steps if isinstance(value, int | float) else list(value)
    if len(values) != steps:
        raise ValueError(
            f"{name} must be one number, or one for each of the num_inference_steps={steps} steps; got {len(values)} "
            "numbers"
        )
    for one in values:
        if not (math.isfinite(one) and one >= 0):
            raise ValueError(f"{name} must be at least 0 and finite at every step; got {one}")
    return torch.tensor(values, dtype=torch.float64)


def rebuild_scheduler(scheduler_class: Any, config: Any) -> Any:
    """Return a scheduler of the class with all values of the configuration (`from_config` would drop defaults)."""
    parameters = inspect.signature(scheduler_class.__init__).parameters
    return scheduler_class(**{name: config[name] for name in parameters if name in config})
