"""Compare the images of a trained policy with the pretrained one's, read by the bundled judge and by another network.

    python scripts/experiments/read_images.py --run-dir runs/three --prompts docs/prompts/three_animals.txt

A policy may earn a judge's reward by deceiving the judge. The convolutional network of
`scripts/bundled_models/evaluate_tiny.py` was trained on other images and has no weights in common with the judge. If
both read the prompt in an image, the image shows it.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro

from agents import DiffusionPolicy, TrainConfig, evaluate
from ddpo_env import DenoisingVectorEnv
from ddpo_env.prompts import load_prompts
from rewards import load_reward

sys.path.append(str(Path(__file__).resolve().parents[1] / "bundled_models"))
import evaluate_tiny
from pretraining.emoji_renderings import all_subjects


@dataclass(kw_only=True)
class Arguments:
    """Which images to read."""

    run_dir: Path
    """Folder of a run with the bundled model."""
    prompts: str
    """Prompt set or file; each prompt must be a caption of the bundled model's renderings."""
    samples_per_prompt: int = 4
    """Images per prompt, from seeds that no training used."""
    seed: int = 5_000_000
    """Seed of the first image."""
    reader_folder: Path = Path("runs/evaluate_judges")
    """Folder of the network; if it is not there, it is trained first."""
    threads: int = 2
    """CPU threads."""


def main() -> None:
    """Parse the command line, generate images with both policies, read them, and print the figures."""
    arguments = tyro.cli(Arguments, description=__doc__)
    torch.set_num_threads(arguments.threads)
    config = TrainConfig.read(arguments.run_dir)
    by_caption = {subject.caption: subject for subject in all_subjects()}
    prompts = [prompt for prompt, _ in load_prompts(arguments.prompts)]  # type: ignore[attr-defined]
    prompts *= arguments.samples_per_prompt
    wanted = [by_caption[prompt] for prompt in prompts]
    env = DenoisingVectorEnv(
        min(45, len(prompts)),
        reward=load_reward("vlm_alignment", model="tiny", device="cpu"),
        prompts=arguments.prompts,
        num_inference_steps=config.num_inference_steps,
        autoreset_mode="Disabled",
        device="cpu",
        backend="torch",
    )
    network = evaluate_tiny.train_classifier(
        evaluate_tiny.Arguments(run_folder=arguments.reader_folder, threads=arguments.threads)
    )
    trained = DiffusionPolicy.load(arguments.run_dir / "policy", device="cpu")
    policies: dict[str, Any] = {"pretrained": trained.model.denoiser, "trained": trained.denoiser}
    for name, denoiser in policies.items():
        trained.denoiser = denoiser
        generated = evaluate(trained, env, prompts, arguments.seed)
        found = network.read(generated.images)
        figures = {
            "vlm_alignment": float(generated.rewards.mean()),
            "judge_says_the_prompt": float(np.equal(generated.details["answer"], prompts).mean()),
            **{f"network_{name}": value for name, value in evaluate_tiny.scores(wanted, found).items()},
        }
        print(name, json.dumps({key: round(value, 4) for key, value in figures.items()}), flush=True)


if __name__ == "__main__":
    main()
