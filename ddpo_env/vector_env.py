"""The denoising MDP, batched: one implementation for one environment and for a thousand.

Third and fifth stop of the data's path. `reset` draws a prompt and the initial noise of every slot; `step` takes the
next latents, moves the clock, and at the end of an episode decodes the picture and asks the reward. The denoiser is
never called here: it belongs to the policy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from diffusers import DiffusionPipeline
from gymnasium.envs.registration import EnvSpec
from gymnasium.error import ResetNeeded
from gymnasium.utils import seeding
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from torch import Tensor

from ddpo_env.arguments import autoreset_mode_of, check_counts, check_reward_and_rendering, check_settings
from ddpo_env.deferred_reward import RewardWorker
from ddpo_env.initial_states import Start, Starts
from ddpo_env.models.loading import DiffusionModel, load_model, with_model_named
from ddpo_env.prompts.distributions import Prompt, load_prompts
from ddpo_env.reset_options import as_float, check_names, given_latents, given_prompts, reset_mask, slot_seeds
from ddpo_env.sampler.gaussian_sampler import GaussianSampler
from ddpo_env.sampler.scheduler_table import SMALLEST_STD
from ddpo_env.spaces import DenoisingObservationSpace, latent_box
from rewards import NonFinite, Reward, are_images, configured_reward, evaluate_reward
from rewards.devices import copied_to

Latents: TypeAlias = npt.NDArray[np.float32] | Tensor
Observation: TypeAlias = dict[str, Any]
Mask: TypeAlias = npt.NDArray[np.bool_]


class DenoisingVectorEnv(VectorEnv[Observation, Latents, npt.NDArray[Any]]):
    """`num_envs` episodes of denoising, stepped together.

    ## Description
    Sampling from a diffusion model as a Markov decision process (Black et al. 2023, arXiv 2305.13301, section 4.1). An
    episode starts from Gaussian noise and a prompt; each action is the next, less noisy latent; the transition is
    deterministic, since the action *is* the next latent; the reward judges the decoded picture at the end.

    ## Action Space
    `Box(-100, 100, latent_shape, float32)`: the next latent `x_{t-1}`, batched. The bounds are there because libraries
    demand finite ones; a finite latent beyond them is taken as it is.

    ## Observation Space
    A `Dict` (`ddpo_env.DenoisingObservationSpace`), batched:

    | key | shape | meaning |
    | --- | --- | --- |
    | `latents` | `latent_shape` | `x_t` |
    | `timestep` | `(1,)` | `t`, on the scheduler's training scale; 0 after the last step |
    | `prompt_embeds`, ... | the text encoder's | the prompt's conditioning, constant in an episode |

    ## Rewards
    0 until the last step, then `reward(decode(x_0), prompt)`. A score that is NaN or infinite is an error. With
    `non_finite_rewards="keep"` it is the step's reward as it came, and `reward_details` has `non_finite`, true for such
    an episode: only for an algorithm that drops these episodes, as those of `agents` do with `"drop"`.

    ## Starting State
    `x_T ~ N(0, I)` and then a prompt from `prompts`, both drawn by the slot's own generator: slot `i` of a batch that
    was reset with `seed=s` begins as a single environment that was reset with `seed=s + i`, and the noise of a seed is
    the same whatever the prompt. With `samples_per_prompt=k` the first slot of every `k` in a row draws the prompt for
    all of them.
    `reset(options={"prompts": ..., "latents": ...})` fixes them: `prompts` is a string or one string a slot, `latents`
    an array of one latent, or of one a slot. `options={"reset_mask": mask}` resets only the slots where `mask` is true.

    ## Episode End
    `terminated` after exactly `num_inference_steps` actions; there is no truncation. The last info then has `image`
    (uint8, height × width × 3; `sample` instead where the model draws something else), `prompt`, and `reward_details`
    if the reward reports any. All three of Gymnasium's autoreset modes are there; the default is next-step.

    ## Arguments

    | name | default | meaning |
    | --- | --- | --- |
    | `num_envs` | 1 | slots in the batch |
    | `model` | `"tiny"` | bundled name, folder, Hub id, diffusers pipeline or `DiffusionModel` |
    | `reward` | `"jpeg_compressibility"` | built-in name, `"module:function"` or callable |
    | `reward_options` | `None` | arguments of the class that `reward` names; of a weighted sum, by its parts' names |
    | `prompts` | `"simple_animals"` | named set, text file, list or callable |
    | `num_inference_steps` | 20 | actions in an episode |
    | `device` | `"auto"` | where text encoder and decoder run |
    | `dtype` | `"auto"` | of the frozen weights: float32 on a CPU, bfloat16 on an accelerator |
    | `backend` | `"numpy"` | `"torch"`: observations are tensors on `device`, rewards and flags stay NumPy |
    | `autoreset_mode` | `"NextStep"` | `gymnasium.vector.AutoresetMode` or its value |
    | `resolution` | `None` | side of the pictures in pixels; default: the model's own |
    | `samples_per_prompt` | 1 | how many slots in a row share a prompt |
    | `part` | `(0, 1)` | `(i, n)`: part `i` of the `n` equal parts of a larger batch; see below |
    | `deferred_rewards` | `False` | compute rewards in a thread of their own while the environment goes on; see below |
    | `non_finite_rewards` | `"raise"` | `"keep"`: NaN and infinite scores are rewards, and not an error |
    | `render_mode` | `None` | `"rgb_array"`: the decoded current latents, or what the model's `render` draws |

    With `backend="torch"` nothing is copied for the caller: read the tensors of an observation, do not write to them.

    With `part` several processes share a batch, `num_envs` slots each: slot `j` of part `i` begins as slot
    `i * num_envs + j` of the whole, groups included; a list of seeds must count up by one. `load_state_dict` takes the
    whole batch's state.

    With `deferred_rewards=True` a step that ends episodes returns before their pictures are judged: their reward is 0
    there, and the last info has `deferred_reward` (`ddpo_env.deferred_reward.DeferredReward`: `done()`, `result()`,
    `details()`) in place of `reward_details`. An exception of the reward is raised by `result()`, and by the next step
    after it happened if nobody has seen it until then. `reset`, `state_dict`, `load_state_dict` and `close` wait for
    what is pending.

    Raises:
        ValueError: for an argument that is not valid, before any model is loaded.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10, "autoreset_mode": AutoresetMode.NEXT_STEP}  # noqa: RUF012
    _spec: EnvSpec | None = None
    _worker: RewardWorker | None = None

    def __init__(
        self,
        num_envs: int = 1,
        *,
        model: str | Path | DiffusionPipeline | DiffusionModel = "tiny",
        reward: str | Callable[..., Any] = "jpeg_compressibility",
        reward_options: Mapping[str, Any] | None = None,
        prompts: Any = "simple_animals",
        num_inference_steps: int = 20,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
        resolution: int | None = None,
        backend: str = "numpy",
        autoreset_mode: str | AutoresetMode = AutoresetMode.NEXT_STEP,
        samples_per_prompt: int = 1,
        part: tuple[int, int] = (0, 1),
        deferred_rewards: bool = False,
        non_finite_rewards: NonFinite = "raise",
        render_mode: str | None = None,
    ) -> None:
        """Check the arguments, then load the model; see the class docstring for each argument."""
        check_counts(num_envs, samples_per_prompt, num_inference_steps, part)
        check_settings(backend, deferred_rewards, non_finite_rewards, render_mode)
        self.autoreset_mode = autoreset_mode_of(autoreset_mode)
        self.reward: Reward = configured_reward(reward, reward_options or {})
        self.prompts = load_prompts(prompts)
        self.model = load_model(model, device, dtype, resolution)
        check_reward_and_rendering(self.model, self.reward, render_mode)
        self.device = next(self.model.denoiser.parameters()).device
        self.num_envs = num_envs
        self.num_inference_steps = num_inference_steps
        self.backend = backend
        self.samples_per_prompt = samples_per_prompt
        self.part = part
        self._starts = Starts(self.model, self.prompts, samples_per_prompt, part[0] * num_envs)
        self.deferred_rewards = deferred_rewards
        self.non_finite_rewards: NonFinite = non_finite_rewards
        self._worker = RewardWorker(non_finite_rewards) if deferred_rewards else None
        self.render_mode = render_mode
        self.metadata = {**self.metadata, "autoreset_mode": self.autoreset_mode}
        clock = GaussianSampler.from_model(self.model, num_inference_steps, min_std=SMALLEST_STD)
        self._timesteps = np.append(clock.timesteps.numpy(), 0.0).astype(np.float32)
        self.single_observation_space = DenoisingObservationSpace(self.model, num_inference_steps)
        self.single_action_space = latent_box(self.model.latent_shape)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._generators, self._seeds = map(list, zip(*(seeding.np_random() for _ in range(num_envs)), strict=True))
        self._step_index = np.full(num_envs, -1)
        self._prompts = np.full(num_envs, None, dtype=object)
        self._prompt_metadata: list[dict[str, Any]] = [{} for _ in range(num_envs)]
        self._latents = torch.zeros((num_envs, *self.model.latent_shape), device=self.device)
        self._conditioning = {
            name: torch.zeros((num_envs, *shape), device=self.device)
            for name, shape in self.model.conditioning_shapes.items()
        }

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Begin new episodes; see "Starting State" above for `seed` and `options`.

        Returns:
            Batched observation, and the info with each slot's `prompt`.
        """
        options = dict(options or {})
        check_names(options)
        mask = reset_mask(options.get("reset_mask"), self.num_envs, self.samples_per_prompt, self.first_slot)
        prompts = given_prompts(options.get("prompts"), self.num_envs, self.prompts)
        latents = given_latents(options.get("latents"), self.num_envs, self.model.latent_shape)
        for slot, slot_seed in enumerate(slot_seeds(seed, self.num_envs, self.first_slot)):
            if slot == 0 and slot_seed is not None and mask[0] and self._starts.rank:
                self._starts.leader, _ = seeding.np_random(slot_seed - self._starts.rank)
            if slot_seed is not None and mask[slot]:
                self._generators[slot], self._seeds[slot] = seeding.np_random(slot_seed)
        self._forget_rewards()
        infos = self._begin(self._draw(mask, prompts, latents), {})
        return self.observe(), infos

    def step(self, actions: Latents) -> tuple[Observation, npt.NDArray[np.float64], Mask, Mask, dict[str, Any]]:
        """Move every slot to its next latent.

        Args:
            actions: next latents, `(num_envs, *latent_shape)`, an array or a tensor.

        Returns:
            Observation, rewards `(num_envs,)`, terminations, truncations (always false) and infos.

        Raises:
            ResetNeeded: before the first `reset`, or after the end of an episode where autoreset is off.
            ValueError: for actions of the wrong shape, or with NaN or infinite values. Looking at every action would
                stall an accelerator, so there with `backend="torch"` only the last latents of an episode are checked.
            Exception: whatever the reward raises. The environment is then where it was, and the step can be repeated.
        """
        if self._worker is not None:
            self._worker.raise_failed()
        self._require_reset()
        latents = self._check_actions(actions)
        over = self._step_index == self.num_inference_steps  # in next-step mode alone: to be reset now
        ending = self._step_index == self.num_inference_steps - 1
        same_step = self.autoreset_mode is AutoresetMode.SAME_STEP
        rewards = np.zeros(self.num_envs)
        infos: dict[str, Any] = {}
        if ending.any():
            rewards[ending], infos = self._judge(ending, latents)
        start = self._draw(ending if same_step else over)
        self._latents = latents  # nothing has changed before, and nothing fails from here on
        self._step_index += 1
        if same_step and ending.any():
            infos = self._as_final(infos, ending)
        infos = self._begin(start, infos)
        return self.observe(), rewards, ending, np.zeros(self.num_envs, dtype=np.bool_), infos

    def render(self) -> tuple[npt.NDArray[np.uint8], ...] | None:
        """Return the current latents, decoded or as the model draws them, one uint8 `(height, width, 3)` a slot."""
        if self.render_mode is None:
            return None
        self._require_reset(ended_is_fine=True)
        return tuple(getattr(self.model, "render", self.model.decode)(self._latents).cpu().numpy())

    def wait_for_rewards(self) -> None:
        """Return when no deferred reward is pending; one that failed is raised by the next step all the same."""
        if self._worker is not None:
            self._worker.wait()

    def cancel_rewards(self) -> None:
        """Give up the deferred rewards whose computation has not begun; asking for one raises `CancelledError`."""
        if self._worker is not None:
            self._worker.cancel()

    def close_extras(self, **kwargs: Any) -> None:
        """Finish the deferred rewards and end their thread."""
        if self._worker is not None:
            self._worker.close()

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return everything that the next step depends on: tensors, and plain values for JSON."""
        self.wait_for_rewards()
        return {"latents": self._latents}, {
            "prompts": self._prompts.tolist(),
            "metadata": self._prompt_metadata,
            "step_index": self._step_index.tolist(),
            "generators": [generator.bit_generator.state for generator in self._generators],
        }

    def load_state_dict(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Go on from what `state_dict` of an environment with the same arguments returned; of all parts in a row."""
        total = self.num_envs * self.part[1]
        if len(state["generators"]) != total:
            raise ValueError(f"state must be of num_envs={total} slots; got {len(state['generators'])}")
        self._forget_rewards()
        own = slice(self.first_slot, self.first_slot + self.num_envs)
        self._latents = tensors["latents"][own].to(self.device)
        self._prompts = np.array(state["prompts"][own], dtype=object)
        self._prompt_metadata = list(state["metadata"][own])
        self._step_index = np.array(state["step_index"][own])
        for generator, generator_state in zip(self._generators, state["generators"][own], strict=True):
            generator.bit_generator.state = generator_state
        if self._starts.rank:
            self._starts.leader = np.random.default_rng()
            self._starts.leader.bit_generator.state = state["generators"][self.first_slot - self._starts.rank]
        self._seeds = [-1] * self.num_envs
        self._conditioning = self.model.encode_prompts([prompt or "" for prompt in self._prompts])

    @property
    def first_slot(self) -> int:
        """Where this part's slots begin in the whole batch."""
        return self._starts.first_slot

    @property  # type: ignore[override]
    def np_random(self) -> tuple[np.random.Generator, ...]:
        """Every slot's generator."""
        return tuple(self._generators)

    @np_random.setter  # type: ignore[override]
    def np_random(self, generators: Sequence[np.random.Generator]) -> None:
        if len(generators) != self.num_envs:
            raise ValueError(f"np_random must be one generator a slot ({self.num_envs}); got {len(generators)}")
        self._generators, self._seeds = list(generators), [-1] * self.num_envs

    @property
    def np_random_seed(self) -> tuple[int, ...]:  # type: ignore[override]
        """The seed of every slot's generator; -1 where it is not known."""
        return tuple(self._seeds)

    @property
    def spec(self) -> EnvSpec | None:
        """What Gymnasium made this environment from; a pipeline object is named there, not held."""
        return self._spec

    @spec.setter
    def spec(self, spec: EnvSpec | None) -> None:
        self._spec = with_model_named(spec, self.model)

    def _draw(self, mask: Mask, prompts: list[Prompt] | None = None, latents: Tensor | None = None) -> Start:
        """Draw what the episodes of the slots in `mask` start from, where it is not given."""
        return self._starts.draw(np.flatnonzero(mask), self._generators, prompts, latents)

    def _begin(self, start: Start, infos: dict[str, Any]) -> dict[str, Any]:
        """Begin episodes; return `infos` with theirs added."""
        if not start.prompts:
            return infos
        rows = torch.as_tensor(start.slots, device=self.device)
        self._latents = self._latents.index_copy(0, rows, start.latents.to(self.device))
        for name, embeds in start.conditioning.items():
            self._conditioning[name] = self._conditioning[name].index_copy(0, rows, embeds)
        self._step_index[start.slots] = 0
        for slot, (prompt, metadata) in zip(start.slots, start.prompts, strict=True):
            self._prompts[slot], self._prompt_metadata[slot] = prompt, metadata
            infos = self._add_info(infos, {"prompt": prompt}, int(slot))
        return infos

    def _judge(self, ending: Mask, latents: Tensor) -> tuple[npt.NDArray[np.float64], dict[str, Any]]:
        """Decode the last latents and score the pictures; return the scores and infos of the slots in `ending`."""
        slots = np.flatnonzero(ending)
        finals = latents[torch.as_tensor(slots, device=self.device)]
        if not bool(torch.isfinite(finals).all()):
            raise ValueError("actions must be finite; the last latents of an episode have NaN or infinite values")
        samples = self.model.decode(finals).cpu().numpy()
        key = "image" if are_images(samples) else "sample"
        prompts, metadata = [self._prompts[i] for i in slots], [self._prompt_metadata[i] for i in slots]
        extras: list[dict[str, Any]] = [{} for _ in slots]
        scores = np.zeros(len(slots))
        if self._worker is not None:
            extras = [{"deferred_reward": one} for one in self._worker.submit(self.reward, samples, prompts, metadata)]
        else:
            scores, details = evaluate_reward(
                self.reward, samples, prompts, metadata, non_finite=self.non_finite_rewards
            )
            if details:
                extras = [
                    {"reward_details": {name: values[row] for name, values in details.items()}}
                    for row in range(len(slots))
                ]
        infos: dict[str, Any] = {}
        for slot, sample, extra in zip(slots, samples, extras, strict=True):
            infos = self._add_info(infos, {"prompt": self._prompts[slot], key: sample, **extra}, int(slot))
        return scores, infos

    def _forget_rewards(self) -> None:
        if self._worker is not None:
            self._worker.forget()

    def _as_final(self, infos: dict[str, Any], ending: Mask) -> dict[str, Any]:
        """Put the last observation and info of the slots in `ending` where same-step autoreset has them."""
        observation = self.observe()
        final: dict[str, Any] = {"final_info": infos, "_final_info": ending.copy()}
        for slot in np.flatnonzero(ending):
            last = {name: value[slot] for name, value in observation.items()}
            final = self._add_info(final, {"final_obs": last}, int(slot))
        return final

    def _check_actions(self, actions: Latents) -> Tensor:
        shape = (self.num_envs, *self.model.latent_shape)
        if tuple(np.shape(actions)) != shape:
            raise ValueError(f"actions must have shape {shape}; got {tuple(np.shape(actions))}")
        latents = as_float(actions, "actions").to(self.device, copy=True)
        if (self.backend == "numpy" or latents.device.type == "cpu") and not bool(torch.isfinite(latents).all()):
            slots = np.flatnonzero(~torch.isfinite(latents).flatten(1).all(1).cpu().numpy()).tolist()
            raise ValueError(f"actions must be finite; got NaN or infinite values in slots {slots}")
        return latents

    def _require_reset(self, ended_is_fine: bool = False) -> None:
        if (self._step_index < 0).any():
            raise ResetNeeded("call reset() before step() or render()")
        ended = self._step_index == self.num_inference_steps
        if ended.any() and self.autoreset_mode is AutoresetMode.DISABLED and not ended_is_fine:
            raise ResetNeeded(
                f"the episodes of slots {np.flatnonzero(ended).tolist()} have ended and autoreset is off: call "
                "reset() first, with options={'reset_mask': mask} for some slots alone"
            )

    def observe(self) -> Observation:
        """Return the batched observation of the current state."""
        timestep = torch.as_tensor(self._timesteps[self._step_index][:, None])
        state = {"latents": self._latents, "timestep": timestep, **self._conditioning}
        if self.backend == "torch":  # nothing is ever written in place, so tensors can be handed out as they are
            return {name: copied_to(tensor, self.device) for name, tensor in state.items()}
        return {name: tensor.cpu().numpy().copy() for name, tensor in state.items()}
