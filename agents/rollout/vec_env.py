"""A Gymnasium vector environment as a Stable-Baselines3 `VecEnv`.

The native batch of `gym.make_vec("DDPO-SD-v0")` is one object with one decoder call for all of its slots; this lets
Stable-Baselines3 drive it without taking it apart into single environments.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from stable_baselines3.common.vec_env.base_vec_env import VecEnv, VecEnvIndices, VecEnvObs, VecEnvStepReturn


class VectorEnvAdapter(VecEnv):
    """Wraps any `gymnasium.vector.VectorEnv` whose autoreset mode is same-step.

    Observations pass through as they are, tensors of `backend="torch"` included. At the end of an episode the info
    holds what Stable-Baselines3 looks for: `terminal_observation`, `TimeLimit.truncated`, and `episode` with return
    `r`, length `l` and time `t` in seconds, so that no `VecMonitor` is needed.

    Raises:
        ValueError: if the environment resets itself in another way.
    """

    def __init__(self, env: VectorEnv[Any, Any, Any]) -> None:
        """Take the environment over; `close` closes it."""
        mode = env.metadata.get("autoreset_mode")
        if mode != AutoresetMode.SAME_STEP:
            raise ValueError(
                "autoreset_mode must be gymnasium.vector.AutoresetMode.SAME_STEP, as Stable-Baselines3 expects; "
                f"got {mode}"
            )
        self.vector_env = env
        super().__init__(env.num_envs, env.single_observation_space, env.single_action_space)
        self._actions: Any = None
        self._returns = np.zeros(env.num_envs)
        self._lengths = np.zeros(env.num_envs, dtype=np.int64)
        self._start = time.perf_counter()

    def reset(self) -> VecEnvObs:
        """Begin new episodes, with the seeds and options set before."""
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
        """Seed slot `i` with `seed + i`, counted in the whole batch where this environment is a part of one."""
        first = getattr(self.vector_env.unwrapped, "first_slot", 0)
        return super().seed(seed if seed is None else seed + first)

    def set_options(self, options: list[dict[str, Any]] | dict[str, Any] | None = None) -> None:
        """Set the options of the next reset: one dictionary for the whole batch, as Gymnasium has it."""
        if isinstance(options, list):
            raise ValueError("options must be one dictionary for the whole batch; got a list")
        self._options = [options or {}]

    def step_async(self, actions: Any) -> None:
        """Keep the actions for `step_wait`."""
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
        fresh = _split({name: infos[name] for name in infos if name not in _FINAL_INFOS}, self.num_envs)
        split = [final if done else info for final, info, done in zip(final_infos, fresh, dones, strict=True)]
        for slot in np.flatnonzero(dones):
            self.reset_infos[slot] = fresh[slot]
            split[slot]["terminal_observation"] = infos["final_obs"][slot]
            split[slot]["TimeLimit.truncated"] = bool(truncations[slot] and not terminations[slot])
            split[slot]["episode"] = {
                "r": float(self._returns[slot]),
                "l": int(self._lengths[slot]),
                "t": round(time.perf_counter() - self._start, 6),
            }
        self._returns[dones] = 0
        self._lengths[dones] = 0
        return observation, rewards.astype(np.float32), dones, split

    def close(self) -> None:
        """Close the environment."""
        self.vector_env.close()

    def get_images(self) -> Sequence[np.ndarray | None]:
        """Return one rendered picture a slot."""
        return self.vector_env.render() or [None] * self.num_envs  # type: ignore[return-value]

    def get_attr(self, attr_name: str, indices: VecEnvIndices = None) -> list[Any]:
        """Return the batch's attribute, once a slot."""
        owner = self.vector_env if hasattr(self.vector_env, attr_name) else self.vector_env.unwrapped
        value = getattr(owner, attr_name)
        return [value for _ in self._get_indices(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: VecEnvIndices = None) -> None:
        """Set an attribute of the whole batch; single slots have none of their own."""
        self._refuse_indices(indices)
        setattr(self.vector_env.unwrapped, attr_name, value)

    def env_method(
        self, method_name: str, *method_args: Any, indices: VecEnvIndices = None, **method_kwargs: Any
    ) -> list[Any]:
        """Call a method of the batch, once; return its result, once a slot."""
        self._refuse_indices(indices)
        result = getattr(self.vector_env.unwrapped, method_name)(*method_args, **method_kwargs)
        return [result] * self.num_envs

    def env_is_wrapped(
        self, wrapper_class: type[gym.Wrapper[Any, Any, Any, Any]], indices: VecEnvIndices = None
    ) -> list[bool]:
        """Single-environment wrappers cannot be around a slot."""
        return [False for _ in self._get_indices(indices)]

    def _refuse_indices(self, indices: VecEnvIndices) -> None:
        if indices is not None and len(list(self._get_indices(indices))) != self.num_envs:
            raise ValueError(
                f"indices must be None: the batch is one environment with {self.num_envs} slots; got {indices}"
            )


_FINAL_INFOS = ("final_obs", "_final_obs", "final_info", "_final_info")


def _split(infos: dict[str, Any], num_envs: int) -> list[dict[str, Any]]:
    """Turn Gymnasium's dictionary of arrays with masks into one dictionary a slot."""
    split: list[dict[str, Any]] = [{} for _ in range(num_envs)]
    for name, values in infos.items():
        if name.startswith("_"):
            continue
        mask = infos.get(f"_{name}", np.ones(num_envs, dtype=np.bool_))
        rows = _split(values, num_envs) if isinstance(values, dict) else values
        for slot in np.flatnonzero(mask):
            split[slot][name] = rows[slot]
    return split
