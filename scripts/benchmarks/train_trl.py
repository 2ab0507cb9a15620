"""Train with TRL's `DDPOTrainer`: a real curve beside those of scripts/experiments/reward_queries.py.

Run it in TRL's virtual environment (see trl_trainer.py), with a model's folder and a file with one prompt per line:

    trl-venv/bin/python scripts/benchmarks/train_trl.py --model FOLDER --prompts docs/prompts/simple_animals.txt

Every iteration prints the mean reward of its images as a line of CSV, with the seconds of training until they were
scored. The task is that of the experiment: 72 images per
iteration in 10 steps without guidance, 4 updates, training on all steps, LoRA of rank 4 on the attention's projections.
"""

import argparse
import random
import sys
import time
from pathlib import Path
from typing import Any

import torch
import trl_trainer


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder in diffusers' layout")
    parser.add_argument("--prompts", type=Path, required=True, help="text file with one prompt per line")
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
    generator = random.Random(chosen.seed)
    trainer = trl_trainer.trainer_of(
        trl_trainer.parse([*given, "--sample-batch-size", str(chosen.samples)]),
        lambda: generator.choice(prompts),
        seed=chosen.seed,
        train_learning_rate=chosen.learning_rate,
        train_clip_range=chosen.clip_range,
        per_prompt_stat_tracking_min_count=16,
        # Without guidance TRL's pipeline fails, because it encodes two prompts per image. This scale has practically
        # no effect.
        sample_guidance_scale=1 + 1e-6,
        train_cfg=True,
    )
    score, rewards, seconds = trainer.reward_fn, [], []
    began = time.perf_counter()

    def recorded(*images_prompts_metadata: Any) -> Any:
        result = score(*images_prompts_metadata)
        rewards.append(float(result[0].mean()))
        seconds.append(time.perf_counter() - began)
        return result

    trainer.reward_fn = recorded
    print("iteration,reward_queries,reward_mean,seconds")
    step = 0
    for iteration in range(chosen.iterations):
        step = trainer.step(iteration, step)
        print(f"{iteration},{iteration * chosen.samples},{rewards[-1]:.4f},{seconds[-1]:.1f}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
