"""Train a denoiser of points in the plane from nothing, and draw what it draws.

A few seconds a training on a CPU: `DDPO-Points-v0` has a small MLP for a denoiser, and no pretraining.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import tyro

import ddpo_env  # noqa: F401  (registers DDPO-Points-v0)
from agents import PPO, DiffusionPolicy, PerPromptAdvantage, VectorEnvAdapter
from agents.evaluation.evaluate import evaluate


@dataclass
class Arguments:
    """One training a reward."""

    rewards: tuple[str, ...] = ("points_ring", "points_mixture")
    """Which rewards."""
    kl_coef: float = 0.0
    """Weight of the KL divergence from the untrained policy."""
    iterations: int = 60
    """Rollouts of 256 episodes and 10 steps."""
    samples: int = 1024
    """Held-out points that are scored and drawn."""
    seed: int = 0
    """Of everything."""
    output: Path = Path("docs/images/points.png")
    """The picture."""


def train(reward: str, arguments: Arguments) -> tuple[Any, Any, float]:
    """Train once; return the held-out evaluations before and after, and the seconds between them."""
    env = gym.make_vec("DDPO-Points-v0", 256, reward=reward, backend="torch", autoreset_mode="SameStep")
    held_out = gym.make_vec(
        "DDPO-Points-v0", arguments.samples, reward=reward, backend="torch", autoreset_mode="Disabled"
    )
    algorithm = PPO(
        DiffusionPolicy,
        VectorEnvAdapter(env),
        learning_rate=lambda remaining: 5e-3 * remaining,
        n_steps=10,
        batch_size=2560,
        n_epochs=10,
        gamma=1.0,
        clip_range=0.2,
        kl_coef=arguments.kl_coef,
        advantage=PerPromptAdvantage(buffer_size=256),
        policy_kwargs={"lora_rank": 0, "guidance_scale": 1.0},
        seed=arguments.seed,
    )
    points: list[Any] = ["a point"] * arguments.samples
    before = evaluate(algorithm.policy, held_out, points, seed=1000)
    started = time.perf_counter()
    algorithm.learn(arguments.iterations * 2560)
    seconds = time.perf_counter() - started
    return before, evaluate(algorithm.policy, held_out, points, seed=1000), seconds


def main() -> None:
    """Train, print, draw."""
    arguments = tyro.cli(Arguments, description=__doc__)
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        1, 2 * len(arguments.rewards), figsize=(5.6 * len(arguments.rewards), 3.1), squeeze=False, sharey=True
    )
    for pair, reward in zip(axes.reshape(-1, 2), arguments.rewards, strict=True):
        before, after, seconds = train(reward, arguments)
        print(f"{reward}: {before.rewards.mean():.3f} -> {after.rewards.mean():.3f} in {seconds:.1f} s", flush=True)
        for axis, title, drawn in zip(pair, ("untrained", "trained"), (before, after), strict=True):
            x, y = np.clip(drawn.images, -2.4, 2.4).T
            axis.scatter(x, y, s=4, alpha=0.5, color="#0b6e99", linewidths=0)
            axis.set(xlim=(-2.5, 2.5), ylim=(-2.5, 2.5), xticks=[-2, 0, 2], yticks=[-2, 0, 2], aspect="equal")
            axis.set_title(f"{reward}, {title}: {drawn.rewards.mean():.2f}", fontsize=9)
            axis.spines[["top", "right"]].set_visible(False)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    figure.savefig(arguments.output, dpi=120)


if __name__ == "__main__":
    main()
