"""Rewards for points in the plane. They are smooth formulas that cost no time, for tests of algorithms."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from rewards.kinds import takes
from rewards.protocol import Metadata

RING_WIDTH = 0.25
"""Standard deviation of the score along the radius; the radius of the ring is 1."""

MIXTURE_CENTRES = np.array([(1.0, 1.0), (-1.0, 1.0), (-1.0, -1.0), (1.0, -1.0)])
"""Centres of the mixture, (4, 2)."""

MIXTURE_STD = 0.3
"""Standard deviation of each of its Gaussians."""


@takes("other")
def points_ring(samples: NDArray[np.floating], prompts: Sequence[str], metadata: Metadata) -> NDArray[np.float64]:
    """Reward points on the unit circle: exp(-(|x| - 1)² / (2 · 0.25²)), (batch,); 1 on the circle, 0 far from it."""
    radii = np.linalg.norm(_points(samples, "points_ring"), axis=1)
    return np.exp(-((radii - 1) ** 2) / (2 * RING_WIDTH**2))


@takes("other")
def points_mixture(samples: NDArray[np.floating], prompts: Sequence[str], metadata: Metadata) -> NDArray[np.float64]:
    """Reward points near (±1, ±1): log Σ_k exp(-|x - c_k|² / (2 · 0.3²)), (batch,).

    Up to a constant, this is the log-probability density of a mixture of four equal Gaussians: 0 at a centre and -9.7
    at the origin. Far away it falls with the square of the distance, so that it has a useful slope everywhere.
    """
    points = _points(samples, "points_mixture")
    squares = ((points[:, None] - MIXTURE_CENTRES) ** 2).sum(axis=2)
    return np.logaddexp.reduce(-squares / (2 * MIXTURE_STD**2), axis=1)


def _points(samples: NDArray[np.floating], name: str) -> NDArray[np.float64]:
    if samples.ndim != 2 or samples.shape[1] != 2 or not np.issubdtype(samples.dtype, np.floating):
        raise ValueError(
            f"reward {name} scores points, a float array (batch, 2); got {samples.dtype} of shape {samples.shape}"
        )
    return samples.astype(np.float64)
