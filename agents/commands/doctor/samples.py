"""Checks of finished samples: the stochastic sampler beside the deployed one, and what the reward makes of them."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from agents.commands.doctor.examination import Examination, uses_images
from agents.commands.doctor.finding import Finding, Level
from agents.commands.doctor.stock_pipeline import pipeline_of, watch
from agents.evaluation.image_grid import image_grid, write_image
from ddpo_env.models import abilities_of
from ddpo_env.models.image_decoding import decode_samples

Images = npt.NDArray[Any]


def check_sampler(examination: Examination) -> Finding:
    """Write images of the stochastic sampler beside the deployed one's, and compare the rewards of both."""
    name, samples = "stochastic sampler", examination.samples
    pipeline = pipeline_of(examination.model)
    watched = None if pipeline is None else watch(examination, samples.prompts, deployed=True)
    deployed = None if watched is None else watched.images
    _write(examination, deployed)
    if broken := int((~samples.finite).sum()):
        meaning = f"{broken} of {len(samples.finite)} samples are NaN or infinite."
        return Finding(name, "red", {"not_finite": broken}, meaning, "Set --dtype float32, or lower --eta.")
    if watched is not None and (fault := watched.fault(name)):
        return fault
    own = examination.score(samples.decoded, samples.prompts)
    numbers: dict[str, Any] = {"reward": _mean(own), "std": float(np.nanstd(own))}
    if deployed is None:
        return Finding(name, "green", numbers, f"The mean reward is {numbers['reward']:.3g}; there is no pipeline.")
    theirs = examination.score(deployed, samples.prompts)
    spread = max(float(np.nanstd(own)), float(np.nanstd(theirs)))
    gap = _mean(own) - _mean(theirs)
    numbers |= {"deployed_reward": _mean(theirs), "deployed_std": float(np.nanstd(theirs)), "gap": gap}
    numbers |= {"sharpness": _sharpness(samples.decoded), "deployed_sharpness": _sharpness(deployed)}
    meaning = (
        f"Mean reward {numbers['reward']:.3g} with the training sampler, {numbers['deployed_reward']:.3g} with "
        f"the pipeline's ({type(examination.model.scheduler).__name__})."
    )
    if spread > 0 and abs(gap) > 3 * spread:
        advice = "Training sees other images than you deploy: take more steps, a lower --eta or --noise-level, or "
        advice += "deploy with DDIM and eta 1. Look at samplers.png."
        return Finding(name, "amber", numbers, meaning, advice)
    return Finding(name, "green", numbers, meaning)


def check_scores(examination: Examination) -> Finding:
    """Look at the range of the scores, at ties, at scores that are missing, and at the time that they take."""
    name, samples = "reward", examination.samples
    examination.score(samples.decoded, samples.prompts)  # the first call may load a model
    start = time.perf_counter()
    scores = examination.score(samples.decoded, samples.prompts)
    seconds = (time.perf_counter() - start) / len(scores)
    finite = scores[np.isfinite(scores)]
    missing = len(scores) - len(finite)
    ties = 1 - len(np.unique(finite)) / len(finite) if len(finite) else 1.0
    numbers: dict[str, Any] = {"scores": scores.tolist(), "ties": ties, "missing": missing}
    numbers["seconds_per_sample"] = seconds
    if len(finite):
        numbers |= {"least": float(finite.min()), "most": float(finite.max()), "std": float(finite.std())}
    if missing:
        drops = examination.config.training.non_finite_rewards == "drop"
        what = "The run drops such samples" if drops else "The run would end with an error"
        level: Level = "amber" if drops and len(finite) > 1 else "red"
        meaning = f"{missing} of {len(scores)} scores are NaN or infinite. {what}."
        return Finding(name, level, numbers, meaning, "Mend the reward, or add --non-finite-rewards drop.")
    if len(finite) > 1 and float(finite.std()) <= 1e-6 * max(1e-12, float(np.abs(finite).max())):
        meaning = f"All {len(scores)} scores are {finite[0]:.4g}: every advantage is 0, and nothing is learned."
        return Finding(
            name, "red", numbers, meaning, "Look at the reward: are its arguments images, prompts, metadata?"
        )
    meaning = f"Scores from {finite.min():.4g} to {finite.max():.4g}, {seconds:.2g} s a sample."
    if ties > 0.5:
        return Finding(name, "amber", numbers, f"{meaning} {ties:.0%} are ties.", "Let the reward tell samples apart.")
    return Finding(name, "green", numbers, meaning)


