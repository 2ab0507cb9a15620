"""The pretraining task of a denoiser: noise is added to clean latents, and the denoiser predicts a target.

The likelihood-based baselines train on it (Black et al. 2023, section 4.2; DDPM, arXiv 2006.11239, eq. 14), and so do
the algorithms of the forward process. A noisy latent is `signal · clean + sigma · noise`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from ddpo_env.sampler.sampler_rows import rebuild_scheduler
from ddpo_env.tensors import copied_to


@dataclass(frozen=True, eq=False)
class NoisedSamples:
    """Clean latents with noise, and what a denoiser is asked about them.

    Attributes:
        clean: `(batch, ...)` float32.
        latents: `signal · clean + sigma · noise`, `(batch, ...)` float32.
        target: what the denoiser is trained to output, `(batch, ...)` float32.
        timestep: `(batch,)`, as the denoiser takes it.
        signal: `(batch, 1, ...)` float32.
        sigma: `(batch, 1, ...)` float32.
        prediction_type: of the denoiser: `epsilon`, `sample`, `v_prediction` or `flow_prediction`.
        conditioning: by name, each tensor `(batch, ...)`.
    """

    clean: Tensor
    latents: Tensor
    target: Tensor
    timestep: Tensor
    signal: Tensor
    sigma: Tensor
    prediction_type: str
    conditioning: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def noise_fraction(self) -> Tensor:
        """`sigma / (signal + sigma)`, `(batch,)`: the time of a flow, and the same for other noise schedules."""
        return (self.sigma / (self.signal + self.sigma)).flatten()

    def predict_clean(self, output: Tensor) -> Tensor:
        """Return the clean latents that an output of the denoiser stands for, `(batch, ...)`: affine in the output."""
        if self.prediction_type == "sample":
            return output
        if self.prediction_type == "epsilon":
            return (self.latents - self.sigma * output) / self.signal
        signal = 1.0 if self.prediction_type == "flow_prediction" else self.signal
        return signal * self.latents - self.sigma * output

    def denoising_loss(self, output: Tensor) -> Tensor:
        """Return the mean squared error of an output, `(batch,)`."""
        return (output - self.target).square().flatten(1).mean(1)


def draw_timesteps(
    scheduler: Any, batch: int, device: torch.device | str, generator: torch.Generator | None = None
) -> Tensor:
    """Return random timesteps of the scheduler's training range, `(batch,)`, from torch's generator or a given one.

    They are uniform, as in the pretraining of diffusion models: int64, or for a flow float32, whose time is uniform in
    (0, 1]. Published flow models were pretrained with another distribution of the time, logit-normal or shifted.
    """
    steps = scheduler.config.num_train_timesteps
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        return steps * (1 - torch.rand(batch, device=device, generator=generator))
    return torch.randint(0, steps, (batch,), device=device, generator=generator)


def add_noise(
    scheduler: Any,
    latents: Tensor,
    noise: Tensor,
    timestep: Tensor,
    conditioning: Mapping[str, Tensor] | None = None,
) -> NoisedSamples:
    """Add noise to clean latents.

    Args:
        scheduler: the model's diffusers scheduler; only its `config` is read.
        latents: clean latents, `(batch, ...)`.
        noise: standard normal noise of the same shape.
        timestep: `(batch,)`, on the training scale.
        conditioning: kept beside the noisy latents.

    Returns:
        The noisy latents and the target: noise, velocity or clean latents, as `prediction_type` says; for flow matching
        `noise - latents`.
    """
    latents, noise = latents.float(), noise.float()
    config = scheduler.config
    trailing = (-1, *[1] * (latents.ndim - 1))
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        kind = "flow_prediction"
        sigma = (timestep / config.num_train_timesteps).float().view(trailing)
        signal = 1 - sigma
    else:
        kind = config.prediction_type
        process = rebuild_scheduler(DDPMScheduler, config)  # it knows every noise schedule
        alpha = copied_to(process.alphas_cumprod, latents.device)[timestep.long()].view(trailing)
        signal, sigma = alpha.sqrt(), (1 - alpha).sqrt()
    targets = {"epsilon": noise, "sample": latents, "flow_prediction": noise - latents}
    target = targets[kind] if kind in targets else signal * noise - sigma * latents
    noisy = signal * latents + sigma * noise
    return NoisedSamples(latents, noisy, target, timestep, signal, sigma, kind, conditioning or {})
