"""Checks against the pipeline's own call: from the same noise and prompts, without the sampler's noise, with a LoRA.

The parts come first (the table of steps, the denoiser with its guidance, the decoder), so that a difference of the
whole has a cause. Nothing is trained yet, so the policy is the pretrained model, with the LoRA that training goes on
from if there is one.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from agents.commands.doctor.examination import Examination
from agents.commands.doctor.finding import Finding, Level, graded
from agents.commands.doctor.stock_pipeline import Watched, pipeline_of, watch, with_saved_lora
from agents.commands.doctor.update import stirred
from ddpo_env.models import DiffusionModel
from ddpo_env.models.image_decoding import decode_samples
from ddpo_env.models.protocol import encode
from ddpo_env.models.quantization import loaded_dtype
from ddpo_env.sampler.gaussian_sampler import GaussianSampler
from ddpo_env.sampler.sampler_rows import noise_by_step
from ddpo_env.sampler.scheduler_table import ddim_of
from ddpo_env.validation.choices import SMALLEST_STD

_ROWS = 2
_STEPS = 4
"""Steps at which the denoisers are compared one by one."""
TOLERANCE = {torch.float32: (3e-4, 1e-2), torch.bfloat16: (0.1, 0.4), torch.float16: (0.03, 0.2)}
"""Relative differences from which a finding is amber, and red, by the dtype in which the denoiser computes."""
_WITHOUT = "The model has no pipeline to compare with."


def check_table(examination: Examination) -> Finding:
    """Compare the sampler's table with the pipeline's scheduler: timesteps, and a step of DDIM's on random numbers."""
    name, model, sampler = "sampler table", examination.model, examination.policy.sampler
    pipeline = pipeline_of(model)
    scheduler = model.scheduler if pipeline is None else pipeline.scheduler
    is_flow = isinstance(scheduler, FlowMatchEulerDiscreteScheduler)
    if is_flow and pipeline is None:
        return Finding(name, "green", {}, "The flow's table is checked by the comparison with a pipeline only.")
    if is_flow:
        return _compared_timesteps(name, sampler, examination)
    own = ddim_of(scheduler)
    own.set_timesteps(len(sampler))
    expected = own.timesteps[: len(sampler)].tolist()
    found = sampler.timesteps.tolist()
    numbers: dict[str, Any] = {"timesteps": found, "scheduler": type(scheduler).__name__}
    if found != expected:
        meaning = f"The sampler's timesteps begin {found[:3]}, the scheduler's {expected[:3]}."
        return Finding(name, "red", numbers, meaning, "Give the model the pipeline's own scheduler.")
    if "DDPM" in type(scheduler).__name__:
        return Finding(name, "green", numbers, f"The {len(found)} timesteps are the scheduler's.")
    difference = _ddim_difference(sampler, own, examination)
    numbers["largest_difference_of_a_step"] = difference
    level = graded(difference, 1e-4, 1e-3)
    meaning = f"A step differs from DDIM's by {difference:.1g} at most."
    return Finding(name, level, numbers, meaning, "" if level == "green" else _ADVICE_TABLE)


_ADVICE_TABLE = "The table is not that of the pipeline's scheduler: give the model the pipeline's own scheduler."


def _compared_timesteps(name: str, sampler: GaussianSampler, examination: Examination) -> Finding:
    watched = _watched(examination)
    found = sampler.timesteps.float().cpu()
    difference = float((found - torch.tensor(watched.timesteps)).abs().max())
    level = graded(difference, 0.01 if examination.dtype == torch.float32 else 4.0, 10.0)
    numbers = {"timesteps": found.tolist(), "largest_difference": difference}
    meaning = f"Timesteps differ from the pipeline's by {difference:.1g} of 1000 at most."
    return Finding(name, level, numbers, meaning, "" if level == "green" else _ADVICE_TABLE)


