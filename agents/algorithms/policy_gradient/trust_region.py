"""How PPO and GRPO keep an update near the policy that sampled: what `trust_region` names.

With the importance ratio ρ = p_θ / p_old of a step and D = ‖μ_θ − μ_old‖² / 2 std², how far the mean of the step moved:

    clip     L = −E[ min(ρ A, clip(ρ, 1 − ε, 1 + ε) A) ]                      PPO (Schulman et al. 2017, eq. 7)
    guard    the same with ρ = exp[ (log p_θ/p_old + D) · std ], over Δ       GRPO-Guard (arXiv 2510.22319)
    dppo     L = −E[ ρ A,  and 0 where D > δ and (ρ − 1) A > 0 ]              Flow-DPPO (arXiv 2606.11025)

`log p_θ/p_old + D` is `ε · (μ_θ − μ_old) / std`, with the noise ε that was drawn. The log-ratio alone has the mean −D,
which differs by step, so a clip range that fits one step clips another on one side only. Times `std` the spread is that
of μ_θ − μ_old alone. Δ is the step in flow time, to which the gradient of the mean is proportional, so every timestep
counts alike. For a flow `std` is s√Δ of its SDE, as in the authors' code; a DDIM step has its own `std`, and Δ is
defined by `GaussianSampler.flow_step`.

All are reduced over the latent like the log-probability, by default to the mean.
"""

from __future__ import annotations

import torch
from torch import Tensor

from agents.algorithms.options import TrustRegion
from agents.distributed import Metric
from agents.policy.abilities import PolicyEvaluation, StepMove


def clipped_surrogate(ratio: Tensor, advantages: Tensor, clip_range: float) -> tuple[Tensor, dict[str, Metric]]:
    """Return PPO's objective of ratios, `(batch,)`, and the metrics that all algorithms with such a ratio log."""
    clipped = advantages * torch.clamp(ratio, 1 - clip_range, 1 + clip_range)
    logged: dict[str, Metric] = {
        "clip_fraction": ((ratio.detach() - 1).abs() > clip_range).float().mean(),
        "clip_range": torch.tensor(clip_range),
    }
    return torch.min(advantages * ratio, clipped), logged


def guarded_surrogate(
    log_ratio: Tensor, move: StepMove, advantages: Tensor, clip_range: float
) -> tuple[Tensor, dict[str, Metric]]:
    """Return GRPO-Guard's objective of log-ratios, `(batch,)`, and metrics."""
    ratio = torch.exp((log_ratio + move.divergence) * move.std)
    objective, logged = clipped_surrogate(ratio, advantages, clip_range)
    return objective / move.flow_step, logged


def masked_surrogate(
    log_ratio: Tensor, move: StepMove, advantages: Tensor, limit: float
) -> tuple[Tensor, dict[str, Metric]]:
    """Return Flow-DPPO's objective of log-ratios, `(batch,)`, and metrics; `limit` is δ."""
    leads_away = log_ratio.detach() * advantages > 0
    is_dropped = leads_away & (move.divergence.detach() > limit)
    objective = torch.where(is_dropped, 0.0, advantages * torch.exp(log_ratio))
    return objective, {"dropped_fraction": is_dropped.float().mean()}


def surrogate(
    kind: TrustRegion, policy: PolicyEvaluation, advantages: Tensor, clip_range: float, limit: float
) -> tuple[Tensor, dict[str, Metric]]:
    """Return the objective that is to rise, `(batch,)`, and metrics.

    Args:
        kind: name of the trust region.
        policy: with its `move`, unless the kind is `clip`.
        advantages: `(batch,)`.
        clip_range: ε.
        limit: δ.
    """
    if policy.move is None:
        return clipped_surrogate(torch.exp(policy.log_ratio), advantages, clip_range)
    if kind == "guard":
        objective, logged = guarded_surrogate(policy.log_ratio, policy.move, advantages, clip_range)
    else:
        objective, logged = masked_surrogate(policy.log_ratio, policy.move, advantages, limit)
    return objective, logged | {"sampling_divergence": policy.move.divergence.detach().mean()}