def check_repeatability(examination: Examination) -> Finding:
    """Score the same samples twice."""
    name, samples = "reward repeated", examination.samples
    first, second = (examination.score(samples.decoded, samples.prompts) for _ in range(2))
    with np.errstate(invalid="ignore"):
        change = float(np.nanmax(np.abs(first - second), initial=0.0))
    spread = float(np.nanstd(first))
    numbers = {"largest_change": change, "std_of_scores": spread}
    if change <= 1e-6 * max(1.0, float(np.nanmax(np.abs(first), initial=0.0))):
        return Finding(name, "green", numbers, "The same samples get the same scores again.")
    level: Level = "red" if change > spread else "amber"
    meaning = f"The same samples get scores that differ by up to {change:.3g}; their spread is {spread:.3g}."
    advice = "Fix the reward's seed or temperature: its noise is learned as if it were a difference between samples."
    return Finding(name, level, numbers, meaning, advice)


def check_inputs(examination: Examination) -> Finding:
    """Ask the reward about a grey and a noise image, and about the samples in another order with the same prompts."""
    name, samples = "reward inputs", examination.samples
    if not uses_images(examination):
        return Finding(name, "green", {}, "Samples are no images: there is no grey one.")
    count = len(samples.prompts)
    scores = examination.score(samples.decoded, samples.prompts)
    others = np.roll(samples.decoded, 1, axis=0)
    moved = examination.score(others, samples.prompts)
    rng = np.random.default_rng(0)
    grey = examination.score(np.full_like(samples.decoded, 128), samples.prompts)
    noise_images = rng.integers(0, 256, samples.decoded.shape).astype(np.uint8)
    noise = examination.score(noise_images, samples.prompts)
    numbers = {"samples": _mean(scores), "grey": _mean(grey), "noise": _mean(noise), "best_sample": _most(scores)}
    unmoved = all(np.allclose(scores, one, equal_nan=True) for one in (moved, grey, noise))
    if count > 1 and unmoved:
        meaning = "The scores do not depend on the images: other images with the same prompts score the same."
        return Finding(name, "red", numbers, meaning, "Are the reward's arguments (images, prompts, metadata)?")
    meaning = f"Samples score {numbers['samples']:.3g} on average, a grey image {numbers['grey']:.3g}, noise "
    meaning += f"{numbers['noise']:.3g}."
    ahead = [what for what in ("grey", "noise") if numbers[what] > numbers["best_sample"]]
    if ahead:
        meaning += f" Training may lead towards {' and '.join(ahead)}, which scores more than every sample."
    lacking = [what for what, got in (("grey", grey), ("noise", noise)) if not np.isfinite(got).all()]
    if lacking:
        meaning = f"The score of {' and '.join(lacking)} is NaN or infinite."
        return Finding(name, "amber", numbers, meaning, "Give such images a low score, or --non-finite-rewards drop.")
    return Finding(name, "green", numbers, meaning)


def check_failing_sample(examination: Examination) -> Finding:
    """Decode latents that are NaN: the environment must see that the sample is broken."""
    name, model = "failing sample", examination.model
    latents = torch.full((1, *model.latent_shape), float("nan"), device=examination.policy.device)
    _, finite = decode_samples(model, latents, [""], "keep")
    policy = examination.config.training.non_finite_rewards
    numbers = {"seen": not bool(finite.all()), "non_finite_rewards": policy}
    if finite.all():
        meaning = "Latents that are NaN decode to a sample that looks whole, and would be scored."
        advice = "Let decode raise NonFiniteSampleError, as ddpo_env.models.image_decoding.to_pixels does."
        return Finding(name, "amber", numbers, meaning, advice)
    what = "is dropped and counted" if policy == "drop" else "ends the run with an error that names the prompt"
    return Finding(name, "green", numbers, f"A sample that is NaN {what}.")


def _write(examination: Examination, deployed: Images | None) -> None:
    """Write `samplers.png`: a row of the training sampler, and one of the pipeline's."""
    samples, abilities = examination.samples, abilities_of(examination.model)
    if not abilities.can_render:
        return
    own = samples.decoded if abilities.sample_kind == "image" else abilities.render(samples.latents).cpu().numpy()
    rows, labels = [own], ["training"]
    if deployed is not None and deployed.shape[1:] == own.shape[1:]:
        rows, labels = [own, deployed], ["training", "deployed"]
    write_image(examination.folder / "samplers.png", image_grid(rows, labels, samples.texts))


def _sharpness(images: Images) -> float:
    """Return the mean absolute difference of neighbouring pixels, in levels."""
    pixels = images.astype(np.float32)
    return float(np.abs(np.diff(pixels, axis=2)).mean())


def _mean(values: npt.NDArray[np.float64]) -> float:
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else float("nan")


def _most(values: npt.NDArray[np.float64]) -> float:
    return float(np.nanmax(values, initial=-np.inf))