def _ddim_difference(sampler: GaussianSampler, scheduler: DDIMScheduler, examination: Examination) -> float:
    """Return the largest difference between a step of the table and `DDIMScheduler.step`, on random numbers."""
    generator = torch.Generator().manual_seed(0)
    latents, output, noise = (torch.randn(1, 4, 4, 4, generator=generator).double() for _ in range(3))
    # In float32 the scheduler itself loses digits where there is almost no signal.
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    scheduler.final_alpha_cumprod = scheduler.final_alpha_cumprod.double()
    table, options = sampler.to("cpu"), examination.config.policy
    etas = noise_by_step("eta", 0.0 if options.sampler == "ode" else options.eta, len(table)).tolist()
    differences = []
    for step, (timestep, eta) in enumerate(zip(table.timesteps, etas, strict=True)):
        index = torch.tensor([step])
        mean = table.mean(latents, output, index)
        pair = [
            scheduler.step(output, timestep, latents, eta=eta, variance_noise=scale * noise).prev_sample
            for scale in (0.0, 1.0)
        ]
        std = max(float((pair[1] - pair[0]).norm() / noise.norm()), (options.min_std or 0.0) if eta > 0 else 0.0)
        std = 0.0 if std < SMALLEST_STD else std
        differences += [float((mean - pair[0]).abs().max() / mean.abs().max()), abs(float(table.std[step]) - std)]
    return max(differences)


def check_denoiser(examination: Examination) -> Finding:
    """Compare the guided output of the policy with the pipeline's, on the pipeline's latents."""
    name = "denoiser"
    if pipeline_of(examination.model) is None:
        return Finding(name, "green", {}, _WITHOUT)
    watched = _watched(examination)
    if watched.inputs[0].shape[1:] != examination.model.latent_shape:
        return Finding(name, "green", {}, "The pipeline packs its latents: the finished images are compared.")
    count = len(watched.inputs)
    steps = sorted({round(step) for step in np.linspace(0, count - 1, _STEPS)})
    differences = {}
    for step in steps:
        ours = _output(examination, watched, step)
        differences[watched.timesteps[step]] = relative_difference(ours, watched.outputs[step])
    largest = max(differences.values())
    level = graded(largest, *TOLERANCE[examination.dtype])
    guidance = examination.config.policy.guidance_scale
    numbers = {"relative_difference": largest, "by_timestep": differences, "guidance_scale": guidance}
    meaning = f"At the same latents the denoiser's outputs differ by {largest:.1g} (relative, guidance {guidance:g})."
    advice = "predict, encode_prompts or the guidance differs from what the pipeline does: mend the model's adapter."
    return Finding(name, level, numbers, meaning, "" if level == "green" else advice)


def check_path(examination: Examination) -> Finding:
    """Compare finished latents, or images, of the run's deterministic path with those of the pipeline's own call."""
    name = "parity"
    if pipeline_of(examination.model) is None:
        return Finding(name, "green", {}, _WITHOUT)
    watched = _watched(examination)
    ours = examination.denoise(examination.deterministic_sampler(), watched.prompts, watched.noise)
    assert watched.latents is not None
    if ours.shape != watched.latents.shape:
        return _image_parity(examination, watched, ours)
    difference = relative_difference(ours, watched.latents)
    level = graded(difference, *TOLERANCE[examination.dtype])
    identical = bool(torch.equal(ours, watched.latents))
    numbers = {
        "relative_difference": difference,
        "largest_difference": float((ours - watched.latents).abs().max()),
        "bit_identical": identical,
        "steps": len(watched.inputs),
    }
    meaning = f"From the same noise our path ends {difference:.1g} (relative) from the pipeline's own call."
    advice = "Training would improve another sampler than the pipeline's: the three checks above show the part."
    return Finding(name, level, numbers, meaning, "" if level == "green" else advice)


def check_decoder(examination: Examination) -> Finding:
    """Compare decoded images with the pipeline's, for the pipeline's finished latents; look for NaN."""
    name, model = "decoder", examination.model
    if pipeline_of(model) is None:
        samples = examination.samples
        return _finite_finding(name, model, samples.finite)
    watched = _watched(examination)
    assert watched.latents is not None
    latents = watched.latents
    if latents.shape[1:] != model.latent_shape:
        latents = examination.denoise(examination.deterministic_sampler(), watched.prompts, watched.noise)
    images, finite = decode_samples(model, latents, watched.texts, "keep")
    if not finite.all() or watched.images is None:
        return _finite_finding(name, model, finite)
    return _compared_images(name, images, watched, "decode scales latents in another way than the pipeline: mend it.")


def _image_parity(examination: Examination, watched: Watched, latents: Tensor) -> Finding:
    images, _ = decode_samples(examination.model, latents, watched.texts, "keep")
    return _compared_images("parity", images, watched, "predict, guidance or decode differs from the pipeline's.")


