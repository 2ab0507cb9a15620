"""A judge behind HTTP: any server that speaks OpenAI's chat completions, such as vLLM, SGLang or `transformers serve`.

Pictures go as base64 data URLs and answers come as text; nothing is ever unpickled. Whatever a server does wrong is
tried again a bounded number of times and then an error: no score is made up for an answer that did not come.
"""

from __future__ import annotations

import base64
import email.utils
import json
import os
import random
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import NDArray

from rewards.judge.loading import encode_jpeg
from rewards.pretrained import require

if TYPE_CHECKING:
    import httpx2

_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_TRY_AGAIN = (408, 409, 425, 429)


class JudgeServerError(RuntimeError):
    """The server gave no usable answer; the message names it, the attempts and the last failure."""


@dataclass
class _FailureError(Exception):
    """One attempt that failed."""

    reason: str
    final: bool = False
    retry_after: float | None = None


class JudgeServer:
    """Asks an OpenAI-compatible server about pictures, several at a time over connections that are kept open."""

    def __init__(
        self,
        url: str,
        model: str | None = None,
        *,
        api_key_variable: str | None = None,
        timeout: float = 60.0,
        attempts: int = 5,
        backoff: float = 1.0,
        max_backoff: float = 60.0,
        concurrency: int = 8,
        max_tokens: int = 64,
        max_answer_bytes: int = 1_000_000,
    ) -> None:
        """Check the arguments; nothing is sent yet.

        Args:
            url: `http://host:port` or `http://host:port/v1`; without a path, `/v1` is added.
            model: Name under which the server serves it; None: the only one that it lists.
            api_key_variable: Environment variable with the key, sent as a bearer token; None: no key.
            timeout: Seconds for connecting, for the silence before and within an answer, and for the whole answer.
            attempts: How often a question is asked before it is an error.
            backoff: Seconds before the second attempt; doubled before each further one, with up to a quarter of jitter.
            max_backoff: Longest wait in seconds, also where the server's `Retry-After` asks for more.
            concurrency: Questions under way at once.
            max_tokens: Length of an answer.
            max_answer_bytes: Size at which a response is given up.

        Raises:
            ValueError: An argument is not valid, or the environment variable is not set.
            ImportError: The HTTP client is not installed.
        """
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.query:
            raise ValueError(f"server must be a URL such as http://localhost:8000/v1, without credentials; got {url!r}")
        _ = parts.port  # a port that is no port is an error here and not at the first question
        for name, value in (("timeout", timeout), ("max_backoff", max_backoff), ("max_tokens", max_tokens)):
            if not value > 0:
                raise ValueError(f"{name} must be positive; got {value}")
        if attempts < 1 or concurrency < 1 or backoff < 0 or max_answer_bytes < 1:
            raise ValueError(
                "attempts, concurrency and max_answer_bytes must be at least 1, and backoff at least 0; "
                f"got {attempts}, {concurrency}, {max_answer_bytes} and {backoff}"
            )
        if api_key_variable is not None and not os.environ.get(api_key_variable):
            raise ValueError(f"the environment variable {api_key_variable!r} must hold the server's key; it is not set")
        require("httpx2", "a judge server")
        self.url = url.rstrip("/") + ("/v1" if parts.path in ("", "/") else "")
        self.model = model
        self.timeout = timeout
        self.attempts = attempts
        self.backoff = backoff
        self.max_backoff = max_backoff
        self.concurrency = concurrency
        self.max_tokens = max_tokens
        self.max_answer_bytes = max_answer_bytes
        self._api_key_variable = api_key_variable
        self._is_loopback = parts.hostname in _LOOPBACK
        self._client: httpx2.Client | None = None
        self._opening = threading.Lock()

    def load(self) -> None:
        """Find the model's name if none was given, and see whether a question about a grey picture is answered.

        Only a question shows a wrong name or a model without eyes: some servers list what they could serve, or nothing.

        Raises:
            JudgeServerError: The server does not answer, refuses the question, or does not serve exactly one model.
        """
        self._find_model()
        self._ask_one(np.full((64, 64, 3), 128, np.uint8), "What is in this image?", threading.Event(), _content)

    def unload(self) -> None:
        """Close the connections; the next question opens new ones."""
        if self._client is not None:
            self._client.close()
            self._client = None

    def ask(self, images: Sequence[NDArray[np.uint8]], questions: Sequence[str]) -> list[str]:
        """Ask one question about each picture.

        Args:
            images: Each (height, width, 3) uint8, sent as JPEG of quality 80.
            questions: One a picture.

        Returns:
            The answers, none empty, in whatever language the server likes.

        Raises:
            JudgeServerError: A question has no usable answer after all attempts; questions under way are given up.
        """
        self._find_model()
        stop = threading.Event()
        with ThreadPoolExecutor(max_workers=self.concurrency) as pool:
            futures = [
                pool.submit(self._ask_one, image, question, stop, _answer_text)
                for image, question in zip(images, questions, strict=True)
            ]
            try:
                return [future.result() for future in futures]
            except BaseException:
                stop.set()
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _find_model(self) -> None:
        if self.model is None:
            listing = self._exchange("GET", "/models", None, _model_names, threading.Event())
            if len(listing) != 1:
                raise JudgeServerError(
                    f"judge server {self.url} lists {', '.join(listing) or 'no model'}: name one with model="
                )
            self.model = listing[0]

    def _ask_one(
        self, image: NDArray[np.uint8], question: str, stop: threading.Event, read: Callable[[Any], str]
    ) -> str:
        picture = f"data:image/jpeg;base64,{base64.b64encode(encode_jpeg(image)).decode()}"
        content = [{"type": "image_url", "image_url": {"url": picture}}, {"type": "text", "text": question}]
        request = {
            "model": self.model,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": self.max_tokens,
            "temperature": 0,
        }
        return self._exchange("POST", "/chat/completions", request, read, stop)

    def _exchange(self, method: str, path: str, request: Any, read: Any, stop: threading.Event) -> Any:
        """Send a request until `read` can make something of the response."""
        began = time.monotonic()
        for attempt in range(1, self.attempts + 1):
            try:
                return read(self._response(method, self.url + path, request))
            except _FailureError as error:
                failure = error
            if failure.final or attempt == self.attempts or stop.wait(self._delay(attempt, failure)):
                break
        raise JudgeServerError(
            f"judge server {self.url} gave no usable answer to {method} {path} in {attempt} of {self.attempts} "
            f"attempts ({time.monotonic() - began:.1f} s); the last failure: {failure.reason}"
        )

    def _delay(self, attempt: int, failure: _FailureError) -> float:
        """Return the seconds to wait after a failed attempt: what the server asks for, or twice the last wait."""
        delay = self.backoff * 2 ** (attempt - 1) * random.uniform(1, 1.25)
        return min(delay if failure.retry_after is None else failure.retry_after, self.max_backoff)

    def _response(self, method: str, url: str, request: Any) -> Any:
        """Send one request; return the decoded JSON of its response, or raise what went wrong."""
        import httpx2

        deadline = time.monotonic() + self.timeout
        try:
            with self._connections().stream(method, url, json=request) as response:
                body = self._read(response, deadline)
        except httpx2.TimeoutException as error:
            raise _FailureError(f"{type(error).__name__} after {self.timeout:g} s") from error
        except httpx2.HTTPError as error:
            raise _FailureError(f"{type(error).__name__}: {error}") from error
        if response.status_code != 200:
            raise _FailureError(
                f"HTTP {response.status_code} {response.reason_phrase}: {body[:300].decode(errors='replace')!r}",
                final=response.status_code < 500 and response.status_code not in _TRY_AGAIN,
                retry_after=_seconds(response.headers.get("retry-after")),
            )
        try:
            return json.loads(body)
        except ValueError as error:
            raise _FailureError(
                f"the response is no JSON ({error}): {body[:200].decode(errors='replace')!r}"
            ) from error

    def _read(self, response: httpx2.Response, deadline: float) -> bytes:
        body = bytearray()
        for chunk in response.iter_raw():  # as it comes: collecting a size first would hide how long it takes
            body += chunk
            if len(body) > self.max_answer_bytes:
                raise _FailureError(f"the response is larger than {self.max_answer_bytes} bytes")
            if time.monotonic() > deadline:
                raise _FailureError(f"the response was not complete after {self.timeout:g} s")
        return bytes(body)

    def _connections(self) -> httpx2.Client:
        """Open the pool of connections; a proxy of the environment is not asked for a server on this machine."""
        import httpx2

        with self._opening:
            if self._client is None:
                headers = {"Accept-Encoding": "identity"}
                if self._api_key_variable is not None:
                    headers["Authorization"] = f"Bearer {os.environ[self._api_key_variable]}"
                self._client = httpx2.Client(
                    headers=headers,
                    timeout=httpx2.Timeout(self.timeout, pool=None),
                    limits=httpx2.Limits(max_connections=self.concurrency, max_keepalive_connections=self.concurrency),
                    trust_env=not self._is_loopback,
                )
            return self._client


