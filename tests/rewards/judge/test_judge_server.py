"""The HTTP judge against a server on loopback that answers as OpenAI's does, or fails when a test says so."""

import base64
import io
import json
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from helpers.images import random_images
from PIL import Image

from rewards import evaluate_reward, load_reward
from rewards.judge.judge_server import JudgeServer, JudgeServerError, _seconds
from rewards.judge.protocol import Judge

FAST = {"backoff": 0.01, "timeout": 1.0, "attempts": 3}


class ChatServer(ThreadingHTTPServer):
    """Answers each question with `answer(question, image)`; `faults` are functions that handle requests instead."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), ChatHandler)
        self.answer = lambda question, image: "a fox riding a bike"
        self.models = ["tiny"]
        self.faults = []
        self.always = None
        self.requests = []
        self.connections = set()
        self.under_way = self.most_under_way = 0
        self.lock = threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1"

    def handle_error(self, request, client_address):
        pass  # in some tests the client hangs up


class ChatHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *_):
        pass

    def send(self, body, status=200, headers=(), length=None):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in headers:
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        if self.server.models is None:
            return self.send({"error": "no cache"}, 500)
        self.send({"data": [{"id": name} for name in self.server.models]})

    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            server.requests.append((self.path, dict(self.headers), body))
            server.connections.add(self.client_address)
            server.under_way += 1
            server.most_under_way = max(server.most_under_way, server.under_way)
            fault = server.faults.pop(0) if server.faults else server.always
        try:
            if fault is not None:
                fault(self)
                return
            image, text = body["messages"][0]["content"]
            data = image["image_url"]["url"].removeprefix("data:image/jpeg;base64,")
            self.send(completion(server.answer(text["text"], base64.b64decode(data))))
        finally:
            with server.lock:
                server.under_way -= 1


def completion(content):
    return {"choices": [{"index": 0, "message": {"role": "assistant", "content": content}, "finish_reason": "stop"}]}


def status(code, headers=()):
    return lambda handler: handler.send({"error": f"status {code}"}, code, headers)


def truncated_json(handler):
    handler.send(json.dumps(completion("a fox")).encode()[:-20])


def dies_midway(handler):
    handler.send(b'{"choices": [', length=5000)
    handler.close_connection = True
    handler.connection.shutdown(socket.SHUT_RDWR)


def hangs_up(handler):
    handler.close_connection = True
    handler.connection.shutdown(socket.SHUT_RDWR)


def answers_and_hangs_up(handler):
    handler.send(completion("goodbye"))
    hangs_up(handler)


def slow(handler):
    time.sleep(0.6)
    handler.send(completion("too late"))


def dripping(handler):
    handler.send(b"", length=5000)
    for _ in range(60):
        handler.wfile.write(b" ")
        time.sleep(0.02)


def replies(body):
    return lambda handler: handler.send(body)


huge = replies(json.dumps(completion("fox " * 2_500_000)).encode())


@pytest.fixture
def server():
    with ChatServer() as running:
        threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        yield running
        running.shutdown()


@pytest.fixture
def judge(server):
    judge = JudgeServer(server.url, "tiny", **FAST)
    yield judge
    judge.unload()


def test_images_are_sent_as_jpeg_data_urls_and_answers_keep_their_order(server, judge):
    server.answer = lambda question, image: f"{question} {Image.open(io.BytesIO(image)).size} {len(image)}"
    images = random_images(12, height=24, width=32)
    answers = judge.ask(list(images), [f"question {index}" for index in range(12)])
    for index, answer in enumerate(answers):
        buffer = io.BytesIO()
        Image.fromarray(images[index]).save(buffer, "JPEG", quality=80)
        assert answer == f"question {index} (32, 24) {len(buffer.getvalue())}"
    path, headers, body = server.requests[0]
    assert path == "/v1/chat/completions"
    assert "Authorization" not in headers
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("tiny", 0, 64)
    assert body["messages"][0]["content"][0]["image_url"]["url"].startswith("data:image/jpeg;base64,/9j/")
    assert isinstance(judge, Judge)


def test_connections_are_kept_and_limited(server):
    judge = JudgeServer(server.url, "tiny", concurrency=3, **FAST)

    def slowly(question, image):
        time.sleep(0.02)
        return "a fox"

    server.answer = slowly
    for _ in range(2):
        assert judge.ask(list(random_images(9)), ["?"] * 9) == ["a fox"] * 9
    judge.unload()
    assert server.most_under_way == 3
    assert len(server.connections) <= 3


def test_connection_that_the_server_closed_costs_no_attempt(server):
    judge = JudgeServer(server.url, "tiny", attempts=1, timeout=1)
    server.faults = [answers_and_hangs_up]
    assert judge.ask(list(random_images(1)), ["?"]) == ["goodbye"]
    time.sleep(0.1)
    assert judge.ask(list(random_images(1)), ["?"]) == ["a fox riding a bike"]
    assert len(server.connections) == 2
    judge.unload()


def test_only_model_of_a_server_is_found(server):
    judge = JudgeServer(server.url.removesuffix("/v1"), **FAST)
    assert judge.ask(list(random_images(1)), ["?"]) == ["a fox riding a bike"]
    assert server.requests[0][2]["model"] == "tiny"
    judge.unload()
    server.models = ["small", "large"]
    with pytest.raises(JudgeServerError, match="lists small, large: name one with model="):
        JudgeServer(server.url, **FAST).load()
    server.models = []
    with pytest.raises(JudgeServerError, match="lists no model: name one with model="):
        JudgeServer(server.url, **FAST).load()
    server.models = None
    with pytest.raises(JudgeServerError, match="GET /models in 3 of 3 attempts .*HTTP 500"):
        JudgeServer(server.url, **FAST).load()


def test_loading_asks_a_question_and_no_list_if_the_model_is_named(server, judge):
    server.models = None
    server.faults = [replies(completion(""))]
    judge.load()
    assert len(server.requests) == 1, "an empty answer shows that the server is there, and is not asked for again"
    server.faults = [status(404)]
    with pytest.raises(JudgeServerError, match="POST /chat/completions in 1 of 3 attempts .*HTTP 404"):
        judge.load()
    server.always = status(503)
    with pytest.raises(JudgeServerError, match="in 3 of 3 attempts .*HTTP 503"):
        judge.load()


@pytest.mark.parametrize(
    "fault",
    [
        *(status(code) for code in (500, 502, 503, 429, 408)),
        *(truncated_json, dies_midway, hangs_up, huge, dripping, slow),
        *(
            replies(body)
            for body in (
                completion(""),
                completion(" \n"),
                completion(None),
                {"choices": []},
                {"choices": [0]},
                b"\xff",
            )
        ),
    ],
    ids=lambda fault: getattr(fault, "__name__", None),
)
def test_question_is_asked_again_after_a_fault(server, fault):
    judge = JudgeServer(server.url, "tiny", timeout=0.3, backoff=0.01, attempts=3)
    server.faults = [fault, fault]
    assert judge.ask(list(random_images(1)), ["?"]) == ["a fox riding a bike"]
    assert len(server.requests) == 3
    judge.unload()


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (status(500), r"HTTP 500 Internal Server Error: '\{\"error\": \"status 500\"\}'"),
        (status(429), "HTTP 429 Too Many Requests"),
        (truncated_json, "the response is not JSON"),
        (dies_midway, "RemoteProtocolError"),
        (hangs_up, "RemoteProtocolError"),
        (slow, "the response was not complete after 0.3 s"),
        (dripping, "the response was not complete after 0.3 s"),
        (huge, "the response is larger than 1000000 bytes"),
        (replies(completion("")), "the answer is empty"),
        (replies({"error": "busy"}), r"""the response is not a chat completion: '\{"error": "busy"\}'"""),
    ],
)
def test_after_the_last_attempt_the_error_names_server_attempts_and_reason(server, fault, reason):
    judge = JudgeServer(server.url, "tiny", timeout=0.3, backoff=0.01, attempts=2)
    server.always = fault
    message = f"judge server {server.url} gave no usable answer to POST /chat/completions in 2 of 2 attempts .*{reason}"
    with pytest.raises(JudgeServerError, match=message):
        judge.ask(list(random_images(1)), ["?"])
    assert len(server.requests) == 2
    judge.unload()


def test_absent_server_is_an_error_after_bounded_retries():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    judge = JudgeServer(f"http://127.0.0.1:{port}", "tiny", **FAST)
    with pytest.raises(JudgeServerError, match=rf"127\.0\.0\.1:{port}/v1 .* in 3 of 3 attempts .*ConnectError"):
        judge.ask(list(random_images(20)), ["?"] * 20)
    with pytest.raises(JudgeServerError, match="POST /chat/completions in 3 of 3 attempts"):
        judge.load()
    with pytest.raises(JudgeServerError, match="GET /models in 3 of 3 attempts"):
        JudgeServer(f"http://127.0.0.1:{port}", **FAST).load()


@pytest.mark.parametrize("code", [400, 401, 404, 413, 301])
def test_request_that_cannot_succeed_is_not_repeated(server, judge, code):
    server.always = status(code)
    with pytest.raises(JudgeServerError, match=f"in 1 of 3 attempts .*HTTP {code}"):
        judge.ask(list(random_images(1)), ["?"])
    assert len(server.requests) == 1


def test_server_that_dies_while_it_works_stops_the_batch(server):
    judge = JudgeServer(server.url, "tiny", concurrency=2, timeout=0.3, backoff=0.01, attempts=2)
    server.faults = [None] * 3
    server.always = hangs_up
    with pytest.raises(JudgeServerError, match="RemoteProtocolError"):
        judge.ask(list(random_images(40)), ["?"] * 40)
    assert len(server.requests) < 20, "the waiting questions are cancelled"
    judge.unload()


def test_waits_grow_and_retry_after_is_obeyed_within_bounds(server):
    judge = JudgeServer(server.url, "tiny", backoff=0.05, max_backoff=0.3, attempts=4)
    server.faults = [status(503)] * 3
    began = time.monotonic()
    judge.ask(list(random_images(1)), ["?"])
    assert 0.05 + 0.1 + 0.2 <= time.monotonic() - began < 1
    for header, least in (("0", 0), ("60", 0.3)):
        server.faults = [status(429, [("Retry-After", header)])]
        began = time.monotonic()
        judge.ask(list(random_images(1)), ["?"])
        assert least <= time.monotonic() - began < least + 0.25
    judge.unload()


def test_retry_after_is_read_in_seconds_or_as_a_date():
    assert (_seconds("7"), _seconds(None), _seconds("soon")) == (7, None, None)
    assert _seconds("Wed, 21 Oct 2015 07:28:00 GMT") == 0


def test_answer_in_another_language_arrives_as_it_is(server, judge):
    server.answer = lambda question, image: " 一只狐狸在骑自行车 – лиса 🦊\n"
    assert judge.ask(list(random_images(1)), ["?"]) == ["一只狐狸在骑自行车 – лиса 🦊"]
    server.faults = [replies(completion([{"type": "text", "text": "ein "}, {"type": "text", "text": "Fuchs"}]))]
    assert judge.ask(list(random_images(1)), ["?"]) == ["ein Fuchs"]
    reward = load_reward("vlm_vqa", model="tiny", server=server.url, judge_options=FAST)
    metadata = [{"questions": ("What animals are in this image?",), "answers": ("foxes",)}]
    scores, details = evaluate_reward(reward, random_images(1), ["foxes"], metadata)
    assert (scores.tolist(), details["answers"]) == ([0], [("一只狐狸在骑自行车 – лиса 🦊",)])
    reward.unload()


def test_failing_server_is_an_error_of_the_reward_and_never_a_score(server):
    server.always = status(500)
    reward = load_reward("vlm_vqa", model="tiny", server=server.url, judge_options=FAST)
    metadata = [{"questions": ("?",), "answers": ("two",)}] * 2
    with pytest.raises(JudgeServerError, match="HTTP 500"):
        evaluate_reward(reward, random_images(2), ["a", "b"], metadata, non_finite="keep")
    reward.unload()


def test_key_comes_from_the_environment(server, monkeypatch):
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    with pytest.raises(ValueError, match="environment variable 'JUDGE_KEY' must hold the server's key; it is not set"):
        JudgeServer(server.url, "tiny", api_key_variable="JUDGE_KEY")
    monkeypatch.setenv("JUDGE_KEY", "secret")
    judge = JudgeServer(server.url, "tiny", api_key_variable="JUDGE_KEY", **FAST)
    judge.ask(list(random_images(1)), ["?"])
    assert server.requests[0][1]["Authorization"] == "Bearer secret"
    server.always = status(401)
    with pytest.raises(JudgeServerError) as caught:
        judge.ask(list(random_images(1)), ["?"])
    assert "secret" not in str(caught.value)
    judge.unload()


def test_proxy_of_the_environment_is_not_used_for_a_local_server(server, judge, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    assert judge.ask(list(random_images(1)), ["?"]) == ["a fox riding a bike"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"url": "localhost:8000"}, "server must be a URL such as"),
        ({"url": "ftp://host"}, "server must be a URL such as"),
        ({"url": "http://me:secret@host"}, "without credentials"),
        ({"url": "http://host:99999"}, "server must be a URL such as .*got 'http://host:99999'"),
        ({"timeout": 0}, "timeout must be a number in .*; got 0"),
        ({"timeout": float("nan")}, "timeout must be a number in .*; got nan"),
        ({"url": "http://host/v1#secret"}, "a query or a fragment"),
        ({"url": "http://host/v1?key=secret"}, "a query or a fragment"),
        ({"url": "http://:secret@host"}, "without credentials"),
        ({"url": "http://[::1"}, "server must be a URL such as"),
        ({"url": 5}, "server must be a URL such as"),
        ({"attempts": 10**12}, "attempts must be an integer in .*; got 1000000000000"),
        ({"attempts": True}, "attempts must be an integer in .*; got True"),
        ({"max_tokens": 0}, "max_tokens must be an integer in .*; got 0"),
        ({"attempts": 0}, "attempts must be an integer in .*; got 0"),
        ({"concurrency": 0}, "concurrency must be an integer in .*; got 0"),
        ({"model": 5}, "model must be a name or None; got 5"),
        ({"model": ""}, "model must be a name or None; got ''"),
        ({"api_key_variable": 5}, "api_key_variable must be a name or None; got 5"),
    ],
)
def test_mistakes_are_named_before_anything_is_sent(arguments, message):
    with pytest.raises(ValueError, match=message):
        JudgeServer(**({"url": "http://localhost:8000"} | arguments))


def test_there_must_be_one_question_per_image(judge):
    with pytest.raises(ValueError, match="zip"):
        judge.ask(list(random_images(2)), ["?"])
