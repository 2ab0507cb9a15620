"""The pipeline's own call, watched: what its scheduler is given and returns at every step, and the images.

The call runs on a shallow copy of the pipeline with a scheduler of its own, so the model under examination is the same
afterwards.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from diffusers.loaders.lora_base import LoraBaseMixin
from peft import PeftModel
from torch import Tensor, nn

from agents.commands.doctor.examination import Examination
from agents.commands.doctor.finding import Finding
from agents.policy.lora import continue_lora, share_weights, starting_adapters
from ddpo_env.models import DiffusionModel, abilities_of, load_model
from ddpo_env.models.files.pipelines import pipeline_of
from ddpo_env.models.files.silence import quiet
from ddpo_env.models.image_decoding import decode_samples
from ddpo_env.models.quantization import loaded_dtype
from ddpo_env.prompts import Prompt
from ddpo_env.prompts.images import IMAGE, read_image
from ddpo_env.sampler.scheduler_table import ddim_of


@dataclass
class Watched:
    """One call of a pipeline.

    Attributes:
        timesteps: of every step.
        inputs: latents that the scheduler's `step` was given, one tensor a step.
        outputs: the guided outputs of the denoiser, likewise.
        latents: after the last step.
        images: uint8 `(batch, height, width, 3)`, with 0 for NaN; `None` if the pipeline returns something else.
        not_finite: number of images with NaN or infinite values.
        prompts: one for each row, with its metadata.
        noise: where the call began, in the layout of the model's latents.
    """

    prompts: list[Prompt]
    noise: Tensor
    timesteps: list[float] = field(default_factory=list)
    inputs: list[Tensor] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)
    latents: Tensor | None = None
    images: npt.NDArray[np.uint8] | None = None
    not_finite: int = 0

    @property
    def texts(self) -> list[str]:
        """The prompts without metadata."""
        return [text for text, _ in self.prompts]

    def fault(self, name: str) -> Finding | None:
        """Return the red finding of a check that compares images, if some of them are not finite."""
        if not self.not_finite:
            return None
        meaning = f"{self.not_finite} of {len(self.prompts)} images of the pipeline's own call are NaN or infinite."
        advice = "You could not deploy what training makes of it: give the pipeline another scheduler or other weights."
        return Finding(name, "red", {"not_finite_of_pipeline": self.not_finite}, meaning, advice)


class _FirstStepError(Exception):
    """Ends a call at its first step."""


def watch(
    examination: Examination,
    prompts: Sequence[Prompt],
    *,
    deployed: bool = False,
    pipeline: DiffusionPipeline | None = None,
) -> Watched:
    """Call the pipeline with the steps and the guidance of the run.

    Args:
        examination: the run.
        prompts: one for each row; fields that the model takes, such as an image, are the first one's.
        deployed: with the scheduler that the pipeline comes with; else with its deterministic one: DDIM, or Euler's
            steps of the flow.
        pipeline: another one than the model's with the LoRA that the run starts from.
    """
    pipeline = pipeline or _starting_pipeline(examination)
    stock = copy.copy(pipeline)
    is_flow = isinstance(pipeline.scheduler, FlowMatchEulerDiscreteScheduler)
    own = deployed or is_flow
    scheduler = copy.deepcopy(pipeline.scheduler) if own else ddim_of(pipeline.scheduler)
    stock.scheduler = scheduler
    stock.set_progress_bar_config(disable=True)
    takes = inspect.signature(type(stock).__call__).parameters
    dtype = loaded_dtype(examination.model.denoiser)
    arguments = _arguments(examination, takes, list(prompts))
    with _on_one_device(stock, examination.policy.device), torch.no_grad():
        if "latents" in takes and _takes_our_latents(examination, stock, arguments):
            noise = examination.initial_noise(len(prompts))
            arguments |= {"latents": noise.to(dtype)}
        else:
            noise = examination.initial_noise(len(prompts), dtype)
            arguments |= {"generator": examination.noise_generator()}
        watched = Watched(list(prompts), noise)
        scheduler.step = _recorder(scheduler.step, watched)
        result = stock(**arguments)[0]
    watched.images = _as_images(result)
    if isinstance(result, np.ndarray):
        watched.not_finite = sum(not np.isfinite(one).all() for one in result)
    return watched


def _starting_pipeline(examination: Examination) -> DiffusionPipeline:
    """Return the pipeline of the model, with the LoRA that training goes on from if there is one."""
    pipeline, lora = pipeline_of(examination.model), examination.config.policy.lora
    assert pipeline is not None
    return pipeline if lora is None else with_starting_lora(examination.model, pipeline, lora)


def _arguments(examination: Examination, takes: Any, prompts: list[Prompt]) -> dict[str, Any]:
    """Return the arguments of the call, apart from the noise."""
    model, scale = examination.model, examination.config.policy.guidance_scale
    texts, abilities = [text for text, _ in prompts], abilities_of(model)
    arguments: dict[str, Any] = {
        **abilities.arguments,
        **{name: prompts[0][1][name] for name in abilities.prompt_fields},
    }
    if IMAGE in abilities.prompt_fields:
        arguments[IMAGE] = read_image(arguments[IMAGE], f"{IMAGE} of prompt {texts[0]!r}")
    arguments |= {"num_inference_steps": examination.config.num_inference_steps, "output_type": "np"}
    arguments |= {"return_dict": False}
    if "prompt" in takes:
        arguments |= {"prompt": texts}
    else:
        arguments |= {"batch_size": len(prompts)}
    if "height" in takes:
        shape = decode_samples(model, examination.initial_noise(1), texts[:1], "keep")[0].shape
        arguments |= {"height": shape[-3], "width": shape[-2]}
    if "true_cfg_scale" in takes and not abilities.guidance_embeds:
        if scale != 1:
            arguments |= {"true_cfg_scale": scale, "negative_prompt": [""] * len(prompts)}
    elif "guidance_scale" in takes:
        arguments |= {"guidance_scale": scale}
    return arguments


def _takes_our_latents(examination: Examination, stock: Any, arguments: dict[str, Any]) -> bool:
    """Return whether the pipeline's latents have the model's layout: one step shows it."""
    rows = examination.initial_noise(1)
    seen = []

    def stop(model_output: Tensor, timestep: Any, sample: Tensor, *_: Any, **__: Any) -> Any:
        seen.append(sample.shape[1:])
        raise _FirstStepError

    scheduler = stock.scheduler
    step = scheduler.step
    scheduler.step = functools.wraps(step)(stop)
    one = {name: value[:1] if isinstance(value, list) else value for name, value in arguments.items()}
    try:
        stock(**one, generator=examination.noise_generator())
    except _FirstStepError:
        pass
    finally:
        scheduler.step = step
    return seen == [rows.shape[1:]]


def _recorder(step: Any, watched: Watched) -> Any:
    @functools.wraps(step)
    def recorded(model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        result = step(model_output, timestep, sample, *args, **kwargs)
        watched.timesteps.append(float(timestep))
        watched.inputs.append(sample.detach().float())
        watched.outputs.append(model_output.detach().float())
        watched.latents = result[0].detach().float()
        return result

    return recorded


def _as_images(result: Any) -> npt.NDArray[np.uint8] | None:
    """Return uint8 images; `None` for anything else than images `(batch, height, width, channels)` in [0, 1]."""
    if not isinstance(result, np.ndarray) or result.ndim != 4 or result.shape[-1] not in (1, 3):
        return None
    pixels = (np.nan_to_num(result) * 255).round().astype(np.uint8)
    return np.repeat(pixels, 3, axis=-1) if pixels.shape[-1] == 1 else pixels


@contextmanager
def _on_one_device(pipeline: Any, device: torch.device) -> Iterator[None]:
    """Keep every component on a device inside this context: text encoders may be on the CPU between their calls."""
    away = {
        name: next(component.parameters()).device
        for name, component in pipeline.components.items()
        if isinstance(component, nn.Module) and next(component.parameters()).device != device
    }
    for name in away:
        pipeline.components[name].to(device)
    try:
        yield
    finally:
        for name, place in away.items():
            pipeline.components[name].to(place)


def with_starting_lora(model: DiffusionModel, pipeline: DiffusionPipeline, lora: Path) -> DiffusionPipeline:
    """Return a copy of a model's pipeline with the LoRA that a run goes on from; its weights are shared."""
    adapters = starting_adapters(model, lora)
    if not isinstance(pipeline, LoraBaseMixin):
        stock = copy.copy(pipeline)
        vars(stock)[_part(pipeline, model.denoiser)] = continue_lora(model.denoiser, adapters)
        return stock
    part = _part(pipeline, model.denoiser)
    return _loaded(pipeline, {f"{part}.{name}": value for name, value in adapters.items()})