def _content(response: Any) -> str:
    """Take the text out of a chat completion; it may be empty."""
    try:
        content = response["choices"][0]["message"].get("content")  # some servers leave an empty one out
    except (TypeError, KeyError, IndexError, AttributeError):
        raise _FailureError(f"the response is no chat completion: {str(response)[:300]}") from None
    if isinstance(content, list):
        content = "".join(str(part.get("text") or "") for part in content if isinstance(part, dict))
    return content.strip() if isinstance(content, str) else ""


def _answer_text(response: Any) -> str:
    text = _content(response)
    if not text:
        raise _FailureError(f"the answer is empty: {str(response)[:300]}")
    return text


def _model_names(response: Any) -> list[str]:
    try:
        return [str(entry["id"]) for entry in response["data"]]
    except (TypeError, KeyError):
        raise _FailureError(f"the response is no list of models: {str(response)[:300]}") from None


def _seconds(retry_after: str | None) -> float | None:
    """Read a `Retry-After` header, seconds or a date (RFC 9110, section 10.2.3)."""
    if retry_after is None:
        return None
    if retry_after.strip().isdigit():
        return float(retry_after)
    try:
        date = email.utils.parsedate_to_datetime(retry_after)
        return max(date.timestamp() - time.time(), 0.0)
    except ValueError:
        return None
