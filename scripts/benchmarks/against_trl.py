"""Two trainers on the same work, taking turns: iteration by iteration, one waits while the other computes.

    python scripts/benchmarks/random_stable_diffusion.py model
    python scripts/benchmarks/against_trl.py --against trl-venv/bin/python --model model --threads 1
    python scripts/benchmarks/against_trl.py --against trl-venv/bin/python --model sd14-random --device cuda --dtype bfloat16

`--against` is the interpreter of an environment in which TRL is (see benchmark_trl.py). Both processes are started
once; in every round each does an iteration, in an order that alternates, and the ratio of a round is of iterations that
ran one after the other. So it holds on a machine that others use too, if rounds are many.
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
from benchmark_figures import PARTS

SCRIPTS = Path(__file__).parent
ARCHITECTURES = {"sd14-random": "sd14"}
"""Models of a name that benchmark.py knows and TRL does not, and the architecture of their folder."""


@dataclass(kw_only=True)
class Arguments:
    """The work of both; the defaults are those of the first comparison with TRL."""

    against: Path
    """Python interpreter of an environment with TRL."""
    model: str
    """Folder in diffusers' layout, a Hub id, or sd14-random, which TRL needs as a folder: it is written first."""
    model_folder: Path | None = None
    """Where sd14-random is written, or was. Default: a folder for this comparison alone; 4.3 GB, in bfloat16 half."""
    resolution: int | None = None
    """Side of the pictures in pixels. Default: the model's own."""
    device: str = "cpu"
    """cpu or cuda."""
    dtype: str = "float32"
    """float32 or bfloat16."""
    samples: int = 32
    """Pictures in an iteration."""
    sample_batch_size: int = 8
    """Pictures drawn at once."""
    train_batch_size: int = 4
    """Samples in one call of the denoiser in training."""
    updates: int = 2
    """Optimizer steps in an iteration."""
    num_inference_steps: int = 20
    """Denoising steps."""
    guidance_scale: float = 5.0
    """Of classifier-free guidance; 1 is off."""
    lora_rank: int = 4
    """Rank of the LoRA on the attention's projections."""
    threads: int = 1
    """CPU threads of each."""
    ours: str = ""
    """More arguments for benchmark.py alone, such as "--compile-denoiser"."""
    theirs: str = ""
    """More arguments for benchmark_trl.py alone."""
    rounds: int = 7
    """Turns of each."""
    json: Path | None = None
    """Where to write the figures."""


class Contestant:
    """A process that does an iteration when it is asked to."""

    def __init__(self, command: list[str], environment: dict[str, str]) -> None:
        """Start it, and wait until it has done its first iteration, which is not timed."""
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
        raise RuntimeError(f"{self.process.args} ended early:\n{self.process.communicate()[1][-2000:]}")

    def iteration(self, with_bare: bool = False) -> dict[str, float]:
        """Return the seconds of its parts."""
        requests = self._pipes[0]
        requests.write("bare\n" if with_bare else "iteration\n")
        requests.flush()
        return json.loads(self._answer("{"))

    def finish(self) -> dict[str, Any]:
        """End it, and return its figures."""
        return json.loads(self.process.communicate()[0])


def commands(arguments: Arguments) -> dict[str, list[str]]:
    """Return the command line of each."""
    shared = ["model", "device", "dtype", "samples", "sample_batch_size", "train_batch_size", "updates"]
    shared += ["num_inference_steps", "guidance_scale", "lora_rank", "threads"]
    if arguments.resolution is not None:
        shared.append("resolution")
    flags = [f"--{name.replace('_', '-')}={getattr(arguments, name)}" for name in shared]
    flags += ["--timestep-fraction=1", "--on-request"]
    same = ["--lora-targets=attention", "--timestep-window", "0", "1"]
    return {
        "ours": [sys.executable, str(SCRIPTS / "benchmark.py"), *flags, *same, *arguments.ours.split()],
        "trl": [str(arguments.against), str(SCRIPTS / "benchmark_trl.py"), *flags, *arguments.theirs.split()],
    }


@contextmanager
def model_of(arguments: Arguments) -> Iterator[str]:
    """Return the model that both read: that of the arguments, or the folder that is written for a name of ours.

    Raises:
        ValueError: for a folder that holds no pipeline, or one for a model that needs none.
    """
    if arguments.model not in ARCHITECTURES:
        if arguments.model_folder is not None:
            raise ValueError(
                f"model_folder must be given with {' or '.join(ARCHITECTURES)} alone; got model {arguments.model!r}"
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
    """Let both take turns, and return the median ratios of ours to theirs, and the figures of each.

    A ratio whose name ends in `_cpu` is of the time on a processor: on a machine that others use, the steadier one.
    """
    with model_of(arguments) as model:
        return _compare(replace(arguments, model=model)) | {"model": arguments.model}


def _compare(arguments: Arguments) -> dict[str, Any]:
    elsewhere = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment = {"OMP_NUM_THREADS": str(arguments.threads), "HF_HUB_OFFLINE": "1"}
    contestants = {
        name: Contestant(command, (elsewhere if name == "trl" else dict(os.environ)) | environment)
        for name, command in commands(arguments).items()
    }
    rounds: list[dict[str, dict[str, float]]] = []
    for number in range(arguments.rounds):
        order = list(contestants) if number % 2 == 0 else list(reversed(contestants))
        rounds.append({name: contestants[name].iteration() for name in order})
        for one in rounds[-1].values():
            one["iteration"] = sum(one[part] for part in PARTS)
            one["iteration_cpu"] = sum(one[f"{part}_cpu"] for part in PARTS)
        print(", ".join(f"{name} {rounds[-1][name]['iteration']:.2f} s" for name in contestants), file=sys.stderr)
    figures = {name: contestant.finish() for name, contestant in contestants.items()}
    ratios = {part: [one["ours"][part] / one["trl"][part] for one in rounds] for part in rounds[0]["ours"]}
    memory = figures["ours"]["peak_memory_mb"] / figures["trl"]["peak_memory_mb"]
    return {
        "ratio": {part: statistics.median(values) for part, values in ratios.items()} | {"peak_memory": memory},
        "ratios_of_iterations": ratios["iteration"],
        **figures,
    }


def main() -> int:
    """Compare, print and write."""
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
