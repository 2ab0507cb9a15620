"""Samples of a policy for given prompts and seeds, the same before, during and after training, and their scores."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from gymnasium.vector import AutoresetMode
from stable_baselines3.common.utils import obs_as_tensor
from torch import Tensor

from agents.distributed import Processes
from agents.evaluation.pretrained_comparison import PretrainedComparison, compare_with_pretrained
from agents.policy.diffusion_policy import DiffusionPolicy
from ddpo_env.models.protocol import abilities_of
from ddpo_env.prompts import Prompt, PromptSet
from ddpo_env.vector_env import DenoisingVectorEnv
from rewards import Freezable, TwoStageReward, combine_measurements


@dataclass(frozen=True)
class Evaluation:
    """Samples of a policy, and their scores.

    Attributes:
        images: `(samples, height, width, 3)` uint8, or `(samples, ...)` if the model generates something else.
        prompts: one per sample.
        rewards: `(samples,)` float64. Some are NaN or infinite if the environment keeps such scores.
        details: the reward's details by name, one value per sample.
        pictures: `(samples, height, width, 3)` uint8, which show the samples: images as they are, other
            samples as the model renders them; `None` if it does not.
        measurements: what a two-stage reward measured, one per sample, while the scores are not known yet.
        comparison: of the policy with the pretrained one, at the transitions that were asked for; `None`: at none.
        holdout_rewards: `(samples,)` float64, scores of a reward that is never trained on; `None`: there is none.
    """

    images: npt.NDArray[Any]
    prompts: list[str]
    rewards: npt.NDArray[np.float64]
    details: dict[str, list[Any]]
    pictures: npt.NDArray[np.uint8] | None = None
    measurements: list[Any] | None = None
    comparison: PretrainedComparison | None = None
    holdout_rewards: npt.NDArray[np.float64] | None = None

    @property
    def dropped_samples(self) -> int:
        """Number of rewards that are NaN or infinite."""
        return int((~np.isfinite(self.rewards)).sum())

    def finite_rewards(self) -> npt.NDArray[np.float64]:
        """Return the rewards that are finite.

        Raises:
            ValueError: if none is.
        """
        finite = self.rewards[np.isfinite(self.rewards)]
        if not len(finite):
            raise ValueError(f"all {len(self.rewards)} rewards of the held-out samples are NaN or infinite")
        return finite

    def first(self, samples: int) -> Evaluation:
        """Return the first samples only; `comparison` stays whole."""
        return replace(
            self,
            images=self.images[:samples],
            prompts=self.prompts[:samples],
            rewards=self.rewards[:samples],
            details={name: values[:samples] for name, values in self.details.items()},
            pictures=None if self.pictures is None else self.pictures[:samples],
            measurements=None if self.measurements is None else self.measurements[:samples],
            holdout_rewards=None if self.holdout_rewards is None else self.holdout_rewards[:samples],
        )


def evaluate(
    policy: DiffusionPolicy,
    env: DenoisingVectorEnv,
    prompts: Sequence[str | Prompt],
    seed: int,
    processes: Processes | None = None,
    compared: Sequence[tuple[int, int]] = (),
) -> Evaluation:
    """Generate one sample per prompt with the policy's stochastic sampler, and score it.

    Sample `i` starts from the noise of seed `seed + i`, and the sampler's noise is seeded too, so the same arguments
    give the same samples for the same policy. The random state of training, and the statistics of a reward that has
    some, do not change.

    Args:
        policy: generates the samples; it does not change.
        env: autoreset must be off. Its number of sub-environments is the batch size. The sampler's noise is drawn one
            batch at a time, so evaluations with another batch size give other samples.
        prompts: one per sample; `(prompt, metadata)` for other metadata than that of the environment's prompt set.
        seed: of the first sample.
        processes: the processes that generate some rows each and return all samples. `env` then holds this process's
            sub-environments. Default: this process only.
        compared: transitions at which the policy is compared with the pretrained one, as pairs (sample, step) of
            numbers from 0. Each costs two rows of the denoiser.

    Raises:
        ValueError: if `env` resets itself or defers its rewards, or there are no prompts.
    """
    if env.autoreset_mode is not AutoresetMode.DISABLED:
        raise ValueError(f"env must have autoreset_mode 'Disabled'; got {env.autoreset_mode.value!r}")
    if env.deferred_rewards:
        raise ValueError("env must have deferred_rewards=False, because rewards are read from its steps; got True")
    if not prompts:
        raise ValueError("prompts must hold at least one prompt; got none")
    processes = processes or Processes()
    rows = processes.rows(env.num_envs * processes.count)
    own = []
    training = policy.training
    with (
        processes.fail_together(),
        _frozen(env),
        torch.no_grad(),
        policy.computing(rows, torch.Generator(policy.device).manual_seed(seed)),
        policy.sampling_weights(),
    ):
        policy.set_training_mode(False)
        for start in range(0, len(prompts), rows.total):
            processes.raise_interrupt()
            wanted = list(prompts[start : start + rows.total])
            padded = wanted + [wanted[-1]] * (rows.total - len(wanted))
            first = start + rows.start
            chosen = [(sample - first, step) for sample, step in compared if first <= sample < start + rows.stop]
            own.append(_episode(policy, env, padded[rows.start : rows.stop], seed + start, chosen))
    policy.set_training_mode(training)
    batches = [_joined(batch) for batch in zip(*processes.gather_objects(own), strict=True)]
    with processes.fail_together(), _frozen(env):
        whole = _joined([_scored(batch, env) for batch in batches])
    return whole.first(len(prompts))


def evaluation_prompts(env: DenoisingVectorEnv, count: int, seed: int) -> list[Prompt]:
    """Choose prompts for an evaluation, with their metadata: a finite set in turn, else draws from the distribution."""
    rng = np.random.default_rng(seed)
    if not isinstance(env.prompts, PromptSet):
        return [env.prompts.sample(rng) for _ in range(count)]
    order = rng.permutation(len(env.prompts))
    return [env.prompts[order[i % len(order)]] for i in range(count)]


def _frozen(env: DenoisingVectorEnv) -> AbstractContextManager[None]:
    return env.reward.frozen() if isinstance(env.reward, Freezable) else nullcontext()


def _episode(
    policy: DiffusionPolicy,
    env: DenoisingVectorEnv,
    prompts: list[str | Prompt],
    seed: int,
    compared: Sequence[tuple[int, int]],
) -> Evaluation:
    observation, _ = env.reset(seed=seed, options={"prompts": prompts})
    infos: dict[str, Any] = {}
    actions = observation["latents"]
    rewards = np.zeros(env.num_envs)
    kept: list[dict[str, Tensor]] = []
    for step in range(env.num_inference_steps):
        tensors = obs_as_tensor(observation, policy.device)
        assert isinstance(tensors, dict)
        if rows := [row for row, at in compared if at == step]:
            kept.append({name: tensor[rows] for name, tensor in tensors.items()})
        actions = policy.get_distribution(tensors).sample()
        observation, rewards, _, _, infos = env.step(actions)
    comparison = compare_with_pretrained(policy, kept, env.num_envs) if kept else None
    details = {name: list(values) for name, values in infos.get("reward_details", {}).items() if name[0] != "_"}
    measurements = None
    if "deferred_reward" in infos:  # several processes share the batch, and the reward has only measured
        deferred = list(infos["deferred_reward"])
        measurements = [one.measurement() for one in deferred]
        details = {name: [one.details()[name] for one in deferred] for name in deferred[0].details()}
    texts = [prompt if isinstance(prompt, str) else prompt[0] for prompt in prompts]
    samples = pictures = infos["image"] if "image" in infos else infos["sample"]
    abilities = abilities_of(env.model)
    if abilities.sample_kind != "image":  # the last action is the final latent
        pictures = abilities.render(actions).cpu().numpy() if abilities.can_render else None
    return Evaluation(samples, texts, rewards, details, pictures, measurements, comparison)


def _scored(batch: Evaluation, env: DenoisingVectorEnv) -> Evaluation:
    """Score a whole batch that several processes have measured."""
    if batch.measurements is None:
        return batch
    assert isinstance(env.reward, TwoStageReward)
    rewards, details = combine_measurements(
        env.reward, batch.measurements, batch.details, batch.prompts, env.non_finite_rewards
    )
    return replace(batch, rewards=rewards, details=details, measurements=None)


def _joined(batches: Sequence[Evaluation]) -> Evaluation:
    names = batches[0].details
    measured = [one for batch in batches for one in batch.measurements or ()]
    comparisons = [batch.comparison for batch in batches if batch.comparison is not None]
    return Evaluation(
        images=np.concatenate([batch.images for batch in batches]),
        prompts=[prompt for batch in batches for prompt in batch.prompts],
        rewards=np.concatenate([batch.rewards for batch in batches]),
        details={name: [value for batch in batches for value in batch.details.get(name, [])] for name in names},
        pictures=None if batches[0].pictures is None else np.concatenate([one.pictures for one in batches]),
        measurements=None if batches[0].measurements is None else measured,
        comparison=PretrainedComparison.joined(comparisons) if comparisons else None,
    )
