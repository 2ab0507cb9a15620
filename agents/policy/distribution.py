"""The policy's action distribution as Stable-Baselines3 knows distributions: one Gaussian step of the sampler."""

from __future__ import annotations

from typing import Any

import torch
from stable_baselines3.common.distributions import Distribution
from torch import Tensor, nn

from agents.distributed import Share, noise_like
from ddpo_env.sampler.gaussian_sampler import GaussianSampler, Reduction


class DenoisingDistribution(Distribution):
    """`π(x_{t-1} | x_t, c) = N(mean, std_t² I)`, with the log-density averaged over the latent's dimensions by default.

    The average is DDPO's convention (it keeps importance ratios in the range of floats, and sets the scale of
    `clip_range`); `reduction="sum"` is the joint density.

    Attributes:
        distribution: the same Gaussian as a torch distribution, one a dimension, for code that wants closed forms.
    """

    def __init__(
        self,
        sampler: GaussianSampler,
        mean: Tensor,
        step_index: Tensor,
        reduction: Reduction = "mean",
        share: Share | None = None,
    ) -> None:
        """Take the sampler's table, the means `(batch, *latent_shape)` and the rows `(batch,)` of the table.

        With `share` they are a share of a batch, for which noise is drawn as a whole.
        """
        super().__init__()
        self.share = share
        self.sampler = sampler
        self.mean = mean
        self.step_index = step_index
        self.reduction = reduction
        self.std = sampler.std[step_index].view(-1, *[1] * (mean.ndim - 1)).expand_as(mean)
        self.distribution: torch.distributions.Normal = torch.distributions.Normal(mean, self.std, validate_args=False)

    def log_prob(self, actions: Tensor) -> Tensor:
        """Return the log-density of `actions` `(batch, ...)`, reduced over the latent: `(batch,)` float32."""
        return self.sampler.log_prob(actions.reshape(self.mean.shape), self.mean, self.step_index, self.reduction)

    def entropy(self) -> Tensor:
        """Return the differential entropy, reduced as the log-density: `(batch,)`. It depends on the timestep only."""
        entropy = self.distribution.entropy().flatten(1)
        return entropy.mean(1) if self.reduction == "mean" else entropy.sum(1)

    def sample(self) -> Tensor:
        """Return next latents `(batch, *latent_shape)`."""
        return self.mean + self.std * noise_like(self.mean, self.share)

    def mode(self) -> Tensor:
        """Return the mean of the next latents."""
        return self.mean

    def proba_distribution_net(self, *args: Any, **kwargs: Any) -> nn.Module:
        """Refuse: the network is the denoiser, which `DiffusionPolicy` owns."""
        raise TypeError("DenoisingDistribution has no network of its own; DiffusionPolicy.get_distribution makes it")

    def proba_distribution(self, mean: Tensor, step_index: Tensor) -> DenoisingDistribution:
        """Return the distribution with other parameters."""
        return DenoisingDistribution(self.sampler, mean, step_index, self.reduction, self.share)

    def actions_from_params(self, mean: Tensor, step_index: Tensor, deterministic: bool = False) -> Tensor:
        """Return next latents for other parameters."""
        return self.proba_distribution(mean, step_index).get_actions(deterministic)

    def log_prob_from_params(self, mean: Tensor, step_index: Tensor) -> tuple[Tensor, Tensor]:
        """Return next latents for other parameters, and their log-density."""
        other = self.proba_distribution(mean, step_index)
        actions = other.sample()
        return actions, other.log_prob(actions)
