"""Score a random, the pretrained and a trained policy in `DDPO-SD-v0`, and measure their steps per second.

    python scripts/benchmarks/environment.py
    python scripts/benchmarks/environment.py --rewards jpeg_compressibility --seeds 0 --trained runs/my-run

All policies play the same episodes: `reset(seed=...)` chooses the prompts and the initial noise. The time of an episode
includes the policy, the decoder and the reward. `docs/environment.md` has the figures.
"""

from __future__ import annotations

import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import torch
import tyro

from agents.training.preparation import EVAL_SEED_OFFSET


@dataclass(kw_only=True)
class Arguments:
    """The environment, the policies and how long they play."""

    model: str = "tiny"
    """Bundled name, a folder in diffusers' layout, or a Hub id."""
    rewards: tuple[str, ...] = ("jpeg_compressibility", "jpeg_incompressibility")
    """Names of rewards; each is a task of its own."""
    prompts: str = "simple_animals"
    """Name of a prompt set, or a text file with one prompt per line."""
    num_inference_steps: int = 10
    """Denoising steps, the length of an episode."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """One training, and one set of held-out episodes, per seed."""
    episodes: int = 90
    """Episodes per policy and seed."""
    num_envs: int = 45
    """Sub-environments that are stepped together; must divide the episodes."""
    trained: tuple[Path, ...] = ()
    """Folders of finished runs on this task, one per seed. Default: every seed is trained here."""
    iterations: int = 20
    """Iterations of a training here."""
    samples_per_iteration: int = 72
    """Samples per iteration of a training here."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, ..."""
    threads: int = torch.get_num_threads()
    """CPU threads."""
    json: Path | None = None
    """File that the figures are written to as well."""

    def check(self) -> None:
        """Refuse what cannot be measured, before anything is trained.

        Raises:
            ValueError: naming the argument, its value and what is valid.
        """
        if not self.seeds or not self.rewards:
            raise ValueError(f"seeds and rewards must not be empty; got {self.seeds} and {self.rewards}")
        if self.episodes < 1 or self.num_envs < 1 or self.episodes % self.num_envs:
            raise ValueError(f"episodes must be a multiple of num_envs={self.num_envs}; got {self.episodes}")
        if self.trained and (len(self.trained) != len(self.seeds) or len(self.rewards) > 1):
            raise ValueError(
                f"trained must name one run per seed ({len(self.seeds)}) of a single reward; "
                f"got {len(self.trained)} runs for {len(self.rewards)} rewards"
            )


class Row(NamedTuple):
    """A line of the table: `scores` has the mean return of each seed's episodes."""

    reward: str
    policy: str
    scores: list[float]
    steps_per_second: float


Act = Callable[[dict[str, Any]], Any]


def play(env: gym.vector.VectorEnv[Any, Any, Any], act: Act, episodes: int, seed: int) -> tuple[list[float], float]:
    """Play held-out episodes to their end.

    Args:
        env: with autoreset off.
        act: batched observation → batched action.
        episodes: a multiple of the number of sub-environments.
        seed: of the training; its held-out episodes have seeds of their own.

    Returns:
        The return of each episode, and the seconds that all of them took.
    """
    env.action_space.seed(seed)
    torch.manual_seed(seed)
    returns: list[float] = []
    started = time.perf_counter()
    for first in range(0, episodes, env.num_envs):
        observation, _ = env.reset(seed=seed + EVAL_SEED_OFFSET + first)
        total, over = np.zeros(env.num_envs), False
        while not over:
            observation, rewards, terminations, _, _ = env.step(act(observation))
            total += rewards
            over = bool(terminations.all())
        returns.extend(total.tolist())
    return returns, time.perf_counter() - started


def train(arguments: Arguments, reward: str, seed: int, folder: Path) -> Path:
    """Train with the defaults of `scripts/train_ppo.py`; return the run's folder."""
    from agents import run_training, train_config

    run_training(
        train_config(
            model=arguments.model,
            reward=reward,
            prompts=arguments.prompts,
            num_inference_steps=arguments.num_inference_steps,
            iterations=arguments.iterations,
            samples_per_iteration=arguments.samples_per_iteration,
            seed=seed,
            device=arguments.device,
            run_dir=folder / f"{reward}-{seed}",
            eval_samples=1,
            eval_interval=0,
            checkpoint_interval=0,
        )
    )
    return folder / f"{reward}-{seed}"


def compare(arguments: Arguments, reward: str, folder: Path) -> Iterator[Row]:
    """Yield the rows of one task."""
    from agents import DiffusionPolicy

    env = gym.make_vec(
        "ddpo_env:DDPO-SD-v0",
        num_envs=arguments.num_envs,
        model=arguments.model,
        reward=reward,
        prompts=arguments.prompts,
        num_inference_steps=arguments.num_inference_steps,
        device=arguments.device,
        autoreset_mode="Disabled",
    )
    runs = arguments.trained or [train(arguments, reward, seed, folder) for seed in arguments.seeds]
    trained = [DiffusionPolicy.load(run / "policy", device=arguments.device) for run in runs]
    pretrained = DiffusionPolicy(
        env.single_observation_space, env.single_action_space, lambda _: 0.0, guidance_scale=1.0
    )

    def sampled(policy: DiffusionPolicy) -> Act:
        return lambda observation: policy.predict(observation)[0]

    def uniform(observation: dict[str, Any]) -> Any:
        return env.action_space.sample()

    def gaussian(observation: dict[str, Any]) -> Any:
        return torch.randn(env.action_space.shape or ()).numpy()

    contenders: dict[str, list[tuple[DiffusionPolicy | None, Act]]] = {
        "random, `action_space.sample()`": [(None, uniform)] * len(arguments.seeds),
        "random, standard normal latents": [(None, gaussian)] * len(arguments.seeds),
        "pretrained": [(pretrained, sampled(pretrained))] * len(arguments.seeds),
        "trained": [(policy, sampled(policy)) for policy in trained],
    }
    for name, actors in contenders.items():
        scores, seconds = [], 0.0
        for (policy, act), seed in zip(actors, arguments.seeds, strict=True):
            with torch.no_grad(), policy.sampling_weights() if policy else nullcontext():
                returns, took = play(env, act, arguments.episodes, seed)
            scores.append(statistics.fmean(returns))
            seconds += took
        steps = arguments.episodes * arguments.num_inference_steps * len(arguments.seeds)
        yield Row(reward, name, scores, steps / seconds)
    env.close()


def main() -> int:
    """Measure and print."""
    arguments = tyro.cli(Arguments, description=__doc__)
    try:
        arguments.check()
        torch.set_num_threads(arguments.threads)
        rows: list[Row] = []
        with tempfile.TemporaryDirectory() as folder:
            for reward in arguments.rewards:
                rows.extend(compare(arguments, reward, Path(folder)))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    seeds = ", ".join(map(str, arguments.seeds))
    print(
        f"\n| reward | policy | mean score, seeds {seeds} | mean | steps per second |\n| --- | --- | --- | --- | --- |"
    )
    for row in rows:
        scores = ", ".join(f"{score:.3f}" for score in row.scores)
        mean = statistics.fmean(row.scores)
        print(f"| `{row.reward}` | {row.policy} | {scores} | {mean:.3f} | {row.steps_per_second:,.0f} |")
    print(
        f"\n{arguments.episodes} episodes per seed, {arguments.num_envs} sub-environments, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}, {platform.platform()}"
    )
    if arguments.json is not None:
        arguments.json.write_text(json.dumps([row._asdict() for row in rows], indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
