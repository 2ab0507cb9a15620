"""A judge behind HTTP: any server that speaks OpenAI's chat completions, such as vLLM, SGLang or `transformers serve`.

Images are sent as base64 data URLs, and answers are text; nothing is unpickled. A request that fails is repeated a
limited number of times, and then it is an error: a missing answer never becomes a score.
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
from dataclasses import KW_ONLY, dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import NDArray

from rewards.judge.protocol import encode_jpeg
from rewards.pretrained import require

if TYPE_CHECKING:
    import httpx2

_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_TRY_AGAIN = (408, 409, 425, 429)


class JudgeServerError(RuntimeError):
    """The server gave no usable answer. The message names the server, the attempts and the last failure."""


@dataclass
class _FailureError(Exception):
    """One attempt failed; `final` means that another attempt cannot succeed."""

    reason: str
    final: bool = False
    retry_after: float | None = None


@dataclass(eq=False)
class JudgeServer:
    """Asks an OpenAI-compatible server about images, several at a time, over connections that are kept open.

    Nothing is sent before the first question or `load`.

    Args:
        url: `http://host:port` or `http://host:port/v1`; without a path, `/v1` is added.
        model: Name under which the server serves the model; None: the only model that it lists.
        api_key_variable: Environment variable with the key, which is sent as a bearer token; None: no key.
        timeout: Seconds for connecting, for a silence before or within an answer, and for the whole answer.
        attempts: How often a question is asked before it is an error.
        backoff: Seconds before the second attempt. They double before each further one, plus up to a quarter at random.
        max_backoff: Longest wait in seconds, also if the server's `Retry-After` asks for more.
        concurrency: How many questions are asked at the same time.
        max_tokens: Largest length of an answer, in tokens.
        max_answer_bytes: Largest size of a response.

    Raises:
        ValueError: An argument is not valid, or the environment variable is not set.
        ImportError: The HTTP client is not installed.
    """

    url: str
    model: str | None = None
    _: KW_ONLY
    api_key_variable: str | None = None
    timeout: float = 60.0
    attempts: int = 5
    backoff: float = 1.0
    max_backoff: float = 60.0
    concurrency: int = 8
    max_tokens: int = 64
    max_answer_bytes: int = 1_000_000
    _client: httpx2.Client | None = field(default=None, init=False, repr=False)
    _opening: threading.Lock = field(default_factory=threading.Lock, init=False, repr=False)

    def __post_init__(self) -> None:
        """Check the arguments."""
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.query:
            raise ValueError(
                f"server must be a URL such as http://localhost:8000/v1, without credentials; got {self.url!r}"
            )
        _ = parts.port  # an invalid port is an error here and not at the first question
        positive = {"timeout": self.timeout, "max_backoff": self.max_backoff, "max_tokens": self.max_tokens}
        for name, value in positive.items():
            if not value > 0:
                raise ValueError(f"{name} must be positive; got {value}")
        if self.attempts < 1 or self.concurrency < 1 or self.backoff < 0 or self.max_answer_bytes < 1:
            raise ValueError(
                "attempts, concurrency and max_answer_bytes must be at least 1, and backoff at least 0; "
                f"got {self.attempts}, {self.concurrency}, {self.max_answer_bytes} and {self.backoff}"
            )
        if self.api_key_variable is not None and not os.environ.get(self.api_key_variable):
            raise ValueError(
                f"the environment variable {self.api_key_variable!r} must hold the server's key; it is not set"
            )
        require("httpx2", "a judge server")
        self.url = self.url.rstrip("/") + ("/v1" if parts.path in ("", "/") else "")

    def load(self) -> None:
        """Find the model's name if none was given, and check that a question about a grey image is answered.

        Only a question reveals a wrong name or a model that takes no images: some servers list models that they do not
        serve, or no models.

        Raises:
            JudgeServerError: The server does not answer, refuses the question, or does not list exactly one model.
        """
        self._find_model()
        self._ask_one(np.full((64, 64, 3), 128, np.uint8), "What is in this image?", threading.Event(), _content)

    def unload(self) -> None:
        """Close the connections. The next question opens new ones."""
        if self._client is not None:
            self._client.close()
            self._client = None

    def ask(self, images: Sequence[NDArray[np.uint8]], questions: Sequence[str]) -> list[str]:
        """Ask one question about each image.

        Args:
            images: Each (height, width, 3) uint8; they are sent as JPEG of quality 80.
            questions: One per image.

        Returns:
            The answers, none of them empty, in the language that the server chose.

        Raises:
            JudgeServerError: A question has no usable answer after all attempts. The other questions are cancelled.
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
        data_url = f"data:image/jpeg;base64,{base64.b64encode(encode_jpeg(image)).decode()}"
        content = [{"type": "image_url", "image_url": {"url": data_url}}, {"type": "text", "text": question}]
        request = {
            "model": self.model,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": self.max_tokens,
            "temperature": 0,
        }
        return self._exchange("POST", "/chat/completions", request, read, stop)

    def _exchange(self, method: str, path: str, request: Any, read: Any, stop: threading.Event) -> Any:
        """Send a request until `read` accepts the response; return what it read."""
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
        """Return the seconds to wait after a failed attempt: those that the server asks for, or twice the last wait."""
        delay = self.backoff * 2 ** (attempt - 1) * random.uniform(1, 1.25)
        return min(delay if failure.retry_after is None else failure.retry_after, self.max_backoff)

    def _response(self, method: str, url: str, request: Any) -> Any:
        """Send one request and return the decoded JSON of its response, or raise `_FailureError`."""
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
                f"the response is not JSON ({error}): {body[:200].decode(errors='replace')!r}"
            ) from error

    def _read(self, response: httpx2.Response, deadline: float) -> bytes:
        body = bytearray()
        for chunk in response.iter_raw():  # a fixed chunk size would delay the check of the time
            body += chunk
            if len(body) > self.max_answer_bytes:
                raise _FailureError(f"the response is larger than {self.max_answer_bytes} bytes")
            if time.monotonic() > deadline:
                raise _FailureError(f"the response was not complete after {self.timeout:g} s")
        return bytes(body)

    def _connections(self) -> httpx2.Client:
        """Return the pool of connections. For a server on this machine, a proxy of the environment is not used."""
        import httpx2

        with self._opening:
            if self._client is None:
                headers = {"Accept-Encoding": "identity"}
                if self.api_key_variable is not None:
                    headers["Authorization"] = f"Bearer {os.environ[self.api_key_variable]}"
                self._client = httpx2.Client(
                    headers=headers,
                    timeout=httpx2.Timeout(self.timeout, pool=None),
                    limits=httpx2.Limits(max_connections=self.concurrency, max_keepalive_connections=self.concurrency),
                    trust_env=urlsplit(self.url).hostname not in _LOOPBACK,
                )
            return self._client


def _content(response: Any) -> str:
    """Return the text of a chat completion, which may be empty."""
    try:
        content = response["choices"][0]["message"].get("content")  # some servers omit an empty text
    except (TypeError, KeyError, IndexError, AttributeError):
        raise _FailureError(f"the response is not a chat completion: {str(response)[:300]}") from None
    if isinstance(content, list):
        content = "".join(str(item.get("text") or "") for item in content if isinstance(item, dict))
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
        raise _FailureError(f"the response is not a list of models: {str(response)[:300]}") from None


def _seconds(retry_after: str | None) -> float | None:
    """Return the seconds of a `Retry-After` header, which holds seconds or a date (RFC 9110, section 10.2.3)."""
    if retry_after is None:
        return None
    if retry_after.strip().isdigit():
        return float(retry_after)
    try:
        date = email.utils.parsedate_to_datetime(retry_after)
        return max(date.timestamp() - time.time(), 0.0)
    except ValueError:
        return None
