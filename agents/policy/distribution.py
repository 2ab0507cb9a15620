"""The policy's action distribution in Stable-Baselines3's interface: one Gaussian step of the sampler."""

from __future__ import annotations

from typing import Any

import torch
from stable_baselines3.common.distributions import Distribution
from torch import Tensor, nn

from agents.distributed import Rows
from ddpo_env.sampler.gaussian_sampler import GaussianSampler
from ddpo_env.validation.choices import Reduction


class DenoisingDistribution(Distribution):
    """`π(x_{t-1} | x_t, c) = N(mean, std_t² I)`.

    By default the log-probability is averaged over the latent's dimensions, as in DDPO. The average keeps importance
    ratios in the range of floats and sets the scale of `clip_range`. `reduction="sum"` gives the joint log-probability.

    Attributes:
        distribution: the same Gaussian as a torch distribution, one per dimension, for code that wants closed forms.
            Its scale is 0 where the step is deterministic.
    """

    def __init__(
        self,
        sampler: GaussianSampler,
        mean: Tensor,
        step_index: Tensor,
        reduction: Reduction = "mean",
        rows: Rows | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        """Take the sampler's table, the means `(batch, *latent_shape)` and the rows `(batch,)` of the table.

        With `rows` the means are those rows of a batch, and noise is drawn for the whole batch. `generator` draws it;
        without one torch's global generator does.
        """
        super().__init__()
        self.rows = rows
        self.generator = generator
        self.sampler = sampler
        self.mean = mean
        self.step_index = step_index
        self.reduction = reduction
        self.std = sampler.std[step_index].view(-1, *[1] * (mean.ndim - 1)).expand_as(mean)
        self.distribution: torch.distributions.Normal = torch.distributions.Normal(mean, self.std, validate_args=False)

    def log_prob(self, actions: Tensor) -> Tensor:
        """Return the log-probability of `actions` `(batch, ...)`, reduced over the latent: `(batch,)` float32."""
        return self.sampler.log_prob(actions.reshape(self.mean.shape), self.mean, self.step_index, self.reduction)

    def kl_divergence(self, other_mean: Tensor) -> Tensor:
        """Return the KL divergence from the distribution with another mean, reduced like the log-probability.

        `(batch,)` float32. Both have the sampler's variance, so it is `‖mean − other_mean‖² / 2 std²`.
        """
        return self.sampler.kl_divergence(self.mean, other_mean, self.step_index, self.reduction)

    def entropy(self) -> Tensor:
        """Return the differential entropy, reduced like the log-probability: `(batch,)`.

        It depends on the timestep only. Like the log-probability it is 0 where the step is deterministic.
        """
        entropy = self.distribution.entropy().flatten(1)
        reduced = entropy.mean(1) if self.reduction == "mean" else entropy.sum(1)
        return torch.where(self.sampler.is_stochastic[self.step_index], reduced, 0.0)

    def sample(self) -> Tensor:
        """Return next latents `(batch, *latent_shape)`."""
        return self.mean + self.std * _noise_like(self.mean, self.rows, self.generator)

    def mode(self) -> Tensor:
        """Return the mean of the next latents."""
        return self.mean

    def proba_distribution_net(self, *args: Any, **kwargs: Any) -> nn.Module:
        """Refuse: the network is the denoiser, which `DiffusionPolicy` owns."""
        raise TypeError("DenoisingDistribution has no network of its own; DiffusionPolicy.get_distribution makes it")

    def proba_distribution(self, mean: Tensor, step_index: Tensor) -> DenoisingDistribution:
        """Return the distribution with other parameters."""
        return DenoisingDistribution(self.sampler, mean, step_index, self.reduction, self.rows, self.generator)

    def actions_from_params(self, mean: Tensor, step_index: Tensor, deterministic: bool = False) -> Tensor:
        """Return next latents for other parameters."""
        return self.proba_distribution(mean, step_index).get_actions(deterministic)

    def log_prob_from_params(self, mean: Tensor, step_index: Tensor) -> tuple[Tensor, Tensor]:
        """Return next latents for other parameters, and their log-probability."""
        other = self.proba_distribution(mean, step_index)
        actions = other.sample()
        return actions, other.log_prob(actions)


def _noise_like(mean: Tensor, rows: Rows | None, generator: torch.Generator | None) -> Tensor:
    """Return standard normal noise for a whole batch, or for some rows of one."""
    if rows is None or rows.total == len(mean):
        rows = Rows.of_process(len(mean), 0, 1)
    return rows.draw(
        lambda total: torch.randn(total, *mean.shape[1:], dtype=mean.dtype, device=mean.device, generator=generator)
    )
