"""The HTTP judge against `transformers serve`, which is started here with the bundled LLaVA.

The server loads the model from a Hub cache, as for a user who downloaded it. Its answers must equal those of the same
model in this process about the images after JPEG compression.
"""

import io
import os
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import httpx2
import numpy as np
import pytest
from helpers.held_out_renderings import load_renderings
from PIL import Image

from rewards import evaluate_reward, load_reward
from rewards.judge.alignment import QUESTION
from rewards.judge.judge_model import JudgeModel
from rewards.judge.judge_server import JudgeServer, JudgeServerError
from rewards.networks.pretrained import resolve_source

NAME = "tiny/judge"
LENGTH = 12
QUESTIONS = (QUESTION, "How many animals are in this image?")
START = 150.0


class TransformersServe:
    """`transformers serve` in a process of its own, offline, on a port that the system chooses at the first start."""

    def __init__(self, folder, model):
        self.log = folder / "log.txt"
        self.log.touch()
        self.model = model
        self.port = 0
        self._environment = os.environ | {
            "HF_HOME": str(folder / "hub"),
            "HF_HUB_CACHE": str(folder / "hub"),
            "HF_HUB_OFFLINE": "1",
            "HF_HUB_DISABLE_UPDATE_CHECK": "1",
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
        }

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}"

    def start(self):
        arguments = ("--host", "127.0.0.1", "--port", str(self.port), "--device", "cpu", "--dtype", "float32")
        past = self.log.stat().st_size
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "transformers.cli.transformers", "serve", self.model, *arguments],
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        try:
            self._wait_until_ready(past, time.monotonic() + START)
        except BaseException:
            self.stop()
            raise

    def _wait_until_ready(self, past, deadline):
        while self.process.poll() is None and time.monotonic() < deadline:
            running = re.search(r"running on http://127\.0\.0\.1:(\d+)", self.said(past))
            if running is not None:
                self.port = int(running[1])
                assert httpx2.get(f"{self.url}/health", trust_env=False).json() == {"status": "ok"}
                return
            time.sleep(0.05)
        pytest.fail(f"the server did not start (exit status {self.process.poll()}):\n{self.said(past)[-5000:]}")

    def said(self, past=0):
        return self.log.read_bytes()[past:].decode(errors="replace")

    def answered(self):
        return len(re.findall(r"POST /v1/chat/completions HTTP/1.1. 200", self.said()))

    def kill(self):
        self.process.kill()
        self.process.wait()

    def stop(self):
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.kill()


