"""Compare the images of a trained policy with the pretrained one's, read by the bundled judge and the bundled reader.

    python scripts/experiments/read_images.py --run-dir runs/three --prompts docs/prompts/three_animals.txt

A policy may earn a judge's reward by deceiving the judge. The reader (the reward `tiny_reader`) was trained on other
images and has no weights in common with the judge. If both read the prompt in an image, the image shows it.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro

from agents import DiffusionPolicy, TrainConfig, evaluate
from ddpo_env import DenoisingVectorEnv
from ddpo_env.prompts import load_prompts
from rewards import evaluate_reward, load_reward


@dataclass(kw_only=True)
class Arguments:
    """Which images to read."""

    run_dir: Path
    """Folder of a run with the bundled model."""
    prompts: str
    """Prompt set or file; each prompt must consist of the bundled model's words."""
    samples_per_prompt: int = 4
    """Images per prompt, from seeds that no training used."""
    seed: int = 5_000_000
    """Seed of the first image."""
    threads: int = 2
    """CPU threads."""


def main() -> None:
    """Parse the command line, generate images with both policies, read them, and print the figures."""
    arguments = tyro.cli(Arguments, description=__doc__)
    torch.set_num_threads(arguments.threads)
    config = TrainConfig.read(arguments.run_dir)
    prompts = [prompt for prompt, _ in load_prompts(arguments.prompts)]  # type: ignore[attr-defined]
    prompts *= arguments.samples_per_prompt
    env = DenoisingVectorEnv(
        min(45, len(prompts)),
        reward=load_reward("vlm_alignment", model="tiny", device="cpu"),
        prompts=arguments.prompts,
        num_inference_steps=config.num_inference_steps,
        autoreset_mode="Disabled",
        device="cpu",
        backend="torch",
    )
    reader = load_reward("tiny_reader", device="cpu")
    trained = DiffusionPolicy.load(arguments.run_dir / "policy", device="cpu")
    policies: dict[str, Any] = {"pretrained": trained.model.denoiser, "trained": trained.denoiser}
    for name, denoiser in policies.items():
        trained.denoiser = denoiser
        generated = evaluate(trained, env, prompts, arguments.seed)
        right, read = evaluate_reward(reader, generated.images, prompts, [{}] * len(prompts))
        figures = {
            "vlm_alignment": float(generated.rewards.mean()),
            "judge_says_the_prompt": float(np.equal(generated.details["answer"], prompts).mean()),
            "reader_says_the_prompt": float(right.mean()),
            **{f"reader_{name}": float(np.mean(values)) for name, values in read.items()},
        }
        print(name, json.dumps({key: round(value, 4) for key, value in figures.items()}), flush=True)


if __name__ == "__main__":
    main()
