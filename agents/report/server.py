"""Serves the report to this machine alone, made anew whenever the run folders have changed."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterable, Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from pathlib import Path

from agents.output.terminal import print_error
from agents.report.page import render
from rewards.votes.local_server import FOREIGN_NAME, LocalServer

_WATCHED = ("config.yaml", "progress.csv", "summary.json", "error.txt", "doctor.json", "judge/**/answers.jsonl")


class ReportServer(LocalServer):
    """Answers `GET /` with the report of run folders.

    Args:
        paths: of the run folders.
        port: 0 for any free one.

    Raises:
        ValueError: if the port is taken, or as `render`.
    """

    def __init__(self, paths: Sequence[Path], port: int) -> None:
        """Render the first page, which shows whether the folders can be read, and take the port."""
        self.paths = paths
        self._rendering = threading.Lock()
        self._page = self._version = ""
        self.current_page()
        super().__init__(port, _Handler)

    def version(self) -> str:
        """Return a text that changes when the run folders do."""
        states = [f"{path} {path.stat().st_mtime_ns} {path.stat().st_size}" for path in _files(self.paths)]
        return hashlib.sha256("\n".join(states).encode()).hexdigest()[:16]

    def current_page(self) -> str:
        """Return the newest report."""
        with self._rendering:
            version = self.version()
            if version != self._version:
                self._page, self._version = render(self.paths, version), version
            return self._page


class _Handler(BaseHTTPRequestHandler):
    server: ReportServer
    server_version = "ddpo-report"

    def do_GET(self) -> None:
        """Send the report."""
        self._answer(has_body=True)

    def do_HEAD(self) -> None:
        """Send the version of the report, for a page that asks whether there is a newer one."""
        self._answer(has_body=False)

    def log_message(self, format: str, *args: object) -> None:
        """Print nothing for a request."""

    def _answer(self, has_body: bool) -> None:
        if not self.server.is_named_in(self):
            return self._send(*FOREIGN_NAME, has_body=has_body)
        if self.path != "/":
            return self._send(HTTPStatus.NOT_FOUND, "there is only the report, at /", has_body=has_body)
        try:
            text, version = (self.server.current_page() if has_body else ""), self.server.version()
        except (ValueError, OSError) as error:
            print_error(error)
            return self._send(HTTPStatus.INTERNAL_SERVER_ERROR, str(error), has_body=has_body)
        return self._send(HTTPStatus.OK, text, "text/html", version, has_body)

    def _send(
        self, status: HTTPStatus, text: str, kind: str = "text/plain", version: str = "", has_body: bool = True
    ) -> None:
        content = text.encode("utf-8")
        self.send_response(status)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("X-Frame-Options", "DENY")
        self.send_header("Cache-Control", "no-store")
        if has_body:
            self.send_header("Content-Length", str(len(content)))
        if version:
            self.send_header("ETag", f'"{version}"')
        self.end_headers()
        if has_body:
            self.wfile.write(content)


def _files(paths: Iterable[Path]) -> Iterable[Path]:
    """Yield the files whose change makes a new report; an evaluation is logged in `progress.csv` after its images."""
    for path in paths:
        for pattern in _WATCHED:
            yield from sorted(path.glob(pattern))
