"""Train a denoiser of points in the plane without pretraining, and plot its points before and after training.

The denoiser of `DDPO-Points-v0` is a small MLP, so a training takes a few seconds on a CPU.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import tyro

import ddpo_env  # noqa: F401  (registers DDPO-Points-v0)
from agents import PPO, DiffusionPolicy, Evaluation, PerPromptAdvantage, VectorEnvAdapter, evaluate


@dataclass
class Arguments:
    """What to train, and where the plot goes; there is one training per reward."""

    rewards: tuple[str, ...] = ("points_ring", "points_mixture")
    """Rewards to train on."""
    kl_coef: float = 0.0
    """Weight of the KL divergence from the untrained policy."""
    iterations: int = 60
    """Iterations of 256 episodes with 10 steps each."""
    samples: int = 1024
    """Number of held-out points that are scored and plotted."""
    seed: int = 0
    """Seed of weights, noise and batches."""
    output: Path = Path("docs/images/points.png")
    """The plot, a PNG file."""


def train(reward: str, arguments: Arguments) -> tuple[Evaluation, Evaluation, float]:
    """Train once; return the held-out evaluations before and after training, and the seconds of training."""
    env = gym.make_vec("DDPO-Points-v0", 256, reward=reward, backend="torch", autoreset_mode="SameStep")
    held_out: Any = gym.make_vec(
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
    policy: Any = algorithm.policy
    before = evaluate(policy, held_out, points, seed=1000)
    started = time.perf_counter()
    algorithm.learn(arguments.iterations * 2560)
    seconds = time.perf_counter() - started
    return before, evaluate(policy, held_out, points, seed=1000), seconds


def main() -> None:
    """Parse the command line, train on each reward, print the mean rewards, and plot the points."""
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
        for axis, title, evaluation in zip(pair, ("untrained", "trained"), (before, after), strict=True):
            x, y = np.clip(evaluation.images, -2.4, 2.4).T
            axis.scatter(x, y, s=4, alpha=0.5, color="#0b6e99", linewidths=0)
            axis.set(xlim=(-2.5, 2.5), ylim=(-2.5, 2.5), xticks=[-2, 0, 2], yticks=[-2, 0, 2], aspect="equal")
            axis.set_title(f"{reward}, {title}: {evaluation.rewards.mean():.2f}", fontsize=9)
            axis.spines[["top", "right"]].set_visible(False)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    figure.savefig(arguments.output, dpi=120)


if __name__ == "__main__":
    main()
