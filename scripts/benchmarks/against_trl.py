"""Compare our trainer with TRL's on the same work: they take turns, and one waits while the other computes.

    python scripts/benchmarks/random_stable_diffusion.py model
    python scripts/benchmarks/against_trl.py --against trl-venv/bin/python --model model --threads 1
    python scripts/benchmarks/against_trl.py --against trl-venv/bin/python --model sd14-random --device cuda

`--against` is the Python interpreter of a virtual environment with TRL (see trl_trainer.py). Each trainer is a process
that is started once. In every round each of them runs one iteration, in alternating order, and the ratio of the round
compares the two. With many rounds the median ratio holds on a machine that others use too.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import random_stable_diffusion
import tyro
from measuring.figures import PHASES

SCRIPTS = Path(__file__).parent
ARCHITECTURES = {"sd14-random": "sd14"}
"""Model names that overhead.py knows and TRL does not, with the architecture that is written to a folder for both."""


@dataclass(kw_only=True)
class Arguments:
    """The work of both trainers; the defaults are those of the first comparison with TRL."""

    against: Path
    """Python interpreter of an environment with TRL."""
    model: str
    """Folder in diffusers' layout, Hub id, or sd14-random, which is written to a folder for TRL."""
    model_folder: Path | None = None
    """Folder of sd14-random, written if it is not there (4.3 GB, in bfloat16 half). Default: a temporary folder."""
    resolution: int | None = None
    """Side of the images in pixels. Default: the model's own."""
    device: str = "cpu"
    """cpu or cuda."""
    dtype: str = "float32"
    """float32 or bfloat16."""
    samples: int = 32
    """Images per iteration."""
    sample_batch_size: int = 8
    """Images generated at once."""
    train_batch_size: int = 4
    """Samples in one training call of TRL, (sample, timestep) pairs in one of ours."""
    updates: int = 2
    """Optimizer steps per iteration."""
    num_inference_steps: int = 20
    """Denoising steps."""
    guidance_scale: float = 5.0
    """Scale of classifier-free guidance; 1 is off."""
    lora_rank: int = 4
    """Rank of the LoRA on the attention's projections."""
    threads: int = 1
    """CPU threads of each process."""
    ours: str = ""
    """More arguments for overhead.py only, such as "--compile-denoiser"."""
    theirs: str = ""
    """More arguments for trl_trainer.py only."""
    rounds: int = 7
    """Iterations of each trainer that are compared."""
    json: Path | None = None
    """File that the figures are written to as well."""


class Trainer:
    """A process that runs an iteration on request."""

    def __init__(self, command: list[str], environment: dict[str, str]) -> None:
        """Start the process, and wait until it has run its first iteration, which is not timed."""
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        )
        self._answer("ready")

    @property
    def _pipes(self) -> tuple[IO[str], IO[str]]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        return self.process.stdin, self.process.stdout

    def _answer(self, beginning: str) -> str:
        for line in self._pipes[1]:
            if line.startswith(beginning):
                return line
        raise RuntimeError(f"{self.process.args!r} ended early:\n{self.process.communicate()[1][-2000:]}")

    def iteration(self) -> dict[str, float]:
        """Run one iteration and return the seconds of its phases."""
        requests = self._pipes[0]
        requests.write("iteration\n")
        requests.flush()
        return json.loads(self._answer("{"))

    def finish(self) -> dict[str, Any]:
        """End the process and return its figures."""
        return json.loads(self.process.communicate()[0])


def commands(arguments: Arguments) -> dict[str, list[str]]:
    """Return the command lines of both trainers."""
    shared = ["model", "device", "dtype", "samples", "sample_batch_size", "train_batch_size", "updates"]
    shared += ["num_inference_steps", "guidance_scale", "lora_rank", "threads"]
    if arguments.resolution is not None:
        shared.append("resolution")
    flags = [f"--{name.replace('_', '-')}={getattr(arguments, name)}" for name in shared]
    flags += ["--timestep-fraction=1", "--on-request"]
    same = ["--lora-targets=attention", "--timestep-window", "0", "1"]
    return {
        "ours": [sys.executable, str(SCRIPTS / "overhead.py"), *flags, *same, *arguments.ours.split()],
        "trl": [str(arguments.against), str(SCRIPTS / "trl_trainer.py"), *flags, *arguments.theirs.split()],
    }


@contextmanager
def model_of(arguments: Arguments) -> Iterator[str]:
    """Return the model that both trainers read: that of the arguments, or the folder that is written for it.

    Raises:
        ValueError: for a `model_folder` with a model that is not written, or a folder that holds something else.
    """
    if arguments.model not in ARCHITECTURES:
        if arguments.model_folder is not None:
            raise ValueError(
                f"model_folder is valid only with model {' or '.join(ARCHITECTURES)}; got model {arguments.model!r}"
            )
        yield arguments.model
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.model_folder or Path(temporary) / arguments.model
        if not (folder / "model_index.json").is_file():
            print(f"writing {arguments.model} to {folder}", file=sys.stderr)
            random_stable_diffusion.write(folder, ARCHITECTURES[arguments.model], arguments.dtype)
        yield str(folder)


def compare(arguments: Arguments) -> dict[str, Any]:
    """Let both trainers take turns; return the median ratios of our times to TRL's, and the figures of each.

    A ratio whose name ends in `_cpu` compares CPU time, which varies less on a machine that others use.
    """
    with model_of(arguments) as model:
        return _compare(replace(arguments, model=model)) | {"model": arguments.model}


def _compare(arguments: Arguments) -> dict[str, Any]:
    without_package = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment = {"OMP_NUM_THREADS": str(arguments.threads), "HF_HUB_OFFLINE": "1"}
    trainers = {
        name: Trainer(command, (without_package if name == "trl" else dict(os.environ)) | environment)
        for name, command in commands(arguments).items()
    }
    rounds: list[dict[str, dict[str, float]]] = []
    for number in range(arguments.rounds):
        order = list(trainers) if number % 2 == 0 else list(reversed(trainers))
        rounds.append({name: trainers[name].iteration() for name in order})
        for one in rounds[-1].values():
            one["iteration"] = sum(one[phase] for phase in PHASES)
            one["iteration_cpu"] = sum(one[f"{phase}_cpu"] for phase in PHASES)
        print(", ".join(f"{name} {rounds[-1][name]['iteration']:.2f} s" for name in trainers), file=sys.stderr)
    figures = {name: trainer.finish() for name, trainer in trainers.items()}
    ratios = {name: [one["ours"][name] / one["trl"][name] for one in rounds] for name in rounds[0]["ours"]}
    memory = figures["ours"]["peak_memory_mb"] / figures["trl"]["peak_memory_mb"]
    return {
        "ratio": {name: statistics.median(values) for name, values in ratios.items()} | {"peak_memory": memory},
        "ratios_of_iterations": ratios["iteration"],
        **figures,
    }


def main() -> int:
    """Compare, and print and write the figures."""
    arguments = tyro.cli(Arguments, description=__doc__)
    try:
        text = json.dumps(compare(arguments), indent=2)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(text)
    if arguments.json is not None:
        arguments.json.write_text(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
