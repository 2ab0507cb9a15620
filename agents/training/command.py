"""Fine-tune a diffusion model with reinforcement learning: PPO with per-prompt advantages (DDPO-IS) by default.

Without arguments, the bundled tiny Stable Diffusion learns to generate images that compress well, in a few minutes on a
CPU. `--preset` selects an experiment of the DDPO paper, and `--dry-run` only prints the plan of a run. With
`accelerate launch` or `torchrun`, several processes share the work of one run.
"""

from __future__ import annotations

import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, cast

from agents.output.terminal import (
    BAD_ARGUMENTS,
    EXPECTED,
    INTERRUPTED,
    describe,
    print_error,
    print_line,
    quoted,
    tolerate_encodings,
)

if TYPE_CHECKING:  # imports that take seconds are in `prepare`, where Ctrl-C is handled
    from agents.config.train_config import TrainConfig
    from agents.distributed import Processes
    from agents.evaluation.generation import GenerationArguments
    from agents.training.run import Run, RunResult
    from ddpo_env.models import DiffusionModel
    from ddpo_env.models.families.pipeline_model import PipelineModel

STARTED = time.perf_counter()
FAILED, SIGNALLED = 1, 128
"""Exit codes: of a run that has failed, and what is added to the number of a signal."""
_FASTER = {
    "vlm_alignment": "--algorithm nft --iterations 5 reached as much here with 720 reward queries as ppo with 2880",
    "aesthetic": (
        "--algorithm grpo --noise-window 2 --noise-window-iterations 1 --shared-noise --learning-rate 5e-3 "
        "--iterations 6 --schedule-iterations 18 reached as much here with 432 reward queries as ppo with 1440"
    ),
}
"""By reward of the bundled model: settings that need fewer reward queries than the default algorithm."""


def main() -> int:
    """Parse the command line, train, and print a summary; return the exit code.

    Returns:
        0 after a finished run or a dry run, 1 after an error in training, 2 for arguments that are not valid or a run
        that cannot start, and 128 plus the signal's number after a signal: 130 for Ctrl-C, 143 for SIGTERM.
    """
    tolerate_encodings()
    try:
        run = prepare()
        return run if isinstance(run, int) else train(run)
    except KeyboardInterrupt:  # before or after training, which handles Ctrl-C itself
        print("Interrupted.", file=sys.stderr)
        return INTERRUPTED


def prepare() -> Run | int:
    """Load what the command line asks for and print the plan; print the reason if that is not possible.

    Returns:
        The run that is ready; the exit code after an error or a dry run.
    """
    from agents.config.command_line import parse_command_line

    line = parse_command_line(description=__doc__)
    from agents.distributed import Processes
    from agents.planning.flops import estimate_time
    from agents.planning.plan import describe_plan
    from agents.planning.weights import describe_weights
    from agents.training.preparation import check_run, prepare_run, start_run_processes

    processes = Processes()
    try:
        processes = start_run_processes(line.config)
        run = None if line.dry_run else prepare_run(line.config, processes)
        config = check_run(line.config, processes).config if run is None else run.config
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a module of the user's may even call sys.exit
        if processes.is_main:
            print_error(describe(error, EXPECTED))
        processes.shutdown(error)
        return BAD_ARGUMENTS
    if processes.is_main:
        estimate = estimate_time(config, processes.count)
        print("\n".join(describe_plan(config, processes.count, estimate, describe_weights(config))))
    if run is not None:
        return run
    processes.shutdown()
    return 0


def train(run: Run) -> int:
    """Train, print how it went, and return the exit code."""
    from agents.policy.diffusion_policy import DiffusionPolicy

    processes = run.processes
    if run.was_finished and processes.is_main and run.stopped_early is not None:
        print_line(f"\nThe run had ended already, after {run.iteration} iterations ({run.stopped_early}).")
    elif run.was_finished and processes.is_main:
        print_line(
            f"\nThe run had finished its {run.iteration} iterations already. To train for more, add --iterations to:"
        )
        print_line(resume_command(run.config, processes))
    done_before = run.iteration
    try:
        result = run.train(STARTED)
    except BaseException as error:
        if processes.is_main:
            report(error, run)
        processes.shutdown(error)
        return FAILED
    stopped = result.reward_after is None
    if processes.is_main and stopped:
        print_line(f"\nStopped after {result.iterations} iterations; the run is saved. To continue:")
        print_line(resume_command(result.config, processes))
    elif processes.is_main and not run.was_finished:
        print_line(summary(result, cast(DiffusionPolicy, run.algorithm.policy).model, done_before))
    processes.shutdown()
    return SIGNALLED + (processes.stopped_by or signal.SIGINT) if stopped else 0


def report(error: BaseException, run: Run) -> None:
    """Print what stopped a run, and how to continue it."""
    print_error(describe(error))
    if run.folder.error.exists():
        print_line(f"The traceback is in {run.folder.shown(run.folder.error)}.")
    if run.saved_iterations is None:
        return
    print_line(f"The run is saved after {run.saved_iterations} iterations.")
    if isinstance(error, FloatingPointError):  # the same numbers would come out again
        if run.folder.best.exists() and run.best_evaluation is not None:
            best = run.folder.shown(run.folder.best)
            print_line(f"{best} holds the policy of its best evaluation, after iteration {run.best_evaluation[0]}.")
        print_line("Resumed, it would end in the same way: start a new run with other settings.")
    else:
        print_line("To continue:")
        print_line(resume_command(run.config, run.processes))


def resume_command(config: TrainConfig, processes: Processes) -> str:
    """Return the command that continues a run; with several processes, what their launcher must start."""
    from agents.config.authority import resume_flags

    return f"  {quoted(*start_of_command(processes), '--resume', config.run_dir, *resume_flags(config))}"


