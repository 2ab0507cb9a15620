"""What serves a page to this machine alone: the page of the votes, and the report of a run.

It listens on the loopback address. A request that names another host is to be refused, so that no page from elsewhere
can read or act under a name that leads here.
"""

from __future__ import annotations

from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

_HOST = "127.0.0.1"
FOREIGN_NAME = (HTTPStatus.FORBIDDEN, "this server answers only to its own address")
"""The answer to a request that does not name the server."""


class LocalServer(ThreadingHTTPServer):
    """Answers in threads that end with the process.

    Args:
        port: 0 for any free one.
        handler: of a request.

    Raises:
        ValueError: The port is taken.
    """

    daemon_threads = True

    def __init__(self, port: int, handler: type[BaseHTTPRequestHandler]) -> None:
        """Take the port."""
        try:
            super().__init__((_HOST, port), handler)
        except OSError as error:
            raise ValueError(f"port must be free on this machine, or 0 for any; got {port}: {error}") from error

    @property
    def address(self) -> str:
        """Where a browser finds the page."""
        return f"http://{_HOST}:{self.server_port}/"

    def is_named_in(self, request: BaseHTTPRequestHandler) -> bool:
        """Return whether a request is to this server under one of its own names."""
        names = {f"{name}:{self.server_port}" for name in (_HOST, "localhost")}
        return request.headers.get("Host") in names
