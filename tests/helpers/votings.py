"""A voting page with pairs on it, for tests of the server and of the browser."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np

from rewards.votes.ballot import Candidate, Comparison, image_hash
from rewards.votes.page import VotingPage

HOSTILE = "</script><script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'>"


def pairs(count: int, prompt: str = "a fox") -> list[Comparison]:
    """Pairs of a dark image on the left and a bright one on the right."""
    images = [np.full((8, 8, 3), level + number, np.uint8) for number in range(count) for level in (20, 200)]
    shown = [Candidate(image, image_hash(image), np.zeros(1), row) for row, image in enumerate(images)]
    return [Comparison(prompt, *shown[start : start + 2]) for start in range(0, 2 * count, 2)]


@contextmanager
def voting(count: int, prompt: str = "a fox") -> Iterator[tuple[VotingPage, list[str]]]:
    """Ask about pairs on a page; the list gets the votes' sides."""
    page, sides = VotingPage("Which is better?", 0), list[str]()
    page.open()
    asking = threading.Thread(target=page.ask, args=(pairs(count, prompt), lambda _, side: sides.append(side), 60))
    asking.start()
    wait_for(lambda: page.shown()["open"] == count)
    try:
        yield page, sides
        wait_for(lambda: not asking.is_alive() or page.shown()["open"] > 0)
    finally:
        for _ in range(count):
            page.vote(page.shown().get("number", -1), "left")
        asking.join(60)
        page.close()


def wait_for(holds: Callable[[], bool], seconds: float = 20) -> None:
    """Wait until something holds; fail if it never does."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.02)
