"""A judge behind HTTP: any server that speaks OpenAI's chat completions, such as vLLM, SGLang or `transformers serve`.

Images are sent as base64 data URLs, and answers are text; nothing is unpickled. A request that fails is repeated a
limited number of times, and then it is an error: a missing answer never becomes a score. The server is not trusted: an
attempt has one deadline from the connection to the last byte, a response has a largest size, and the key is masked in
every text that comes back.
"""

from __future__ import annotations

import asyncio
import base64
import email.utils
import html
import json
import logging
import math
import os
import random
import threading
import time
from collections.abc import Callable, Coroutine, Sequence
from contextlib import ExitStack
from dataclasses import KW_ONLY, dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import quote, urlsplit

import numpy as np
from numpy.typing import NDArray

from rewards.judge.protocol import encode_jpeg
from rewards.networks.pretrained import require
from rewards.registry import check_number

if TYPE_CHECKING:
    import httpx2
    from anyio.from_thread import BlockingPortal

_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_TRY_AGAIN = (408, 409, 425, 429)
_EXCERPT = 300
_LONGEST_NAME = 1000
_SHORTEST_KEY = 4
_SECONDS: dict[str, tuple[float, float]] = {
    "timeout": (1e-3, 86_400.0),
    "backoff": (0.0, 86_400.0),
    "max_backoff": (1e-3, 86_400.0),
}
_COUNTS: dict[str, tuple[int, int]] = {
    "attempts": (1, 1000),
    "concurrency": (1, 1000),
    "max_tokens": (1, 1_000_000),
    "max_answer_bytes": (1, 1_000_000_000),
}
"""Range of each number among the arguments."""

