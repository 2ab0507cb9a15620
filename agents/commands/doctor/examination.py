"""A run under examination: the run's own model, reward, environment and algorithm, with a small number of samples.

Everything is built when a check needs it first. Whatever cannot be built is an error of that check; later checks that
need it say so, and the others still run.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.utils import set_random_seed
from torch import Tensor

from agents.algorithms.on_policy import TensorOnPolicyAlgorithm
from agents.commands.doctor.finding import Finding
from agents.config.sizes import divisors
from agents.config.train_config import TrainConfig
from agents.distributed import Processes
from agents.evaluation.evaluate import evaluation_prompts
from agents.planning.memory import fit_micro_batch_size
from agents.policy.diffusion_policy import DiffusionPolicy
from agents.rollout.vec_env import denoising_env_of
from agents.training.build import build_algorithm
from agents.training.preparation import CheckedRun, load_configured_model, training_env
from ddpo_env.models import DiffusionModel, abilities_of
from ddpo_env.models.image_decoding import decode_samples
from ddpo_env.models.protocol import encode
from ddpo_env.prompts import Prompt
from ddpo_env.sampler.gaussian_sampler import GaussianSampler
from ddpo_env.sampler.scheduler_table import ddim_of
from rewards import Freezable, Loadable, LogsAnswers, Reward, StatefulReward, evaluate_reward, is_stateful

Check = Callable[["Examination"], Finding]

SAMPLES = 8
"""Samples whose images and scores are looked at."""
_LEAST_ROLLOUT, _MOST_ROLLOUT = 16, 24
"""Samples in the rollout of the examination, as far as the run has so many."""
_SMALLER = (
    "The memory does not suffice: take --dtype bfloat16, a smaller --sample-batch-size and --train-batch-size, "
    "--vae-tiling or --gradient-checkpointing, or a device with more memory."
)
_T = TypeVar("_T")


class NotExaminedError(Exception):
    """Something that a check needs could not be built; an earlier check said why."""


@dataclass(frozen=True)
class Samples:
    """Finished samples of the policy.

    Attributes:
        noise: `(samples, *latent_shape)` float32, where they began.
        latents: `(samples, *latent_shape)` float32.
        decoded: what the model decoded, `(samples, ...)`; black images where it is not finite.
        finite: `(samples,)`.
        prompts: one for each sample, with its metadata.
    """

    noise: Tensor
    latents: Tensor
    decoded: npt.NDArray[Any]
    finite: npt.NDArray[np.bool_]
    prompts: list[Prompt]

    @property
    def texts(self) -> list[str]:
        """The prompts without metadata."""
        return [text for text, _ in self.prompts]


@dataclass(frozen=True)
class Update:
    """One iteration's update.

    Attributes:
        metrics: what training logs, by name.
        steps: of the optimizer.
        largest_change: of a weight that learns.
        error: that ended the update, if one did.
    """

    metrics: Mapping[str, float]
    steps: int
    largest_change: float
    error: str = ""


class Examination:
    """A small copy of a run.

    Args:
        checked: the run, with its own sizes.
        folder: where images are written.

    Attributes:
        config: settings of the run.
        small: the same settings with few samples. Samples without a score are dropped here, so that the examination
            goes on.
    """

    def __init__(self, checked: CheckedRun, folder: Path) -> None:
        """Choose the sizes; nothing is loaded."""
        self.config, self.folder = checked.config, folder
        self.processes = Processes()
        self.small = _small(checked.config)
        self._checked = replace(checked, config=self.small)
        self._built: dict[str, Any] = {}
        self._failed: dict[str, Exception] = {}

    def once(self, name: str, build: Callable[[], _T]) -> _T:
        """Return what `build` returned when a check first needed it.

        Raises:
            NotExaminedError: if it failed then. The first time, the error itself is raised.
        """
        if name in self._failed:
            raise NotExaminedError(f"the {name} failed: {self._failed[name]}")
        if name not in self._built:
            try:
                self._built[name] = build()
            except NotExaminedError:
                raise
            except Exception as error:
                self._failed[name] = error
                raise
        built: _T = self._built[name]
        return built

    @property
    def model(self) -> DiffusionModel:
        """The model of the run, with its dtype and on its device."""
        return self.once("model", lambda: load_configured_model(self._checked, self.processes))

    @property
    def algorithm(self) -> TensorOnPolicyAlgorithm:
        """The algorithm of the run, on an environment with few sub-environments."""
        model = self.model
        return self.once("algorithm", lambda: self._algorithm(model))

    @property
    def policy(self) -> DiffusionPolicy:
        """The policy of the algorithm."""
        policy = self.algorithm.policy
        assert isinstance(policy, DiffusionPolicy)
        return policy

    @property
    def samples(self) -> Samples:
        """Samples of the stochastic sampler, before any update."""
        policy = self.policy
        return self.once("stochastic sampler", lambda: self._sample(policy))

    @property
    def reward(self) -> Reward:
        """The reward of the run, with its model loaded."""
        return self.once("reward", self._load_reward)

    @property
    def rollout(self) -> TensorOnPolicyAlgorithm:
        """The algorithm with a full rollout buffer, before its update."""
        algorithm, _ = self.algorithm, self.reward
        self.once("rollout", lambda: self._collect(algorithm))
        return algorithm

    @property
    def update(self) -> Update:
        """One iteration's update; the weights are put back afterwards."""
        algorithm = self.rollout
        return self.once("update", lambda: self._update(algorithm))

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which the denoiser computes."""
        return self.policy.compute_dtype

    def deterministic_sampler(self) -> GaussianSampler:
        """Return the table of the run's steps without noise: DDIM with η = 0, or Euler's steps of the flow."""
        model, steps = self.model, self.config.num_inference_steps
        if isinstance(model.scheduler, FlowMatchEulerDiscreteScheduler):
            return GaussianSampler.from_model(model, steps, sampler="ode")
        return GaussianSampler.from_scheduler(ddim_of(model.scheduler), steps, sampler="ode")

    def initial_noise(self, rows: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return `(rows, *latent_shape)` float32 on the policy's device: what a pipeline draws with `generator`."""
        noise = torch.randn(rows, *self.model.latent_shape, generator=self.noise_generator(), dtype=dtype)
        return noise.float().to(self.policy.device)

    def noise_generator(self) -> torch.Generator:
        """Return the generator of the initial noise, at its beginning."""
        return torch.Generator("cpu").manual_seed(self.config.seed)

    @torch.no_grad()
    def denoise(
        self,
        sampler: GaussianSampler,
        prompts: Sequence[Prompt],
        noise: Tensor,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Return finished latents of the policy, `(batch, *latent_shape)`.

        Args:
            sampler: the table of steps.
            prompts: one for each row, with its metadata.
            noise: where the steps begin, `(batch, *latent_shape)`.
            generator: of the steps' noise; `None`: each step goes to its mean.
        """
        policy, latents = self.policy, noise
        sampler, conditioning = sampler.to(policy.device), encode(self.model, prompts)
        policy.set_training_mode(False)
        with policy.sampling_weights():
            for step in range(len(sampler)):
                index = torch.full((len(latents),), step, device=policy.device)
                timestep = sampler.timesteps[index].float()
                output = policy.predict_output(latents, timestep, conditioning)
                if generator is None:
                    latents = sampler.mean(latents, output, index)
                else:
                    drawn = torch.randn(latents.shape, generator=generator, device=policy.device)
                    latents, _ = sampler.sample(latents, output, index, drawn)
        return latents

    def score(self, samples: npt.NDArray[Any], prompts: Sequence[Prompt]) -> npt.NDArray[np.float64]:
        """Return the scores of samples, `(batch,)`, some of which may not be finite; the reward's state stays."""
        texts, metadata = [text for text, _ in prompts], [dict(details) for _, details in prompts]
        reward = self.reward
        with _undisturbed(reward):
            return evaluate_reward(reward, samples, texts, metadata, non_finite="keep")[0]

    def chosen_prompts(self, count: int) -> list[Prompt]:
        """Return prompts of the run, different ones as far as there are some.

        If the model takes more than the text, such as an image, all have that of the first: a pipeline's call takes one
        image for all rows.
        """
        env = denoising_env_of(self.algorithm.env) if self.algorithm.env is not None else None
        assert env is not None
        prompts = evaluation_prompts(env, count, self.config.seed)
        shared = {name: prompts[0][1][name] for name in abilities_of(env.model).prompt_fields}
        return [(text, {**metadata, **shared}) for text, metadata in prompts]

    def close(self) -> None:
        """Close the environment, whose thread calls the reward."""
        algorithm = self._built.get("algorithm")
        if algorithm is not None:
            if (env := denoising_env_of(algorithm.env)) is not None:
                env.cancel_rewards()  # a call may wait for people
            algorithm.env.close()

    def _load_reward(self) -> Reward:
        reward = self._checked.reward
        if isinstance(reward, LogsAnswers):
            reward.log_to(self.folder / "judge")
        if isinstance(reward, Loadable):
            reward.load()
        return reward

    def _algorithm(self, model: DiffusionModel) -> TensorOnPolicyAlgorithm:
        set_random_seed(self.config.seed)
        algorithm = build_algorithm(self.small, training_env(self._checked, model, self.processes), self.processes)
        algorithm.set_logger(Logger(None, []))
        if self.small.training.train_batch_size == 0:
            algorithm.micro_batch_size = fit_micro_batch_size(algorithm)
        return algorithm

    def _sample(self, policy: DiffusionPolicy) -> Samples:
        prompts = self.chosen_prompts(max(2, min(SAMPLES, self.config.training.sample_batch_size)))
        noise, texts = self.initial_noise(len(prompts)), [text for text, _ in prompts]
        generator = torch.Generator(policy.device).manual_seed(self.config.seed)
        latents = self.denoise(policy.sampler, prompts, noise, generator)
        decoded, finite = decode_samples(self.model, latents, texts, "keep")
        return Samples(noise, latents, decoded, finite, prompts)

    def _collect(self, algorithm: TensorOnPolicyAlgorithm) -> None:
        _, callback = algorithm._setup_learn(0, None)
        algorithm.set_logger(Logger(None, []))
        assert algorithm.env is not None
        algorithm.collect_rollouts(algorithm.env, callback, algorithm.rollout_buffer, algorithm.n_steps)
        algorithm._update_current_progress_remaining(0, 1)

    def _update(self, algorithm: TensorOnPolicyAlgorithm) -> Update:
        policy, steps, error = self.policy, 0, ""
        drift: dict[str, float] = {}

        def count(*_: Any) -> None:
            nonlocal steps
            steps += 1

        before = {name: value.clone() for name, value in policy.state_dict().items()}
        hook = policy.optimizer.register_step_post_hook(count)
        try:
            with algorithm.generators.as_global():
                algorithm.train()
                # On more steps than the few that so small an update measures by itself.
                drift = algorithm.drift(algorithm.random_steps(16))
        except FloatingPointError as raised:
            error = str(raised)
        finally:
            hook.remove()
            after = policy.state_dict()
            change = max(float((after[name] - value).abs().max()) for name, value in before.items())
            policy.load_state_dict(before)
            policy.optimizer.state.clear()
        metrics = {name: float(value) for name, value in algorithm.logger.name_to_value.items()}
        metrics |= {f"train/{name}": value for name, value in drift.items()}
        return Update(metrics, steps, change, error)


def examine(
    examination: Examination, checks: Mapping[str, Check], show: Callable[[Finding], None] = lambda _: None
) -> list[Finding]:
    """Run checks one after another; one that raises is a red finding, and the others still run.

    Args:
        examination: the run.
        checks: by the names of their findings.
        show: is told each finding.
    """
    findings = []
    for name, check in checks.items():
        started = time.perf_counter()
        try:
            finding = check(examination)
        except NotExaminedError as missing:
            finding = Finding(name, "amber", {}, f"Not examined: {missing}", "Mend the red findings first.")
        except Exception as error:
            text = " ".join([f"{type(error).__name__}: {error}", *getattr(error, "__notes__", ())])
            is_full = isinstance(error, torch.OutOfMemoryError)
            advice = _SMALLER if is_full else "A run would end with this error: mend it."
            finding = Finding(name, "red", {}, f"The check raised {text}", advice)
        findings.append(replace(finding, seconds=time.perf_counter() - started))
        show(findings[-1])
    return findings


def uses_images(examination: Examination) -> bool:
    """Return whether the samples of the model are images."""
    return abilities_of(examination.model).sample_kind == "image"


@contextmanager
def _undisturbed(reward: Any) -> Iterator[None]:
    """Keep a reward's state as it is."""
    if isinstance(reward, Freezable):
        with reward.frozen():
            yield
        return
    state = copy.deepcopy(reward.state_dict()) if is_stateful(reward) else None
    yield
    if state is not None:
        assert isinstance(reward, StatefulReward)
        reward.load_state_dict(state)


def _small(config: TrainConfig) -> TrainConfig:
    """Return the settings of an iteration with few samples: an update has a whole training call where that is cheap."""
    training, total = config.training, config.samples_per_iteration
    unit = math.lcm(training.updates_per_iteration, training.samples_per_prompt)
    whole_call = math.ceil(training.train_batch_size * training.updates_per_iteration / config.trained_steps)
    wanted = min(max(_LEAST_ROLLOUT, whole_call), _MOST_ROLLOUT)
    samples = min(total, unit * math.ceil(wanted / unit))
    batch = max(
        size for size in divisors(samples, training.sample_batch_size) if size % training.samples_per_prompt == 0
    )
    return config.changed(samples_per_iteration=samples, sample_batch_size=batch, non_finite_rewards="drop")