@pytest.fixture(scope="module")
def serve(tmp_path_factory):
    folder = tmp_path_factory.mktemp("serve")
    repository = folder / "hub" / f"models--{NAME.replace('/', '--')}"
    commit = "0" * 40
    shutil.copytree(resolve_source("tiny", "judge"), repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    server = TransformersServe(folder, NAME)
    server.start()
    yield server
    server.stop()


@pytest.fixture
def log_on_failure(serve):
    """Print what the server wrote during the test; pytest shows it if the test fails."""
    past = serve.log.stat().st_size
    yield
    print("the server's log:", serve.said(past)[-5000:], sep="\n")


pytestmark = pytest.mark.usefixtures("log_on_failure")


def renderings_and_noise(batch):
    """Renderings at even indices and, at odd indices, noise of another size, which JPEG changes."""
    random = np.random.default_rng(0)
    renderings, _ = load_renderings()
    return [
        random.integers(0, 256, (80, 48, 3), dtype=np.uint8) if index % 2 else renderings[index * 37 % len(renderings)]
        for index in range(batch)
    ]


def after_jpeg(images):
    files = [io.BytesIO() for _ in images]
    for image, file in zip(images, files, strict=True):
        Image.fromarray(image).save(file, "JPEG", quality=80)
    return [np.asarray(Image.open(file)) for file in files]


@pytest.fixture(scope="module")
def in_process():
    return JudgeModel("tiny", device="cpu", max_new_tokens=LENGTH)


def test_load_finds_the_model_that_is_served(serve):
    judge = JudgeServer(serve.url, max_tokens=LENGTH, attempts=1)
    judge.load()
    assert judge.model == NAME
    judge.unload()


def test_served_answers_equal_those_in_process_for_any_concurrency(serve, in_process):
    images = renderings_and_noise(10)
    questions = [QUESTIONS[index // 2 % 2] for index in range(10)]
    expected = in_process.ask(after_jpeg(images), questions)
    assert all(expected)
    assert len(set(expected)) > 5, "the answers differ, so that a wrong order would be noticed"
    assert expected != in_process.ask(images, questions), "the answers show that the images were compressed"
    for concurrency in (1, 4):
        judge = JudgeServer(serve.url, NAME, max_tokens=LENGTH, attempts=1, concurrency=concurrency)
        assert judge.ask(images, questions) == expected
        judge.unload()


def test_alignment_by_server_equals_alignment_in_process(serve):
    options = {"text_model": "tiny", "device": "cpu"}
    here = load_reward("vlm_alignment", model="tiny", judge_options={"max_new_tokens": LENGTH}, **options)
    there = load_reward("vlm_alignment", server=serve.url, judge_options={"max_tokens": LENGTH}, **options)
    there.load()
    images, prompts = renderings_and_noise(8)[::2], ["a fox", "a cat", "two dogs", "a cow playing chess"]
    expected, said = evaluate_reward(here, np.stack(after_jpeg(images)), prompts, [{}] * 4)
    scores, details = evaluate_reward(there, np.stack(images), prompts, [{}] * 4)
    np.testing.assert_allclose(scores, expected, atol=1e-6)
    assert list(details["answer"]) == list(said["answer"])
    assert all(one != other for one, other in pairwise(scores))
    there.unload()


def test_vqa_by_server_equals_vqa_in_process(serve, in_process):
    images = renderings_and_noise(8)[::2]
    right = in_process.ask(after_jpeg(images[:1] * 2), QUESTIONS)
    metadata = [{"questions": QUESTIONS, "answers": tuple(right)}] * 4
    here = load_reward("vlm_vqa", model="tiny", device="cpu", judge_options={"max_new_tokens": LENGTH})
    there = load_reward("vlm_vqa", model=NAME, server=serve.url, judge_options={"max_tokens": LENGTH})
    expected, said = evaluate_reward(here, np.stack(after_jpeg(images)), ["dogs"] * 4, metadata)
    scores, details = evaluate_reward(there, np.stack(images), ["dogs"] * 4, metadata)
    assert scores.tolist() == expected.tolist()
    assert list(details["answers"]) == list(said["answers"])
    assert scores[0] == 1
    assert scores.min() < 1
    there.unload()


def test_unknown_model_is_an_error_at_once(serve):
    judge = JudgeServer(serve.url, "tiny/jugde", attempts=5, backoff=60)
    began = time.monotonic()
    for ask in (judge.load, lambda: judge.ask(renderings_and_noise(4), [QUESTION] * 4)):
        with pytest.raises(JudgeServerError, match="in 1 of 5 attempts .*HTTP 400 .*requested .*tiny/jugde"):
            ask()
    assert time.monotonic() - began < 10
    judge.unload()


def test_killed_server_is_an_error_after_few_attempts_and_survived_with_many(serve, in_process):
    images, asked = renderings_and_noise(120), {"max_tokens": LENGTH, "timeout": 60, "concurrency": 2}
    waits = JudgeServer(serve.url, NAME, attempts=360, backoff=0.1, max_backoff=0.5, **asked)
    gives_up = load_reward(
        "vlm_vqa", model=NAME, server=serve.url, judge_options={"attempts": 3, "backoff": 0.1, **asked}
    )
    metadata = [{"questions": (QUESTION,), "answers": ("a dog",)}] * 60
    before = serve.answered()
    with ThreadPoolExecutor(2) as pool:
        failing = pool.submit(
            evaluate_reward, gives_up, np.stack(images[::2]), ["dogs"] * 60, metadata, non_finite="keep"
        )
        surviving = pool.submit(waits.ask, images[:24:2], [QUESTION] * 12)
        while serve.answered() < before + 6:
            assert not failing.done()
            time.sleep(0.01)
        assert not failing.done()
        assert not surviving.done()
        serve.kill()
        killed = time.monotonic()
        with pytest.raises(JudgeServerError, match=rf"judge server {serve.url}/v1 .* in 3 of 3 attempts"):
            failing.result(timeout=60)
        assert time.monotonic() - killed < 10
        assert not surviving.done()
        serve.start()
        assert surviving.result(timeout=120) == in_process.ask(after_jpeg(images[:24:2]), [QUESTION] * 12)
    waits.unload()
    gives_up.unload()
