"""What a vote is about, what it says, and the file that keeps the votes.

`votes.jsonl` has a line of JSON for every vote, written when it is cast. An image is named by the hash of its pixels.
So a run that samples the same images again finds the votes and does not ask for them again.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray

from rewards.judge.answer_log import open_without_links

Side: TypeAlias = Literal["left", "right"]
Voter: TypeAlias = Literal["person", "simulation"]
_BEGINNING = b'{"left": "'
"""Of every line."""


def image_hash(image: NDArray[np.uint8]) -> str:
    """Return the SHA-256 of an image's shape and pixels, in hexadecimal."""
    return hashlib.sha256(repr(image.shape).encode() + np.ascontiguousarray(image).tobytes()).hexdigest()


@dataclass(frozen=True, eq=False)
class Candidate:
    """One of two images.

    Attributes:
        image: (height, width, 3).
        digest: Its `image_hash`.
        embedding: Of CLIP, (dimensions,).
        row: Its place in the batch.
    """

    image: NDArray[np.uint8]
    digest: str
    embedding: NDArray[np.float64]
    row: int


@dataclass(frozen=True, eq=False)
class Comparison:
    """Two images of a prompt, one of which is to be chosen."""

    prompt: str
    left: Candidate
    right: Candidate

    def in_order(self, winner: Side) -> tuple[Candidate, Candidate]:
        """Return the winner and the loser."""
        return (self.left, self.right) if winner == "left" else (self.right, self.left)


@dataclass(frozen=True)
class Vote:
    """A line of the file.

    Attributes:
        left: Hash of the image that was shown on the left.
        right: Hash of the other one.
        prompt: Of both.
        question: That was asked.
        winner: `left` or `right`.
        voter: `person` or `simulation`.
        when: Time of the vote, ISO 8601 in UTC.
    """

    left: str
    right: str
    prompt: str
    question: str
    winner: Side
    voter: Voter
    when: str

    def __post_init__(self) -> None:
        texts = (self.left, self.right, self.prompt, self.question, self.when)
        if not all(isinstance(text, str) for text in texts):
            raise ValueError("a vote must have texts only")
        for name, value, valid in (("winner", self.winner, get_args(Side)), ("voter", self.voter, get_args(Voter))):
            if value not in valid:
                raise ValueError(f"{name} must be {' or '.join(valid)}; got {value!r}")


class VoteFile:
    """The votes of one kind of voter on one question, and the file that keeps them.

    Args:
        path: The file, which need not exist; None: there is no file until `use` names one.
        question: Votes on other questions stay in the file and have no effect.
        voter: The same for votes of the other voter.
    """

    def __init__(self, path: Path | None, question: str, voter: Voter) -> None:
        """Read the file; see the class docstring for the arguments and `use` for the errors."""
        self.path: Path | None = None
        self._question, self._voter = question, voter
        self._known: dict[tuple[str, str, str], Side] = {}
        if path is not None:
            self.use(path)

    def use(self, path: Path) -> None:
        """Read this file and write to it from now on, unless there is a file already.

        A vote without the end of its line, which a killed process may leave, is removed.

        Raises:
            ValueError: A line is not a vote; the message names the line. The file then stays as it is.
            OSError: The file cannot be read or written, or it is a link.
        """
        if self.path is not None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a+b", opener=open_without_links) as file:
            file.seek(0)
            whole, end, unfinished = file.read().rpartition(b"\n")
            for number, line in enumerate((whole + end).split(b"\n")[:-1], 1):
                self._read(line, f"line {number} of {str(path)!r}")
            if unfinished[: len(_BEGINNING)] != _BEGINNING[: len(unfinished)]:
                raise ValueError(f"{str(path)!r} must be a file of votes; its last line is {unfinished[:200]!r}")
            file.truncate(len(whole + end))
        self.path = path

    def _read(self, line: bytes, place: str) -> None:
        try:
            vote = Vote(**json.loads(line))
        except (ValueError, TypeError, RecursionError) as error:
            raise ValueError(f"{place} must be a vote; got {line[:200]!r} ({error})") from error
        if (vote.question, vote.voter) == (self._question, self._voter):
            self._known[vote.prompt, vote.left, vote.right] = vote.winner

    def __len__(self) -> int:
        """Return the number of pairs that have a vote."""
        return len(self._known)

    def find(self, comparison: Comparison) -> Side | None:
        """Return what has been voted on a pair, or None."""
        return self._known.get(_key(comparison))

    def record(self, comparison: Comparison, winner: Side) -> None:
        """Keep a vote, in the file if there is one."""
        self._known[_key(comparison)] = winner
        if self.path is None:
            return
        prompt, left, right = _key(comparison)
        when = datetime.now(UTC).isoformat(timespec="seconds")
        line = json.dumps(asdict(Vote(left, right, prompt, self._question, winner, self._voter, when)))
        with open(self.path, "a", encoding="ascii", opener=open_without_links) as file:
            file.write(line + "\n")


def _key(comparison: Comparison) -> tuple[str, str, str]:
    return comparison.prompt, comparison.left.digest, comparison.right.digest
