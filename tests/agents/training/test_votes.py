"""A run whose reward is people: it waits for them, stops when it is told to, and never asks twice."""

import json
import os
import signal
import threading

import pytest
from helpers.micro_agents import micro_config, resume_config
from helpers.run_comparison import assert_same_run

from agents.training.preparation import run_training
from rewards.votes.page import VotingPage

OPTIONS = ("model=tiny", "votes_per_batch=2", "device=cpu")


@pytest.fixture(autouse=True)
def nothing_is_drawn(monkeypatch):
    monkeypatch.setattr("agents.evaluation.plots.write_figure", lambda path, _: path.touch())
    monkeypatch.setattr("agents.training.run.write_report", lambda file, _: file.touch())
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def pages(monkeypatch):
    """The pages that runs open."""
    opened: list[VotingPage] = []
    start = VotingPage.open

    def noted(self):
        start(self)
        if self not in opened:
            opened.append(self)

    monkeypatch.setattr(VotingPage, "open", noted)
    return opened


def person(pages, votes, is_over):
    """Vote on every pair by a rule, until it is time to press Ctrl-C instead."""
    while not is_over.wait(0.01):
        shown = pages[-1].shown() if pages else {"open": 0}
        if shown["open"] and not votes:
            return os.kill(os.getpid(), signal.SIGINT)
        if shown["open"]:
            votes -= pages[-1].vote(shown["number"], "left" if shown["left"] < shown["right"] else "right")


def train(config, pages, votes=10**9):
    pages.clear()
    is_over = threading.Event()
    voting = threading.Thread(target=person, args=(pages, votes, is_over), daemon=True)
    voting.start()
    try:
        return run_training(config)
    finally:
        is_over.set()
        voting.join()


def pairs(folder):
    lines = [json.loads(line) for line in (folder / "judge" / "votes.jsonl").read_text().splitlines()]
    return [(line["left"], line["right"], line["winner"]) for line in lines]


def test_stopped_run_keeps_its_votes_and_goes_on_without_asking_again(micro_pipeline_folder, pages, tmp_path):
    settings = {"reward": "votes", "reward_options": OPTIONS, "iterations": 2, "eval_samples": 2}
    train(micro_config(micro_pipeline_folder, tmp_path / "whole", **settings), pages)
    expected = pairs(tmp_path / "whole")
    assert len(expected) == len(set(expected)) == 8  # two batches in each iteration; held-out samples cost nothing
    stopped = train(micro_config(micro_pipeline_folder, tmp_path / "run", **settings), pages, votes=5)
    assert stopped.iterations == 1
    assert pairs(tmp_path / "run") == expected[:5]
    train(resume_config(tmp_path / "run"), pages)
    assert pairs(tmp_path / "run") == expected
    for folder in ("run", "whole"):
        (tmp_path / folder / "judge" / "votes.jsonl").unlink()  # the votes have times
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_people_are_no_held_out_reward(micro_pipeline_folder, tmp_path):
    for reward in ("votes", "votes:1,jpeg_compressibility:1"):
        with pytest.raises(ValueError, match="votes asks people, and held-out samples must not cost votes"):
            run_training(micro_config(micro_pipeline_folder, tmp_path / "run", holdout_reward=reward))
