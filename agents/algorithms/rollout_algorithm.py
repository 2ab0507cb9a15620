"""An algorithm that collects rollouts: Stable-Baselines3's `OnPolicyAlgorithm` with two methods replaced.

`collect_rollouts` makes no NumPy round trip where the environment returns tensors, and accepts rewards that are still
being computed. `learn` logs an iteration after its update, together with the update's metrics.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, ClassVar, Self

import numpy as np
import numpy.typing as npt
import torch
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.policies import (
    ActorCriticCnnPolicy,
    ActorCriticPolicy,
    BasePolicy,
    MultiInputActorCriticPolicy,
)
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, Schedule
from stable_baselines3.common.utils import obs_as_tensor
from stable_baselines3.common.vec_env import VecEnv
from torch import Tensor

from agents.algorithms.advantages import AdvantageEstimator, fitting_estimator
from agents.algorithms.generators import Generators
from agents.algorithms.options import RATE, NonFiniteRewards, check_arguments, check_timesteps
from agents.algorithms.saving.algorithm_file import SavableAlgorithm
from agents.distributed import Processes, Rows
from agents.policy.abilities import PolicyAbilities, policy_abilities
from agents.rollout.buffer import TensorRolloutBuffer
from agents.rollout.latents_check import LatentsCheck
from agents.rollout.sampling_scope import SamplingScope
from agents.rollout.scores import PendingScores, detail_means, numeric_details, score_measured
from agents.rollout.shared_prefix import EqualRows, SharedPrefix, shared_prefix_of
from agents.rollout.vec_env import checked_env, denoising_env_of, env_actions, pending_scores_of
from ddpo_env.spaces import DenoisingObservationSpace


class RolloutAlgorithm(SavableAlgorithm):
    """Collects a rollout, computes the weight of each of its steps, and calls `train`.

    Args:
        policy: policy class, or a name in `policy_aliases`.
        env: vectorized or single environment, or its id.
        learning_rate: a number, or a function of the remaining progress.
        n_steps: steps of each environment in a rollout.
        gamma: discount.
        gae_lambda: λ of `GeneralizedAdvantage`.
        ent_coef: weight of the entropy bonus.
        vf_coef: weight of the critic's loss.
        max_grad_norm: gradients are clipped to this norm.
        advantage: estimator; default: `GeneralizedAdvantage` for a policy with a critic, whose values it needs, and
            `PerPromptAdvantage` for one without, such as `DiffusionPolicy` by default. That needs whole episodes.
        non_finite_rewards: `"raise"`: a reward that is NaN or infinite is an error. `"drop"`: its sample is removed and
            counted in `rollout/dropped_samples`. The environment must not raise by itself then
            (`DenoisingVectorEnv(non_finite_rewards="keep")`).
        processes: the processes that share the work, see `agents.distributed`; default: this one only. `env` holds this
            process's sub-environments. The policy must be able to compute the rows of a batch
            (`PolicyAbilities.shares_batches`).
        context_key: key of an episode's context, such as its prompt, in the reset info.
        policy_kwargs: arguments of the policy.
        stats_window_size: number of episodes that `rollout/ep_rew_mean` averages.
        tensorboard_log: folder of TensorBoard logs.
        verbose: 0 silent, 1 informative.
        seed: of the algorithm's own generators (`generators`), the environment, and the global generators of Python,
            NumPy and torch, from which training draws nothing.
        device: where the policy is; default `"auto"`.
        _init_setup_model: as in Stable-Baselines3.

    Raises:
        ValueError: for an argument that is not valid.
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {
        "MlpPolicy": ActorCriticPolicy,
        "CnnPolicy": ActorCriticCnnPolicy,
        "MultiInputPolicy": MultiInputActorCriticPolicy,
    }
    penalises_steps: ClassVar[bool] = True
    """Whether `kl_coef` is the weight of the divergence of the sampler's steps, which needs noise in them."""
    advantage: AdvantageEstimator
    rollout_buffer: TensorRolloutBuffer  # type: ignore[assignment]

    def __init__(
        self,
        policy: str | type[ActorCriticPolicy],
        env: GymEnv | str,
        *,
        learning_rate: float | Schedule,
        n_steps: int,
        gamma: float = 0.99,
        gae_lambda: float = 0.95,
        ent_coef: float = 0.0,
        vf_coef: float = 0.5,
        max_grad_norm: float = 0.5,
        advantage: AdvantageEstimator | None = None,
        non_finite_rewards: NonFiniteRewards = "raise",
        processes: Processes | None = None,
        context_key: str = "prompt",
        policy_kwargs: dict[str, Any] | None = None,
        stats_window_size: int = 100,
        tensorboard_log: str | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: torch.device | str = "auto",
        _init_setup_model: bool = True,
    ) -> None:
        check_arguments(locals())
        self.non_finite_rewards: NonFiniteRewards = non_finite_rewards
        self._given_advantage = advantage
        self.context_key = context_key
        self.processes = processes if processes is not None else Processes()
        super().__init__(
            policy,
            env,
            learning_rate=learning_rate,
            n_steps=n_steps,
            gamma=gamma,
            gae_lambda=gae_lambda,
            ent_coef=ent_coef,
            vf_coef=vf_coef,
            max_grad_norm=max_grad_norm,
            use_sde=False,
            sde_sample_freq=-1,
            rollout_buffer_class=TensorRolloutBuffer,  # type: ignore[arg-type]
            stats_window_size=stats_window_size,
            tensorboard_log=tensorboard_log,
            policy_kwargs=policy_kwargs,
            verbose=verbose,
            seed=seed,
            device=device,
            _init_setup_model=_init_setup_model,
            supported_action_spaces=(spaces.Box, spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary),
        )

    def _setup_model(self) -> None:
        if self.processes.count > 1 and self.seed is None:
            raise ValueError(f"seed must be given with {self.processes.count} processes, which draw the same numbers")
        self.generators = Generators(self.seed, self.device)
        with self.generators.as_global():
            super()._setup_model()
        self.advantage = fitting_estimator(self._given_advantage, self.abilities, self.n_steps)
        if self.seed is not None:  # for `predict` and user code, which draw other numbers than training does
            torch.manual_seed(self.seed + 1)
        if self.processes.count > 1 and not self.abilities.shares_batches:
            raise ValueError(
                f"processes must be 1 with a {type(self.policy).__name__}, which cannot compute the rows of a shared "
                f"batch; got {self.processes.count}"
            )

    @staticmethod
    def _wrap_env(env: GymEnv, verbose: int = 0, monitor_wrapper: bool = True) -> VecEnv:
        return SavableAlgorithm._wrap_env(checked_env(env), verbose, monitor_wrapper)

    @property
    def abilities(self) -> PolicyAbilities:
        """What the policy can do beyond Stable-Baselines3's interface."""
        return policy_abilities(self.policy)

    def sampling(self, rollout: int) -> AbstractContextManager[None]:
        """Return the context in which a rollout is sampled, by its number from 0."""
        return self.abilities.sampling_weights()

    @property
    def _rollouts(self) -> int:
        """The number of finished rollouts, also those before a checkpoint."""
        return self.num_timesteps // (self.n_steps * self.n_envs * self.processes.count)

    def broadcast_weights(self) -> None:
        """Give the weights of all processes the main one's values, before the first iteration."""
        self.processes.broadcast_weights([p for p in self.policy.parameters() if p.requires_grad])

    def scheduled(self, name: str, schedule: Any) -> float:
        """Return a schedule's value now, a finite number of at least 0; raise a `ValueError` with `name` otherwise."""
        progress = self._current_progress_remaining
        value = float(schedule(progress))
        if value not in RATE:
            raise ValueError(f"{name} must be {RATE} at any progress; got {value} at progress {progress:g}")
        return value

    def _update_learning_rate(self, optimizers: list[torch.optim.Optimizer] | torch.optim.Optimizer) -> None:
        self.scheduled("learning_rate", self.lr_schedule)
        super()._update_learning_rate(optimizers)

    def set_random_seed(self, seed: int | None = None) -> None:
        """Seed this algorithm's generators, the spaces, the environment, and the global generators for user code."""
        super().set_random_seed(seed)
        if seed is not None:
            self.generators.seed(seed)

    def generator_state(self) -> dict[str, Any]:
        """Return the states of this algorithm's random generators as plain values, for a checkpoint."""
        return self.generators.state()

    def load_generator_state(self, state: dict[str, Any]) -> None:
        """Restore what `generator_state` returned."""
        self.generators.load_state(state)

    def learn(
        self,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int = 1,
        tb_log_name: str | None = None,
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> Self:
        """Train for at least `total_timesteps` environment steps; arguments as in Stable-Baselines3.

        Schedules see the progress of this call, whatever came before it: 1 in its first iteration, and 1 / n in the
        last one of n. `tb_log_name` is the name of the class by default.
        """
        check_timesteps(total_timesteps)
        total_timesteps, callbacks = self._setup_learn(
            total_timesteps, callback, reset_num_timesteps, tb_log_name or type(self).__name__, progress_bar
        )
        callbacks.on_training_start(locals(), globals())
        iteration, first = 0, self.num_timesteps
        while self.num_timesteps < total_timesteps:
            iteration += 1
            if not self.iterate(callbacks, iteration, total_timesteps, log_interval, first):
                break
        callbacks.on_training_end()
        return self

    def iterate(
        self,
        callback: BaseCallback,
        iteration: int,
        total_timesteps: int,
        log_interval: int | None = 1,
        first_timestep: int = 0,
    ) -> bool:
        """Run one iteration: a rollout, its update and its log.

        Schedules see the progress with which the iteration begins, from `first_timestep` (1) to `total_timesteps` (0).

        Returns:
            False if a callback asked to stop.
        """
        assert self.env is not None
        done, total = self.num_timesteps - first_timestep, total_timesteps - first_timestep
        if not self.collect_rollouts(self.env, callback, self.rollout_buffer, self.n_steps):
            return False
        self._update_current_progress_remaining(done, total)
        with self.generators.as_global():
            self.train()
        if log_interval is not None and iteration % log_interval == 0:
            with self.processes.fail_together():
                self.dump_logs(iteration)
        return True

    def collect_rollouts(  # type: ignore[override]
        self, env: VecEnv, callback: BaseCallback, rollout_buffer: TensorRolloutBuffer, n_rollout_steps: int
    ) -> bool:
        """Fill the buffer with `n_rollout_steps` steps of every sub-environment and compute the step weights.

        Returns:
            False if a callback asked to stop.

        Raises:
            ValueError: for a reward that is not finite, before it can reach a weight; where such samples are dropped,
                if none is left.
            Exception: whatever the reward raises. If rewards are computed in the background, at the next step.
        """
        self.policy.set_training_mode(False)
        rollout_buffer.reset()
        callback.on_rollout_start()
        pending = PendingScores(rollout_buffer)
        complete = False
        try:
            sampling = SamplingScope(partial(self.sampling, self._rollouts))
            with self.processes.fail_together(), sampling, pending_scores_of(env):
                complete = self._sample(env, callback, rollout_buffer, n_rollout_steps, pending, sampling)
        finally:
            if not complete:  # the next rollout begins new episodes, so that no part of one is trained on
                self._last_obs = None
                rollout_buffer.reset()
        if not complete:
            return False
        rollout_buffer.gather(self.processes)
        episodes = pending.join(self.processes)
        denoising_env = denoising_env_of(env)
        with self.processes.fail_together():
            reward = None if denoising_env is None else denoising_env.reward
            score_measured(episodes, rollout_buffer, reward, "keep" if self.non_finite_rewards == "drop" else "raise")
            scored = [episode for episode in episodes if episode.is_finite(rollout_buffer)]
            self._update_info_buffer([episode.statistics for episode in scored], np.ones(len(scored), np.bool_))
            self._drop_or_raise(rollout_buffer)
            rollout_buffer.details = numeric_details(scored, rollout_buffer)
            rollout_buffer.set_monte_carlo_returns()
            rollout_buffer.advantages = self.step_weights(rollout_buffer)
        self._record_rewards(rollout_buffer)
        for name, mean in detail_means(scored).items():
            self.logger.record(f"reward/{name}", mean)
        callback.update_locals(locals())
        callback.on_rollout_end()
        return True

    def _sample(
        self,
        env: VecEnv,
        callback: BaseCallback,
        rollout_buffer: TensorRolloutBuffer,
        n_rollout_steps: int,
        pending: PendingScores,
        sampling: SamplingScope,
    ) -> bool:
        """Fill the buffer with this process's sub-environments; return False if a callback asked to stop."""
        dones = np.zeros(env.num_envs, np.bool_)
        rows = self.processes.rows(env.num_envs * self.processes.count)
        latents = LatentsCheck() if isinstance(self.observation_space, DenoisingObservationSpace) else None
        prefix = self.shared_prefix(env)
        for n_steps in range(n_rollout_steps):  # callbacks know the local variables by Stable-Baselines3's names
            self.processes.raise_interrupt()
            obs_tensor = obs_as_tensor(self._last_obs, self.device)  # type: ignore[arg-type]
            starts = np.asarray(self._last_episode_starts, dtype=np.bool_)
            reset_infos = getattr(env.unwrapped, "reset_infos", None) or [{}] * env.num_envs  # wrappers do not have it
            contexts = [info.get(self.context_key) for info in reset_infos]
            equal_rows = None if prefix is None else prefix.equal_rows(obs_tensor)  # type: ignore[arg-type]
            actions, values, log_probs = self._act(obs_tensor, rows, equal_rows)
            scored = self.abilities.scored(obs_tensor)
            clipped_actions = env_actions(self.policy, actions, self._last_obs)
            new_obs, rewards, dones, infos = env.step(clipped_actions)
            # All of this changes before callbacks run, so that a callback that stops leaves a consistent state.
            self._last_obs = new_obs  # type: ignore[assignment]
            self._last_episode_starts = dones
            self.num_timesteps += rows.total
            if self.non_finite_rewards == "raise":
                self._require_finite(rewards)
            callback.update_locals(locals())
            if not sampling.on_step(callback):
                return False
            self._bootstrap_time_limits(rewards, dones, infos)
            rollout_buffer.add(obs_tensor, actions, rewards, starts, values, log_probs, contexts, scored)
            if latents is not None:
                latents.compare(actions, new_obs, dones, infos)  # type: ignore[arg-type]
            pending.add(n_steps, dones, infos)
            pending.collect()
        if latents is not None:
            latents.raise_if_changed()
        if prefix is not None:
            prefix.raise_if_different()
        with torch.no_grad():
            last_values = self.policy.predict_values(obs_as_tensor(self._last_obs, self.device))  # type: ignore[arg-type]
        rollout_buffer.finish(last_values, dones)
        pending.collect(wait=True)
        return True

    def shared_prefix(self, env: VecEnv) -> SharedPrefix | None:
        """Return what samples of a prompt have in common, which is computed once; `None` if they do not start alike."""
        return shared_prefix_of(denoising_env_of(env), self.abilities.stochastic_steps(), self.device)

    def _act(self, observation: Any, rows: Rows, equal_rows: EqualRows | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return actions, values and log-probabilities, with noise from this algorithm's generators only."""
        abilities = self.abilities
        scope = nullcontext() if abilities.draws_from_generator else self.generators.as_global()
        with torch.no_grad(), scope, abilities.computing(rows, self.generators.noise, equal_rows):
            return self.policy(observation)

    def _require_finite(self, rewards: npt.NDArray[np.floating]) -> None:
        if not np.isfinite(rewards).all():
            raise ValueError(f"rewards must be finite; got {rewards} at timestep {self.num_timesteps}")

    def _drop_or_raise(self, rollout: TensorRolloutBuffer) -> None:
        """Drop samples whose reward is not finite, or raise, now that all rewards are known."""
        if self.non_finite_rewards == "raise":
            self._require_finite(rollout.rewards)
            return
        rollout.drop_non_finite()
        count = len(rollout.dropped_contexts)
        if not rollout.contexts:
            raise ValueError(f"all {count} rewards of the rollout are NaN or infinite: no sample is left to train on")
        self.logger.record("rollout/dropped_samples", count)

    def step_weights(self, rollout: TensorRolloutBuffer) -> Tensor:
        """Return the factor of each step in the loss, `(buffer_size, n_envs)`: its advantage."""
        return self.advantage(rollout)

    def _bootstrap_time_limits(
        self, rewards: npt.NDArray[np.floating], dones: npt.NDArray[np.bool_], infos: list[dict[str, Any]]
    ) -> None:
        """Add the discounted value of the state where a time limit cut an episode (Pardo et al. 2018)."""
        for index in np.flatnonzero(dones):
            if infos[index].get("TimeLimit.truncated", False):
                terminal, _ = self.policy.obs_to_tensor(infos[index]["terminal_observation"])
                with torch.no_grad():
                    rewards[index] += self.gamma * float(self.policy.predict_values(terminal))

    def _record_rewards(self, rollout: TensorRolloutBuffer) -> None:
        returns = rollout.segment_returns()[rollout.complete_segments()]
        if len(returns):
            self.logger.record("rollout/reward_mean", float(returns.mean()))
            self.logger.record("rollout/reward_std", float(returns.std()))
            self.logger.record("rollout/episodes", len(returns))
