"""A diffusion model as a Stable-Baselines3 actor-critic policy: denoiser → guidance → one Gaussian step.

Fourth stop of the data's path. The policy owns what learns (LoRA adapters or every weight of the denoiser) and the
distribution over the next latent; clock, prompts and reward belong to the environment. Its model and its timesteps are
those that the environment wrote on its observation space, so `PPO(DiffusionPolicy, env)` is complete.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from diffusers import DiffusionPipeline
from gymnasium import spaces
from safetensors.torch import load_file, save_file
from stable_baselines3.common.policies import ActorCriticPolicy, BasePolicy
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule
from torch import Tensor, nn

from agents.distributed import Share
from agents.policy import compilation
from agents.policy.critic import DenoisingCritic
from agents.policy.distribution import DenoisingDistribution
from agents.policy.guidance import guided_output, negative_conditioning
from agents.policy.lora import LoraTargets, add_lora, copy_for_full_training, merged_adapters
from agents.policy.policy_arguments import check_arguments, check_model, find_model
from agents.rollout.buffer import TensorRolloutBuffer, Transitions
from ddpo_env.models.loading import load_model
from ddpo_env.sampler.denoising_loss import add_noise, draw_timesteps
from ddpo_env.sampler.gaussian_sampler import GaussianSampler, Reduction
from ddpo_env.spaces import DenoisingObservationSpace, latent_box

DenoisingObservation: TypeAlias = dict[str, Tensor]

_CONFIG_FILE = "policy.json"
_WEIGHTS_FILE = "policy.safetensors"


class DiffusionPolicy(ActorCriticPolicy):
    """`π_θ(x_{t-1} | x_t, c) = N(μ_θ(x_t, t, c), σ_t² I)` around a pipeline's denoiser (Black et al. 2023, eq. 3).

    Guidance stays on in training: the guided prediction defines the mean. `forward`, `evaluate_actions`,
    `predict_values`, `get_distribution` and `predict` mean what they mean in Stable-Baselines3; observations are
    dictionaries of the environment's tensors, actions are next latents `(batch, *latent_shape)`.

    `predict(deterministic=True)` returns the Gaussian's mean, as in every Stable-Baselines3 policy. Pictures sampled
    that way lack the noise that the denoiser expects and come out flat; sample with `deterministic=False`.

    Args:
        observation_space: of the environment.
        action_space: of the environment, a latent.
        lr_schedule: learning rate as a function of the remaining progress, 1 → 0.
        use_sde: must be false (state-dependent exploration; the sampler is stochastic by itself).
        model: what `ddpo_env.load_model` takes; default: the environment's.
        num_inference_steps: length of an episode; default: the environment's.
        device: where the model is loaded; default: the environment's.
        dtype: of the frozen weights; default: the environment's. What learns is float32.
        resolution: side of the pictures in pixels; default: the environment's.
        guidance_scale: of classifier-free guidance; 1 is off, which halves the cost. Where the model's denoiser takes
            the scale as an input (FLUX.1-dev), it is that input.
        unconditional_gradient: whether guidance's unconditional half is differentiated. Without, an update costs about
            a fifth less, and its gradient is another one: that of the conditional half, `guidance_scale` times.
        eta: noise of the DDIM step, above 0.
        noise_level: noise of the flow-matching step, above 0, default 0.7; refused for other samplers.
        min_std: lower bound on the step's standard deviation; needed where the sampler's last step is deterministic.
        lora_rank: of the adapters; 0 trains every weight.
        lora_targets: which layers get an adapter, a name in `agents.policy.lora.LORA_TARGETS`.
        merge_lora: whether a rollout is sampled with the adapters merged into a copy of their layers' weights, which
            saves their cost; default: in float32. In half precision the sum is rounded, and with it what was learnt.
        log_prob_reduction: `"mean"` or `"sum"` over the latent's dimensions. `clip_range` depends on it.
        critic: whether there is a value network; without one every value is 0.
        gradient_checkpointing: recompute the denoiser's activations in the backward pass, to save memory.
        compile_denoiser: run it by `torch.compile`: faster calls after minutes of compiling, for long runs.
        autocast: `"bfloat16"` or `"float16"`: the denoiser computes in it, what learns and the log-densities stay
            float32. Default: the dtype of the frozen weights.
        optimizer_class: optimizer of what learns.
        optimizer_kwargs: its arguments; default for Adam and AdamW: DDPO's betas (0.9, 0.999), weight decay 1e-4.

    Raises:
        ValueError: for an argument that is not valid, or a space that is not the model's.
    """

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        action_space: spaces.Space[Any],
        lr_schedule: Schedule,
        use_sde: bool = False,
        *,
        model: str | Path | DiffusionPipeline | None = None,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        resolution: int | None = None,
        guidance_scale: float = 5.0,
        unconditional_gradient: bool = True,
        eta: float = 1.0,
        noise_level: float | None = None,
        min_std: float | None = None,
        lora_rank: int = 4,
        lora_targets: LoraTargets = "attention",
        merge_lora: bool | None = None,
        log_prob_reduction: Reduction = "mean",
        critic: bool = False,
        gradient_checkpointing: bool = False,
        compile_denoiser: bool = False,
        autocast: Literal["bfloat16", "float16"] | None = None,
        optimizer_class: type[torch.optim.Optimizer] = torch.optim.AdamW,
        optimizer_kwargs: dict[str, Any] | None = None,
    ) -> None:
        """Share the environment's model and put the adapters in; see the class docstring for the arguments."""
        check_arguments(use_sde, num_inference_steps, guidance_scale, log_prob_reduction, autocast)
        if issubclass(optimizer_class, torch.optim.Adam | torch.optim.AdamW):
            optimizer_kwargs = {"betas": (0.9, 0.999), "weight_decay": 1e-4, **(optimizer_kwargs or {})}
        # ActorCriticPolicy's own constructor would build an MLP; everything that it promises is defined below.
        BasePolicy.__init__(
            self, observation_space, action_space, optimizer_class=optimizer_class, optimizer_kwargs=optimizer_kwargs
        )
        self.model, self.num_inference_steps = find_model(
            observation_space, model, num_inference_steps, device, dtype, resolution
        )
        check_model(self.model, observation_space, action_space, guidance_scale)
        self.guidance_scale = guidance_scale
        self.unconditional_gradient = unconditional_gradient
        self.eta = eta
        self.noise_level = noise_level
        self.min_std = min_std
        self.lora_rank = lora_rank
        self.lora_targets: LoraTargets = lora_targets
        self.merge_lora = merge_lora
        self.log_prob_reduction: Reduction = log_prob_reduction
        self.share: Share | None = None  # set by `agents.distributed.sharing`
        self.autocast = autocast
        self.share_features_extractor = True
        self.sampler = GaussianSampler.from_model(
            self.model, self.num_inference_steps, eta, noise_level=noise_level, min_std=min_std
        )
        self.guidance_embeds: bool = getattr(self.model, "guidance_embeds", False)
        guides = guidance_scale != 1 and not self.guidance_embeds
        self.negative_conditioning = negative_conditioning(self.model) if guides else {}
        if lora_rank == 0:
            self.denoiser = copy_for_full_training(self.model.denoiser)
        else:
            self.denoiser = add_lora(self.model.denoiser, lora_rank, lora_targets)
        self.critic = DenoisingCritic(self.model.latent_shape, self.model.conditioning_shapes) if critic else None
        self.gradient_checkpointing = gradient_checkpointing
        if gradient_checkpointing:
            self.denoiser.enable_gradient_checkpointing()  # type: ignore[operator]
        self.to(next(self.denoiser.parameters()).device)
        self.compile_denoiser = compile_denoiser
        if compile_denoiser:
            compilation.compile_denoiser(self.denoiser)
        self.optimizer = self.optimizer_class(
            self.trainable_parameters(),
            lr=lr_schedule(1),  # type: ignore[call-arg]
            **self.optimizer_kwargs,
        )

    def sampling_weights(self) -> AbstractContextManager[None]:
        """Return a context for many calls without gradients, in which the weights do not change: it makes them cheaper.

        `collect_rollouts` of the algorithms here and `evaluate` sample in it; see `merge_lora`.
        """
        wanted = self.compute_dtype == torch.float32 if self.merge_lora is None else self.merge_lora
        return merged_adapters(self.denoiser) if wanted and self.lora_rank > 0 else nullcontext()

    def trainable_parameters(self) -> list[nn.Parameter]:
        """What learns: adapters or the whole denoiser, and the critic if there is one."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def forward(self, obs: PyTorchObs, deterministic: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """Return next latents `(batch, *latent_shape)`, values `(batch, 1)` and log-densities `(batch,)`."""
        distribution = self.get_distribution(obs)
        actions = distribution.get_actions(deterministic)
        return actions, self.predict_values(obs), distribution.log_prob(actions)

    def evaluate_actions(self, obs: PyTorchObs, actions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return values `(batch, 1)`, log-densities `(batch,)` and entropies `(batch,)` of given next latents."""
        distribution = self.get_distribution(obs)
        return self.predict_values(obs), distribution.log_prob(actions), distribution.entropy()

    def evaluate_with_reference(self, obs: PyTorchObs, actions: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return what `evaluate_actions` returns, and the KL divergence from the pretrained policy `(batch,)`.

        Both policies have the sampler's variance, so the divergence is `‖μ_θ − μ_pretrained‖² / 2σ²`, reduced as the
        log-density is. The pretrained policy costs a forward pass and no memory: it is the model's own denoiser, whose
        frozen weights the adapters are around.
        """
        distribution = self.get_distribution(obs)
        with torch.no_grad():
            reference = self.get_distribution(obs, self.model.denoiser)
        kl = self.sampler.kl_divergence(
            distribution.mean, reference.mean, distribution.step_index, self.log_prob_reduction
        )
        return self.predict_values(obs), distribution.log_prob(actions), distribution.entropy(), kl

    def regression_steps(self, rollout: TensorRolloutBuffer) -> npt.NDArray[np.int64]:
        """Return the steps whose actions reward-weighted regression imitates: the last ones, the finished latents."""
        return rollout.final_steps()

    def regression_loss(self, batch: Transitions) -> Tensor:
        """Return the denoising loss of finished latents, `(batch,)`: mean squared error at a random timestep.

        As in pretraining there is no guidance: the prediction for the prompt is compared with what it should have been.
        """
        _, _, conditioning = self._split(batch.observations)
        latents = batch.actions
        share = self.share or Share.of_worker(len(latents), 0, 1)
        timestep, noise = (drawn[share.start : share.stop] for drawn in self._draw_regression(share.total))
        noisy, target = add_noise(self.model.scheduler, latents, noise, timestep)
        output = self._predict_with(self.denoiser, noisy, timestep, conditioning)
        return (output - target).square().flatten(1).mean(1)

    def pass_over_regression(self, rows: int) -> None:
        """Draw the random numbers that `regression_loss` draws for `rows` transitions."""
        self._draw_regression(rows)

    def _draw_regression(self, rows: int) -> tuple[Tensor, Tensor]:
        """Random timesteps `(rows,)` and noise `(rows, *latent_shape)`."""
        timestep = draw_timesteps(self.model.scheduler, rows, self.device)
        return timestep, torch.randn(rows, *self.model.latent_shape, device=self.device)

    def get_distribution(self, obs: PyTorchObs, denoiser: nn.Module | None = None) -> DenoisingDistribution:
        """Run the denoiser, with guidance, and return the Gaussian over the next latent.

        Args:
            obs: observation, batched.
            denoiser: in the place of the one that learns.
        """
        latents, timestep, conditioning = self._split(obs)
        if self.sampler.std.device != latents.device:
            self.sampler = self.sampler.to(latents.device)
        step_index = self.sampler.step_index_of(timestep)
        output = self.predict_output(latents, timestep, conditioning, denoiser)
        mean = self.sampler.mean(latents, output, step_index)
        return DenoisingDistribution(self.sampler, mean, step_index, self.log_prob_reduction, self.share)

    def predict_output(
        self,
        latents: Tensor,
        timestep: Tensor,
        conditioning: DenoisingObservation,
        denoiser: nn.Module | None = None,
    ) -> Tensor:
        """Return the guided output of the denoiser (the one that learns unless another is given), float32."""
        denoiser = self.denoiser if denoiser is None else denoiser
        predict = partial(self._predict_with, denoiser)
        if not self.negative_conditioning:
            return predict(latents, timestep, conditioning)
        negative, scale = self.negative_conditioning, self.guidance_scale
        return guided_output(predict, latents, timestep, conditioning, negative, scale, self.unconditional_gradient)

    @property
    def compute_dtype(self) -> torch.dtype:
        """What the denoiser computes in."""
        return getattr(torch, self.autocast) if self.autocast else next(self.model.denoiser.parameters()).dtype

    def _predict_with(
        self, denoiser: nn.Module, latents: Tensor, timestep: Tensor, conditioning: DenoisingObservation
    ) -> Tensor:
        if self.guidance_embeds:
            conditioning = {
                **conditioning,
                "guidance": torch.full_like(timestep, self.guidance_scale, dtype=torch.float32),
            }
        if self.compile_denoiser:
            compilation.any_batch_size([latents, timestep, *conditioning.values()])
        with torch.autocast(latents.device.type, self.compute_dtype, enabled=self.autocast is not None):
            return self.model.predict(denoiser, latents, timestep, conditioning).float()

    def predict_values(self, obs: PyTorchObs) -> Tensor:
        """Return values `(batch, 1)`; zeros without a critic."""
        latents, timestep, conditioning = self._split(obs)
        if self.critic is None:
            return torch.zeros(len(latents), 1, device=latents.device)
        return self.critic(latents, timestep, conditioning)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Return the tensors that learn; the frozen ones are the model's and are not saved again and again."""
        state = super().state_dict(*args, **kwargs)
        prefix = kwargs.get("prefix", "")
        learned = {prefix + name for name, parameter in self.named_parameters() if parameter.requires_grad}
        return {name: value for name, value in state.items() if name in learned}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load what `state_dict` returned; with `strict`, exactly the tensors that learn must be there."""
        expected = set(self.state_dict())
        if strict and set(state_dict) != expected:
            missing, unexpected = sorted(expected - set(state_dict)), sorted(set(state_dict) - expected)
            raise ValueError(
                f"state_dict must hold the {len(expected)} tensors that learn; missing {missing[:3]}, "
                f"unexpected {unexpected[:3]}: same lora_rank, lora_targets and critic?"
            )
        return super().load_state_dict(state_dict, strict=False, assign=assign)

    def save(self, path: str | Path) -> None:
        """Write the policy to a folder: what learns as safetensors, how to build the policy as JSON."""
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: value.contiguous() for name, value in self.state_dict().items()}, folder / _WEIGHTS_FILE)
        settings = {
            "model": self.model.source,
            "resolution": getattr(self.model, "resolution", None),
            "num_inference_steps": self.num_inference_steps,
            "guidance_scale": self.guidance_scale,
            "unconditional_gradient": self.unconditional_gradient,
            "eta": self.eta,
            "noise_level": self.noise_level,
            "min_std": self.min_std,
            "lora_rank": self.lora_rank,
            "lora_targets": self.lora_targets,
            "merge_lora": self.merge_lora,
            "log_prob_reduction": self.log_prob_reduction,
            "critic": self.critic is not None,
            "gradient_checkpointing": self.gradient_checkpointing,
            "compile_denoiser": self.compile_denoiser,
            "autocast": self.autocast,
        }
        (folder / _CONFIG_FILE).write_text(json.dumps(settings, indent=2) + "\n")

    @classmethod
    def load(
        cls,
        path: str | Path,
        device: str | torch.device = "auto",
        model: str | Path | DiffusionPipeline | None = None,
        dtype: str | torch.dtype = "auto",
    ) -> DiffusionPolicy:
        """Read a policy that `save` wrote.

        Args:
            path: the folder.
            device: where to put it.
            model: the pretrained model, if it is not where it was when the policy was saved.
            dtype: of the frozen weights.

        Raises:
            ValueError: if there is no policy in the folder, or it does not fit `model`.
        """
        folder = Path(path)
        for name in (_CONFIG_FILE, _WEIGHTS_FILE):
            if not (folder / name).is_file():
                raise ValueError(
                    f"path must be a folder that DiffusionPolicy.save wrote; {str(folder)!r} has no {name}"
                )
        settings = json.loads((folder / _CONFIG_FILE).read_text())
        settings["model"] = model if model is not None else settings["model"]
        base = load_model(settings["model"], device, dtype, settings.setdefault("resolution", None))
        policy = cls(
            DenoisingObservationSpace(base, settings["num_inference_steps"]),
            latent_box(base.latent_shape),
            lambda _: 0.0,
            **settings,
        )
        policy.load_state_dict(load_file(folder / _WEIGHTS_FILE, device=str(policy.device)))
        return policy

    def save_lora(self, folder: str | Path) -> None:
        """Write the adapters in diffusers' format: stock `pipe.load_lora_weights(folder)` brings them back."""
        if self.lora_rank == 0:
            raise ValueError("save_lora needs lora_rank above 0; this policy trains every weight (lora_rank=0)")
        self.model.save_lora(self.denoiser, Path(folder))

    def _predict(self, observation: PyTorchObs, deterministic: bool = False) -> Tensor:
        return self.get_distribution(observation).get_actions(deterministic)

    def _split(self, obs: PyTorchObs) -> tuple[Tensor, Tensor, DenoisingObservation]:
        assert isinstance(obs, dict)
        conditioning = {name: obs[name] for name in self.model.conditioning_shapes}
        return obs["latents"], obs["timestep"].flatten(), conditioning
