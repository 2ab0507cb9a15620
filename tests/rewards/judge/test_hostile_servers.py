"""A judge server that means harm: an attempt ends at its deadline, and no secret leaves in any text."""

import html
import json
import logging
import socket
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from helpers.images import random_images

from rewards.judge.answer_log import AnswerLog
from rewards.judge.judge_server import JudgeServer, JudgeServerError, _seconds

KEY = "sk-0123456789abcdef"
OK = b"HTTP/1.1 200 OK\r\n"


@contextmanager
def serving(talk: Callable[[socket.socket], None]) -> Iterator[str]:
    """A server that reads one request of each connection and then does what `talk` says."""
    listener = socket.create_server(("127.0.0.1", 0))

    def handle(connection: socket.socket) -> None:
        with connection:
            try:
                received = connection.makefile("rb")
                lines = iter(received.readline, b"\r\n")
                sizes = [line.split(b":")[1] for line in lines if line.lower().startswith(b"content-length:")]
                received.read(int(sizes[0]) if sizes else 0)
                talk(connection)
            except OSError:
                pass  # the client has hung up

    def accept() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=handle, args=(connection,), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
    finally:
        listener.close()


def body_of(answer: object) -> bytes:
    body = json.dumps({"choices": [{"message": {"content": answer}}]}).encode()
    return OK + b"Content-Length: %d\r\nConnection: close\r\n\r\n" % len(body) + body


def drip(text: bytes) -> Callable[[socket.socket], None]:
    def talk(connection: socket.socket) -> None:
        while True:
            connection.sendall(text)
            time.sleep(0.01)

    return talk


def sends(content: bytes) -> Callable[[socket.socket], None]:
    return lambda connection: connection.sendall(content)


def dripped_header(connection: socket.socket) -> None:
    connection.sendall(OK + b"X-Long: ")
    drip(b"a")(connection)


ENDLESS = {
    "headers that drip": dripped_header,
    "headers that never end": lambda connection: (connection.sendall(OK), drip(b"X-More: 1\r\n")(connection)),
    "endless 1xx": drip(b"HTTP/1.1 103 Early Hints\r\nX-More: 1\r\n\r\n"),
    "a body that drips": lambda connection: (
        connection.sendall(OK + b"Content-Length: 100000\r\n\r\n"),
        drip(b" ")(connection),
    ),
    "chunks without end": lambda connection: (
        connection.sendall(OK + b"Transfer-Encoding: chunked\r\n\r\n"),
        drip(b"1\r\n \r\n")(connection),
    ),
    "silence": lambda connection: time.sleep(5),
}


def ask(url: str, **arguments: object) -> list[str]:
    judge = JudgeServer(url, **{"model": "tiny", "timeout": 0.3, "attempts": 1, "backoff": 0} | arguments)  # type: ignore[arg-type]
    try:
        return judge.ask(list(random_images(1)), ["?"])
    finally:
        judge.unload()


@pytest.mark.parametrize("name", ENDLESS)
def test_an_attempt_has_one_deadline(name: str) -> None:
    with serving(ENDLESS[name]) as url:  # type: ignore[arg-type]
        began = time.monotonic()
        with pytest.raises(JudgeServerError, match="gave no usable answer"):
            ask(url)
        assert time.monotonic() - began < 2


def test_interrupted_questions_leave_no_thread_behind() -> None:
    before = threading.active_count()
    with serving(ENDLESS["headers that drip"]) as url, pytest.raises(JudgeServerError):
        ask(url)
    for _ in range(100):
        if threading.active_count() <= before + 2:  # the test's own server
            break
        time.sleep(0.02)
    assert threading.active_count() <= before + 2


def test_deep_json_is_a_failure_and_not_a_crash() -> None:
    body = b"[" * 100_000 + b"]" * 100_000
    answer = OK + b"Content-Length: %d\r\nConnection: close\r\n\r\n" % len(body) + body
    with serving(sends(answer)) as url, pytest.raises(JudgeServerError, match="nested too deeply"):
        ask(url)


@pytest.mark.parametrize(
    "header", ["²", "-5", "nan", "1e400", "9" * 4000, "\x00", "Wed, 21 Oct 99999 07:28:00 GMT", ""]
)
def test_any_retry_after_is_read_or_ignored(header: str) -> None:
    seconds = _seconds(header)
    assert seconds is None or 0 <= seconds < float("inf")


def test_half_a_surrogate_pair_becomes_text_that_can_be_written(tmp_path: Path) -> None:
    with serving(sends(body_of("a fox \ud800"))) as url:
        (answer,) = ask(url)
    assert answer == "a fox ?"
    (tmp_path / "answer.txt").write_text(answer, encoding="utf-8")


REDIRECT = b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:9/" + KEY.encode() + b"\r\nContent-Length: 0\r\n\r\n"
ECHOES = {
    "error body": b"HTTP/1.1 400 Bad\r\nContent-Length: %d\r\n\r\n%s" % (len(KEY), KEY.encode()),
    "cut body": b"HTTP/1.1 400 Bad\r\nContent-Length: 300\r\n\r\n" + b"x" * 290 + KEY.encode()[:10],
    "key at the cut": b"HTTP/1.1 400 Bad\r\nContent-Length: 309\r\n\r\n" + b"x" * 290 + KEY.encode(),
    "reason": b"HTTP/1.1 400 " + KEY.encode() + b"\r\nContent-Length: 0\r\n\r\n",
    "no json": OK + b"Content-Length: %d\r\n\r\n%s" % (len(KEY), KEY.encode()),
    "no completion": OK + b"Content-Length: %d\r\n\r\n" % (len(KEY) + 2) + f'"{KEY}"'.encode(),
    "no http": KEY.encode() + b"\r\n\r\n",
    "redirect": REDIRECT,
}


