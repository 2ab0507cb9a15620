"""What a trained policy draws and the pretrained one did not, read by the bundled judge and by a network apart from it.

    python scripts/experiments/read_images.py --run-dir runs/three --prompts docs/prompts/three_animals.txt

A reward that a judge gives may be earned by fooling the judge. The convolutional network of `scripts/bundled_models/evaluate_tiny.py`
learned from pictures of its own and shares no weights with it, so what both read is in the picture.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import evaluate_tiny
import numpy as np
import torch
import tyro
import yaml
from emoji_renderings import Subject, all_subjects

from agents import DiffusionPolicy
from agents.evaluation.evaluate import evaluate
from ddpo_env import DenoisingVectorEnv
from ddpo_env.prompts.distributions import load_prompts
from rewards import load_reward


@dataclass(kw_only=True)
class Arguments:
    """What to read."""

    run_dir: Path
    """Folder of a run on the bundled model."""
    prompts: str
    """Set or file of prompts, all of them captions of the bundled model's renderings."""
    samples_per_prompt: int = 4
    """Drawings of each prompt, from seeds that no training used."""
    seed: int = 5_000_000
    """Of the first drawing."""
    reader_folder: Path = Path("runs/evaluate_judges")
    """Where the network is; it is trained if it is not there."""
    threads: int = 2
    """CPU threads."""


def share(wanted: list[Subject], found: list[Subject], part: str) -> float:
    """Returns the share with the right `word`, `activity` or `count`."""
    return float(np.mean([getattr(a, part) == getattr(b, part) for a, b in zip(wanted, found, strict=True)]))


def main(arguments: Arguments) -> None:
    """Draws with both policies, reads, and prints."""
    torch.set_num_threads(arguments.threads)
    steps = yaml.safe_load((arguments.run_dir / "config.yaml").read_text())["task"]["num_inference_steps"]
    by_caption = {subject.caption: subject for subject in all_subjects()}
    prompts = [prompt for prompt, _ in load_prompts(arguments.prompts)]  # type: ignore[attr-defined]
    prompts *= arguments.samples_per_prompt
    wanted = [by_caption[prompt] for prompt in prompts]
    env = DenoisingVectorEnv(
        min(45, len(prompts)),
        reward=load_reward("vlm_alignment", model="tiny", device="cpu"),
        prompts=arguments.prompts,
        num_inference_steps=steps,
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
        drawn = evaluate(trained, env, prompts, arguments.seed)
        found = network.read(drawn.images)
        said = np.equal(drawn.details["answer"], prompts)
        figures = {
            "vlm_alignment": float(drawn.rewards.mean()),
            "judge_says_the_prompt": float(said.mean()),
            **{f"network_{part}": share(wanted, found, part) for part in ("word", "activity", "count")},
            "network_all": float(np.mean([a == b for a, b in zip(wanted, found, strict=True)])),
            "drawings": len(prompts),
        }
        print(name, json.dumps({key: round(value, 4) for key, value in figures.items()}), flush=True)


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))
