"""One step of a stochastic sampler, as a Gaussian that can be sampled and scored.

This is the policy's action distribution: it turns the denoiser's output into the next latent. The mean of every
supported sampler is affine in the latent, the model's output and the predicted clean latent. So a sampler is a table
with one row per step, read once from the pipeline's own scheduler (DDPO, arXiv 2305.13301, section 4.3).
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from ddpo_env.sampler.sampler_rows import Noise
from ddpo_env.sampler.scheduler_table import read_scheduler
from ddpo_env.tensors import copied_to
from ddpo_env.validation.choices import SMALLEST_STD, Reduction, SamplerName


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

    A step whose `std` is 0 is deterministic: it goes to its mean and has no density. Nothing can be learned from its
    log-probability, so `log_prob` and `kl_divergence` are 0 there, without a gradient, whatever the latents are.

    Attributes:
        timesteps: (steps,), in denoising order; int64, or float32 for flow matching.
        sample_to_x0: (steps,) float32.
        output_to_x0: (steps,) float32.
        sample_to_mean: (steps,) float32.
        output_to_mean: (steps,) float32.
        x0_to_mean: (steps,) float32.
        std: (steps,) float32: 0 for a deterministic step, else at least `SMALLEST_STD`, so that it has a density.
        flow_step: (steps,) float32: by how much the flow time `sigma / (signal + sigma)` falls, Δ of flow matching. Of
            a diffusion's DDIM step with eta 0 it is the step of Euler's method, in latents divided by `signal + sigma`.
        clip_sample_range: Bound on the absolute value of `x0_hat`; `None` if the scheduler does not clip.
    """

    timesteps: Tensor
    sample_to_x0: Tensor
    output_to_x0: Tensor
    sample_to_mean: Tensor
    output_to_mean: Tensor
    x0_to_mean: Tensor
    std: Tensor
    flow_step: Tensor
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
        if ((self.std != 0) & (self.std < SMALLEST_STD)).any():
            raise ValueError(f"std must be 0 or at least {SMALLEST_STD} at every step; got {self.std.tolist()}")

    @classmethod
    def from_scheduler(
        cls,
        scheduler: Any,
        num_inference_steps: int,
        eta: Noise = 1.0,
        *,
        sampler: SamplerName | None = None,
        noise_level: Noise | None = None,
        min_std: float | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
    ) -> GaussianSampler:
        """Read the table from a diffusers scheduler; the scheduler itself does not change.

        | `sampler` | of | a step |
        | --- | --- | --- |
        | `ddpm` | `DDPMScheduler` | its own ancestral step (DDPM, arXiv 2006.11239, eq. 6-7) |
        | `flow-sde` | `FlowMatchEulerDiscreteScheduler` | the SDE of Flow-GRPO (arXiv 2505.05470) |
        | `dance` | the same | the SDE of DanceGRPO (arXiv 2505.07818) |
        | `cps` | the same | coefficients-preserving sampling (arXiv 2509.05952) |
        | `ddim` | any other scheduler of a discrete diffusion | DDIM on its schedule (arXiv 2010.02502, eq. 12) |
        | `ode` | all of them | no noise: DDIM with eta 0, or Euler's step of the flow |

        Some steps are deterministic whatever the noise: the last one of `DDPMScheduler` (except with `fixed_large`
        variance and a timestep above 0) and of `cps`, and a DDIM step whose next latent has no noise. `min_std` gives
        them noise.

        Args:
            scheduler: A diffusers scheduler; only its `config` is read.
            num_inference_steps: Number of rows of the table, at least 1.
            eta: Noise of the DDIM step: 1 is as noisy as DDPM, 0 is deterministic; one value, or one for each step.
            sampler: How noise is added. Default: the first of the table that fits the scheduler.
            noise_level: Noise of a flow's step, one value, or one for each step: 0 is deterministic. Default: the
                sampler's own, `flow_steps.NOISE_LEVELS`.
            min_std: Lower bound on the standard deviation of the steps that are to have noise, at least
                `SMALLEST_STD`; the means stay as they are.
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
            sampler=sampler,
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
        eta: Noise = 1.0,
        *,
        sampler: SamplerName | None = None,
        noise_level: Noise | None = None,
        min_std: float | None = None,
    ) -> GaussianSampler:
        """Read the table from a model's scheduler, with the model's own `sampler_options` if it has them.

        Environment and policy both build the table in this way, so they agree on the timesteps. Arguments and errors
        are those of `from_scheduler`.
        """
        options = model.sampler_options(num_inference_steps) if isinstance(model, ChoosesSamplerOptions) else {}
        return cls.from_scheduler(
            model.scheduler,
            num_inference_steps,
            eta,
            sampler=sampler,
            noise_level=noise_level,
            min_std=min_std,
            **options,
        )

    def __len__(self) -> int:
        return len(self.timesteps)

    @property
    def is_stochastic(self) -> Tensor:
        """Which steps have noise, (steps,) bool."""
        return self.std > 0

    def windowed(self, start: int, stop: int, outside: GaussianSampler) -> GaussianSampler:
        """Return this table's rows from `start` to before `stop`, and those of another one elsewhere.

        Args:
            start: First row of the window.
            stop: One past its last row.
            outside: A table of the same steps, such as the one without noise.
        """
        if not torch.equal(self.timesteps, outside.timesteps) or self.clip_sample_range != outside.clip_sample_range:
            raise ValueError("outside must be a table of the same timesteps, with the same clip_sample_range")
        rows = torch.arange(len(self), device=self.std.device)
        inside = (start <= rows) & (rows < stop)
        chosen: dict[str, Any] = {
            name: torch.where(inside, value, getattr(outside, name))
            for name, value in vars(self).items()
            if isinstance(value, Tensor)
        }
        return dataclasses.replace(self, **chosen)

    def to(self, device: torch.device | str) -> GaussianSampler:
        """Return the same table on `device`."""
        moved = copy.copy(self)  # without checking or waiting, because a window of noise moves a table every rollout
        is_host = torch.device(device).type == "cpu"  # whose numbers must have arrived
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                object.__setattr__(moved, name, value.to(device) if is_host else copied_to(value, device))
        return moved

    def step_index_of(self, timestep: Tensor) -> Tensor:
        """Map values of `timesteps`, (batch,), to rows, (batch,) int64, without waiting for an accelerator.

        A value that is not in the table is a `ValueError` on a CPU. On other devices it becomes the index `len(self)`,
        so the next look-up fails.
        """
        matches = timestep[:, None] == self.timesteps
        found = matches.any(dim=1)
        if timestep.device.type == "cpu" and not found.all():
            unknown = timestep[~found].tolist()
            raise ValueError(
                f"timestep must be one of {self.timesteps.tolist()}; got {unknown} (does a wrapper, such as "
                "VecNormalize, change the observation?)"
            )
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
        """Return the log-probability of `next_latents`, (batch,) float32; 0 where the step is deterministic.

        Args:
            next_latents: (batch, ...), exactly as stored.
            mean: (batch, ...), from `mean` or `sample`.
            step_index: (batch,).
            reduction: `"mean"` over the elements of a latent, as in DDPO, keeps the importance ratio in the range of
                floats; `"sum"` is the joint log-probability.
        """
        std = self._divisor[step_index]
        z = (next_latents.float() - mean.float()) / _row(self._divisor, step_index, mean)
        average = -0.5 * z.square().reshape(len(z), -1).mean(dim=1) - std.log() - 0.5 * math.log(2 * math.pi)
        return self._scored(average * _scale(reduction, mean), step_index)

    def kl_divergence(
        self, mean: Tensor, reference_mean: Tensor, step_index: Tensor, reduction: Reduction = "mean"
    ) -> Tensor:
        """Return KL(policy, reference), (batch,) float32: both have the same `std`, so it is a squared distance.

        It is 0 where the step is deterministic: two deterministic steps have no divergence that is finite.

        Args:
            mean: (batch, ...), the policy's.
            reference_mean: (batch, ...), the reference's.
            step_index: (batch,).
            reduction: Over the elements of a latent, as in `log_prob`.
        """
        z = (mean.float() - reference_mean.float()) / _row(self._divisor, step_index, mean)
        divergence = 0.5 * z.square().reshape(len(z), -1).mean(dim=1) * _scale(reduction, mean)
        return self._scored(divergence, step_index)

    @property
    def _divisor(self) -> Tensor:
        """`std`, and 1 for a deterministic step, so that neither a value nor a gradient is NaN there; (steps,)."""
        return torch.where(self.is_stochastic, self.std, 1.0)

    def _scored(self, values: Tensor, step_index: Tensor) -> Tensor:
        """Return values (batch,), and 0 where the step is deterministic."""
        return torch.where(self.is_stochastic[step_index], values, 0.0)


def _row(column: Tensor, step_index: Tensor, like: Tensor) -> Tensor:
    """Return the entries of a column at `step_index`, with trailing axes so that they broadcast over `like`."""
    return column[step_index].reshape(-1, *[1] * (like.ndim - 1))


def _scale(reduction: Reduction, latents: Tensor) -> float:
    """Return the factor that turns the mean over a latent's elements into `reduction`."""
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction must be mean or sum; got {reduction!r}")
    return 1.0 if reduction == "mean" else float(math.prod(latents.shape[1:]))
