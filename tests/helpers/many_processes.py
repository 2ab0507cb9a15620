"""Runs of several processes on a CPU, and the mishaps that happen to one of them; what their tests share.

Processes are forked from a server that has imported everything, so that a run takes a second or two. Its imports take
longer, so only a worker of pytest-xdist that comes to such a test starts it.
"""

import json
import multiprocessing
import os
import signal
import socket
import sys
import time
from dataclasses import dataclass, field, replace
from functools import cache, wraps
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from agents.algorithms.on_policy import TensorOnPolicyAlgorithm
from agents.distributed import Processes
from agents.training.preparation import prepare_run, run_training
from helpers import micro_agents
from helpers.paths import ROOT

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["helpers.many_processes"])
# The server finds what it is to import by this variable alone.
_PATHS = (str(ROOT / "tests"), str(ROOT), os.environ.get("PYTHONPATH"))
os.environ["PYTHONPATH"] = os.pathsep.join(
    dict.fromkeys(filter(None, os.pathsep.join(filter(None, _PATHS)).split(os.pathsep)))
)


@dataclass(frozen=True)
class Mishap:
    """What happens to one process, at its `call`-th call of the reward, or at its `update`-th update."""

    kind: str
    rank: int = 1
    call: int = 0
    update: int = 0

    def happen(self):
        if self.kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.kind == "interrupt":
            os.kill(os.getpid(), signal.SIGINT)
        if self.kind == "raise":
            raise RuntimeError("the judge has left")


@dataclass(frozen=True)
class Job:
    """A run of `micro_config`, with other settings by name; `resume` goes on in the folder."""

    model: str
    folder: Path
    settings: dict[str, Any] = field(default_factory=dict)
    mishap: Mishap | None = None
    resume: bool = False
    synchronised: bool = True
    timeout: float = 60.0

    def config(self):
        if self.resume:
            return micro_agents.resume_config(self.folder)
        return micro_agents.micro_config(self.model, self.folder, **self.settings)


@dataclass(frozen=True)
class Outcome:
    """How a run ended: exit codes, what each process said last, its weights after every update, seconds."""

    codes: list[int]
    said: list[str]
    weights: list[list[list[float]]]
    seconds: float


@cache
def start_server():
    """Start the server and wait for its imports, which are no part of the time that a run may take."""
    first = PROCESSES.Process(target=int)
    first.start()
    first.join()


def run_processes(count, job, limit=120):
    """Run a job in `count` processes and wait; those that are left after `limit` seconds are a failure."""
    start_server()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    notes = [job.folder.with_name(f"{job.folder.name}-{rank}-of-{count}.jsonl") for rank in range(count)]
    for note in notes:
        note.unlink(missing_ok=True)
    began = time.monotonic()
    processes = [
        PROCESSES.Process(target=_process, args=(rank, count, port, job, notes[rank])) for rank in range(count)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(max(0.0, limit - (time.monotonic() - began)))
    left = [process for process in processes if process.is_alive()]
    for process in left:
        process.kill()
    assert not left, f"{len(left)} processes hang"
    lines = [[json.loads(line) for line in note.read_text().splitlines()] if note.exists() else [] for note in notes]
    said = [next((line for line in reversed(part) if isinstance(line, str)), "") for part in lines]
    weights = [[line for line in part if isinstance(line, list)] for part in lines]
    return Outcome([p.exitcode for p in processes], said, weights, time.monotonic() - began)


def _process(rank, count, port, job, note):
    """One process, as a launcher would start it."""
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.manual_seed(100 + rank)  # nothing may depend on what a process did before
    with note.open("a") as file:

        def say(line):
            file.write(json.dumps(line) + "\n")
            file.flush()

        _rig(rank, job, say)
        sys.exit(_train(job, say))


def _train(job, say):
    processes = None
    try:
        run = prepare_run(job.config())
        processes = run.algorithm.processes
        result = run.train()
    except Exception as error:
        say(f"{type(error).__name__}: {error}")
        if processes is not None:
            processes.shutdown(error)
        return 1
    say("stopped" if result.reward_after is None else f"reward {result.reward_after!r}")
    processes.shutdown()
    return 0


def _rig(rank, job, say):
    """Note the weights after every update, and let the mishap happen."""
    counts = {"call": 0, "update": 0}
    reward, step, accumulate = (
        micro_agents.brightness,
        TensorOnPolicyAlgorithm._step,
        TensorOnPolicyAlgorithm._accumulate,
    )

    def count(what):
        counts[what] += 1
        if job.mishap and job.mishap.rank == rank and getattr(job.mishap, what) == counts[what]:
            job.mishap.happen()

    @wraps(reward)
    def brightness(images, prompts, metadata):
        count("call")
        return reward(images, prompts, metadata)

    def accumulating(self, indices):
        count("update")
        return accumulate(self, indices)

    def stepping(self, metrics):
        step(self, metrics)
        say([number for value in self.policy.state_dict().values() for number in value.flatten()[:5].tolist()])

    micro_agents.brightness = brightness
    TensorOnPolicyAlgorithm._step = stepping
    TensorOnPolicyAlgorithm._accumulate = accumulating
    if not job.synchronised:
        Processes._sum_gradients = lambda self, parameters: None


def again(job, **changes):
    """The same job with changes, to go on with."""
    return replace(job, resume=True, mishap=None, **changes)


LINEAR = {"learning_rate": 0.05, "adam_epsilon": 1.0}
"""Steps in proportion to gradients: with a small epsilon Adam turns the rounding of a tiny gradient into a step."""


def trained(folder):
    """What learned in a finished run."""
    return load_file(folder / "policy" / "policy.safetensors")


def largest_difference(folder, other):
    mine, theirs = trained(folder), trained(other)
    assert mine.keys() == theirs.keys()
    return max(float((mine[name] - theirs[name]).abs().max()) for name in mine)


def single(model, folder, **settings):
    """The run of one process that all others are to equal."""
    run_training(micro_agents.micro_config(model, folder, **settings))
    return folder
