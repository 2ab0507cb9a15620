"""The denoising MDP as a batch: one implementation for one environment and for a thousand.

It is the third and the fifth stop of the data's path (DDPO, arXiv 2305.13301, section 4). `reset` samples a prompt and
the initial noise of every sub-environment. `step` takes the next latents, and at the end of an episode it decodes the
image and asks the reward. The denoiser is never called here: it belongs to the policy.
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
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from torch import Tensor

from ddpo_env.deferred_reward import RewardCaller
from ddpo_env.initial_states import InitialState, InitialStates
from ddpo_env.models.image_decoding import decode_samples
from ddpo_env.models.loading import load_model, with_plain_values
from ddpo_env.models.prompt_images import with_prompt_images
from ddpo_env.models.protocol import DiffusionModel, abilities_of, check_reward_and_rendering
from ddpo_env.prompts.distributions import Prompt, load_prompts
from ddpo_env.sampler.gaussian_sampler import GaussianSampler
from ddpo_env.spaces import DenoisingObservationSpace, action_box
from ddpo_env.tensors import copied_to
from ddpo_env.validation import arguments as validation
from ddpo_env.validation.choices import Quantization
from ddpo_env.validation.resolution import Resolution
from rewards import NonFinite, Reward, are_images, asking_people, check_shareable, configured_reward

Latents: TypeAlias = npt.NDArray[np.float32] | Tensor
Observation: TypeAlias = dict[str, Any]
Mask: TypeAlias = npt.NDArray[np.bool_]


class DenoisingVectorEnv(VectorEnv[Observation, Latents, npt.NDArray[Any]]):
    """A batch of `num_envs` denoising episodes.

    ## Description
    Sampling from a diffusion model is a Markov decision process (Black et al. 2023, arXiv 2305.13301, section 4.1). An
    episode starts from Gaussian noise and a prompt. Each action is the next, less noisy latent. The transition is
    deterministic, because the action *is* the next latent. The reward scores the decoded image at the end.

    ## Action Space
    `Box(-3, 3, latent_shape, float32)`, batched: the next latent `x_{t-1}`. The bounds are three standard deviations of
    the initial noise; a finite latent outside them is taken as it is.

    ## Observation Space
    A `Dict` (`ddpo_env.DenoisingObservationSpace`), batched. Its `handle` carries the model.

    | key | shape | meaning |
    | --- | --- | --- |
    | `latents` | `latent_shape` | `x_t` |
    | `timestep` | `(1,)` | `t`, on the scheduler's training scale; 0 after the last step |
    | `prompt_embeds`, ... | as the text encoder returns them | the prompt's conditioning, constant in an episode |

    ## Rewards
    0 until the last step, then `reward(decode(x_0), prompt)`. The score of a decoded sample with NaN or infinite values
    is NaN. A score that is NaN or infinite is an error; with `non_finite_rewards="keep"` it is the step's reward, and
    `reward_details` has `non_finite`, which is true for such an episode. Use this only with an algorithm that drops
    such episodes, as those of `agents` do with `"drop"`.

    ## Starting State
    `x_T ~ N(0, I)`, and then a prompt from `prompts`. Each sub-environment has a generator: with `seed=s`,
    sub-environment `i` starts as a single environment that is reset with `seed=s + i`, and the noise does not depend on
    the prompt. With `samples_per_prompt=k`, the first of every `k` consecutive sub-environments samples their prompt,
    and with `shared_noise` their noise too.
    `reset(options={"prompts": ..., "latents": ...})` fixes them: `prompts` is a string or one string per
    sub-environment, `latents` an array of one latent or of one per sub-environment. `options={"reset_mask": mask}`
    resets only the sub-environments for which `mask` is true.

    ## Episode End
    `terminated` after exactly `num_inference_steps` actions; there is no truncation. The last info then has `image`
    (uint8, height × width × 3; `sample` if the model generates something else), `prompt`, and `reward_details` if the
    reward reports any. Gymnasium's three autoreset modes are available; the default is next-step.

    ## Arguments

    | name | default | meaning |
    | --- | --- | --- |
    | `num_envs` | 1 | number of sub-environments |
    | `model` | `"tiny"` | bundled name, folder, Hub id, diffusers pipeline or `DiffusionModel` |
    | `reward` | `"jpeg_compressibility"` | built-in name, `"module:function"` or callable |
    | `reward_options` | `None` | arguments of the class that `reward` names; for a weighted sum, by its terms' names |
    | `prompts` | `"simple_animals"` | named set, file, strings or callable; each may have an `image` for the pipeline |
    | `num_inference_steps` | 20 | number of actions in an episode |
    | `max_episode_steps` | `None` | must be `None`: an episode always has `num_inference_steps` |
    | `device`, `dtype` | `"auto"` | of the frozen weights: float32 on a CPU, bfloat16 on an accelerator |
    | `backend` | `"numpy"` | `"torch"`: observations are tensors on `device`; rewards and flags stay NumPy |
    | `autoreset_mode` | `"NextStep"` | `gymnasium.vector.AutoresetMode` or its value |
    | `resolution` | `None` | of the images: `512`, or `"832x1216"` (width x height); default: the model's own |
    | `pipeline_arguments` | `None` | arguments of every call of the model's pipeline, such as `{"num_frames": 17}` |
    | `quantization` | `None` | of the frozen denoiser: `"int8"`, or `"nf4"` (4 bits) |
    | `samples_per_prompt` | 1 | number of consecutive sub-environments that share a prompt |
    | `shared_noise` | `False` | they start from the same noise too |
    | `part` | `(0, 1)` | `(i, n)`: part `i` of the `n` equal parts of a larger batch; see below |
    | `deferred_rewards` | `False` | compute rewards in a thread while the environment continues; see below |
    | `non_finite_rewards` | `"raise"` | `"keep"`: NaN and infinite scores are rewards, and not an error |
    | `render_mode` | `None` | `"rgb_array"`: the decoded current latents, or what the model's `render` returns |

    With `backend="torch"` nothing is copied for the caller: do not write to the tensors of an observation.
    Copies share the model. A pickle has its name and no weights, as that of the observation space.

    With `part`, several processes share a batch, and each has `num_envs` of its sub-environments: number `j` of part
    `i` starts as number `i * num_envs + j` of the whole batch, groups included. A list of seeds must count up by one.
    `load_state_dict` takes the state of the whole batch. A `rewards.TwoStageReward` then only measures: the last reward
    is 0, and the last info has a `deferred_reward` with a `measurement()`.

    With `deferred_rewards=True`, a step that ends episodes returns before the reward is called: its reward is 0, and
    the last info has `deferred_reward` (`ddpo_env.DeferredReward`: `done()`, `result()`, `details()`) instead of
    `reward_details`. `result()` raises the reward's exception, or else the next step. `close` and a `reset` without a
    mask wait; what has failed by then is an error of `result()` only.

    ```python
    >>> import gymnasium as gym
    >>> envs = gym.make_vec("ddpo_env:DDPO-SD-v0", num_envs=2, num_inference_steps=3)
    >>> observations, infos = envs.reset(seed=0)
    >>> infos["prompt"].tolist()
    ['a mouse', 'a squirrel']
    >>> {name: value.shape for name, value in observations.items()}
    {'latents': (2, 4, 16, 16), 'timestep': (2, 1), 'prompt_embeds': (2, 16, 96)}
    >>> for _ in range(3):  # a policy would denoise; half of the latent shows the interface
    ...     observations, rewards, terminations, truncations, infos = envs.step(0.5 * observations["latents"])
    >>> terminations.tolist()
    [True, True]
    >>> infos["image"].shape
    (2, 64, 64, 3)
    >>> bool((rewards < 0).all())  # minus the size of the JPEG file in kB
    True

    ```

    ## Version History

    * v0: Initial version

    Raises:
        ValueError: for an argument that is not valid; most are checked before a model is loaded.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10, "autoreset_mode": AutoresetMode.NEXT_STEP}  # noqa: RUF012
    _spec: EnvSpec | None = None

    def __init__(
        self,
        num_envs: int = 1,
        *,
        model: str | Path | DiffusionPipeline | DiffusionModel = "tiny",
        reward: str | Callable[..., Any] = "jpeg_compressibility",
        reward_options: Mapping[str, Any] | None = None,
        prompts: Any = "simple_animals",
        num_inference_steps: int = 20,
        max_episode_steps: None = None,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
        resolution: Resolution | None = None,
        pipeline_arguments: Mapping[str, Any] | None = None,
        quantization: Quantization | None = None,
        backend: str = "numpy",
        autoreset_mode: str | AutoresetMode = AutoresetMode.NEXT_STEP,
        samples_per_prompt: int = 1,
        shared_noise: bool = False,
        part: tuple[int, int] = (0, 1),
        deferred_rewards: bool = False,
        non_finite_rewards: NonFinite = "raise",
        render_mode: str | None = None,
    ) -> None:
        """Check the arguments, then load the model; see the class docstring for each argument."""
        validation.check_counts(num_envs, samples_per_prompt, num_inference_steps, part, max_episode_steps)
        validation.check_settings(backend, deferred_rewards, non_finite_rewards, render_mode)
        validation.check_shared_noise(shared_noise, samples_per_prompt)
        self.autoreset_mode = validation.autoreset_mode_of(autoreset_mode)
        self.reward: Reward = configured_reward(reward, reward_options or {})
        if part[1] > 1:
            check_shareable(self.reward)
        self.prompts = load_prompts(prompts)
        pipeline_arguments = with_prompt_images(model, self.prompts, pipeline_arguments)
        self.model = load_model(model, device, dtype, resolution, pipeline_arguments, quantization)
        check_reward_and_rendering(self.model, self.reward, render_mode)
        self.device = next(self.model.denoiser.parameters()).device
        self.num_envs, self.num_inference_steps = num_envs, num_inference_steps
        self.backend, self.render_mode = backend, render_mode
        self.samples_per_prompt, self.shared_noise = samples_per_prompt, shared_noise
        self.part, self.deferred_rewards = part, deferred_rewards
        self.non_finite_rewards: NonFinite = non_finite_rewards
        self.metadata = {**self.metadata, "autoreset_mode": self.autoreset_mode}
        self._caller = RewardCaller(in_thread=deferred_rewards, measures=part[1] > 1, non_finite=non_finite_rewards)
        first = part[0] * num_envs
        self._starts = InitialStates(self.model, self.prompts, num_envs, samples_per_prompt, first, shared_noise)
        sampler = GaussianSampler.from_model(self.model, num_inference_steps)
        self._timesteps = np.append(sampler.timesteps.numpy(), 0.0).astype(np.float32)
        self.single_observation_space = DenoisingObservationSpace(self.model, num_inference_steps)
        self.single_action_space = action_box(self.model.latent_shape)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.step_index = np.full(num_envs, -1)
        self._prompts: list[Prompt | None] = [None] * num_envs
        self._latents = torch.zeros((num_envs, *self.model.latent_shape), device=self.device)
        self._conditioning = self._starts.encode(self._prompts, self.device)

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Begin new episodes; see "Starting State" above for `seed` and `options`.

        Returns:
            Batched observation, and the info with the `prompt` of each sub-environment.
        """
        options = validation.reset_options(options)
        mask = validation.reset_mask(
            options.get("reset_mask"), self.num_envs, self.samples_per_prompt, self.first_index
        )
        prompts = validation.given_prompts(options.get("prompts"), self.num_envs, self.prompts)
        latents = validation.given_latents(options.get("latents"), self.num_envs, self.model.latent_shape)
        self._starts.seed(validation.seeds_of(seed, self.num_envs, self.first_index), mask)
        if mask.all():
            self._caller.discard()
        infos = self._begin(self._starts.sample(np.flatnonzero(mask), prompts, latents), {})
        return self.observe(), infos

    def step(self, actions: Latents) -> tuple[Observation, npt.NDArray[np.float64], Mask, Mask, dict[str, Any]]:
        """Move every sub-environment to its next latent.

        Args:
            actions: next latents, `(num_envs, *latent_shape)`, an array or a tensor.

        Returns:
            Observation, rewards `(num_envs,)`, terminations, truncations (always false) and infos.

        Raises:
            ResetNeeded: before the first `reset`, or after the end of an episode if autoreset is disabled.
            ValueError: for actions of the wrong shape, or with NaN or infinite values. A check of every action would
                stall an accelerator, so there with `backend="torch"` only the last latents of an episode are checked.
            Exception: whatever the reward raises. The environment does not change then, and the step can be repeated.
        """
        self._caller.raise_failed()
        self._require_reset()
        shape = (self.num_envs, *self.model.latent_shape)
        latents = validation.checked_actions(actions, shape, self.device, stalls=self.backend == "numpy")
        over = self.step_index == self.num_inference_steps  # only in next-step mode, where they are reset now
        ending = self.step_index == self.num_inference_steps - 1
        same_step = self.autoreset_mode is AutoresetMode.SAME_STEP
        rewards = np.zeros(self.num_envs)
        infos: dict[str, Any] = {}
        if ending.any():
            rewards[ending], infos = self._score(np.flatnonzero(ending), latents)
        start = self._starts.sample(np.flatnonzero(ending if same_step else over))
        self._latents = latents  # nothing has changed before this line, and nothing fails after it
        self.step_index += 1
        if same_step and ending.any():
            infos = self._as_final(infos, ending)
        infos = self._begin(start, infos)
        return self.observe(), rewards, ending, np.zeros(self.num_envs, dtype=np.bool_), infos

    def render(self) -> tuple[npt.NDArray[np.uint8], ...] | None:
        """Return the current latents as the model renders them, one uint8 `(height, width, 3)` per sub-environment."""
        if self.render_mode is None:
            return None
        self._require_reset(ended_is_fine=True)
        return tuple(abilities_of(self.model).render(self._latents).cpu().numpy())

    def observe(self) -> Observation:
        """Return the batched observation of the current state."""
        timestep = torch.as_tensor(self._timesteps[self.step_index][:, None])
        state = {"latents": self._latents, "timestep": timestep, **self._conditioning}
        if self.backend == "torch":  # no tensor is ever written in place, so the caller can have it
            return {name: copied_to(tensor, self.device) for name, tensor in state.items()}
        return {name: tensor.cpu().numpy().copy() for name, tensor in state.items()}

    def wait_for_rewards(self) -> None:
        """Return when no deferred reward is pending; the next step still raises the exception of one that failed."""
        self._caller.wait()

    def cancel_rewards(self) -> None:
        """Drop the deferred rewards whose computation has not begun, and end a wait for people.

        Asking for a dropped reward raises `CancelledError`.
        """
        self._caller.cancel()
        for reward in asking_people(self.reward):
            reward.cancel()

    def close_extras(self, **kwargs: Any) -> None:
        """Finish the deferred rewards and end their thread."""
        self._caller.close()

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return everything that the next step depends on: tensors, and plain values for JSON."""
        self.wait_for_rewards()
        state = self._starts.state(self._prompts)
        return {"latents": self._latents}, {"step_index": self.step_index.tolist(), **state}

    def load_state_dict(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Continue from the `state_dict` of an environment with the same arguments; of all parts, one after another."""
        total = self.num_envs * self.part[1]
        if len(state["generators"]) != total:
            raise ValueError(f"state must be of num_envs={total} sub-environments; got {len(state['generators'])}")
        self._caller.discard()
        own = slice(self.first_index, self.first_index + self.num_envs)
        self._latents = tensors["latents"][own].to(self.device)
        self.step_index = np.array(state["step_index"][own])
        self._prompts = self._starts.load_state(state)
        self._conditioning = self._starts.encode(self._prompts, self.device)

    def reset_infos(self) -> list[dict[str, Any]]:
        """Return what the infos of the resets said about the current episodes, one dictionary per sub-environment."""
        return [{} if prompt is None else self._starts.info(prompt) for prompt in self._prompts]

    @property
    def first_index(self) -> int:
        """Index of this part's first sub-environment in the whole batch."""
        return self._starts.first_index

    @property  # type: ignore[override]
    def np_random(self) -> tuple[np.random.Generator, ...]:
        """One generator per sub-environment."""
        return tuple(self._starts.generators)

    @np_random.setter  # type: ignore[override]
    def np_random(self, generators: Sequence[np.random.Generator]) -> None:
        self._starts.use_generators(generators)

    @property
    def np_random_seed(self) -> tuple[int, ...]:  # type: ignore[override]
        """The seed of each generator; -1 if it is not known."""
        return tuple(self._starts.seeds)

    @property
    def spec(self) -> EnvSpec | None:
        """What Gymnasium made this environment from; it names a model object and does not hold it."""
        return self._spec

    @spec.setter
    def spec(self, spec: EnvSpec | None) -> None:
        self._spec = with_plain_values(spec, self.model)

    def _begin(self, start: InitialState, infos: dict[str, Any]) -> dict[str, Any]:
        """Begin episodes; return `infos` with theirs added."""
        if not start.prompts:
            return infos
        rows = copied_to(start.indices, self.device)
        self._latents = self._latents.index_copy(0, rows, copied_to(start.latents, self.device))
        for name, embeds in start.conditioning.items():
            self._conditioning[name] = self._conditioning[name].index_copy(0, rows, embeds)
        self.step_index[start.indices] = 0
        for index, prompt in zip(start.indices, start.prompts, strict=True):
            self._prompts[index] = prompt
            infos = self._add_info(infos, self._starts.info(prompt), int(index))
        return infos

    def _score(self, indices: npt.NDArray[np.intp], latents: Tensor) -> tuple[npt.NDArray[np.float64], dict[str, Any]]:
        """Decode the last latents and ask the reward; return scores and infos of the sub-environments `indices`."""
        if not bool(torch.isfinite(finals := latents[copied_to(indices, self.device)]).all()):
            raise ValueError("actions must be finite; the last latents of an episode have NaN or infinite values")
        started = [prompt for index in indices if (prompt := self._prompts[index]) is not None]
        texts, own = [text for text, _ in started], abilities_of(self.model).sample_metadata
        samples, finite = decode_samples(self.model, finals, texts, self.non_finite_rewards)
        prompts = [text for text, is_finite in zip(texts, finite, strict=True) if is_finite]
        metadata = [{**own, **given} for (_, given), is_finite in zip(started, finite, strict=True) if is_finite]
        answers = iter(self._caller.submit(self.reward, samples[finite], prompts, metadata) if finite.any() else ())
        scores = np.zeros(len(indices))
        infos: dict[str, Any] = {}
        for row, index in enumerate(indices):
            info = {"prompt": texts[row], "image" if are_images(samples) else "sample": samples[row]}
            if not finite[row]:
                scores[row], info["reward_details"] = np.nan, {"non_finite": True}
            elif (answer := next(answers)).is_measured or self.deferred_rewards:
                info["deferred_reward"] = answer
            else:
                scores[row] = answer.result()
                info |= {"reward_details": details} if (details := answer.details()) else {}
            infos = self._add_info(infos, info, int(index))
        return scores, infos

    def _as_final(self, infos: dict[str, Any], ending: Mask) -> dict[str, Any]:
        """Put the last observation and info of the sub-environments in `ending` where same-step autoreset has them."""
        observation = self.observe()
        final: dict[str, Any] = {"final_info": infos, "_final_info": ending.copy()}
        for index in np.flatnonzero(ending):
            last = {name: value[index] for name, value in observation.items()}
            final = self._add_info(final, {"final_obs": last}, int(index))
        return final

    def _require_reset(self, ended_is_fine: bool = False) -> None:
        if (self.step_index < 0).any():
            raise ResetNeeded("call reset() before step() or render()")
        ended = self.step_index == self.num_inference_steps
        if ended.any() and self.autoreset_mode is AutoresetMode.DISABLED and not ended_is_fine:
            raise ResetNeeded(
                f"the episodes of sub-environments {np.flatnonzero(ended).tolist()} have ended and autoreset is "
                "disabled: call reset(), with options={'reset_mask': mask} for some of them only"
            )
