"""The page on which people vote, served to this machine alone.

The address contains a random token, and a request without it is refused, so that other users of the machine cannot vote
or see the images. A request that names another host is refused too, so that no page from elsewhere can act under a name
that leads here.
"""

from __future__ import annotations

import base64
import hmac
import io
import json
import secrets
import sys
import threading
from collections import deque
from collections.abc import Sequence
from concurrent.futures import CancelledError
from functools import cache
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from importlib.resources import files
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from rewards.votes.ballot import Comparison, Side
from rewards.votes.local_server import FOREIGN_NAME, LocalServer
from rewards.votes.voters import Cast

_LARGEST_REQUEST = 1000
"""Bytes of a vote; the page sends less than 100."""
_FILES = {
    "": ("votes.html", "text/html"),
    "votes.css": ("votes.css", "text/css"),
    "votes.js": ("votes.js", "text/javascript"),
}
_POLICY = (
    "default-src 'none'; img-src data:; style-src 'self'; script-src 'self'; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
)


class VotingPage:
    """People who vote in a browser. Several may have the page open; a pair takes the first vote.

    Args:
        question: What the page asks.
        port: 0 for any free one.
    """

    def __init__(self, question: str, port: int) -> None:
        """Take the arguments; the page opens with `open`, or with the first question."""
        self.question = question
        self._port = port
        self._server: _Server | None = None
        self._changed = threading.Condition()
        self._open: deque[tuple[int, Comparison]] = deque()
        self._asked = self._voted = 0
        self._cast: Cast | None = None
        self._is_closed = False

    @property
    def address(self) -> str:
        """Where a browser finds the page."""
        self.open()
        assert self._server is not None
        return f"{self._server.address}{self._server.token}/"

    def open(self) -> None:
        """Take the port and print the address.

        Raises:
            ValueError: The port is taken.
        """
        if self._server is not None:
            return
        self._server = _Server(self, self._port)
        threading.Thread(target=self._server.serve_forever, name="votes", daemon=True).start()
        print(f"votes: open {self.address} to vote", file=sys.stderr, flush=True)

    def ask(self, comparisons: Sequence[Comparison], cast: Cast, patience: float | None) -> None:
        """Show pairs until they are voted on; see `Voters`."""
        if not self._is_closed:
            self.open()
        with self._changed:
            self._cast = cast
            self._open = deque(enumerate(comparisons, self._asked))
            self._asked += len(comparisons)
            self._changed.wait_for(lambda: self._is_closed or not self._open, patience)
            if self._is_closed:
                raise CancelledError("the voting has been cancelled")

    def close(self) -> None:
        """End a call of `ask`, and give the port back; see `Voters`."""
        with self._changed:
            self._is_closed = True
            self._open.clear()
            self._changed.notify_all()
            server, self._server = self._server, None
        if server is not None:
            server.shutdown()
            server.server_close()

    def shown(self) -> dict[str, Any]:
        """Return what the page shows now: the first open pair, and how many there are; without a pair, no images."""
        with self._changed:
            status = {"question": self.question, "open": len(self._open), "voted": self._voted}
            if not self._open:
                return status
            number, comparison = self._open[0]
        sides = {"left": _data_url(comparison.left.image), "right": _data_url(comparison.right.image)}
        return {**status, **sides, "number": number, "prompt": comparison.prompt}

    def vote(self, number: int, side: Side) -> bool:
        """Take a vote on the pair that is shown; return False if another pair is shown by now."""
        with self._changed:
            if not self._open or self._open[0][0] != number:
                return False
            assert self._cast is not None
            self._cast(self._open[0][1], side)  # an error leaves the pair open
            self._open.popleft()
            self._voted += 1
            self._changed.notify_all()
            return True


class _Server(LocalServer):
    def __init__(self, page: VotingPage, port: int) -> None:
        self.page = page
        self.token = secrets.token_urlsafe(24)
        super().__init__(port, _Handler)


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    server_version = "ddpo-votes"
    timeout = 10

    def do_GET(self) -> None:
        """Send the page, or the pair that it shows."""
        name = self._name()
        if name == "pair":
            self._send_json(HTTPStatus.OK, self.server.page.shown())
        elif name in _FILES:
            file, kind = _FILES[name]
            self._send(HTTPStatus.OK, _content(file), kind)
        elif name is not None:
            self._refuse(HTTPStatus.NOT_FOUND, "there is only the page")

    def do_POST(self) -> None:
        """Take a vote, a dictionary with the `number` of the pair and the `winner`."""
        name = self._name()
        if name is None:
            return None
        length = self.headers.get("Content-Length", "")
        if name != "vote" or not length.isdecimal() or int(length) > _LARGEST_REQUEST:
            return self._refuse(HTTPStatus.BAD_REQUEST, "only votes are taken")
        try:
            vote = json.loads(self.rfile.read(int(length)))
            number, winner = vote["number"], vote["winner"]
        except (ValueError, TypeError, KeyError, RecursionError):
            number, winner = None, None
        if type(number) is not int or winner not in ("left", "right"):
            return self._refuse(HTTPStatus.BAD_REQUEST, "a vote has a number, and a winner: left or right")
        try:
            is_taken = self.server.page.vote(number, winner)
        except OSError as error:
            print(f"votes: a vote cannot be kept: {error}", file=sys.stderr, flush=True)
            return self._refuse(HTTPStatus.INTERNAL_SERVER_ERROR, "the vote cannot be kept")
        return self._send_json(HTTPStatus.OK if is_taken else HTTPStatus.CONFLICT, self.server.page.shown())

    def log_message(self, format: str, *args: object) -> None:
        """Print nothing for a request."""

    def _name(self) -> str | None:
        """Return what is asked for, below the token; None if the request has been refused."""
        if not self.server.is_named_in(self):
            self._refuse(*FOREIGN_NAME)
            return None
        token, separator, name = self.path.removeprefix("/").partition("/")
        if not separator or not hmac.compare_digest(token.encode(), self.server.token.encode()):
            self._refuse(HTTPStatus.FORBIDDEN, "the address must contain the token that the run has printed")
            return None
        return name

    def _refuse(self, status: HTTPStatus, reason: str) -> None:
        self._send(status, reason.encode(), "text/plain")

    def _send_json(self, status: HTTPStatus, content: dict[str, Any]) -> None:
        self._send(status, json.dumps(content).encode(), "application/json")

    def _send(self, status: HTTPStatus, content: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Content-Security-Policy", _POLICY)
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Referrer-Policy", "no-referrer")
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        self.wfile.write(content)


@cache
def _content(name: str) -> bytes:
    return (files("rewards.votes") / "data" / name).read_bytes()


def _data_url(image: NDArray[np.uint8]) -> str:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
