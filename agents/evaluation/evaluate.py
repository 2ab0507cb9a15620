"""Pictures of a policy for given prompts and seeds: the same ones before, during and after training."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from gymnasium.vector import AutoresetMode
from stable_baselines3.common.utils import obs_as_tensor

from agents.distributed import Processes, sharing
from agents.policy.diffusion_policy import DiffusionPolicy
from ddpo_env.prompts.distributions import Prompt, PromptSet
from ddpo_env.vector_env import DenoisingVectorEnv
from rewards import SharedReward, unshared


@dataclass(frozen=True)
class Evaluation:
    """What a policy drew.

    Attributes:
        images: `(samples, height, width, 3)` uint8, or `(samples, ...)` where the model draws something else.
        prompts: one a sample.
        rewards: `(samples,)` float64; where the environment keeps such scores, NaN or infinite for some.
        details: the reward's details by name, one value a sample.
    """

    images: npt.NDArray[Any]
    prompts: list[str]
    rewards: npt.NDArray[np.float64]
    details: dict[str, list[Any]]

    @property
    def dropped_samples(self) -> int:
        """How many rewards are NaN or infinite."""
        return int((~np.isfinite(self.rewards)).sum())

    def finite_rewards(self) -> npt.NDArray[np.float64]:
        """Return the rewards that say something.

        Raises:
            ValueError: if none does.
        """
        finite = self.rewards[np.isfinite(self.rewards)]
        if not len(finite):
            raise ValueError(f"all {len(self.rewards)} rewards of the held-out pictures are NaN or infinite")
        return finite

    def first(self, samples: int) -> Evaluation:
        """Return the first samples alone."""
        details = {name: values[:samples] for name, values in self.details.items()}
        return Evaluation(self.images[:samples], self.prompts[:samples], self.rewards[:samples], details)


def evaluate(
    policy: DiffusionPolicy,
    env: DenoisingVectorEnv,
    prompts: Sequence[str | Prompt],
    seed: int,
    processes: Processes | None = None,
) -> Evaluation:
    """Draw one picture a prompt with the policy's stochastic sampler, and score it.

    Sample `i` starts from the noise of seed `seed + i`, and the sampler's own noise is seeded too: the same arguments
    give the same pictures for the same policy. The random state of training, and the statistics of a reward that keeps
    some, are left as they were.

    Args:
        policy: what draws; it is not changed.
        env: autoreset must be off; its number of slots is the batch size. The sampler's noise is drawn a batch at a
            time, so only evaluations with the same number of slots draw the same pictures.
        prompts: one a picture; `(prompt, metadata)` where the reward is to have other metadata than the environment's
            prompt set knows.
        seed: of the first picture.
        processes: that draw a share each and return all; `env` is this one's part of the batch, with a reward as
            `rewards.shared` returns it. Default: this one.

    Raises:
        ValueError: if `env` resets itself or defers its rewards, or there are no prompts.
    """
    if env.autoreset_mode is not AutoresetMode.DISABLED:
        raise ValueError(f"env must have autoreset_mode 'Disabled'; got {env.autoreset_mode.value!r}")
    if env.deferred_rewards:
        raise ValueError("env must have deferred_rewards=False: the rewards are read off its steps; got True")
    if not prompts:
        raise ValueError("prompts must hold at least one prompt; got none")
    devices = [policy.device] if policy.device.type == "cuda" else []
    processes = processes or Processes()
    share = processes.share(env.num_envs * processes.count)
    own = []
    training = policy.training
    frozen_reward = getattr(unshared(env.reward), "frozen", nullcontext)
    with (
        processes.agreement(),
        frozen_reward(),
        torch.random.fork_rng(devices=devices),
        torch.no_grad(),
        sharing(policy, share),
        policy.sampling_weights(),
    ):
        torch.manual_seed(seed)
        policy.set_training_mode(False)
        for start in range(0, len(prompts), share.total):
            processes.raise_interrupt()
            wanted = list(prompts[start : start + share.total])
            padded = wanted + [wanted[-1]] * (share.total - len(wanted))
            own.append(_episode(policy, env, padded[share.start : share.stop], seed + start))
    policy.set_training_mode(training)
    batches = [_joined(parts) for parts in zip(*processes.gather_objects(own), strict=True)]
    with processes.agreement(), frozen_reward():
        whole = _joined([_scored(batch, env) for batch in batches])
    return whole.first(len(prompts))


def _episode(policy: DiffusionPolicy, env: DenoisingVectorEnv, prompts: list[str | Prompt], seed: int) -> Evaluation:
    observation, _ = env.reset(seed=seed, options={"prompts": prompts})
    infos: dict[str, Any] = {}
    rewards = np.zeros(env.num_envs)
    for _ in range(env.num_inference_steps):
        actions = policy.get_distribution(obs_as_tensor(observation, policy.device)).sample()
        observation, rewards, _, _, infos = env.step(actions)
    details = {name: list(values) for name, values in infos.get("reward_details", {}).items() if name[0] != "_"}
    texts = [prompt if isinstance(prompt, str) else prompt[0] for prompt in prompts]
    return Evaluation(infos["image"] if "image" in infos else infos["sample"], texts, rewards, details)


def _scored(batch: Evaluation, env: DenoisingVectorEnv) -> Evaluation:
    """Give a whole batch its scores, where the processes have only measured it."""
    if not isinstance(env.reward, SharedReward):
        return batch
    rewards, details = env.reward.combined(batch.details, batch.prompts, env.non_finite_rewards)
    return replace(batch, rewards=rewards, details=details)


def _joined(parts: Sequence[Evaluation]) -> Evaluation:
    return Evaluation(
        images=np.concatenate([part.images for part in parts]),
        prompts=[prompt for part in parts for prompt in part.prompts],
        rewards=np.concatenate([part.rewards for part in parts]),
        details={name: [value for part in parts for value in part.details.get(name, [])] for name in parts[0].details},
    )


def evaluation_prompts(env: DenoisingVectorEnv, count: int, seed: int) -> list[Prompt]:
    """Choose prompts, with their metadata, to evaluate on: a finite set in turn, else draws from the distribution."""
    rng = np.random.default_rng(seed)
    if not isinstance(env.prompts, PromptSet):
        return [env.prompts.sample(rng) for _ in range(count)]
    order = rng.permutation(len(env.prompts))
    return [env.prompts[order[i % len(order)]] for i in range(count)]
