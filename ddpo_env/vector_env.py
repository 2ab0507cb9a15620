"""The denoising MDP, batched: one implementation for one environment and for a thousand.

Third and fifth stop of the data's path. `reset` draws a prompt and the initial noise of every slot; `step` takes the next
latents, moves the clock, and at the end of an episode decodes the picture and asks the reward. The denoiser is never
called here: it belongs to the policy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from diffusers import DiffusionPipeline
from gymnasium.error import ResetNeeded
from gymnasium.utils import seeding
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from torch import Tensor

from ddpo_env.models import load_model
from ddpo_env.prompts import Prompt, PromptSet, load_prompts
from ddpo_env.spaces import DenoisingObservationSpace, latent_box
from ddpo_env.scheduler_table import SMALLEST_STD
from ddpo_env.transition import GaussianSampler
from rewards import Reward, evaluate_reward, load_reward

Latents: TypeAlias = npt.NDArray[np.float32] | Tensor
Observation: TypeAlias = dict[str, Any]
Mask: TypeAlias = npt.NDArray[np.bool_]

BACKENDS = ("numpy", "torch")
RESET_OPTIONS = ("prompts", "latents", "reset_mask")


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
    0 until the last step, then `reward(decode(x_0), prompt)`.

    ## Starting State
    A prompt drawn from `prompts` and `x_T ~ N(0, I)`, both from the slot's own generator: slot `i` of a batch that was
    reset with `seed=s` begins as a single environment that was reset with `seed=s + i`. With `samples_per_prompt=k` the
    first slot of every `k` in a row draws the prompt for all of them.
    `reset(options={"prompts": ..., "latents": ...})` fixes them: `prompts` is a string or one string a slot, `latents` an
    array of one latent, or of one a slot. `options={"reset_mask": mask}` resets only the slots where `mask` is true.

    ## Episode End
    `terminated` after exactly `num_inference_steps` actions; there is no truncation. The last info then has `image`
    (uint8, height × width × 3), `prompt`, and `reward_details` if the reward reports any. All three of Gymnasium's
    autoreset modes are there; the default is next-step.

    ## Arguments

    | name | default | meaning |
    | --- | --- | --- |
    | `num_envs` | 1 | slots in the batch |
    | `model` | `"tiny"` | bundled name, folder, Hub id or diffusers pipeline |
    | `reward` | `"jpeg_compressibility"` | built-in name, `"module:function"` or callable |
    | `prompts` | `"simple_animals"` | named set, text file, list or callable |
    | `num_inference_steps` | 20 | actions in an episode |
    | `device` | `"auto"` | where text encoder and decoder run |
    | `dtype` | `"auto"` | of the frozen weights: float32 on a CPU, bfloat16 on an accelerator |
    | `backend` | `"numpy"` | `"torch"`: observations are tensors on `device`; rewards and flags, made on the host, stay NumPy |
    | `autoreset_mode` | `"NextStep"` | `gymnasium.vector.AutoresetMode` or its value |
    | `samples_per_prompt` | 1 | how many slots in a row share a prompt |
    | `render_mode` | `None` | `"rgb_array"`: the decoded current latents |

    Raises:
        ValueError: for an argument that is not valid, before any model is loaded.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10, "autoreset_mode": AutoresetMode.NEXT_STEP}

    def __init__(
        self,
        num_envs: int = 1,
        *,
        model: str | Path | DiffusionPipeline = "tiny",
        reward: str | Callable[..., Any] = "jpeg_compressibility",
        prompts: Any = "simple_animals",
        num_inference_steps: int = 20,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
        backend: str = "numpy",
        autoreset_mode: str | AutoresetMode = AutoresetMode.NEXT_STEP,
        samples_per_prompt: int = 1,
        render_mode: str | None = None,
    ) -> None:
        """Check the arguments, then load the model; see the class docstring for each argument."""
        if num_envs < 1:
            raise ValueError(f"num_envs must be at least 1; got {num_envs}")
        if backend not in BACKENDS:
            raise ValueError(f"backend must be one of {', '.join(BACKENDS)}; got {backend!r}")
        if samples_per_prompt < 1 or num_envs % samples_per_prompt:
            raise ValueError(f"samples_per_prompt must divide num_envs={num_envs}; got {samples_per_prompt}")
        if render_mode not in (None, "rgb_array"):
            raise ValueError(f"render_mode must be None or 'rgb_array'; got {render_mode!r}")
        if num_inference_steps < 1:
            raise ValueError(f"num_inference_steps must be at least 1; got {num_inference_steps}")
        self.autoreset_mode = _autoreset_mode(autoreset_mode)
        self.reward: Reward = load_reward(reward)
        self.prompts = load_prompts(prompts)
        self.model = load_model(model, device, dtype)
        self.device = next(self.model.denoiser.parameters()).device
        self.num_envs = num_envs
        self.num_inference_steps = num_inference_steps
        self.backend = backend
        self.samples_per_prompt = samples_per_prompt
        self.render_mode = render_mode
        self.metadata = {**self.metadata, "autoreset_mode": self.autoreset_mode}
        clock = GaussianSampler.from_scheduler(self.model.scheduler, num_inference_steps, min_std=SMALLEST_STD)
        self._timesteps = np.append(clock.timesteps.numpy(), 0.0).astype(np.float32)
        self.single_observation_space = DenoisingObservationSpace(self.model, num_inference_steps)
        self.single_action_space = latent_box(self.model.latent_shape)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._generators = [seeding.np_random(None)[0] for _ in range(num_envs)]
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
        if unknown := set(options) - set(RESET_OPTIONS):
            raise ValueError(
                f"reset options must be among {', '.join(RESET_OPTIONS)}; got {', '.join(sorted(unknown))}"
            )
        mask = self._reset_mask(options.get("reset_mask"))
        seeds = [seed + i for i in range(self.num_envs)] if isinstance(seed, (int, np.integer)) else seed
        if seeds is not None:
            if len(seeds) != self.num_envs:
                raise ValueError(f"seed must be an int or one a slot ({self.num_envs}); got {len(seeds)}")
            for slot, slot_seed in enumerate(seeds):
                if slot_seed is not None and mask[slot]:
                    self._generators[slot] = seeding.np_random(int(slot_seed))[0]
        infos = self._begin(mask, options.get("prompts"), options.get("latents"))
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
        """
        self._require_reset()
        latents = self._check_actions(actions)
        ended = self._step_index == self.num_inference_steps
        infos: dict[str, Any] = {}
        if ended.any():  # only in next-step mode: this call resets them and ignores their actions
            infos = self._begin(ended)
            latents = torch.where(self._slots(ended), self._latents, latents)
        self._latents = latents
        self._step_index[~ended] += 1
        terminations = (self._step_index == self.num_inference_steps) & ~ended
        rewards = np.zeros(self.num_envs)
        if terminations.any():
            infos = self._finish(terminations, rewards, infos)
        return self.observe(), rewards, terminations, np.zeros(self.num_envs, dtype=np.bool_), infos

    def render(self) -> tuple[npt.NDArray[np.uint8], ...] | None:
        """Return the decoded current latents, one uint8 picture `(height, width, 3)` a slot."""
        if self.render_mode is None:
            return None
        self._require_reset(ended_is_fine=True)
        return tuple(self.model.decode(self._latents).cpu().numpy())

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return everything that the next step depends on: tensors, and plain values for JSON."""
        return {"latents": self._latents}, {
            "prompts": self._prompts.tolist(),
            "metadata": self._prompt_metadata,
            "step_index": self._step_index.tolist(),
            "generators": [generator.bit_generator.state for generator in self._generators],
        }

    def load_state_dict(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Go on from what `state_dict` of an environment with the same arguments returned."""
        if len(state["generators"]) != self.num_envs:
            raise ValueError(f"state must be of num_envs={self.num_envs} slots; got {len(state['generators'])}")
        self._latents = tensors["latents"].to(self.device)
        self._prompts = np.array(state["prompts"], dtype=object)
        self._prompt_metadata = list(state["metadata"])
        self._step_index = np.array(state["step_index"])
        for generator, generator_state in zip(self._generators, state["generators"], strict=True):
            generator.bit_generator.state = generator_state
        self._conditioning = self.model.encode_prompts(self._prompts.tolist())

    @property
    def np_random(self) -> tuple[np.random.Generator, ...]:  # type: ignore[override]
        """Every slot's generator."""
        return tuple(self._generators)

    def _reset_mask(self, mask: Mask | None) -> Mask:
        if mask is None:
            return np.ones(self.num_envs, dtype=np.bool_)
        if not isinstance(mask, np.ndarray) or mask.dtype != np.bool_ or mask.shape != (self.num_envs,):
            raise ValueError(f"reset_mask must be a boolean array of shape ({self.num_envs},); got {mask!r}")
        groups = mask.reshape(-1, self.samples_per_prompt)
        if not mask.any() or (groups.any(1) != groups.all(1)).any():
            raise ValueError(
                f"reset_mask must select at least one slot, and whole groups of samples_per_prompt="
                f"{self.samples_per_prompt} slots; got {mask!r}"
            )
        return mask

    def _begin(self, mask: Mask, prompts: Any = None, latents: Any = None) -> dict[str, Any]:
        """Start an episode in every slot of `mask`; return their infos."""
        slots = np.flatnonzero(mask)
        given = self._given_prompts(prompts)
        noise = np.zeros((self.num_envs, *self.model.latent_shape), np.float32)
        for slot in slots:
            if given is not None:
                self._prompts[slot], self._prompt_metadata[slot] = given[slot]
            elif slot % self.samples_per_prompt == 0:
                self._prompts[slot], self._prompt_metadata[slot] = self.prompts.sample(self._generators[slot])
            else:
                self._prompts[slot], self._prompt_metadata[slot] = (
                    self._prompts[slot - 1],
                    self._prompt_metadata[slot - 1],
                )
            noise[slot] = self._generators[slot].standard_normal(self.model.latent_shape, np.float32)
        initial = torch.as_tensor(noise) if latents is None else self._given_latents(latents)
        chosen = self._slots(mask)
        self._latents = torch.where(chosen, initial.to(self.device), self._latents)
        fresh = self.model.encode_prompts([self._prompts[slot] for slot in slots])
        for name, embeds in fresh.items():
            self._conditioning[name] = self._conditioning[name].clone()
            self._conditioning[name][torch.as_tensor(slots, device=self.device)] = embeds.to(torch.float32)
        self._step_index[mask] = 0
        return {"prompt": np.where(mask, self._prompts, None), "_prompt": mask.copy()}

    def _finish(self, ended: Mask, rewards: npt.NDArray[np.float64], infos: dict[str, Any]) -> dict[str, Any]:
        """Decode and judge the slots that `ended`; write their rewards and infos; reset them in same-step mode."""
        slots = np.flatnonzero(ended)
        finals = self._latents[torch.as_tensor(slots, device=self.device)]
        if not bool(torch.isfinite(finals).all()):
            raise ValueError("actions must be finite; the last latents of an episode have NaN or infinite values")
        images = self.model.decode(finals).cpu().numpy()
        scores, details = evaluate_reward(
            self.reward, images, [self._prompts[i] for i in slots], [self._prompt_metadata[i] for i in slots]
        )
        rewards[slots] = scores
        final_infos: dict[str, Any] = {}
        for row, slot in enumerate(slots):
            final_info: dict[str, Any] = {"prompt": self._prompts[slot], "image": images[row]}
            if details:
                final_info["reward_details"] = {name: values[row] for name, values in details.items()}
            final_infos = self._add_info(final_infos, final_info, int(slot))
        if self.autoreset_mode is not AutoresetMode.SAME_STEP:
            return {**infos, **_merge(infos, final_infos)}
        final_observation = self.observe()
        final_obs = np.full(self.num_envs, None, dtype=object)
        for slot in slots:
            final_obs[slot] = {name: value[slot] for name, value in final_observation.items()}
        infos = {
            "final_obs": final_obs,
            "_final_obs": ended.copy(),
            "final_info": final_infos,
            "_final_info": ended.copy(),
        }
        return {**infos, **self._begin(ended)}

    def _check_actions(self, actions: Latents) -> Tensor:
        shape = (self.num_envs, *self.model.latent_shape)
        if tuple(np.shape(actions)) != shape:
            raise ValueError(f"actions must have shape {shape}; got {tuple(np.shape(actions))}")
        latents = torch.as_tensor(actions).detach().to(self.device, torch.float32, copy=True)
        if (self.backend == "numpy" or latents.device.type == "cpu") and not bool(torch.isfinite(latents).all()):
            raise ValueError("actions must be finite; got NaN or infinite values")
        return latents

    def _require_reset(self, ended_is_fine: bool = False) -> None:
        if (self._step_index < 0).any():
            raise ResetNeeded("call reset() before step() or render()")
        ended = self._step_index == self.num_inference_steps
        if ended.any() and self.autoreset_mode is AutoresetMode.DISABLED and not ended_is_fine:
            raise ResetNeeded(
                f"the episodes of slots {np.flatnonzero(ended).tolist()} have ended and autoreset is off: "
                "call reset(options={'reset_mask': mask}) first"
            )

    def _given_prompts(self, prompts: Any) -> list[Prompt] | None:
        """Check `options["prompts"]`; a prompt of the environment's own set keeps its metadata."""
        if prompts is None:
            return None
        given = load_prompts([prompts] * self.num_envs if isinstance(prompts, str) else list(prompts))
        assert isinstance(given, PromptSet)
        if len(given) != self.num_envs:
            raise ValueError(f"options['prompts'] must be a string or one a slot ({self.num_envs}); got {len(given)}")
        known = dict(self.prompts) if isinstance(self.prompts, PromptSet) else {}
        return [(prompt, metadata or known.get(prompt, {})) for prompt, metadata in given]

    def _given_latents(self, latents: Latents) -> Tensor:
        tensor = torch.as_tensor(latents).detach().to(torch.float32)
        shape = self.model.latent_shape
        if tuple(tensor.shape) not in (shape, (self.num_envs, *shape)) or not bool(torch.isfinite(tensor).all()):
            raise ValueError(
                f"options['latents'] must be finite, of shape {shape} or {(self.num_envs, *shape)}; "
                f"got shape {tuple(tensor.shape)}"
            )
        return tensor.expand(self.num_envs, *shape)

    def observe(self) -> Observation:
        """Return the batched observation of the current state."""
        timestep = torch.as_tensor(self._timesteps[self._step_index][:, None])
        state = {"latents": self._latents, "timestep": timestep, **self._conditioning}
        if self.backend == "torch":  # nothing is ever written in place, so tensors can be handed out as they are
            return {name: tensor.to(self.device) for name, tensor in state.items()}
        return {name: tensor.cpu().numpy().copy() for name, tensor in state.items()}

    def _slots(self, mask: Mask) -> Tensor:
        return torch.as_tensor(mask, device=self.device).view(-1, *[1] * len(self.model.latent_shape))


def _autoreset_mode(mode: str | AutoresetMode) -> AutoresetMode:
    try:
        return AutoresetMode(mode)
    except ValueError:
        valid = ", ".join(repr(m.value) for m in AutoresetMode)
        raise ValueError(f"autoreset_mode must be one of {valid}; got {mode!r}") from None


def _merge(infos: dict[str, Any], final_infos: dict[str, Any]) -> dict[str, Any]:
    """Join the infos of slots that began and of slots that ended in the same step (next-step mode, out of phase)."""
    merged = dict(final_infos)
    for name in infos.keys() & final_infos.keys():
        if not name.startswith("_"):
            merged[name] = np.where(final_infos[f"_{name}"], final_infos[name], infos[name])
            merged[f"_{name}"] = infos[f"_{name}"] | final_infos[f"_{name}"]
    return merged
