"""Processes that are killed at random moments and resumed by others, against one that was left alone."""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from helpers.paths import ROOT
from helpers.run_comparison import assert_same_run

TESTS = ROOT / "tests"
PROGRAM = """
import sys
from pathlib import Path
from helpers.micro_agents import micro_config, resume_config
from agents.training.preparation import run_training

model, folder, resume = sys.argv[1:]
run_training(
    resume_config(Path(folder))
    if resume == "resume"
    else micro_config(model, Path(folder), iterations=5)
)
"""


def start(model, folder, how="new"):
    path = os.pathsep.join(filter(None, (str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH"))))
    command = [sys.executable, "-c", PROGRAM, str(model), str(folder), how]
    return subprocess.Popen(command, env=os.environ | {"PYTHONPATH": path}, stdout=subprocess.DEVNULL)


def wait_for(process, file):
    while not file.exists():
        assert process.poll() is None, "the run ended before it began"
        time.sleep(0.01)


@pytest.fixture(scope="module")
def left_alone(micro_pipeline_folder, tmp_path_factory):
    """A run that nobody killed, and how many seconds it took from its first checkpoint on."""
    folder = tmp_path_factory.mktemp("runs") / "alone"
    process = start(micro_pipeline_folder, folder)
    wait_for(process, folder / "config.yaml")
    began = time.perf_counter()
    assert process.wait() == 0
    return folder, time.perf_counter() - began


@pytest.mark.slow
@pytest.mark.parametrize("moment", range(10))
def test_killed_and_resumed_process_gives_the_same_bits(left_alone, micro_pipeline_folder, tmp_path, moment):
    expected, duration = left_alone
    process = start(micro_pipeline_folder, tmp_path)
    wait_for(process, tmp_path / "config.yaml")
    time.sleep(np.random.default_rng(moment).uniform(0, duration))
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert start(micro_pipeline_folder, tmp_path, "resume").wait() == 0
    assert_same_run(tmp_path, expected)
