"""The settings of `DiffusionPolicy`: its signature, its saved file and the command line all read them here."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
import tyro

from ddpo_env.validation.choices import SMALLEST_STD, Reduction, SamplerName
from ddpo_env.validation.options import Range, check_fields
from rewards.registry import did_you_mean

if TYPE_CHECKING:  # a command line is read without torch; see `ddpo_env.validation.choices`
    from ddpo_env.models import DiffusionModel
    from ddpo_env.sampler.gaussian_sampler import GaussianSampler

LoraTargets = Literal["attention", "attention+convolutions"]

_BY_STEP = tyro.conf.arg(metavar="FLOAT [FLOAT ...]")


@dataclass(frozen=True, kw_only=True)
class PolicyOptions:
    """The denoiser as a policy: how it samples, and which weights learn.

    `DiffusionPolicy` in Python has the DDPO paper's defaults, without guidance and adapters where the model cannot have
    them. The defaults of a run are tuned for the bundled model (`agents.config.train_config.TUNED_POLICY`).

    Where the denoiser takes the guidance scale as an input (FLUX.1-dev), `guidance_scale` is that input.

    Raises:
        ValueError: for a value that is not valid, naming the option.
    """

    guidance_scale: Annotated[float, Range(at_least=0, at_most=100)] = 5.0
    """Scale of classifier-free guidance in sampling and training. 1 is off and halves the cost; DDPO: 5 on SD 1.4."""
    unconditional_gradient: Annotated[bool, tyro.conf.Suppress] = True
    """Differentiate both halves of guidance. Without it an update costs about a fifth less, and its gradient is that of
    the conditional half, times the guidance scale."""
    sampler: SamplerName | None = None
    """How a step adds noise: flow-sde (Flow-GRPO), dance (DanceGRPO) or cps (Flow-CPS) for flow matching, ddim or ddpm
    for diffusion, ode for none at all. Default: flow-sde, ddim or ddpm, whichever fits the model."""
    eta: Annotated[float | tuple[float, ...], Range(at_least=0, at_most=10), _BY_STEP] = 1.0
    """Noise of the DDIM steps, one number or one for each step; 1 is as noisy as DDPM, 0 is none."""
    noise_level: Annotated[float | tuple[float, ...] | None, Range(at_least=0, at_most=10), _BY_STEP] = None
    """Noise of the flow-matching steps (SD 3, FLUX), one number or one for each step; 0 is none. Default: the
    sampler's, 0.7 for flow-sde, 0.3 for dance, 0.8 for cps."""
    min_std: Annotated[float | None, Range(at_least=SMALLEST_STD, at_most=10)] = None
    """Lower bound of the standard deviation of a step that has noise, also of a last step that would have none. Steps
    without noise are not trained on."""
    lora_rank: Annotated[int, Range(at_least=0, at_most=4096)] = 4
    """Rank of the LoRA adapters; 0 trains every weight."""
    lora_targets: LoraTargets = "attention"
    """Layers that get an adapter."""
    lora: Path | None = None
    """File or folder of a LoRA to go on training: diffusers', kohya's or a run's. Its layers and ranks replace
    lora_rank and lora_targets. The KL divergence is that from the model without it."""
    merge_lora: Annotated[bool | None, tyro.conf.Suppress] = None
    """Sample with the adapters merged into a copy of their layers' weights, which is faster. Default: in float32,
    without quantization. In half precision it loses small adapters to rounding."""
    log_prob_reduction: Reduction = "mean"
    """Reduction of the log-probability over the latent's dimensions. The clip range depends on it."""
    critic: bool = False
    """Train a value network, which generalized advantages need. DDPO has none; every value is then 0."""
    gradient_checkpointing: bool = False
    """Recompute the denoiser's activations in the backward pass: less memory, more time."""
    compile_denoiser: bool = False
    """Run the denoiser with torch.compile: faster calls after minutes of compiling, for long runs."""
    autocast: Literal["bfloat16", "float16"] | None = None
    """Dtype in which the denoiser computes; what learns stays float32. Default: the dtype of the frozen weights."""

    def __post_init__(self) -> None:
        if isinstance(self.lora, str) and self.lora:
            object.__setattr__(self, "lora", Path(self.lora))
        for name in ("eta", "noise_level"):
            if isinstance(value := getattr(self, name), list):  # as files have it
                object.__setattr__(self, name, tuple(value))
        check_fields(self)
        if self.lora is not None and self.lora_rank == 0:
            raise ValueError(
                f"lora must be None with lora_rank=0, which trains every weight; got {str(self.lora)!r}. Merge it into "
                "the model instead: base_lora"
            )

    def stochastic_steps(self, num_inference_steps: int) -> npt.NDArray[np.bool_]:
        """Return which steps have noise as far as these options say, `(steps,)`; a model's last step may have none.

        Raises:
            ValueError: for noise by step of another number of steps.
        """
        from ddpo_env.sampler.sampler_rows import noise_by_step

        has_noise = np.full(num_inference_steps, self.sampler != "ode")
        for name, value in {"eta": self.eta, "noise_level": self.noise_level}.items():
            if value is not None:
                has_noise &= noise_by_step(name, value, num_inference_steps).numpy() > 0
        if self.sampler == "cps" and self.min_std is None:
            has_noise[-1] = False
        return has_noise

    def sampler_table(self, model: DiffusionModel, num_inference_steps: int) -> GaussianSampler:
        """Return the sampler that these options describe for a model.

        Raises:
            ValueError: for an option that does not fit the model or the number of steps.
        """
        from ddpo_env.sampler.gaussian_sampler import GaussianSampler

        return GaussianSampler.from_model(
            model,
            num_inference_steps,
            self.eta,
            sampler=self.sampler,
            noise_level=self.noise_level,
            min_std=self.min_std,
        )


