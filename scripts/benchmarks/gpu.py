"""Measure everything that has a bar for one GPU, with one command, and write it to one file.

    python scripts/benchmarks/gpu.py --against trl-venv/bin/python --json gpu.json
    python scripts/benchmarks/gpu.py --miniature

A bar is the largest value that a figure may have. Each part is a process of its own, because each has its own peak
memory:

* `iteration`: an iteration of Stable Diffusion 1.4's architecture at 512 × 512 next to the bare calls of its
  networks, by `overhead.py`: 256 images of 50 steps, guidance 5, 4 updates, LoRA of rank 4, bfloat16. It takes as
  long as three iterations: one is not timed, one is, and then come the bare calls.
* `against`: the same work on 32 images next to TRL, by `against_trl.py`; only with `--against`.
* `memory`: the same model with one image, and one pair per training call.
* `sdxl`: SDXL's architecture at 1024 × 1024 with one image, one pair per training call, and gradient checkpointing.

The weights are random. A folder for SDXL (7 GB) is written first, and one for Stable Diffusion 1.4 (2 GB) with
`--against`. `--miniature` runs all parts on a CPU with small networks. It checks the commands and says nothing about a
bar.
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

FOLDER = Path(__file__).parent
Part = Literal["iteration", "against", "memory", "sdxl"]
Figures = dict[str, Any]

BARS: dict[str, tuple[Part, Callable[[Figures], float], float]] = {
    "iteration_seconds": ("iteration", lambda figures: figures["iteration_seconds"], 144.0),
    "sampling_over_bare": ("iteration", lambda figures: figures["sampling_over_bare"], 1.05),
    "training_over_bare": ("iteration", lambda figures: figures["training_over_bare"], 1.05),
    "iteration_over_trl": ("against", lambda figures: figures["ratio"]["iteration"], 0.5),
    "peak_memory_mb_at_batch_1": ("memory", lambda figures: figures["peak_memory_mb"], 6000.0),
    "sdxl_peak_memory_mb_at_batch_1": ("sdxl", lambda figures: figures["peak_memory_mb"], 16000.0),
}
"""The part that measures a figure, how it is read there, and its largest valid value; memory in 10^6 bytes."""


@dataclass(kw_only=True)
class Arguments:
    """What is measured."""

    parts: tuple[Part, ...] = get_args(Part)
    """Parts to measure; `against` is left out without `--against`."""
    against: Path | None = None
    """Python interpreter of an environment with TRL, see trl_trainer.py."""
    device: str = "cuda"
    """cuda, cuda:1, ...; TRL takes only cuda."""
    sample_batch_size: int = 32
    """Images generated at once in our iteration."""
    train_batch_size: int = 0
    """Pairs in one training call of ours. 0: as many as fit into the memory."""
    repeats: int = 1
    """Timed iterations, and iterations of each trainer in the comparison with TRL."""
    models: Path | None = None
    """Folder in which random models are written and found again. Default: a temporary folder."""
    miniature: bool = False
    """Use small networks on a CPU."""
    json: Path = Path("gpu.json")
    """File that the figures are written to."""


def flags(**values: Any) -> list[str]:
    """Return settings as flags of a command line."""
    return [f"--{name.replace('_', '-')}={value}" for name, value in values.items()]


def commands(arguments: Arguments, models: Path) -> dict[str, list[str]]:
    """Return the command line of each wanted part by its name; a command line begins with the script.

    Args:
        arguments: what is measured.
        models: folder of the random models.
    """
    small = arguments.miniature
    steps, short = (2, 2) if small else (50, 4)
    images = 4 if small else 256
    sampled = min(arguments.sample_batch_size, images)
    place = {"device": "cpu" if small else arguments.device, "dtype": "float32" if small else "bfloat16"}
    shared = {**place, "guidance_scale": 5, "lora_rank": 4}
    whole = ["--lora-targets=attention", "--timestep-fraction=1", "--timestep-window", "0", "1"]
    ours = flags(sample_batch_size=sampled, train_batch_size=arguments.train_batch_size)
    single = flags(samples=1, sample_batch_size=1, train_batch_size=1, updates=1, repeats=1, num_inference_steps=short)
    named = str(models / "small") if small else "sd14-random"
    found = {
        "iteration": [
            "overhead.py",
            *flags(model=named, **shared, samples=images, updates=2 if small else 4, num_inference_steps=steps),
            *flags(repeats=arguments.repeats),
            *whole,
            *ours,
        ],
        "against": [
            "against_trl.py",
            *flags(against=arguments.against, model=models / ("small" if small else "sd14"), **shared),
            *flags(samples=4 if small else 32, sample_batch_size=4 if small else 8, train_batch_size=4, updates=1),
            *flags(num_inference_steps=steps, rounds=arguments.repeats),
            f"--ours={' '.join(ours if small else flags(sample_batch_size=32, train_batch_size=0))}",
        ],
        "memory": ["overhead.py", *flags(model=named, **shared), *whole, *single],
        "sdxl": [
            "overhead.py",
            *flags(model=models / ("small-sdxl" if small else "sdxl"), **shared),
            "--gradient-checkpointing",
            *whole,
            *single,
        ],
    }
    wanted = [name for name in arguments.parts if name != "against" or arguments.against is not None]
    return {name: found[name] for name in wanted}


def write_models(arguments: Arguments, lines: dict[str, list[str]], models: Path) -> None:
    """Write the models that the command lines name and that do not exist yet."""
    for architecture in random_stable_diffusion.pipelines.ARCHITECTURES:
        folder = models / architecture
        named = any(f"--model={folder}" in line for line in lines.values())
        if named and not (folder / "model_index.json").is_file():
            print(f"writing {folder}", file=sys.stderr)
            random_stable_diffusion.write(folder, architecture, "float32" if arguments.miniature else "bfloat16")


def run_script(line: list[str], output: Path) -> Figures:
    """Run a script in a process of its own and return its figures.

    Raises:
        RuntimeError: if it fails; the message ends with its error output.
    """
    command = [sys.executable, str(FOLDER / line[0]), *line[1:], f"--json={output}"]
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(line)} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return json.loads(output.read_text())


def compared(figures: dict[str, Figures], is_miniature: bool) -> dict[str, Figures]:
    """Return the bars of the measured parts: the figure, its largest valid value, and whether the bar is met.

    With a miniature, `met` is `None`.
    """
    bars = {}
    for name, (part, read, limit) in BARS.items():
        if "error" not in figures.get(part, {"error": "not measured"}):
            value = read(figures[part])
            bars[name] = {"figure": value, "at_most": limit, "met": None if is_miniature else value <= limit}
    return bars


def measure(arguments: Arguments) -> Figures:
    """Run the parts and return their figures and the bars; for a part that fails, its error instead of figures."""
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
            arguments.json.write_text(json.dumps(result, indent=2) + "\n")  # after every part: a run may be stopped
    return result


def main() -> int:
    """Measure and print the bars; return 1 if a part failed."""
    arguments = tyro.cli(Arguments, description=__doc__)
    if not arguments.parts or (arguments.parts == ("against",) and arguments.against is None):
        print("error: parts must name at least one part, and against needs --against", file=sys.stderr)
        return 2
    result = measure(arguments)
    print(json.dumps(result["bars"], indent=2))
    return int(any("error" in figures for figures in result["parts"].values()))


if __name__ == "__main__":
    sys.exit(main())