def with_saved_lora(model: DiffusionModel, folder: Path) -> DiffusionPipeline:
    """Return a copy of a model's pipeline that has read a LoRA which the model saved; its weights are shared.

    What was merged into the model is part of the file, so the pipeline is one without it.
    """
    if (merged := abilities_of(model).merged_lora) is not None:
        weight, own = next(model.denoiser.parameters()), abilities_of(model)
        model = load_model(merged.model, weight.device, weight.dtype, own.resolution, own.arguments)
    pipeline: Any = model.pipeline  # type: ignore[attr-defined]
    if isinstance(pipeline, LoraBaseMixin):
        return _loaded(pipeline, str(folder))
    stock = copy.copy(pipeline)
    carrier = PeftModel.from_pretrained(share_weights(model.denoiser), folder)
    vars(stock)[_part(pipeline, model.denoiser)] = carrier.get_base_model()  # merged, weights would change
    return stock


def _loaded(pipeline: Any, lora: str | dict[str, Tensor]) -> DiffusionPipeline:
    stock = copy.copy(pipeline)
    for name in pipeline._lora_loadable_modules:
        if isinstance(component := getattr(pipeline, name, None), nn.Module):
            vars(stock)[name] = share_weights(component)
    with quiet(), torch.random.fork_rng(devices=[]):
        stock.load_lora_weights(lora)
    return stock


def _part(pipeline: DiffusionPipeline, denoiser: nn.Module) -> str:
    (part,) = [name for name, component in pipeline.components.items() if component is denoiser]
    return part
