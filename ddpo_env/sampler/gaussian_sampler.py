"""One step of a stochastic sampler, as a Gaussian that can be sampled and scored.

This is the policy's action distribution: it turns the denoiser's output into the next latent. The mean of every
supported sampler is affine in the latent, the model's output and the predicted clean latent. So a sampler is a table
with one row per step, read once from the pipeline's own scheduler (DDPO, arXiv 2305.13301, section 4.3).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from ddpo_env.sampler.scheduler_table import SMALLEST_STD, read_scheduler

Reduction = Literal["mean", "sum"]


class HasScheduler(Protocol):
    """A model with a diffusers scheduler."""

    scheduler: Any


@runtime_checkable
class ChoosesSamplerOptions(Protocol):
    """A model whose flow times are not the scheduler's own."""

    def sampler_options(self, num_inference_steps: int) -> dict[str, Any]:
        """Return keyword arguments for `GaussianSampler.from_scheduler`, such as `sigmas` and `mu`."""
        ...


@dataclass(frozen=True, eq=False)
class GaussianSampler:
    """A stochastic sampler as a table: row `k` is the `k`-th denoising step.

        x0_hat  = sample_to_x0[k] * x_t + output_to_x0[k] * model_output      (clamped if the scheduler clips)
        mean    = sample_to_mean[k] * x_t + output_to_mean[k] * model_output + x0_to_mean[k] * x0_hat
        x_{t-1} = mean + std[k] * noise

    If the scheduler does not clip, `x0_hat` is folded into the other two terms and `x0_to_mean` is 0. All arithmetic is
    float32, for inputs of any dtype. Every method takes `step_index`, a LongTensor (batch,) of rows, so that one batch
    may hold different timesteps; latents are (batch, ...) of any rank.

    Attributes:
        timesteps: (steps,), in denoising order; int64, or float32 for flow matching.
        sample_to_x0: (steps,) float32.
        output_to_x0: (steps,) float32.
        sample_to_mean: (steps,) float32.
        output_to_mean: (steps,) float32.
        x0_to_mean: (steps,) float32.
        std: (steps,) float32, at least `SMALLEST_STD`, so that every step has a density.
        clip_sample_range: Bound on the absolute value of `x0_hat`; `None` if the scheduler does not clip.
    """

    timesteps: Tensor
    sample_to_x0: Tensor
    output_to_x0: Tensor
    sample_to_mean: Tensor
    output_to_mean: Tensor
    x0_to_mean: Tensor
    std: Tensor
    clip_sample_range: float | None = None

    def __post_init__(self) -> None:
        columns = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        for name, column in columns.items():
            if column.shape != self.timesteps.shape or column.ndim != 1:
                expected = tuple(self.timesteps.shape)
                raise ValueError(f"{name} must have one value per step, {expected}; got {tuple(column.shape)}")
            if not torch.isfinite(column).all():
                raise ValueError(f"{name} must be finite at every step; got {column.tolist()}")
        if self.clip_sample_range is None and self.x0_to_mean.any():
            raise ValueError(f"x0_to_mean must be 0 if the scheduler does not clip; got {self.x0_to_mean.tolist()}")
        if self.std.min() < SMALLEST_STD:
            raise ValueError(f"std must be at least {SMALLEST_STD} at every step; got {self.std.tolist()}")

    @classmethod
    def from_scheduler(
        cls,
        scheduler: Any,
        num_inference_steps: int,
        eta: float = 1.0,
        *,
        noise_level: float | None = None,
        min_std: float | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
    ) -> GaussianSampler:
        """Read the table from a diffusers scheduler; the scheduler itself does not change.

        `DDPMScheduler` gives its own ancestral step (DDPM, arXiv 2006.11239, eq. 6-7) and
        `FlowMatchEulerDiscreteScheduler` the SDE of Flow-GRPO (arXiv 2505.05470). Every other scheduler of a discrete
        variance-preserving diffusion (PNDM, Euler, DPM-Solver, ...) gives the DDIM step (arXiv 2010.02502, eq. 12, 16)
        on its noise schedule, as DDPO did for Stable Diffusion 1.4.

        A deterministic step has no density. Such a step is an error unless `min_std` is given: the lower bound on the
        standard deviation, for sampling and scoring alike. For `DDPMScheduler` the last step is deterministic, except
        with `fixed_large` variance and a timestep above 0; for `DDIMScheduler` a step whose next latent has no noise.

        Args:
            scheduler: A diffusers scheduler; only its `config` is read.
            num_inference_steps: Number of rows of the table, at least 1.
            eta: Noise of the DDIM step: 1 is as noisy as DDPM; 0 would be deterministic and is an error.
            noise_level: Noise of the flow-matching SDE, default 0.7; an error for other schedulers.
            min_std: Lower bound on the standard deviation, at least `SMALLEST_STD`; the means stay as they are.
            sigmas: Flow times for `FlowMatchEulerDiscreteScheduler.set_timesteps`; default: the scheduler's own.
            mu: Shift of the flow times, if the scheduler uses dynamic shifting.

        Raises:
            ValueError: An argument or the scheduler's configuration does not describe such a sampler.
            TypeError: `num_inference_steps` is not an integer.
        """
        rows, clip_sample_range = read_scheduler(
            scheduler,
            num_inference_steps,
            eta,
            noise_level=noise_level,
            min_std=min_std,
            sigmas=sigmas,
            mu=mu,
        )
        columns = {field: column.float() for field, column in rows._asdict().items() if field != "timesteps"}
        return cls(timesteps=rows.timesteps, **columns, clip_sample_range=clip_sample_range)

    @classmethod
    def from_model(
        cls,
        model: HasScheduler,
        num_inference_steps: int,
        eta: float = 1.0,
        *,
        noise_level: float | None = None,
        min_std: float | None = None,
    ) -> GaussianSampler:
        """Read the table from a model's scheduler, with the model's own `sampler_options` if it has them.

        Environment and policy both build the table in this way, so they agree on the timesteps. Arguments and errors
        are those of `from_scheduler`.
        """
        options = model.sampler_options(num_inference_steps) if isinstance(model, ChoosesSamplerOptions) else {}
        return cls.from_scheduler(
            model.scheduler, num_inference_steps, eta, noise_level=noise_level, min_std=min_std, **options
        )

    def __len__(self) -> int:
        return len(self.timesteps)

    def to(self, device: torch.device | str) -> GaussianSampler:
        """Return the same table on `device`."""
        moved: dict[str, Any] = {
            name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return dataclasses.replace(self, **moved)

    def step_index_of(self, timestep: Tensor) -> Tensor:
        """Map values of `timesteps`, (batch,), to rows, (batch,) int64, without waiting for an accelerator.

        A value that is not in the table is a `ValueError` on a CPU. On other devices it becomes the index `len(self)`,
        so the next look-up fails.
        """
        matches = timestep[:, None] == self.timesteps
        found = matches.any(dim=1)
        if timestep.device.type == "cpu" and not found.all():
            unknown = timestep[~found].tolist()
            raise ValueError(f"timestep must be one of {self.timesteps.tolist()}; got {unknown}")
        return torch.where(found, matches.to(torch.uint8).argmax(dim=1), len(self))

    def predict_x0(self, latents: Tensor, model_output: Tensor, step_index: Tensor) -> Tensor:
        """Return the predicted clean latents, (batch, ...) float32, clamped if the scheduler clips."""
        latents, model_output = latents.float(), model_output.float()
        x0 = _row(self.sample_to_x0, step_index, latents) * latents
        x0 = x0 + _row(self.output_to_x0, step_index, latents) * model_output
        return x0 if self.clip_sample_range is None else x0.clamp(-self.clip_sample_range, self.clip_sample_range)

    def mean(self, latents: Tensor, model_output: Tensor, step_index: Tensor) -> Tensor:
        """Return the mean of the next latents, (batch, ...) float32."""
        latents, model_output = latents.float(), model_output.float()
        mean = _row(self.sample_to_mean, step_index, latents) * latents
        mean = mean + _row(self.output_to_mean, step_index, latents) * model_output
        if self.clip_sample_range is None:
            return mean
        x0 = self.predict_x0(latents, model_output, step_index)
        return mean + _row(self.x0_to_mean, step_index, latents) * x0

    def sample(self, latents: Tensor, model_output: Tensor, step_index: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Return the next latents for standard normal `noise`, and their mean: both (batch, ...) float32.

        To store the next latents in less than float32, round them first and score the rounded ones.
        """
        mean = self.mean(latents, model_output, step_index)
        return mean + _row(self.std, step_index, mean) * noise.float(), mean

    def log_prob(self, next_latents: Tensor, mean: Tensor, step_index: Tensor, reduction: Reduction = "mean") -> Tensor:
        """Return the log-probability of `next_latents`, (batch,) float32.

        Args:
            next_latents: (batch, ...), exactly as stored.
            mean: (batch, ...), from `mean` or `sample`.
            step_index: (batch,).
            reduction: `"mean"` over the elements of a latent, as in DDPO, keeps the importance ratio in the range of
                floats; `"sum"` is the joint log-probability.
        """
        std = self.std[step_index]
        z = (next_latents.float() - mean.float()) / _row(self.std, step_index, mean)
        average = -0.5 * z.square().reshape(len(z), -1).mean(dim=1) - std.log() - 0.5 * math.log(2 * math.pi)
        return average * _scale(reduction, mean)

    def kl_divergence(
        self, mean: Tensor, reference_mean: Tensor, step_index: Tensor, reduction: Reduction = "mean"
    ) -> Tensor:
        """Return KL(policy, reference), (batch,) float32: both have the same `std`, so it is a squared distance.

        Args:
            mean: (batch, ...), the policy's.
            reference_mean: (batch, ...), the reference's.
            step_index: (batch,).
            reduction: Over the elements of a latent, as in `log_prob`.
        """
        z = (mean.float() - reference_mean.float()) / _row(self.std, step_index, mean)
        return 0.5 * z.square().reshape(len(z), -1).mean(dim=1) * _scale(reduction, mean)


def _row(column: Tensor, step_index: Tensor, like: Tensor) -> Tensor:
    """Return the entries of a column at `step_index`, with trailing axes so that they broadcast over `like`."""
    return column[step_index].reshape(-1, *[1] * (like.ndim - 1))


def _scale(reduction: Reduction, latents: Tensor) -> float:
    """Return the factor that turns the mean over a latent's elements into `reduction`."""
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction must be mean or sum; got {reduction!r}")
    return 1.0 if reduction == "mean" else float(math.prod(latents.shape[1:]))
