"""Fine-tune a diffusion model with PPO and per-prompt advantages (DDPO-IS), or another algorithm, from one command.

Without arguments: the bundled tiny Stable Diffusion learns to draw pictures that compress well, in a few minutes on a
CPU.
"""

import time

STARTED = time.perf_counter()

import sys  # noqa: E402  (the clock starts before the imports, which are part of what a user waits for)
from typing import Annotated  # noqa: E402

import tyro  # noqa: E402
from rich.console import Console  # noqa: E402

from agents.configuration import TrainConfig  # noqa: E402


def main() -> int:
    """Parse the command line, train, and print a summary."""
    config = tyro.cli(Annotated[TrainConfig, tyro.conf.OmitArgPrefixes], description=__doc__)
    console = Console()
    try:
        from agents.plan import describe_plan
        from agents.training import prepare_run

        run = prepare_run(config)
        console.print("\n".join(describe_plan(run.config)), highlight=False, soft_wrap=True)
    except (ValueError, OSError) as error:
        Console(stderr=True).print(f"[red]error:[/red] {error}", highlight=False, soft_wrap=True)
        return 2
    result = run.train(STARTED)
    folder = result.folder.path
    if result.reward_after is None:
        console.print(
            f"\nStopped after {result.iterations} iterations; the run is saved. To go on:\n"
            f"  {sys.executable} scripts/train_ppo.py --resume {folder}",
            highlight=False,
            soft_wrap=True,
        )
        return 130
    before, after = result.reward_before, result.reward_after
    assert before is not None
    change = (after - before) / abs(before) if before else float("nan")
    lines = [
        "",
        f"Reward ({result.config.task.reward}), mean of {result.config.run.eval_samples} pictures from held-out seeds:",
        f"  before {before:.3f} → after {after:.3f}  ({change:+.1%} of |before|)",
        f"  {result.iterations} iterations in {result.wall_clock_seconds:.0f} s, start included",
        "",
        "Look at",
        f"  {folder}/samples/before_after.png    the same prompts and seeds before, during and after",
        f"  {folder}/reward.png                  the curve",
        f"  {folder}/summary.json                these figures, and the versions",
        f"  tensorboard --logdir {folder}/tensorboard",
    ]
    if result.config.policy.lora_rank:
        lines.append(
            f"Use it: pipe.load_lora_weights({str(folder / 'lora')!r}), or scripts/sample.py --lora {folder}/lora"
        )
    console.print("\n".join(lines), highlight=False, soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