def _compared_images(name: str, images: np.ndarray, watched: Watched, advice: str) -> Finding:
    if watched.images is None or images.shape != watched.images.shape:
        shape = None if watched.images is None else watched.images.shape
        return Finding(name, "red", {}, f"Images have shape {images.shape}, the pipeline's {shape}.", advice)
    if fault := watched.fault(name):
        return fault
    levels = np.abs(images.astype(float) - watched.images)
    numbers = {"mean_levels": float(levels.mean()), "largest_levels": float(levels.max())}
    level = graded(numbers["mean_levels"], 0.3, 2.0)
    meaning = f"Images differ from the pipeline's by {numbers['mean_levels']:.2g} of 255 levels on average."
    return Finding(name, level, numbers, meaning, "" if level == "green" else advice)


def _finite_finding(name: str, model: DiffusionModel, finite: np.ndarray) -> Finding:
    broken = int((~finite).sum())
    dtype = loaded_dtype(model.denoiser)
    numbers = {"not_finite": broken, "samples": len(finite)}
    if not broken:
        return Finding(name, "green", numbers, "Decoded samples are finite.")
    settings = {} if dtype == torch.float32 else {"dtype": "float32"}
    advice = "The decoder overflows: set --dtype float32" if settings else "The decoder is broken: use another VAE"
    meaning = f"The decoder returns NaN or infinite values for {broken} of {len(finite)} samples."
    return Finding(name, "red", numbers, meaning, f"{advice}.", settings)


@torch.no_grad()
def _output(examination: Examination, watched: Watched, step: int) -> Tensor:
    policy, latents = examination.policy, watched.inputs[step]
    policy.set_training_mode(False)
    timestep = torch.full((len(latents),), watched.timesteps[step], device=policy.device)
    conditioning = encode(examination.model, watched.prompts)
    return policy.predict_output(latents, timestep, conditioning)


def relative_difference(ours: Tensor, theirs: Tensor) -> float:
    """Return `‖ours − theirs‖ / ‖theirs‖`, a scalar; NaN if one of them is not finite."""
    return float((ours.float() - theirs.float()).norm() / theirs.float().norm())


def _watched(examination: Examination) -> Watched:
    """Return the pipeline's deterministic call; it runs once."""
    prompts = examination.chosen_prompts(_ROWS)
    return examination.once("pipeline's own call", lambda: watch(examination, prompts))


def check_lora(examination: Examination) -> Finding:
    """Move the adapters, save them, read them with the stock pipeline, and compare finished latents."""
    name, policy, model = "LoRA", examination.policy, examination.model
    if not policy.options.lora_rank:
        return Finding(name, "green", {}, "Every weight learns: there is no LoRA.")
    prompts = examination.chosen_prompts(_ROWS)
    with tempfile.TemporaryDirectory() as folder, stirred(examination):
        policy.save_lora(folder)
        size = sum(file.stat().st_size for file in Path(folder).iterdir())
        if pipeline_of(model) is None:
            return Finding(name, "green", {"bytes": size}, "Saved; the model has no pipeline that could read it.")
        watched = watch(examination, prompts, pipeline=with_saved_lora(model, Path(folder)))
        ours = examination.denoise(examination.deterministic_sampler(), prompts, watched.noise)
    base = examination.denoise(examination.deterministic_sampler(), prompts, watched.noise)
    assert watched.latents is not None
    if ours.shape != watched.latents.shape:
        return _by_images(examination, watched.images, ours, base, size)
    return _judged(relative_difference(ours, watched.latents), relative_difference(ours, base), examination.dtype, size)


def _judged(difference: float, effect: float, dtype: torch.dtype, size: int) -> Finding:
    numbers = {"relative_difference": difference, "effect_of_the_lora": effect, "bytes": size}
    level: Level = graded(difference, *TOLERANCE[dtype])
    if difference > 0.3 * effect:  # it may be the sample without a LoRA
        level = "red"
    meaning = (
        f"The pipeline with the saved LoRA ends {difference:.1g} from the policy; the LoRA moves it by {effect:.1g}."
    )
    advice = "The file does not hold what was trained: mend save_lora of the model (names, values, scale)."
    return Finding("LoRA", level, numbers, meaning, "" if level == "green" else advice)


def _by_images(examination: Examination, images: Any, ours: Any, base: Any, size: int) -> Finding:
    """Compare images, where the pipeline packs its latents."""
    decoded, without = (examination.model.decode(latents).cpu().float() for latents in (ours, base))
    theirs = torch.as_tensor(images).float()
    return _judged(relative_difference(decoded, theirs), relative_difference(decoded, without), torch.bfloat16, size)
