"""How far a policy is from the pretrained one, on a few transitions of held-out samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from agents.policy.diffusion_policy import DiffusionPolicy

_FRACTION = 100
"""One in a hundred transitions is compared, at least one. Each costs two rows of the denoiser: 2 % of those that
generate the samples."""


@dataclass(frozen=True)
class PretrainedComparison:
    """A policy next to the pretrained one, transition by transition.

    Attributes:
        kl: KL divergence of the next latent's distribution from the pretrained policy's, in nats, reduced over the
            latent's dimensions like the log-probability (by default their mean): `(transitions,)` float64; NaN where
            the step has no noise, and so no divergence.
        output_norm: Euclidean norm of the denoiser's output, guidance included: `(transitions,)` float64.
        pretrained_norm: the same of the pretrained denoiser.
    """

    kl: npt.NDArray[np.float64]
    output_norm: npt.NDArray[np.float64]
    pretrained_norm: npt.NDArray[np.float64]

    @property
    def norm_ratio(self) -> float | None:
        """Root mean square of the outputs' norms over that of the pretrained ones; `None` if those are 0."""
        squares = float(np.square(self.pretrained_norm).sum())
        return float(np.sqrt(np.square(self.output_norm).sum() / squares)) if squares > 0 else None

    @property
    def mean_kl(self) -> float | None:
        """Mean divergence of the transitions with noise; `None` if there is none."""
        known = self.kl[~np.isnan(self.kl)]
        return float(known.mean()) if len(known) else None

    @classmethod
    def joined(cls, parts: Sequence[PretrainedComparison]) -> PretrainedComparison:
        """Return one comparison of the transitions of several."""
        return cls(
            np.concatenate([part.kl for part in parts]),
            np.concatenate([part.output_norm for part in parts]),
            np.concatenate([part.pretrained_norm for part in parts]),
        )


@torch.no_grad()
def compare_with_pretrained(
    policy: DiffusionPolicy, observations: Sequence[dict[str, Tensor]], batch_size: int
) -> PretrainedComparison:
    """Run the policy's denoiser and the pretrained one on the same observations.

    Both policies have the sampler's variance, so the divergence is in closed form, `‖μ_θ − μ_pretrained‖² / 2σ²`, as in
    the KL penalty (`DiffusionPolicy.evaluate_with_reference`).

    Args:
        policy: with its reference, the model's own denoiser.
        observations: batches of the environment's tensors, on the policy's device.
        batch_size: most rows in one call of a denoiser.
    """
    whole = {name: torch.cat([one[name] for one in observations]) for name in observations[0]}
    parts = []
    for start in range(0, len(whole["latents"]), batch_size):
        rows = {name: tensor[start : start + batch_size] for name, tensor in whole.items()}
        latents, timestep = rows["latents"], rows["timestep"].flatten()
        conditioning = {name: rows[name] for name in policy.model.conditioning_shapes}
        sampler = policy.sampler.to(latents.device)
        index = sampler.step_index_of(timestep)
        output = policy.predict_output(latents, timestep, conditioning)
        pretrained = policy.predict_output(latents, timestep, conditioning, policy.model.denoiser)
        mean, pretrained_mean = (sampler.mean(latents, one, index) for one in (output, pretrained))
        kl = sampler.kl_divergence(mean, pretrained_mean, index, policy.options.log_prob_reduction)
        kl = torch.where(sampler.is_stochastic[index], kl, torch.nan)
        numbers = torch.stack([kl, *(one.flatten(1).norm(dim=1) for one in (output, pretrained))])
        parts.append(PretrainedComparison(*numbers.double().cpu().numpy()))
    return PretrainedComparison.joined(parts)


def chosen_transitions(
    samples: int, steps: int, window: tuple[float, float], stochastic: npt.NDArray[np.bool_] | None = None
) -> list[tuple[int, int]]:
    """Choose a few transitions, evenly over the samples and over the steps in a window: one in a hundred, at least one.

    Args:
        samples: number of samples.
        steps: of each.
        window: first and last step as fractions of the steps: those that a run trains on (`timestep_window`).
        stochastic: which steps have noise, `(steps,)`; the others are left out where some in the window have noise.
            Default: all have.

    Returns:
        Pairs (sample, step), numbers from 0.
    """
    first, last = (round(edge * steps) for edge in window)
    compared = [step for step in range(first, last) if stochastic is None or stochastic[step]] or range(first, last)
    count = max(1, samples * steps // _FRACTION)

    def spread(number: int, total: int) -> int:
        return (2 * number + 1) * total // (2 * count)

    return [(spread(one, samples), compared[spread(one, len(compared))]) for one in range(count)]