_T = TypeVar("_T")


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
        timeout: Seconds for one attempt, from connecting to the end of the answer.
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
    _resources: ExitStack = field(default_factory=ExitStack, init=False, repr=False)
    _portal: BlockingPortal | None = field(default=None, init=False, repr=False)
    _client: httpx2.AsyncClient | None = field(default=None, init=False, repr=False)
    _opening: threading.Lock = field(default_factory=threading.Lock, init=False, repr=False)
    _secrets: tuple[str, ...] = field(default=(), init=False, repr=False)

    def __post_init__(self) -> None:
        """Check the arguments."""
        self.url = _checked_url(self.url)
        for name, limits in {**_SECONDS, **_COUNTS}.items():
            check_number(name, getattr(self, name), *limits)
        for name in ("model", "api_key_variable"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, str) or not value.isprintable() or not value):
                raise ValueError(f"{name} must be a name or None; got {value!r}")
        _ = self._key
        require("httpx2", "a judge server")

    @property
    def _key(self) -> str | None:
        """The key, read from the environment when connections are opened."""
        if self.api_key_variable is None:
            return None
        key = os.environ.get(self.api_key_variable, "").strip()
        if not key or not key.isascii() or not key.isprintable():
            raise ValueError(
                f"the environment variable {self.api_key_variable!r} must hold the server's key; "
                f"{'it has characters that are no printable ASCII' if key else 'it is not set'}"
            )
        return key

    def load(self) -> None:
        """Find the model's name if none was given, and check that a question about a grey image is answered.

        Only a question reveals a wrong name or a model that takes no images: some servers list models that they do not
        serve, or no models.

        Raises:
            JudgeServerError: The server does not answer, refuses the question, or does not list exactly one model.
        """
        grey = np.full((64, 64, 3), 128, np.uint8)
        self._run(self._ask_all([grey], ["What is in this image?"], _content))

    def unload(self) -> None:
        """Close the connections. The next question opens new ones."""
        with self._opening:
            portal, client, self._portal, self._client = self._portal, self._client, None, None
            if portal is not None and client is not None:
                portal.call(client.aclose)
            self._resources.close()

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
        return self._run(self._ask_all(images, questions, _answer_text))

    def _run(self, work: Coroutine[Any, Any, _T]) -> _T:
        """Run a coroutine in the thread of this server's event loop, and cancel it if this thread is interrupted."""
        from anyio.from_thread import start_blocking_portal

        async def awaited() -> _T:
            return await work

        with self._opening:
            if self._portal is None:
                self._portal = self._resources.enter_context(start_blocking_portal())
            portal = self._portal
        future = portal.start_task_soon(awaited)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    async def _ask_all(
        self, images: Sequence[NDArray[np.uint8]], questions: Sequence[str], read: Callable[[Any], str]
    ) -> list[str]:
        if self.model is None:
            listing = await self._exchange("GET", "/models", None, _model_names)
            if len(listing) != 1:
                raise JudgeServerError(
                    f"judge server {self.url} lists {self._excerpt(', '.join(listing)) or 'no model'}: name one with "
                    "model="
                )
            self.model = listing[0]
        limit = asyncio.Semaphore(self.concurrency)
        tasks = [
            asyncio.ensure_future(self._ask_one(image, question, read, limit))
            for image, question in zip(images, questions, strict=True)
        ]
        try:
            return [self._masked(answer) for answer in await asyncio.gather(*tasks)]
        finally:
            for task in tasks:
                task.cancel()

    async def _ask_one(
        self, image: NDArray[np.uint8], question: str, read: Callable[[Any], str], limit: asyncio.Semaphore
    ) -> str:
        async with limit:
            data_url = f"data:image/jpeg;base64,{base64.b64encode(encode_jpeg(image)).decode()}"
            content = [{"type": "image_url", "image_url": {"url": data_url}}, {"type": "text", "text": question}]
            request = {
                "model": self.model,
                "messages": [{"role": "user", "content": content}],
                "max_tokens": self.max_tokens,
                "temperature": 0,
            }
            return await self._exchange("POST", "/chat/completions", request, read)

    async def _exchange(self, method: str, path: str, request: Any, read: Callable[[Any], _T]) -> _T:
        """Send a request until `read` accepts the response; return what it read."""
        began = time.monotonic()
        for attempt in range(1, self.attempts + 1):
            try:
                return await self._attempt(method, self.url + path, request, read)
            except _FailureError as error:
                failure = error
            if failure.final or attempt == self.attempts:
                break
            await asyncio.sleep(self._delay(attempt, failure))
        raise JudgeServerError(
            f"judge server {self.url} gave no usable answer to {method} {path} in {attempt} of {self.attempts} "
            f"attempts ({time.monotonic() - began:.1f} s); the last failure: {failure.reason}"
        )

    def _delay(self, attempt: int, failure: _FailureError) -> float:
        """Return the seconds to wait after a failed attempt: those that the server asks for, or twice the last wait."""
        if failure.retry_after is not None:
            return min(failure.retry_after, self.max_backoff)
        doubled = self.backoff * 2 ** min(attempt - 1, 60)
        return min(doubled * random.Random().uniform(1, 1.25), self.max_backoff)

    async def _attempt(self, method: str, url: str, request: Any, read: Callable[[Any], _T]) -> _T:
        """Send one request and return what `read` makes of its JSON, or raise `_FailureError`."""
        import httpx2

        try:
            async with asyncio.timeout(self.timeout), self._connections().stream(method, url, json=request) as response:
                body = await self._body(response)
        except (TimeoutError, httpx2.TimeoutException) as error:
            raise _FailureError(f"the response was not complete after {self.timeout:g} s") from error
        except httpx2.HTTPError as error:
            raise _FailureError(f"{type(error).__name__}: {self._excerpt(error)}") from None
        text = body.decode(errors="replace")
        if response.status_code != 200:
            raise _FailureError(
                f"HTTP {response.status_code} {self._excerpt(response.reason_phrase)}: {self._excerpt(text)!r}",
                final=response.status_code < 500 and response.status_code not in _TRY_AGAIN,
                retry_after=_seconds(response.headers.get("retry-after")),
            )
        try:
            return read(json.loads(text))
        except _FailureError as failure:
            raise _FailureError(f"{failure.reason}: {self._excerpt(text)!r}") from None
        except RecursionError:
            raise _FailureError(f"the response is nested too deeply: {self._excerpt(text)!r}") from None
        except ValueError as error:
            reason = self._excerpt(error)
            raise _FailureError(f"the response is not JSON ({reason}): {self._excerpt(text)!r}") from None

    async def _body(self, response: httpx2.Response) -> bytes:
        body = bytearray()
        async for chunk in response.aiter_raw():
            body += chunk
            if len(body) > self.max_answer_bytes:
                raise _FailureError(f"the response is larger than {self.max_answer_bytes} bytes")
        return bytes(body)

    def _connections(self) -> httpx2.AsyncClient:
        """Return the pool of connections. For a server on this machine, a proxy of the environment is not used."""
        import httpx2

        if self._client is None:
            headers = {"Accept-Encoding": "identity"}
            if (key := self._key) is not None:
                headers["Authorization"] = f"Bearer {key}"
                self._secrets = _spellings(key)
                for name in ("httpx2", "httpcore2"):  # their logs hold lines of responses, which may echo the key
                    logging.getLogger(name).setLevel(logging.WARNING)
            self._client = httpx2.AsyncClient(
                headers=headers,
                timeout=None,  # `asyncio.timeout` bounds the whole attempt
                follow_redirects=False,  # another server must not get the key
                limits=httpx2.Limits(max_connections=self.concurrency, max_keepalive_connections=self.concurrency),
                trust_env=urlsplit(self.url).hostname not in _LOOPBACK,
            )
        return self._client

    def _masked(self, text: str) -> str:
        """Return a text from the server without the key, which a server could send back."""
        for secret in self._secrets:
            text = text.replace(secret, "***")
        return text

    def _excerpt(self, text: object) -> str:
        return self._masked(str(text))[:_EXCERPT]


