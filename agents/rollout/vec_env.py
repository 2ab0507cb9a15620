"""A Gymnasium vector environment as a Stable-Baselines3 `VecEnv`.

`gym.make_vec("DDPO-SD-v0")` is one object with one decoder call for all of its sub-environments. The adapter lets
Stable-Baselines3 use it without splitting it into single environments.
"""

from __future__ import annotations

import reprlib
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import GymEnv
from stable_baselines3.common.vec_env.base_vec_env import VecEnv, VecEnvIndices, VecEnvObs, VecEnvStepReturn
from torch import Tensor

from ddpo_env.spaces import DenoisingObservationSpace
from ddpo_env.vector_env import DenoisingVectorEnv


class VectorEnvAdapter(VecEnv):
    """Wraps any `gymnasium.vector.VectorEnv` whose autoreset mode is same-step.

    Observations pass through unchanged, also the tensors of `backend="torch"`. At the end of an episode the info holds
    what Stable-Baselines3 looks for: `terminal_observation`, `TimeLimit.truncated`, and `episode` with return `r`,
    length `l` and time `t` in seconds. No `VecMonitor` is needed.

    Raises:
        TypeError: if it is no `VectorEnv`.
        ValueError: if it has another autoreset mode.
    """

    def __init__(self, env: VectorEnv[Any, Any, Any]) -> None:
        """Wrap the environment; `close` closes it."""
        if not isinstance(env, VectorEnv):
            raise TypeError(
                "env must be a gymnasium.vector.VectorEnv, such as gym.make_vec(..., "
                f'autoreset_mode="SameStep"); got a {type(env).__name__}: {reprlib.repr(env)}'
            )
        mode = env.metadata.get("autoreset_mode")
        if mode != AutoresetMode.SAME_STEP:
            raise ValueError(
                "autoreset_mode must be gymnasium.vector.AutoresetMode.SAME_STEP, as Stable-Baselines3 expects; "
                f"got {mode}"
            )
        below = env.unwrapped
        if isinstance(below, DenoisingVectorEnv) and below.deferred_rewards and env is not below:
            raise ValueError(
                f"deferred_rewards must be False with a wrapper such as {type(env).__name__} around the environment, "
                "which would see rewards of 0"
            )
        self.vector_env = env
        self._leaves_pending = False
        super().__init__(env.num_envs, env.single_observation_space, env.single_action_space)
        self._actions: Any = None
        self._returns = np.zeros(env.num_envs)
        self._lengths = np.zeros(env.num_envs, dtype=np.int64)
        self._start = time.perf_counter()

    @property
    def denoising_env(self) -> DenoisingVectorEnv | None:
        """The denoising environment below all wrappers; `None` for any other environment."""
        env = self.vector_env.unwrapped
        return env if isinstance(env, DenoisingVectorEnv) else None

    def reset(self) -> VecEnvObs:
        """Start new episodes, with the seeds and options that were set before."""
        seed = None if all(seed is None for seed in self._seeds) else self._seeds
        options = self._options[0] if any(self._options) else None
        observation, infos = self.vector_env.reset(seed=seed, options=options)  # type: ignore[arg-type]
        self.reset_infos = _split(infos, self.num_envs)
        self._returns[:] = 0
        self._lengths[:] = 0
        self._reset_seeds()
        self._reset_options()
        return observation

    def seed(self, seed: int | None = None) -> Sequence[int | None]:
        """Seed sub-environment `i` with `seed + i`; `i` counts in the whole batch where several processes share one."""
        first = 0 if self.denoising_env is None else self.denoising_env.first_index
        return super().seed(seed if seed is None else seed + first)

    def set_options(self, options: list[dict[str, Any]] | dict[str, Any] | None = None) -> None:
        """Set the options of the next reset: one dictionary for the whole batch, as in Gymnasium."""
        if isinstance(options, list):
            raise ValueError("options must be one dictionary for the whole batch; got a list")
        self._options = [options or {}]

    def step_async(self, actions: Any) -> None:
        """Store the actions for `step_wait`."""
        self._actions = actions

    def step_wait(self) -> VecEnvStepReturn:
        """Step; return observation, rewards `(num_envs,)` float32, dones `(num_envs,)` and a list of infos."""
        observation, rewards, terminations, truncations, infos = self.vector_env.step(self._actions)
        rewards = np.asarray(rewards, dtype=np.float64)
        dones = np.logical_or(terminations, truncations)
        self._returns += rewards
        self._lengths += 1
        if not dones.any():
            return observation, rewards.astype(np.float32), dones, _split(infos, self.num_envs)
        final_infos = _split(infos["final_info"], self.num_envs)
        if not self._leaves_pending:
            rewards = self._with_pending(rewards, final_infos)
        fresh = _split({name: infos[name] for name in infos if name not in _FINAL_INFOS}, self.num_envs)
        split = [final if done else info for final, info, done in zip(final_infos, fresh, dones, strict=True)]
        for index in np.flatnonzero(dones):
            self.reset_infos[index] = fresh[index]
            split[index]["terminal_observation"] = infos["final_obs"][index]
            split[index]["TimeLimit.truncated"] = bool(truncations[index] and not terminations[index])
            split[index]["episode"] = {
                "r": float(self._returns[index]),
                "l": int(self._lengths[index]),
                "t": round(time.perf_counter() - self._start, 6),
            }
        self._returns[dones] = 0
        self._lengths[dones] = 0
        return observation, rewards.astype(np.float32), dones, split

    @contextmanager
    def pending_scores(self) -> Iterator[None]:
        """Leave deferred rewards pending inside the block: the caller takes them out of the infos (`PendingScores`).

        Everywhere else a step waits for them, so that stock algorithms and wrappers around this adapter see them.
        """
        self._leaves_pending = True
        try:
            yield
        finally:
            self._leaves_pending = False

    def _with_pending(self, rewards: np.ndarray, infos: list[dict[str, Any]]) -> np.ndarray:
        """Return the rewards with the deferred ones of ended episodes, and put their details into the infos."""
        rewards = rewards.copy()
        for index, info in enumerate(infos):
            if (deferred := info.pop("deferred_reward", None)) is None:
                continue
            if deferred.is_measured:
                raise ValueError(
                    "the reward is shared by several processes, and only the algorithms of `agents` on the adapter "
                    "itself, without wrappers such as VecNormalize, form its scores"
                )
            rewards[index] += deferred.result()
            self._returns[index] += deferred.result()
            info |= {"reward_details": details} if (details := deferred.details()) else {}
        return rewards

    def close(self) -> None:
        """Close the environment."""
        self.vector_env.close()

    def get_images(self) -> Sequence[np.ndarray | None]:
        """Return one rendered image per sub-environment."""
        return self.vector_env.render() or [None] * self.num_envs  # type: ignore[return-value]

    def get_attr(self, attr_name: str, indices: VecEnvIndices = None) -> list[Any]:
        """Return an attribute of the batch, once per sub-environment."""
        owner = self.vector_env if hasattr(self.vector_env, attr_name) else self.vector_env.unwrapped
        value = getattr(owner, attr_name)
        return [value for _ in self._get_indices(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: VecEnvIndices = None) -> None:
        """Set an attribute of the whole batch; single sub-environments have none of their own."""
        self._refuse_indices(indices)
        setattr(self.vector_env.unwrapped, attr_name, value)

    def env_method(
        self, method_name: str, *method_args: Any, indices: VecEnvIndices = None, **method_kwargs: Any
    ) -> list[Any]:
        """Call a method of the batch once; return its result once per sub-environment."""
        self._refuse_indices(indices)
        result = getattr(self.vector_env.unwrapped, method_name)(*method_args, **method_kwargs)
        return [result] * self.num_envs

    def env_is_wrapped(
        self, wrapper_class: type[gym.Wrapper[Any, Any, Any, Any]], indices: VecEnvIndices = None
    ) -> list[bool]:
        """Return true for `Monitor`, whose `episode` the infos have; no other wrapper is around a sub-environment."""
        return [wrapper_class is Monitor for _ in self._get_indices(indices)]

    def _refuse_indices(self, indices: VecEnvIndices) -> None:
        if indices is not None and len(list(self._get_indices(indices))) != self.num_envs:
            raise ValueError(
                f"indices must be None: the {self.num_envs} sub-environments are one environment; got {indices}"
            )


_FINAL_INFOS = ("final_obs", "_final_obs", "final_info", "_final_info")


def _split(infos: dict[str, Any], num_envs: int) -> list[dict[str, Any]]:
    """Turn Gymnasium's dictionary of arrays with masks into one dictionary per sub-environment."""
    split: list[dict[str, Any]] = [{} for _ in range(num_envs)]
    for name, values in infos.items():
        if name.startswith("_"):
            continue
        mask = infos.get(f"_{name}", np.ones(num_envs, dtype=np.bool_))
        rows = _split(values, num_envs) if isinstance(values, dict) else values
        for index in np.flatnonzero(mask):
            split[index][name] = rows[index]
    return split


def checked_env(env: GymEnv) -> GymEnv:
    """Return an environment as it is, unless it is a batch of Gymnasium's, which Stable-Baselines3 does not take.

    Raises:
        TypeError: for such a batch; the message says what makes a `VecEnv` of it.
    """
    if isinstance(env, VectorEnv):
        raise TypeError(
            f"env must be a single environment, its id, or a VecEnv; got a {type(env).__name__}, a batch of "
            'Gymnasium\'s. Wrap it: agents.VectorEnvAdapter(gym.make_vec(..., autoreset_mode="SameStep"))'
        )
    return env


def denoising_env_of(env: VecEnv) -> DenoisingVectorEnv | None:
    """Return the denoising environment below all wrappers of a `VecEnv`; `None` for any other environment."""
    adapter = env.unwrapped
    return adapter.denoising_env if isinstance(adapter, VectorEnvAdapter) else None


def pending_scores_of(env: VecEnv) -> AbstractContextManager[None]:
    """Leave scores pending inside the context, unless a wrapper around the adapter must see them."""
    return env.pending_scores() if isinstance(env, VectorEnvAdapter) else nullcontext()


def env_actions(policy: BasePolicy, actions: Tensor, last_observation: Any) -> Any:
    """Return a policy's actions for the environment: tensors if it takes them, else arrays inside the action space.

    Args:
        policy: whose spaces are the environment's.
        actions: `(n_envs, *action_shape)`.
        last_observation: what the environment returned last; it tells whether it works with tensors.
    """
    if isinstance(policy.observation_space, DenoisingObservationSpace):
        # Latents are never clipped: the buffer relies on the next latent being exactly this action.
        return actions if isinstance(last_observation["latents"], Tensor) else actions.cpu().numpy()
    array = actions.cpu().numpy()
    if not isinstance(policy.action_space, spaces.Box):
        return array
    if policy.squash_output:
        return policy.unscale_action(array)
    return np.clip(array, policy.action_space.low, policy.action_space.high)
