"""A diffusion model as a Stable-Baselines3 actor-critic policy: denoiser → guidance → one Gaussian step.

Fourth stop of the data's path. The policy owns what learns (LoRA adapters or every weight of the denoiser) and the
distribution over the next latent. Timesteps, prompts and reward belong to the environment. The environment puts its
model and its number of steps on the observation space, so `PPO(DiffusionPolicy, env)` is complete.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from diffusers import DiffusionPipeline
from gymnasium import spaces
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from stable_baselines3.common.policies import ActorCriticPolicy, BasePolicy
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule
from torch import Tensor, nn

from agents.distributed import Rows
from agents.output.files import write_file, write_folder
from agents.policy.abilities import SamplerAbilities
from agents.policy.compilation import compile_denoiser
from agents.policy.critic import DenoisingCritic
from agents.policy.distribution import DenoisingDistribution
from agents.policy.guidance import guided_output
from agents.policy.lora import (
    POLICY_WEIGHTS,
    add_lora,
    continue_lora,
    copy_for_full_training,
    merged_adapters,
    starting_adapters,
)
from agents.policy.matching import check_spaces, find_model, options_for
from agents.policy.options import PolicyOptions, check_trainable, policy_options, read_settings
from agents.rollout.buffer import TensorRolloutBuffer, Transitions
from ddpo_env.models import DiffusionModel, abilities_of, load_model
from ddpo_env.models.loading import plain_arguments
from ddpo_env.models.quantization import loaded_dtype, quantization_of
from ddpo_env.sampler.denoising_loss import NoisedSamples, add_noise, draw_timesteps
from ddpo_env.spaces import DenoisingObservationSpace, action_box
from ddpo_env.validation.options import shows_options

DenoisingObservation: TypeAlias = dict[str, Tensor]

_CONFIG_FILE = "policy.json"


class DiffusionPolicy(SamplerAbilities, ActorCriticPolicy):
    """`π_θ(x_{t-1} | x_t, c) = N(μ_θ(x_t, t, c), σ_t² I)` around a model's denoiser (Black et al. 2023, eq. 3).

    Guidance stays on in training: the guided prediction defines the mean. `forward`, `evaluate_actions`,
    `predict_values`, `get_distribution` and `predict` mean what they mean in Stable-Baselines3. Observations are
    dictionaries of the environment's tensors, actions are next latents `(batch, *latent_shape)`.

    `predict(deterministic=True)` returns the Gaussian's mean, as in every Stable-Baselines3 policy. Images sampled that
    way lack the noise that the denoiser expects and look flat; sample with `deterministic=False`.

    Args:
        observation_space: of the environment. A `DenoisingObservationSpace` names model and number of steps.
        action_space: of the environment, a latent.
        lr_schedule: learning rate as a function of the remaining progress, 1 → 0.
        use_sde: must be false (state-dependent exploration; the sampler is stochastic by itself).
        model: what `ddpo_env.load_model` takes; default: the environment's model.
        num_inference_steps: length of an episode; default: the environment's.
        optimizer_class: optimizer of the weights that learn.
        optimizer_kwargs: its arguments; default for Adam and AdamW: DDPO's betas (0.9, 0.999), weight decay 1e-4.
        guidance_scale: see `PolicyOptions`; default: 5, or 1 for a model that takes no prompt.
        lora_rank: see `PolicyOptions`; default: 4, or 0 for a denoiser without a layer for the default `lora_targets`.
        **options: the other fields of `PolicyOptions`: `eta`, `lora_targets`, ...

    Attributes:
        options: the `PolicyOptions`, complete.
        model: the `DiffusionModel`, whose frozen weights the adapters share.
        denoiser: the network that learns.

    Raises:
        ValueError: for an argument that is not valid, or a space that does not fit the model.
    """

    knows_reference = shares_batches = has_forward_process = draws_from_generator = True

    @shows_options(PolicyOptions)
    def __init__(
        self,
        observation_space: spaces.Space[Any],
        action_space: spaces.Space[Any],
        lr_schedule: Schedule,
        use_sde: bool = False,
        *,
        model: str | Path | DiffusionPipeline | DiffusionModel | None = None,
        num_inference_steps: int | None = None,
        optimizer_class: type[torch.optim.Optimizer] = torch.optim.AdamW,
        optimizer_kwargs: dict[str, Any] | None = None,
        guidance_scale: float | None = None,
        lora_rank: int | None = None,
        **options: Any,
    ) -> None:
        """Share the environment's model and add the adapters; see the class docstring for the arguments."""
        if use_sde:
            raise ValueError("use_sde must be False: the sampler's own noise is the exploration; got True")
        open_options = {"guidance_scale": guidance_scale, "lora_rank": lora_rank}
        options |= {name: value for name, value in open_options.items() if value is not None}
        policy_options(options)  # what is wrong with any model is told before one is loaded
        if issubclass(optimizer_class, torch.optim.Adam | torch.optim.AdamW):
            optimizer_kwargs = {"betas": (0.9, 0.999), "weight_decay": 1e-4, **(optimizer_kwargs or {})}
        # ActorCriticPolicy's own constructor would build an MLP; everything that it promises is defined below.
        BasePolicy.__init__(
            self,
            observation_space,
            action_space,
            optimizer_class=optimizer_class,
            optimizer_kwargs=optimizer_kwargs,
            squash_output=True,  # Stable-Baselines3 would clip latents to the box otherwise
        )
        handle = find_model(observation_space, model, num_inference_steps)
        self.model, self.num_inference_steps = handle.model, handle.num_inference_steps
        self.options = options_for(self.model, options)
        self.guidance_embeds = abilities_of(self.model).guidance_embeds
        check_spaces(self.model, observation_space, action_space, self.options.guidance_scale)
        self.share_features_extractor = True
        self.use_sampler(self.options.sampler_table(self.model, self.num_inference_steps))
        is_guided = self.options.guidance_scale != 1 and not self.guidance_embeds
        self.negative_conditioning = abilities_of(self.model).negative_conditioning() if is_guided else {}
        check_trainable(quantization_of(self.model.denoiser), self.options)
        if self.options.lora_rank == 0:
            self.denoiser = copy_for_full_training(self.model.denoiser)
        elif self.options.lora is not None:
            adapters = starting_adapters(self.model, self.options.lora)
            self.denoiser = continue_lora(self.model.denoiser, adapters)
        else:
            self.denoiser = add_lora(self.model.denoiser, self.options.lora_rank, self.options.lora_targets)
        shapes = self.model.latent_shape, self.model.conditioning_shapes
        self.critic = DenoisingCritic(*shapes) if self.options.critic else None
        if self.options.gradient_checkpointing:
            self.denoiser.enable_gradient_checkpointing()  # type: ignore[operator]
        self.to(next(self.denoiser.parameters()).device)
        if self.options.compile_denoiser:
            compile_denoiser(self.denoiser)
        self.optimizer = self.optimizer_class(
            self.trainable_parameters(),
            lr=lr_schedule(1),  # type: ignore[call-arg]
            **self.optimizer_kwargs,
        )

    @property
    def compute_dtype(self) -> torch.dtype:
        """Dtype in which the denoiser computes."""
        autocast = self.options.autocast
        return getattr(torch, autocast) if autocast else loaded_dtype(self.model.denoiser)

    def sampling_weights(self) -> AbstractContextManager[None]:
        """Return a context for sampling without gradients: the adapters are merged, see `PolicyOptions.merge_lora`."""
        merge = self.options.merge_lora
        wanted = self.compute_dtype == torch.float32 if merge is None else merge
        if not wanted or self.options.lora_rank == 0 or quantization_of(self.model.denoiser):
            return nullcontext()
        return merged_adapters(self.denoiser)

    def trainable_parameters(self) -> list[nn.Parameter]:
        """Return the weights that learn: adapters or the whole denoiser, and the critic if there is one."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def forward(self, obs: PyTorchObs, deterministic: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """Return next latents `(batch, *latent_shape)`, values `(batch, 1)` and log-probabilities `(batch,)`."""
        distribution = self.get_distribution(obs)
        actions = distribution.get_actions(deterministic)
        return actions, self.predict_values(obs), distribution.log_prob(actions)

    def evaluate_actions(self, obs: PyTorchObs, actions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return values `(batch, 1)`, log-probabilities `(batch,)` and entropies `(batch,)` of given next latents."""
        distribution = self.get_distribution(obs)
        return self.predict_values(obs), distribution.log_prob(actions), distribution.entropy()

    def evaluate_with_reference(self, obs: PyTorchObs, actions: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return what `evaluate_actions` returns, and the KL divergence from the pretrained policy `(batch,)`.

        Both policies have the sampler's variance, so the divergence is `‖μ_θ − μ_pretrained‖² / 2σ²`, reduced like the
        log-probability. The pretrained policy costs a forward pass and no memory: it is the model's own denoiser, whose
        frozen weights the adapters share.
        """
        distribution = self.get_distribution(obs)
        kl = self.reference_kl(obs, distribution)
        return self.predict_values(obs), distribution.log_prob(actions), distribution.entropy(), kl

    def reference_kl(self, obs: PyTorchObs, distribution: DenoisingDistribution) -> Tensor:
        """Return the KL divergence of a distribution over the next latents from the pretrained policy's, `(batch,)`."""
        with torch.no_grad():
            reference = self.get_distribution(obs, self.model.denoiser)
        return distribution.kl_divergence(reference.mean)

    def regression_steps(self, rollout: TensorRolloutBuffer) -> npt.NDArray[np.int64]:
        """Return the steps whose actions reward-weighted regression imitates: the last ones, the finished latents."""
        return rollout.final_steps()

    def regression_loss(self, batch: Transitions) -> Tensor:
        """Return the denoising loss of finished latents, `(batch,)`: mean squared error at a random timestep.

        If guidance is on, the guided output is compared with the target, as in the authors' configurations
        (`train_cfg` of https://github.com/jannerm/ddpo).
        """
        _, _, conditioning = self._split(batch.observations)
        latents = batch.actions
        rows = self.rows or Rows.of_process(len(latents), 0, 1)
        timestep, noise = (drawn[rows.start : rows.stop] for drawn in self._draw_regression(rows.total))
        noised = add_noise(self.model.scheduler, latents, noise, timestep, conditioning)
        return noised.denoising_loss(self.noised_output(noised))

    def noised(self, batch: Transitions, noise: Tensor) -> NoisedSamples:
        """Return the clean latents in a batch's actions with noise of its timesteps."""
        _, timestep, conditioning = self._split(batch.observations)
        return add_noise(self.model.scheduler, batch.actions, noise, timestep, conditioning)

    def noised_output(self, noised: NoisedSamples, pretrained: bool = False) -> Tensor:
        """Return the denoiser's guided output for noised samples, or the pretrained one's; see `predict_output`."""
        denoiser = self.model.denoiser if pretrained else None
        return self.predict_output(noised.latents, noised.timestep, dict(noised.conditioning), denoiser)

    def advance_rng(self, rows: int) -> None:
        """Draw the random numbers that `regression_loss` draws for `rows` transitions."""
        self._draw_regression(rows)

    def _draw_regression(self, rows: int) -> tuple[Tensor, Tensor]:
        """Return random timesteps `(rows,)` and noise `(rows, *latent_shape)`."""
        timestep = draw_timesteps(self.model.scheduler, rows, self.device, self.generator)
        return timestep, torch.randn(rows, *self.model.latent_shape, device=self.device, generator=self.generator)

    def get_distribution(self, obs: PyTorchObs, denoiser: nn.Module | None = None) -> DenoisingDistribution:
        """Run the denoiser, with guidance, and return the Gaussian over the next latent.

        Rows that are equal (`equal_rows`) are computed once.

        Args:
            obs: observation, batched.
            denoiser: used instead of the one that learns.
        """
        latents, timestep, conditioning = self._split(obs)
        sampler = self.sampler_on(latents.device)
        step_index = sampler.step_index_of(timestep)
        if (equal := self.equal_rows) is None:
            output = self.predict_output(latents, timestep, conditioning, denoiser)
        else:
            once = {name: equal.reduce(values) for name, values in conditioning.items()}
            output = self.predict_output(equal.reduce(latents), equal.reduce(timestep), once, denoiser)
            output = equal.expand(output)
        mean = sampler.mean(latents, output, step_index)
        return DenoisingDistribution(
            sampler, mean, step_index, self.options.log_prob_reduction, self.rows, self.generator
        )

    def predict_output(
        self,
        latents: Tensor,
        timestep: Tensor,
        conditioning: DenoisingObservation,
        denoiser: nn.Module | None = None,
    ) -> Tensor:
        """Return the guided output of the denoiser that learns, or of a given one; latent-shaped, float32."""
        predict = partial(self._predict_with, self.denoiser if denoiser is None else denoiser)
        if not self.negative_conditioning:
            return predict(latents, timestep, conditioning)
        guide = partial(abilities_of(self.model).guide, scale=self.options.guidance_scale)
        differentiate = self.options.unconditional_gradient
        return guided_output(predict, latents, timestep, conditioning, self.negative_conditioning, guide, differentiate)

    def _predict_with(
        self, denoiser: nn.Module, latents: Tensor, timestep: Tensor, conditioning: DenoisingObservation
    ) -> Tensor:
        if self.guidance_embeds:
            scale = torch.full((len(timestep),), self.options.guidance_scale)
            conditioning = {**conditioning, "guidance": scale}
        options, dtype = self.options, self.compute_dtype  # full training has a float32 copy, whatever the dtype
        is_mixed = options.autocast is not None or (options.lora_rank == 0 and dtype != torch.float32)
        with torch.autocast(latents.device.type, dtype, enabled=is_mixed):
            return self.model.predict(denoiser, latents, timestep, conditioning).float()

    def predict_values(self, obs: PyTorchObs) -> Tensor:
        """Return values `(batch, 1)`; zeros without a critic."""
        latents, timestep, conditioning = self._split(obs)
        if self.critic is None:
            return torch.zeros(len(latents), 1, device=latents.device)
        return self.critic(latents, timestep, conditioning)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Return the tensors that learn; the frozen ones belong to the model and are not saved again."""
        state = super().state_dict(*args, **kwargs)
        prefix = kwargs.get("prefix", "")
        learned = {prefix + name for name, parameter in self.named_parameters() if parameter.requires_grad}
        return {name: value for name, value in state.items() if name in learned}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load what `state_dict` returned; with `strict` it must hold exactly the tensors that learn."""
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
        folder = Path(path).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        weights = {name: value.contiguous() for name, value in self.state_dict().items()}
        write_file(folder / POLICY_WEIGHTS, lambda file: save_file(weights, file))
        merged = abilities_of(self.model).merged_lora
        settings = {
            "model": self.model.source if merged is None else merged.model,
            "base_lora": None if merged is None else merged.file,
            "model_identity": abilities_of(self.model).identity,
            "resolution": abilities_of(self.model).resolution,
            "pipeline_arguments": plain_arguments(self.model),
            "quantization": quantization_of(self.model.denoiser),
            "num_inference_steps": self.num_inference_steps,
            **asdict(self.options),
        }
        write_file(folder / _CONFIG_FILE, json.dumps(settings, indent=2, default=str) + "\n")

    @classmethod
    def load(
        cls,
        path: str | Path,
        device: str | torch.device = "auto",
        model: str | Path | DiffusionPipeline | DiffusionModel | None = None,
        dtype: str | torch.dtype = "auto",
    ) -> DiffusionPolicy:
        """Read a policy that `save` wrote.

        Args:
            path: the folder.
            device: where to put it.
            model: the pretrained model, if it has moved; without it, the model must be there and must be the same.
            dtype: dtype of the frozen weights.

        Raises:
            ValueError: if there is no policy in the folder, or its model is gone, another one, or does not fit.
        """
        folder = Path(path)
        for name in (_CONFIG_FILE, POLICY_WEIGHTS):
            if not (folder / name).is_file():
                raise ValueError(
                    f"path must be a folder that DiffusionPolicy.save wrote; {str(folder)!r} has no {name}"
                )
        settings = read_settings(folder / _CONFIG_FILE)
        source, resolution = settings.pop("model"), settings.pop("resolution", None)
        variant = [settings.pop(name, None) for name in ("pipeline_arguments", "quantization")]
        identity, base_lora = settings.pop("model_identity", None), settings.pop("base_lora", None)
        remedy = f"pass the model that it was trained with: DiffusionPolicy.load({str(folder)!r}, model=...)"
        try:
            place = (source, base_lora) if model is None else (model, None)
            loaded = load_model(place[0], device, dtype, resolution, *variant, base_lora=place[1])
        except ValueError as error:
            raise ValueError(f"policy {str(folder)!r} cannot load model {source!r}; {remedy}: {error}") from error
        if model is None and identity != abilities_of(loaded).identity:
            raise ValueError(f"model {source!r} has changed since policy {str(folder)!r} was saved; {remedy}")
        if settings.get("lora") is not None:
            settings["lora"] = folder / POLICY_WEIGHTS  # its adapters have the layers and ranks
        space = DenoisingObservationSpace(loaded, settings.pop("num_inference_steps"))
        policy = cls(space, action_box(loaded.latent_shape), lambda _: 0.0, **settings)
        try:
            policy.load_state_dict(load_file(folder / POLICY_WEIGHTS, device=str(policy.device)))
        except (SafetensorError, RuntimeError) as error:
            raise ValueError(
                f"policy {str(folder)!r} must have whole weights that fit its settings; {error}"
            ) from error
        return policy

    def save_lora(self, folder: str | Path) -> None:
        """Write the adapters in diffusers' format: stock `pipe.load_lora_weights(folder)` reads them. Check it."""
        if Path(folder).exists() and not Path(folder).is_dir():
            raise ValueError(f"folder of a LoRA must be a folder or a new name; {str(folder)!r} is a file")
        if self.options.lora_rank == 0:
            raise ValueError("save_lora needs lora_rank above 0; this policy trains every weight (lora_rank=0)")
        write_folder(Path(folder).resolve(), lambda empty: self.model.save_lora(self.denoiser, empty))

    def unscale_action(self, scaled_action: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Return latents as they are; the box of the action space is for libraries that need one."""
        return scaled_action

    def _predict(self, observation: PyTorchObs, deterministic: bool = False) -> Tensor:
        return self.get_distribution(observation).get_actions(deterministic)

    def _split(self, obs: PyTorchObs) -> tuple[Tensor, Tensor, DenoisingObservation]:
        assert isinstance(obs, dict)
        conditioning = {name: obs[name] for name in self.model.conditioning_shapes}
        return obs["latents"], obs["timestep"].flatten(), conditioning
