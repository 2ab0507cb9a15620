"""A small judge that learns from the votes so far, scores images nobody has voted on, and says what to ask next.

It is a Bradley-Terry model whose scores are linear in CLIP embeddings. What it does not know is the covariance of its
weights, and the next pairs are those whose votes tell most.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rewards.votes.bradley_terry import Posterior, posterior

_Floats = NDArray[np.float64]
Pair = tuple[int, int]


class LearnedJudge:
    """Scores CLIP embeddings of images; learns from votes.

    Args:
        spread: Standard deviation, before the first vote, of the score difference of two images of a prompt that are
            as far apart as two such images of the first batch usually are.
        precision: One over the variance of what the score of an image has beyond the judge's.

    Attributes:
        differences: Embedding of the winner minus embedding of the loser of every vote, (votes, dimensions).
    """

    def __init__(self, spread: float, precision: float) -> None:
        """Know nothing; see the class docstring for the arguments."""
        self._spread, self._precision = spread, precision
        self._distance = 0.0
        self.differences: _Floats = np.zeros((0, 0))
        self._posterior: Posterior | None = None

    def learn(self, winners: _Floats, losers: _Floats) -> None:
        """Take more votes: embeddings of what won and what lost, (votes, dimensions)."""
        if len(winners):
            earlier = [self.differences] if len(self.differences) else []
            self.differences = np.concatenate([*earlier, winners - losers])
            self._posterior = None

    def scores(self, embeddings: _Floats) -> _Floats:
        """Return the scores, (batch,), of embeddings, (batch, dimensions); zeros before the first vote."""
        if not len(self.differences):
            return np.zeros(len(embeddings))
        return np.asarray(embeddings @ self._beliefs(embeddings.shape[1]).mode)

    def choose_pairs(self, embeddings: _Floats, candidates: Sequence[Pair], count: int) -> list[Pair]:
        """Choose the pairs whose votes tell most about the scores of the batch.

        The score of an image is what the judge's weights say, and something of its own with variance 1/`precision`. So
        a vote on the images i and j is about d = (embedding_i - embedding_j, e_i - e_j), with e the unit vectors of the
        rows. Where p is the probability of its outcome and Σ the covariance of all of these, a vote removes
        Σd(Σd)ᵀ / (1/p(1-p) + dᵀΣd) from Σ. The next pair is the one with the largest p(1-p) dᵀΣd, and Σ is reduced as
        if it had been voted on (D-optimal design, one pair after another).

        Args:
            embeddings: Of the batch, (batch, dimensions).
            candidates: Pairs of rows.
            count: How many to choose, each at most once.

        Returns:
            `count` pairs, or all of them if there are fewer.
        """
        if not candidates:
            return []
        first, second = np.array(candidates).T
        apart = embeddings[first] - embeddings[second]
        if not self._distance:
            self._distance = float(np.sqrt((apart**2).sum(axis=1).mean())) or 1.0
        batch, dimensions = embeddings.shape
        beliefs, own = self._beliefs(dimensions), np.eye(batch)
        differences = np.concatenate([apart, own[first] - own[second]], axis=1)
        covariance = np.zeros((dimensions + batch,) * 2)
        covariance[:dimensions, :dimensions] = beliefs.covariance
        covariance[dimensions:, dimensions:] = own / self._precision
        wins = 1 / (1 + np.exp(np.clip(-(apart @ beliefs.mode), -500, 500)))
        information = wins * (1 - wins)
        left = np.ones(len(candidates), dtype=bool)
        chosen: list[Pair] = []
        while len(chosen) < min(count, len(candidates)):
            moved = differences @ covariance
            variances = (moved * differences).sum(axis=1)
            best = int(np.argmax(np.where(left, information * variances, -np.inf)))
            left[best] = False
            chosen.append(candidates[best])
            covariance -= np.outer(moved[best], moved[best]) / (1 / information[best] + variances[best])
        return chosen

    def state_dict(self) -> dict[str, Any]:
        """Return the votes and the scale."""
        return {"differences": self.differences.copy(), "distance": self._distance}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned.

        Raises:
            ValueError: These are no votes.
        """
        differences, distance = np.array(state["differences"], dtype=np.float64), float(state["distance"])
        if differences.ndim != 2 or not np.isfinite(differences).all() or not 0 <= distance < np.inf:
            raise ValueError(f"state must have finite differences (votes, dimensions); got {differences.shape}")
        self.differences, self._distance, self._posterior = differences, distance, None

    def _beliefs(self, dimensions: int) -> Posterior:
        """Return what is known about the weights.

        Raises:
            ValueError: The votes were on embeddings of another CLIP model.
        """
        if self._posterior is None:
            differences = self.differences if len(self.differences) else np.zeros((0, dimensions))
            if differences.shape[1] != dimensions:
                raise ValueError(
                    "model must be the CLIP model whose embeddings the judge has learned from, with "
                    f"{differences.shape[1]} dimensions; got {dimensions}"
                )
            self._posterior = posterior(differences, np.zeros(dimensions), (self._distance / self._spread) ** 2)
        return self._posterior
