"""Fine-tune a diffusion model with PPO and per-prompt advantages (DDPO-IS), or another algorithm, from one command.

Without arguments: the bundled tiny Stable Diffusion learns to draw pictures that compress well, in a few minutes on a
CPU. `--preset` names an experiment of the DDPO paper; `--dry-run` only prints what a run amounts to. Started by
`accelerate launch` or `torchrun`, several processes share the work of the same run.
"""

from __future__ import annotations

import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # what takes seconds is imported in `prepare`: a user waits for it, and may press Ctrl-C
    from agents.distributed import Processes
    from agents.training.run import PreparedRun, RunResult

STARTED = time.perf_counter()
FAILED, BAD_ARGUMENTS, INTERRUPTED = 1, 2, 130


def main() -> int:
    """Parse the command line, train, and print a summary; return the exit code."""
    try:
        run = prepare()
        return run if isinstance(run, int) else train(run)
    except KeyboardInterrupt:  # before or after training, which ends by itself
        print("Interrupted.", file=sys.stderr)
        return INTERRUPTED


def prepare() -> PreparedRun | int:
    """Load what the command line asks for and print the plan; print why, if that cannot be.

    Returns:
        What is ready to train; the exit code if it cannot be, or if the plan is all that is wanted.
    """
    from agents.config.command_line import parse_command_line

    line = parse_command_line(description=__doc__)
    from agents.distributed import Processes, start_processes
    from agents.planning.flops import estimate_time
    from agents.planning.memory import describe_call
    from agents.planning.plan import describe_plan
    from agents.training.checks import device_of
    from agents.training.run import check_run, prepare_run

    processes = Processes()
    try:
        processes = start_processes(device_of(line.config), line.config.run.process_timeout)
        run = None if line.dry_run else prepare_run(line.config, processes)
        config = check_run(line.config, processes) if run is None else run.config
    except (ValueError, TypeError, ImportError, OSError, RuntimeError) as error:
        if processes.is_main:
            complain(str(error))
        processes.leave(error)
        return BAD_ARGUMENTS
    if processes.is_main:
        is_chosen = line.config.run.resume is None and line.config.training.train_batch_size == 0
        memory = describe_call(config, processes) if is_chosen else None
        print("\n".join(describe_plan(config, processes.count, estimate_time(config, processes.count), memory)))
    if run is not None:
        return run
    processes.leave()
    return 0


def train(run: PreparedRun) -> int:
    """Train, say how it went, and return the exit code."""
    processes = run.algorithm.processes
    try:
        result = run.train(STARTED)
    except Exception as error:
        if processes.is_main:
            report(error, run)
        processes.leave(error)
        return FAILED
    stopped = result.reward_after is None
    if processes.is_main and stopped:
        print(f"\nStopped after {result.iterations} iterations; the run is saved. To go on:")
        print(command(result.folder.path, processes))
    elif processes.is_main:
        print(summary(result))
    processes.leave()
    return INTERRUPTED if stopped else 0


def report(error: Exception, run: PreparedRun) -> None:
    """Say what stopped a run, and how it goes on."""
    folder = run.pictures.folder
    complain(described(error))
    print(f"The traceback is in {folder.error}.")
    if run.saved_iterations is not None:
        print(f"The run is saved after {run.saved_iterations} iterations. To go on:")
        print(command(folder.path, run.algorithm.processes))


def complain(message: str) -> None:
    """Print an error."""
    from rich.console import Console
    from rich.markup import escape

    Console(stderr=True).print(f"[red]error:[/red] {escape(message)}", highlight=False, soft_wrap=True)


def described(error: Exception) -> str:
    """Return what went wrong, in one line."""
    notes = "".join(f" ({note})" for note in getattr(error, "__notes__", ()))
    return " ".join(f"{type(error).__name__}: {error}{notes}".split())


def command(folder: Path, processes: Processes) -> str:
    """Return the command that goes on with a run; of several processes, what their launcher is to start."""
    start = [sys.executable] if processes.count == 1 else ["accelerate", "launch", "..."]
    return f"  {shlex.join([*start, sys.argv[0], '--resume', str(folder)])}"


def summary(result: RunResult) -> str:
    """Return what a finished run says of itself."""
    folder, config = result.folder, result.config
    before, after = result.reward_before, result.reward_after
    assert before is not None
    assert after is not None
    change = (after - before) / abs(before) if before else float("nan")
    lines = [
        "",
        f"Reward ({config.task.reward}), mean of {config.run.eval_samples} pictures from held-out seeds:",
        f"  before {before:.3f} → after {after:.3f}  ({change:+.1%} of |before|)",
        f"  {result.iterations} iterations in {result.wall_clock_seconds:.0f} s, start included",
        "",
        "Look at",
        f"  {folder.path}/samples/before_after.png    the same prompts and seeds before, during and after",
        f"  {folder.path}/reward.png                  the curve",
        f"  {folder.path}/summary.json                these figures, and the versions",
        f"  tensorboard --logdir {folder.path}/tensorboard",
    ]
    if folder.judge.is_dir():
        lines.append(f"  {folder.judge}/                      some pictures of every call as the judge saw them")
    if config.policy.lora_rank:
        lines.append(f"Use it: pipe.load_lora_weights({str(folder.lora)!r}), or scripts/sample.py --lora {folder.lora}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