def _spellings(key: str) -> tuple[str, ...]:
    """Return the forms in which servers quote a key: as it is, and escaped for JSON, Python, HTML or an address."""
    if len(key) < _SHORTEST_KEY:
        return ()
    escaped = (json.dumps(key)[1:-1], json.dumps(key)[1:-1].replace("/", r"\/"), repr(key)[1:-1], html.escape(key))
    return tuple(dict.fromkeys((key, *escaped, quote(key), quote(key, safe=""))))


def _checked_url(url: Any) -> str:
    """Return the address with `/v1`, without whatever may hold a secret.

    Raises:
        ValueError: It is no HTTP address of a server, or it has credentials, a query or a fragment. The message shows
            none of these.
    """
    shown = url
    if isinstance(url, str):
        try:
            parts = urlsplit(url)
            is_plain = "@" not in parts.netloc and not parts.query and not parts.fragment and "?" not in url
            is_clean = is_plain and "#" not in url and url.isprintable() and " " not in url
            shown = url if is_clean else f"{parts.scheme}://{parts.netloc.rpartition('@')[2]} and more"
            if is_clean and parts.scheme in ("http", "https") and parts.hostname and parts.port != 0:
                return url.rstrip("/") + ("/v1" if parts.path in ("", "/") else "")
        except ValueError:  # a port that is none, or half of an IPv6 address
            shown = url.rpartition("@")[2].partition("?")[0].partition("#")[0]
    raise ValueError(
        "server must be a URL such as http://localhost:8000/v1, without credentials, a query or a fragment; "
        f"got {shown!r}"
    )


def _content(response: Any) -> str:
    """Return the text of a chat completion, which may be empty; half of a surrogate pair becomes a question mark."""
    try:
        content = response["choices"][0]["message"].get("content")  # some servers omit an empty text
    except (TypeError, KeyError, IndexError, AttributeError):
        raise _FailureError("the response is not a chat completion") from None
    if isinstance(content, list):
        content = "".join(str(item.get("text") or "") for item in content if isinstance(item, dict))
    return _writable(content).strip() if isinstance(content, str) else ""


def _answer_text(response: Any) -> str:
    text = _content(response)
    if not text:
        raise _FailureError("the answer is empty")
    return text


def _model_names(response: Any) -> list[str]:
    try:
        names = [entry["id"] for entry in response["data"]]
    except (TypeError, KeyError):
        names = [None]
    if not all(isinstance(name, str) and len(name) <= _LONGEST_NAME for name in names):
        raise _FailureError("the response is not a list of models")
    return [_writable(name) for name in names]


def _writable(text: str) -> str:
    """Return a text that UTF-8 can hold: half of a surrogate pair becomes a question mark."""
    return text.encode(errors="replace").decode()


def _seconds(retry_after: str | None) -> float | None:
    """Return the seconds of a `Retry-After` header, which holds seconds or a date (RFC 9110, section 10.2.3)."""
    if retry_after is None:
        return None
    text = retry_after.strip()
    if text.isascii() and text.isdecimal():
        return float(text[:20])
    try:
        seconds = email.utils.parsedate_to_datetime(text).timestamp() - time.time()
    except (ValueError, TypeError, OverflowError):
        return None
    return max(seconds, 0.0) if math.isfinite(seconds) else None
