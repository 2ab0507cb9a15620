"""People as the reward: they vote on pairs of images of a prompt, and a Bradley-Terry model turns votes into scores.

Of every batch some pairs are asked, chosen by a small judge that learns from all votes so far (`learned_judge`). An
image's score is its Bradley-Terry score in the batch. The judge's score is the prior mean, so it speaks for images with
few votes or none. Held-out samples are scored by the judge alone and cost no votes.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rewards.clip.clip_model import ClipReward
from rewards.protocol import Details, Images, Metadata
from rewards.registry import check_number, check_text
from rewards.votes import bradley_terry
from rewards.votes.ballot import Candidate, Comparison, Side, VoteFile, image_hash
from rewards.votes.learned_judge import LearnedJudge
from rewards.votes.page import VotingPage
from rewards.votes.voters import SimulatedPerson, Voters

_FILE = "votes.jsonl"
_LONGEST_PATIENCE = 1e6
_SPREAD = 1.0
"""Log-odds of a vote, for images of a prompt that are as different as usual: the judge's prior standard deviation."""
_PRECISION = 1.0
"""One over the variance of what an image's score has beyond the judge's."""


class Votes(ClipReward):
    """What people prefer, in log-odds: 1 point more wins 73 % of the votes.

    Attributes:
        judge: What has been learned from the votes so far.
        file: The votes so far.
    """

    __name__ = "votes"
    purpose = "clip"

    def __init__(
        self,
        model: str | Path = "openai/clip-vit-large-patch14",
        *,
        question: str = "Which image is better?",
        votes_per_batch: int = 30,
        patience: float | None = None,
        port: int = 0,
        file: str | Path | None = None,
        simulated_noise: float | None = None,
        **options: Any,
    ) -> None:
        """Check the arguments. Nothing is loaded and nobody is asked yet.

        Args:
            model: Folder or Hub id of the CLIP model whose embeddings the judge learns from, or `"tiny"` for the
                bundled one.
            question: What the page asks.
            votes_per_batch: How many pairs of each batch are asked.
            patience: Seconds that a batch waits for its votes, before the judge scores it with what it has. None: it
                waits for all. The first batch always waits for all, as the judge knows nothing before.
            port: Of the page, on 127.0.0.1; 0 for any free one.
            file: The votes; None: `votes.jsonl` in the folder that `log_to` names. Pairs with a vote in the file are
                not asked again.
            simulated_noise: A simulation: no page opens, and a `SimulatedPerson` with this noise votes. None: people
                vote.
            **options: `device`, `dtype` and `batch_size` as in `ClipReward`.

        Raises:
            ValueError: An argument is not valid, or the file has a line that is not a vote.
        """
        super().__init__(model, **options)
        check_text("question", question)
        check_number("votes_per_batch", votes_per_batch, 1, 1_000_000)
        check_number("port", port, 0, 65535)
        if patience is not None:
            check_number("patience", patience, 0.0, _LONGEST_PATIENCE)
        if simulated_noise is not None:
            check_number("simulated_noise", simulated_noise, 0.0, 1e6)
        if file is not None:
            check_text("file", str(file))
        is_simulated = simulated_noise is not None
        self._voters: Voters = (
            SimulatedPerson(simulated_noise) if simulated_noise is not None else VotingPage(question, port)
        )
        self.file = VoteFile(
            None if file is None else Path(file), question, voter="simulation" if is_simulated else "person"
        )
        self.judge = LearnedJudge(_SPREAD, _PRECISION)
        self._votes_per_batch, self._patience = votes_per_batch, patience
        self._is_frozen = False
        self._lock = threading.Lock()
        self._cast: list[tuple[Comparison, Side]] = []

    def load(self) -> None:
        """Load the CLIP model and open the page; its address is printed."""
        super().load()
        self._voters.open()

    def cancel(self) -> None:
        """Ask nobody any more; a call that waits for votes raises `CancelledError`. It may come from any thread."""
        self._voters.close()

    def log_to(self, folder: Path) -> None:
        """Keep the votes in this folder, unless there is a `file`."""
        self.file.use(folder / _FILE)

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Let the judge score alone inside this context, and ask nobody."""
        before, self._is_frozen = self._is_frozen, True
        try:
            yield
        finally:
            self._is_frozen = before

    def state_dict(self) -> dict[str, Any]:
        """Return what the judge has learned from."""
        return self.judge.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned.

        Raises:
            ValueError: It is no such state.
        """
        self.judge.load_state_dict(state)

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return the judge's scores of embeddings, (batch,); zeros before the first vote. Prompts do not matter."""
        return torch.as_tensor(self.judge.scores(images.double().cpu().numpy()))

    def __call__(
        self, images: Images, prompts: Sequence[str], metadata: Metadata
    ) -> NDArray[np.float32] | tuple[NDArray[np.float64], Details]:
        """Ask about pairs of images of the same prompt, and score all images, (batch,).

        The mean score of each prompt's images is 0, as votes on images of one prompt say nothing about another prompt.
        The detail `votes` is the number of votes on each image.

        Raises:
            ValueError: No prompt occurs with two different images.
            CancelledError: `cancel` was called.
        """
        if self._is_frozen or not len(images):
            return super().__call__(images, prompts, metadata)
        embeddings = self._embed(images)
        comparisons = self._comparisons(images, prompts, embeddings)
        winners: list[int] = []
        losers: list[int] = []
        for comparison, side in self._votes_on(comparisons):
            winner, loser = comparison.in_order(side)
            winners.append(winner.row)
            losers.append(loser.row)
        self.judge.learn(embeddings[winners], embeddings[losers])
        prior_mean = self.judge.scores(embeddings)
        scores = bradley_terry.scores(np.array(winners, int), np.array(losers, int), prior_mean, _PRECISION)
        counts = np.bincount([*winners, *losers], minlength=len(images))
        return _centred(scores, prompts), {"votes": counts.tolist()}

    def _embed(self, images: Images) -> NDArray[np.float64]:
        starts = range(0, len(images), self.batch_size)
        parts = [self.loaded.embed_images(self.prepare(images[start : start + self.batch_size])) for start in starts]
        return torch.cat(parts).double().cpu().numpy()

    def _comparisons(self, images: Images, prompts: Sequence[str], embeddings: NDArray[np.float64]) -> list[Comparison]:
        """Return the pairs to ask about. The smaller hash is on the left, so neither image has a usual side."""
        shown = [Candidate(images[row], image_hash(images[row]), embeddings[row], row) for row in range(len(images))]
        pairs = [
            (first, second)
            for first, second in combinations(range(len(images)), 2)
            if prompts[first] == prompts[second] and shown[first].digest != shown[second].digest
        ]
        if not pairs:
            raise ValueError(
                "votes compares images of the same prompt, and no prompt has two different images in this batch of "
                f"{len(images)}: samples_per_prompt must be at least 2"
            )
        chosen = self.judge.choose_pairs(embeddings, pairs, self._votes_per_batch)
        ordered = [sorted((shown[first], shown[second]), key=lambda one: one.digest) for first, second in chosen]
        return [Comparison(prompts[left.row], left, right) for left, right in ordered]

    def _votes_on(self, comparisons: Sequence[Comparison]) -> list[tuple[Comparison, Side]]:
        """Return the votes on these pairs, in their order; votes that came late for earlier ones go to the judge."""
        self._learn_late_votes()
        missing = [comparison for comparison in comparisons if self.file.find(comparison) is None]
        if missing:
            self._voters.ask(missing, self._take, self._patience if len(self.judge.differences) else None)
        with self._lock:
            current = {id(comparison) for comparison in comparisons}
            self._cast = [one for one in self._cast if id(one[0]) not in current]
            found = [(comparison, self.file.find(comparison)) for comparison in comparisons]
        return [(comparison, side) for comparison, side in found if side is not None]

    def _learn_late_votes(self) -> None:
        with self._lock:
            late, self._cast = self._cast, []
        ordered = [comparison.in_order(side) for comparison, side in late]
        if ordered:
            self.judge.learn(*(np.stack([pair[place].embedding for pair in ordered]) for place in (0, 1)))

    def _take(self, comparison: Comparison, side: Side) -> None:
        """Keep a vote at once, so that it is not lost with the run."""
        with self._lock:
            self.file.record(comparison, side)
            self._cast.append((comparison, side))


def _centred(scores: NDArray[np.float64], prompts: Sequence[str]) -> NDArray[np.float64]:
    """Return the scores minus the mean of their prompt's."""
    _, group = np.unique(np.array(prompts, dtype=object), return_inverse=True)
    return scores - (np.bincount(group, scores) / np.bincount(group))[group]
