"""Train with TRL's `DDPOTrainer` itself: a check of the contender `trl` of compare_settings.py, which stands for it.

In TRL's environment (see benchmark_trl.py), with a model's folder and a file with a prompt a line:

    trl-venv/bin/python scripts/benchmarks/train_trl.py --model FOLDER --prompts docs/prompts/simple_animals.txt

Every iteration prints the mean reward of its pictures, as CSV. Same task as there: 72 pictures an iteration in 10 steps
without guidance, 4 updates, all steps trained on, LoRA of rank 4 on the attention's projections.
"""

import argparse
import random
import sys
from pathlib import Path

import benchmark_trl
import torch


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder in diffusers' layout")
    parser.add_argument("--prompts", type=Path, required=True, help="text file with a prompt a line")
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--clip-range", type=float, default=1.6e-3)
    parser.add_argument("--iterations", type=int, default=20)
    parser.add_argument("--samples", type=int, default=72)
    parser.add_argument("--train-batch-size", type=int, default=18)
    parser.add_argument("--num-inference-steps", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    return parser.parse_args()


def main() -> int:
    """Train and print."""
    chosen = parse()
    torch.set_num_threads(chosen.threads)
    prompts = chosen.prompts.read_text().splitlines()
    given = ["--model", chosen.model, "--guidance-scale", "1", "--updates", "4"]
    for name in ("samples", "train_batch_size", "num_inference_steps"):
        given += [f"--{name.replace('_', '-')}", str(getattr(chosen, name))]
    draw = random.Random(chosen.seed)
    trainer = benchmark_trl.trainer_of(
        benchmark_trl.parse([*given, "--sample-batch-size", str(chosen.samples)]),
        lambda: draw.choice(prompts),
        seed=chosen.seed,
        train_learning_rate=chosen.learning_rate,
        train_clip_range=chosen.clip_range,
        per_prompt_stat_tracking_min_count=16,
        # Without guidance TRL's pipeline encodes twice as many prompts as it draws pictures, and stops. This is as
        # good as none.
        sample_guidance_scale=1 + 1e-6,
        train_cfg=True,
    )
    judge, rewards = trainer.reward_fn, []

    def judged(*images_prompts_metadata):  # type: ignore[no-untyped-def]
        result = judge(*images_prompts_metadata)
        rewards.append(float(result[0].mean()))
        return result

    trainer.reward_fn = judged
    print("iteration,reward_queries,reward_mean")
    step = 0
    for iteration in range(chosen.iterations):
        step = trainer.step(iteration, step)
        print(f"{iteration},{iteration * chosen.samples},{rewards[-1]:.4f}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
