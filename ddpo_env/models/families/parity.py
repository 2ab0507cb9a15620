"""Whether a watched pipeline gives the outputs of its own call, shown on the spot for a pipeline nobody has tested."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ddpo_env.models.quantization import loaded_dtype

TESTED = frozenset(
    f"{name}Pipeline"
    for name in (
        *("StableDiffusion", "StableDiffusionXL", "StableDiffusion3", "Flux", "FluxKontext", "Flux2", "Flux2Klein"),
        *("QwenImage", "ZImage", "Sana", "Lumina2", "PixArtSigma", "Wan", "LTX", "StableAudio3"),
    )
)
"""Pipelines that the test suite takes through the whole loop."""
STEPS = 2
_GUIDANCE = 3.0
_PROMPT = "a cat"
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 5e-2}
"""Largest difference, as a fraction of the largest output: the last bits of a row depend on the batch."""


def record_steps(pipeline: Any, call: Callable[..., Any], **arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Call a pipeline with its own scheduler, and note each call of the denoiser.

    Args:
        pipeline: a copy that may be changed.
        call: the pipeline's call.
        **arguments: of the call.

    Returns:
        The latents that the denoiser got, the timesteps, and what the scheduler was given: `(steps, ...)` each.
    """
    scheduler = copy.deepcopy(pipeline.scheduler)
    steps: list[tuple[Tensor, Tensor, Tensor]] = []
    scaled: list[Tensor] = []
    step, scale = scheduler.step, getattr(scheduler, "scale_model_input", None)

    def note_step(output: Tensor, timestep: Tensor, sample: Tensor, *others: Any, **options: Any) -> Any:
        latents = scaled[-1][: len(sample)] if scaled else sample
        steps.append((latents, torch.as_tensor(timestep, device=sample.device).reshape(-1)[:1], output))
        return step(output, timestep, sample, *others, **options)

    def note_scaled(sample: Tensor, *others: Any, **options: Any) -> Tensor:
        assert scale is not None
        scaled.append(scale(sample, *others, **options))
        return scaled[-1]

    scheduler.step = note_step
    if scale is not None:
        scheduler.scale_model_input = note_scaled
    vars(pipeline)["scheduler"] = scheduler
    with torch.no_grad():
        call(pipeline, **arguments)
    latents, timesteps, outputs = (torch.cat(noted) for noted in zip(*steps, strict=True))
    return latents, timesteps, outputs


def differs(mine: Tensor, theirs: Tensor, dtype: torch.dtype) -> str | None:
    """Say how two outputs differ, or nothing if it is by rounding only."""
    if mine.shape != theirs.shape:
        return f"their shapes are {tuple(mine.shape)} and {tuple(theirs.shape)}"
    difference, size = float((mine.float() - theirs.float()).abs().max()), float(theirs.float().abs().max())
    if difference <= _TOLERANCE[dtype] * size:
        return None
    return f"they differ by {difference:.2g}, and the largest output is {size:.2g}"


@torch.no_grad()
def compare_with_pipeline(model: Any) -> tuple[str | None, str | None]:
    """Compare what is watched with the pipeline's own call, at two timesteps in one batch.

    Args:
        model: a `PipelineModel`, which imports this file.

    Returns:
        How the outputs differ without guidance, and with it; `None` if they do not.
    """
    without = _difference(model, None)
    guided = None if without is not None else model.guided_call(_GUIDANCE)
    with_guidance = None if guided is None else _difference(model, guided)
    return without, with_guidance and f"this pipeline has a guidance of its own: {with_guidance}"


def _difference(model: Any, guided: dict[str, Any] | None) -> str | None:
    try:
        return differs(*_outputs(model, guided), loaded_dtype(model.denoiser))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of any kind, as the pipeline is anybody's
        return f"its call ended with {type(error).__name__}: {error}"


def _outputs(model: Any, guided: dict[str, Any] | None) -> tuple[Tensor, Tensor]:
    """Return the outputs as they are watched, and those of the pipeline's own call."""
    call = model.pipeline_call(1.0) | {"prompt": _PROMPT, "num_inference_steps": STEPS, "output_type": "latent"}
    call |= guided or {}
    given = {name: value for name, value in call.items() if name in model.watched.parameters}
    if "generator" in model.watched.parameters:
        given["generator"] = torch.Generator().manual_seed(0)
    with model.text_encoders_on_device():
        latents, timestep, expected = model.watched.recorded(**given)
    embedded = {"guidance": torch.ones(len(latents))} if model.guidance_embeds else {}
    fields = {"fields": [{name: given[name] for name in model.prompt_fields}]} if model.prompt_fields else {}
    encoded = model.encode_prompts([_PROMPT], **fields)
    positive, negative = (
        {name: value.expand(len(latents), *value.shape[1:]) for name, value in one.items()} | embedded
        for one in (encoded, encoded | model.negative_conditioning())
    )
    output = model.predict(model.denoiser, latents, timestep, positive)
    if guided is not None:
        output = model.guide(model.predict(model.denoiser, latents, timestep, negative), output, _GUIDANCE)
    return output, expected