def start_of_command(processes: Processes) -> list[str]:
    """Return how this program was started, without its options."""
    is_script = sys.argv[0].endswith(".py")
    start = ["accelerate", "launch", "..."] if processes.count > 1 else [sys.executable] if is_script else []
    return [*start, sys.argv[0]]


def summary(result: RunResult, model: DiffusionModel, done_before: int = 0) -> str:
    """Return the last words of a finished run: reward before and after, and where to look.

    Args:
        result: of the run.
        model: of the run, pretrained.
        done_before: iterations that were finished when this process began; its seconds are those of the others.
    """
    folder, config = result.folder, result.config
    before, after = result.reward_before, result.reward_after
    assert before is not None
    assert after is not None
    # A sum of standardised rewards begins at 0, of which no change is a percentage.
    is_relative = abs(before) > 1e-3 * abs(after - before)
    change = f"{(after - before) / abs(before):+.1%} of |before|" if is_relative else f"{after - before:+.3f}"
    iterations = "1 iteration" if result.iterations == 1 else f"{result.iterations} iterations"
    if done_before:
        iterations += f"; this process trained {result.iterations - done_before} of them"
    lines = [
        "",
        f"Reward ({config.reward}), mean of {config.run.eval_samples} samples from held-out seeds:",
        f"  before {before:.3f} → after {after:.3f}  ({change})",
        f"  {iterations} in {result.wall_clock_seconds:.0f} s, start included",
        *_holdout_lines(result),
        "",
        "Look at",
    ]
    for file, content in (
        (folder.report, "everything on one page, for a browser"),
        (folder.samples / "before_after.png", "the same prompts and seeds before, during and after training"),
        (folder.path / "reward.png", "the curve"),
        (folder.path / "reward_against_kl.png", "rewards against the distance from the pretrained model"),
        (folder.summary, "these figures, and the versions"),
        (folder.judge, "the answers of the judge, or the votes"),
    ):
        if file.exists():
            lines.append(f"  {folder.shown(file)}    {content}")
    lines.append(f"  {quoted('tensorboard', '--logdir', folder.shown(folder.tensorboard))}")
    lines += _advice(result, model)
    lines += faster_algorithm(result.config)
    return "\n".join(lines)


def _holdout_lines(result: RunResult) -> list[str]:
    """Say how the held-out reward went, and why the run stopped early, if it did."""
    lines = [f"Stopped early: {result.stopped_early}."] if result.stopped_early is not None else []
    if result.holdout_evaluations and result.best_evaluation is not None:
        before, after = result.holdout_evaluations[0][1], result.holdout_evaluations[-1][1]
        iteration, best = result.best_evaluation
        lines += [
            f"Held-out reward ({result.config.run.holdout_reward}), mean of the same samples:",
            f"  before {before:.3f} → best {best:.3f} (after iteration {iteration}) → after {after:.3f}",
        ]
    return lines


def _advice(result: RunResult, model: DiffusionModel) -> list[str]:
    """Say which weights to use: the last ones, or the best evaluation's if the held-out reward knows better ones."""
    from agents.training.result import NO_GRADIENT, advised_iteration

    folder, has_lora = result.folder, result.config.policy.lora_rank > 0
    if not result.has_learned:
        return [f"Nothing was learned: no iteration had a gradient, {NO_GRADIENT}."]
    advised = advised_iteration(result.holdout_evaluations, result.iterations)
    is_better = advised != result.iterations
    if advised == 0:
        return ["Use the pretrained model: by the held-out reward it is better than what was learned."]
    use = f"Use the policy after iteration {advised}, the best by the held-out reward" if is_better else "Use it"
    if not has_lora:
        policy = folder.shown(folder.best / "policy")
        return [f"{use}: agents.DiffusionPolicy.load({policy!r})"] if is_better else []
    lora = folder.shown(folder.best / "lora" if is_better else folder.lora)
    loads = f"{use}: pipe.load_lora_weights({lora!r})"
    sample = sample_command(result.config, model, lora)
    return [f"{loads}, or {quoted(*sample)}" if sample else loads]


def faster_algorithm(config: TrainConfig) -> list[str]:
    """Name the settings that learned the same from fewer reward queries, for the tasks where that was measured."""
    from agents.config.train_config import train_config

    if (config.model, config.algorithm) != ("tiny", train_config().algorithm) or config.reward not in _FASTER:
        return []
    return [f"{_FASTER[config.reward]} (docs/race.md)."]


def sample_command(config: TrainConfig, model: DiffusionModel, lora: str) -> list[str]:
    """Return the command that samples with a LoRA most nearly as the run did; empty where `ddpo-sample` cannot."""
    from ddpo_env.models.families.pipeline_model import PipelineModel

    if not isinstance(model, PipelineModel) or model.sample_kind != "image":
        return []
    return generation_arguments(config, model, Path(lora)).command("ddpo-sample")


def generation_arguments(config: TrainConfig, model: PipelineModel, lora: Path) -> GenerationArguments:
    """Return the arguments with which diffusers generates most nearly as a run did.

    Args:
        config: of the run.
        model: of the run; on the meta device it is enough.
        lora: to load.
    """
    from agents.evaluation.generation import GenerationArguments, stock_eta

    eta = stock_eta(model, config.policy, config.num_inference_steps)
    return GenerationArguments(
        model=config.model,
        resolution=config.run.resolution,
        pipeline_arguments=config.run.pipeline_arguments,
        quantization=config.run.quantization,
        lora=lora,
        num_inference_steps=config.num_inference_steps,
        guidance_scale=config.policy.guidance_scale,
        eta=GenerationArguments.eta if eta is None else eta,
    )


if __name__ == "__main__":
    sys.exit(main())
