"""Runs that are killed at random moments or meet a full disk, and are resumed, against one that was left alone."""

import os
import shutil
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
import resource, signal, sys
from pathlib import Path
from helpers.micro_agents import micro_config, resume_config
from agents.training.preparation import run_training

model, folder, resume, largest = sys.argv[1:]
if int(largest):  # a file that is larger fails, as on a full disk
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(largest), resource.RLIM_INFINITY))
small = {"num_inference_steps": 2, "samples_per_iteration": 4, "eval_samples": 2, "iterations": 5}
run_training(
    resume_config(Path(folder)) if resume == "resume" else micro_config(model, Path(folder), **small)
)
"""
KILLS = [(moment, how) for moment in range(25) for how in (signal.SIGKILL, signal.SIGTERM)]


def start(model, folder, how="new", largest=0):
    path = os.pathsep.join(filter(None, (str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH"))))
    command = [sys.executable, "-c", PROGRAM, str(model), str(folder), how, str(largest)]
    quiet = subprocess.DEVNULL
    return subprocess.Popen(command, env=os.environ | {"PYTHONPATH": path}, stdout=quiet, stderr=quiet)


def finish(model, folder):
    """Resume the run; one without a checkpoint never began, and starts again."""
    began = (folder / "config.yaml").exists() and any(folder.glob("checkpoints/iteration_*"))
    if not began:
        shutil.rmtree(folder, ignore_errors=True)
    assert start(model, folder, "resume" if began else "new").wait() == 0


@pytest.fixture(scope="module")
def left_alone(micro_pipeline_folder, tmp_path_factory):
    """A run that nobody killed, the seconds until its folder was there, and those until its end."""
    folder = tmp_path_factory.mktemp("runs") / "alone"
    began = time.perf_counter()
    process = start(micro_pipeline_folder, folder)
    while not folder.exists():
        assert process.poll() is None, "the run ended before it began"
        time.sleep(0.01)
    loaded = time.perf_counter() - began
    assert process.wait() == 0
    return folder, loaded, time.perf_counter() - began


@pytest.mark.slow
@pytest.mark.parametrize(("moment", "how"), KILLS)
def test_killed_and_resumed_process_gives_the_same_bits(left_alone, micro_pipeline_folder, tmp_path, moment, how):
    expected, loaded, duration = left_alone
    process = start(micro_pipeline_folder, tmp_path / "run")
    # From just before the folder is made, so that the start, checkpoints and the end are hit too.
    time.sleep(np.random.default_rng(moment).uniform(0.95 * loaded, duration))
    process.send_signal(how)
    process.wait()
    finish(micro_pipeline_folder, tmp_path / "run")
    assert_same_run(tmp_path / "run", expected)


@pytest.mark.slow
@pytest.mark.parametrize("largest", [100, 2_000, 5_000, 20_000, 50_000])
def test_run_on_a_full_disk_is_resumed_to_the_same_bits(left_alone, micro_pipeline_folder, tmp_path, largest):
    start(micro_pipeline_folder, tmp_path / "run", largest=largest).wait()
    finish(micro_pipeline_folder, tmp_path / "run")
    assert_same_run(tmp_path / "run", left_alone[0])
