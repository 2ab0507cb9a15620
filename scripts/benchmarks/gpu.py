"""What the bars for one GPU ask for, measured in one command and written to one file.

    python scripts/benchmarks/gpu.py --against trl-venv/bin/python --json gpu.json
    python scripts/benchmarks/gpu.py --miniature

The parts, each a process of its own, so that each has its own peak of memory:

* `iteration`: Stable Diffusion 1.4's architecture at 512 × 512, 256 pictures of 50 steps, guidance 5, 4 updates, LoRA
  of rank 4, bfloat16, by `benchmark.py`, next to its bare denoiser calls. It runs an iteration that is not timed, one
  that is, and the bare calls: three times an iteration's time.
* `against`: the same work on 32 pictures next to TRL, by `benchmark_against.py`; only with `--against`.
* `memory`: the same with one picture and one pair a call.
* `sdxl`: SDXL's architecture at 1024 × 1024, one picture and one pair a call, with gradient checkpointing.

Weights are random. A folder for SDXL (7 GB) is written first, and one for Stable Diffusion 1.4 (2 GB) if there is TRL.
`--miniature` does all that on a CPU with small networks: it says whether the recipe works, and nothing about a bar.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import random_stable_diffusion
import tyro

SCRIPTS = Path(__file__).parent
Part = Literal["iteration", "against", "memory", "sdxl"]
Figures = dict[str, Any]

BARS: dict[str, tuple[Part, Callable[[Figures], float], float]] = {
    "iteration_seconds": ("iteration", lambda figures: figures["iteration_seconds"], 144.0),
    "sampling_over_unet": ("iteration", lambda figures: figures["sampling_over_unet"], 1.05),
    "training_over_unet": ("iteration", lambda figures: figures["training_over_unet"], 1.05),
    "iteration_over_trl": ("against", lambda figures: figures["ratio"]["iteration"], 0.5),
    "peak_memory_mb_at_batch_1": ("memory", lambda figures: figures["peak_memory_mb"], 6000.0),
    "sdxl_peak_memory_mb_at_batch_1": ("sdxl", lambda figures: figures["peak_memory_mb"], 16000.0),
}
"""What is measured, in which part, and how much it may be at most; memory in 10^6 bytes."""


@dataclass(kw_only=True)
class Arguments:
    """What is measured."""

    parts: tuple[Part, ...] = get_args(Part)
    """Which; `against` is left out where there is no TRL."""
    against: Path | None = None
    """Python interpreter of an environment with TRL, see benchmark_trl.py."""
    device: str = "cuda"
    """cuda, cuda:1, ...; TRL takes cuda alone."""
    sample_batch_size: int = 32
    """Pictures drawn at once, in our iteration."""
    train_batch_size: int = 0
    """Pairs in one call of our training. 0: as many as fit."""
    repeats: int = 1
    """Iterations that are timed, and turns of each next to TRL."""
    models: Path | None = None
    """Folder in which random models are written, and found again. Default: one for this run alone."""
    miniature: bool = False
    """On a CPU with small networks."""
    json: Path = Path("gpu.json")
    """Where to write the figures."""


def flags(**values: Any) -> list[str]:
    """Return a command line of settings."""
    return [f"--{name.replace('_', '-')}={value}" for name, value in values.items()]


def commands(arguments: Arguments, models: Path) -> dict[str, list[str]]:
    """Return the command line of every part that is wanted, by its name; each begins with its script.

    Args:
        arguments: what is measured.
        models: folder of the random models.
    """
    small = arguments.miniature
    steps, short = (2, 2) if small else (50, 4)
    pictures = 4 if small else 256
    sampled = min(arguments.sample_batch_size, pictures)
    place = {"device": "cpu" if small else arguments.device, "dtype": "float32" if small else "bfloat16"}
    shared = {**place, "guidance_scale": 5, "lora_rank": 4}
    whole = ["--lora-targets=attention", "--timestep-fraction=1", "--timestep-window", "0", "1"]
    ours = flags(sample_batch_size=sampled, train_batch_size=arguments.train_batch_size)
    single = flags(samples=1, sample_batch_size=1, train_batch_size=1, updates=1, repeats=1, num_inference_steps=short)
    named = str(models / "small") if small else "sd14-random"
    found = {
        "iteration": [
            "benchmark.py",
            *flags(model=named, **shared, samples=pictures, updates=2 if small else 4, num_inference_steps=steps),
            *flags(repeats=arguments.repeats),
            *whole,
            *ours,
        ],
        "against": [
            "benchmark_against.py",
            *flags(against=arguments.against, model=models / ("small" if small else "sd14"), **shared),
            *flags(samples=4 if small else 32, sample_batch_size=4 if small else 8, train_batch_size=4, updates=1),
            *flags(num_inference_steps=steps, rounds=arguments.repeats),
            f"--ours={' '.join(ours if small else flags(sample_batch_size=32, train_batch_size=0))}",
        ],
        "memory": ["benchmark.py", *flags(model=named, **shared), *whole, *single],
        "sdxl": [
            "benchmark.py",
            *flags(model=models / ("small-sdxl" if small else "sdxl"), **shared),
            "--gradient-checkpointing",
            *whole,
            *single,
        ],
    }
    wanted = [name for name in arguments.parts if name != "against" or arguments.against is not None]
    return {name: found[name] for name in wanted}


def write_models(arguments: Arguments, lines: dict[str, list[str]], models: Path) -> None:
    """Write the folders that the command lines name and that are not there yet."""
    for architecture in random_stable_diffusion.pipelines.ARCHITECTURES:
        folder = models / architecture
        named = any(f"--model={folder}" in line for line in lines.values())
        if named and not (folder / "model_index.json").is_file():
            print(f"writing {folder}", file=sys.stderr)
            random_stable_diffusion.write(folder, architecture, "float32" if arguments.miniature else "bfloat16")


def run_script(line: list[str], output: Path) -> Figures:
    """Run a script in a process of its own, and return what it wrote.

    Raises:
        RuntimeError: if it fails, with the end of what it said.
    """
    command = [sys.executable, str(SCRIPTS / line[0]), *line[1:], f"--json={output}"]
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(line)} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return json.loads(output.read_text())


def compared(figures: dict[str, Figures], is_miniature: bool) -> dict[str, Figures]:
    """Return every bar of a part that was measured: the figure, what it may be at most, and whether it is.

    A miniature says nothing about that.
    """
    bars = {}
    for name, (part, read, limit) in BARS.items():
        if "error" not in figures.get(part, {"error": "not measured"}):
            value = read(figures[part])
            bars[name] = {"figure": value, "at_most": limit, "met": None if is_miniature else value <= limit}
    return bars


def measure(arguments: Arguments) -> Figures:
    """Run the parts; return their figures and the bars. A part that fails has its error there, and the others go on."""
    with tempfile.TemporaryDirectory() as temporary:
        models = arguments.models or Path(temporary) / "models"
        lines = commands(arguments, models)
        write_models(arguments, lines, models)
        figures: dict[str, Figures] = {}
        for name, line in lines.items():
            print(f"{name}: {' '.join(line)}", file=sys.stderr, flush=True)
            try:
                figures[name] = run_script(line, Path(temporary) / f"{name}.json")
            except RuntimeError as error:
                print(f"error: {error}", file=sys.stderr)
                figures[name] = {"error": str(error)}
            result = {
                "miniature": arguments.miniature,
                "bars": compared(figures, arguments.miniature),
                "not_measured": sorted(set(get_args(Part)) - set(figures)),
                "parts": figures,
            }
            arguments.json.write_text(json.dumps(result, indent=2) + "\n")  # after every part: a run may be cut short
    return result


def main() -> int:
    """Measure and print; 1 if a part failed."""
    arguments = tyro.cli(Arguments, description=__doc__)
    if not arguments.parts or (arguments.parts == ("against",) and arguments.against is None):
        print("error: parts must name one at least, and against needs --against", file=sys.stderr)
        return 2
    result = measure(arguments)
    print(json.dumps(result["bars"], indent=2))
    return int(any("error" in figures for figures in result["parts"].values()))


if __name__ == "__main__":
    sys.exit(main())