def policy_options(given: Mapping[str, Any]) -> PolicyOptions:
    """Return options from arguments of `DiffusionPolicy` by name.

    Raises:
        ValueError: for a name that is none, or a value that is not valid.
    """
    names = [field.name for field in fields(PolicyOptions)]
    if unknown := [name for name in given if name not in names]:
        valid = ["model", "num_inference_steps", "optimizer_class", "optimizer_kwargs", *names]
        near = did_you_mean(unknown[0], valid)
        raise ValueError(f"policy_kwargs must be among {', '.join(valid)}; got {', '.join(unknown)}{near}")
    return PolicyOptions(**given)


def check_trainable(quantization: str | None, options: PolicyOptions) -> None:
    """Refuse options that need the frozen weights in full precision, if they are quantized.

    Raises:
        ValueError: naming the option.
    """
    if quantization is None:
        return
    if options.lora_rank == 0:
        raise ValueError(
            f"lora_rank must be at least 1 with quantization={quantization!r}, because quantized weights cannot learn; "
            "got 0"
        )
    if options.merge_lora:
        raise ValueError(
            f"merge_lora must be None or False with quantization={quantization!r}, because a merged weight would have "
            "to be quantized again, and would lose most of the LoRA; got True"
        )


def read_settings(file: Path) -> dict[str, Any]:
    """Return the settings in the file of a saved policy: its options, and what it was trained with.

    Raises:
        ValueError: if the file holds anything else.
    """
    known = {
        "model",
        "resolution",
        "pipeline_arguments",
        "quantization",
        "model_identity",
        "base_lora",
        "num_inference_steps",
        *(one.name for one in fields(PolicyOptions)),
    }
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{str(file)!r} must be the JSON that DiffusionPolicy.save wrote; {error}") from error
    if not isinstance(settings, dict) or not {"model", "num_inference_steps"} <= settings.keys() <= known:
        raise ValueError(f"{str(file)!r} must hold the settings of a policy; got {str(settings)[:100]}")
    return settings