@pytest.mark.parametrize("name", ECHOES)
def test_an_echoed_key_is_in_no_error(
    name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("JUDGE_KEY", KEY + "\n")
    caplog.set_level(logging.DEBUG)
    for library in ("httpx2", "httpcore2"):
        logging.getLogger(library).setLevel(logging.NOTSET)
    with serving(sends(ECHOES[name])) as url, pytest.raises(JudgeServerError) as caught:
        ask(url, api_key_variable="JUDGE_KEY")
    shown = [caplog.text, str(caught.value), repr(caught.value), *(getattr(caught.value, "__notes__", []))]
    assert not any(KEY[:12] in text for text in shown)


QUOTED_KEY = 'sk-"quoted"\\path/+=&'


@pytest.mark.parametrize(
    "quote",
    [lambda key: json.dumps({"error": key}), repr, html.escape, lambda key: urllib.parse.quote(key, safe="")],
    ids=["json", "python", "html", "address"],
)
def test_a_key_that_is_echoed_with_escapes_is_masked(
    quote: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JUDGE_KEY", QUOTED_KEY)
    body = quote(QUOTED_KEY).encode()
    answer = sends(b"HTTP/1.1 400 Bad\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
    with serving(answer) as url, pytest.raises(JudgeServerError, match=r"\*\*\*") as caught:
        ask(url, api_key_variable="JUDGE_KEY")
    assert "quoted" not in str(caught.value)


def test_a_key_is_masked_after_it_left_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", KEY)

    def answer(connection: socket.socket) -> None:
        monkeypatch.delenv("JUDGE_KEY")
        connection.sendall(body_of(KEY))

    with serving(answer) as url:
        assert ask(url, api_key_variable="JUDGE_KEY") == ["***"]


@pytest.mark.parametrize("name", [{"x": 1}, None, "a" * 10_000], ids=["object", "null", "long"])
def test_names_of_models_are_checked(name: object) -> None:
    body = json.dumps({"data": [{"id": name}]}).encode()
    answer = sends(OK + b"Content-Length: %d\r\n\r\n" % len(body) + body)
    with serving(answer) as url, pytest.raises(JudgeServerError, match="the response is not a list of models"):
        ask(url, model=None)


def test_half_a_surrogate_pair_in_a_models_name_is_a_failure_of_the_server() -> None:
    body = b'{"data": [{"id": "\\ud800"}]}'
    answer = sends(OK + b"Content-Length: %d\r\n\r\n" % len(body) + body)
    with serving(answer) as url, pytest.raises(JudgeServerError, match="gave no usable answer"):
        ask(url, model=None)


def test_an_echoed_key_is_in_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", KEY)
    with serving(sends(body_of(f"your key is {KEY}"))) as url:
        assert ask(url, api_key_variable="JUDGE_KEY") == ["your key is ***"]


def test_key_of_several_lines_is_refused_without_showing_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", f"{KEY}\nX-Injected: 1")
    with pytest.raises(ValueError, match="environment variable 'JUDGE_KEY' must hold the server's key") as caught:
        JudgeServer("http://localhost:1", api_key_variable="JUDGE_KEY")
    assert KEY not in str(caught.value)


@pytest.mark.parametrize(
    "url", [f"http://me:{KEY}@host/v1", f"http://{KEY}@host:x", f"http://host/?k={KEY}", f"http://host/#{KEY}"]
)
def test_credentials_in_an_address_are_refused_without_showing_them(url: str) -> None:
    with pytest.raises(ValueError, match="without credentials") as caught:
        JudgeServer(url)
    assert KEY not in str(caught.value)


def test_logged_answers_are_cut(tmp_path: Path) -> None:
    log = AnswerLog(tmp_path)
    log.record(list(np.zeros((1, 8, 8, 3), np.uint8)), ["p"], [["?"]], [["fox " * 100_000]], [1.0])
    (line,) = (tmp_path / "answers.jsonl").read_text(encoding="utf-8").splitlines()
    (answer,) = json.loads(line)["answers"]
    assert len(answer) < 3000
    assert answer.endswith("of 400000 characters]")


def test_log_follows_no_links_and_overwrites_nothing(tmp_path: Path) -> None:
    folder, outside = tmp_path / "judge", tmp_path / "outside"
    folder.mkdir()
    outside.write_text("mine")
    (folder / "answers.jsonl").symlink_to(outside)
    with pytest.raises(OSError, match="answers.jsonl"):
        AnswerLog(folder).record(list(np.zeros((1, 8, 8, 3), np.uint8)), ["p"], [["?"]], [["a"]], [1.0])
    assert outside.read_text() == "mine"


def test_log_continues_beside_files_of_other_names(tmp_path: Path) -> None:
    for name in ("1²3.jpg", "12abc.jpg", "000007.jpg"):
        (tmp_path / name).write_bytes(b"")
    AnswerLog(tmp_path).record(list(np.zeros((1, 8, 8, 3), np.uint8)), ["\ud800"], [["?"]], [["a"]], [1.0])
    assert (tmp_path / "000008.jpg").stat().st_size > 0
