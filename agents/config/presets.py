"""The experiments of the DDPO paper with Stable Diffusion 1.4 (Black et al. 2023, arXiv 2305.13301), as configurations.

Which of the numbers are the paper's, which its author's PyTorch repository's (https://github.com/kvablack/ddpo-pytorch)
and which ours, is in the table of `docs/training.md`.
"""

from __future__ import annotations

from typing import NamedTuple

from agents.config.settings import OptimizerSettings, PolicySettings, RunSettings, TaskSettings, TrainingSettings
from agents.config.train_config import TrainConfig


class _Experiment(NamedTuple):
    """In what the experiments differ."""

    reward: str
    prompts: str
    samples_per_iteration: int
    updates_per_iteration: int
    iterations: int
    stat_buffer_size: int


_EXPERIMENTS: dict[str, _Experiment] = {
    "sd14-compressibility": _Experiment("jpeg_compressibility", "imagenet_animals", 256, 4, 100, 16),
    "sd14-incompressibility": _Experiment("jpeg_incompressibility", "imagenet_animals", 256, 4, 100, 16),
    "sd14-aesthetic": _Experiment("aesthetic", "simple_animals", 256, 2, 200, 32),
    "sd14-alignment": _Experiment("vlm_alignment", "animal_activities", 288, 2, 200, 32),
}

PRESETS = tuple(_EXPERIMENTS)
"""Names of the presets, for `preset_config` and `scripts/train_ppo.py --preset`."""


def check_preset(run: RunSettings) -> None:
    """Refuse a preset that does not exist, and one for a run that is to be resumed.

    Raises:
        ValueError: naming the setting, its value, and what is valid.
    """
    if run.preset is None:
        return
    if run.preset not in PRESETS:
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}; got {run.preset!r}")
    if run.resume is not None:
        raise ValueError(f"preset must not be given with resume, whose run has its own settings; got {run.preset!r}")


def preset_config(name: str) -> TrainConfig:
    """Return a fresh configuration with the settings of a preset, to be changed at will.

    Args:
        name: one of `PRESETS`.

    Raises:
        ValueError: for any other name.
    """
    check_preset(RunSettings(preset=name))
    experiment = _EXPERIMENTS[name]
    return TrainConfig(
        # A held-out picture costs as much as a sample: 64 of them every tenth iteration are 2.5 % of the samples, and
        # fill whole batches.
        run=RunSettings(preset=name, iterations=experiment.iterations, eval_samples=64, eval_interval=10),
        task=TaskSettings(
            model="CompVis/stable-diffusion-v1-4",
            reward=experiment.reward,
            prompts=experiment.prompts,
            num_inference_steps=50,
        ),
        policy=PolicySettings(
            guidance_scale=5.0, eta=1.0, lora_rank=4, lora_targets="attention", log_prob_reduction="mean"
        ),
        training=TrainingSettings(
            algorithm="ppo",
            advantage="per_prompt",
            samples_per_iteration=experiment.samples_per_iteration,
            samples_per_prompt=1,
            sample_batch_size=8,
            # One GPU of 24 GB: in bfloat16 the denoiser keeps 2 GiB of activations for the backward pass of a guided
            # pair (counted by autograd's saved tensors, with a fused attention). Four pairs leave room for 2 GiB of
            # weights, 1 GiB of rollout, a reward of CLIP's size and what kernels take; eight would not.
            train_batch_size=4,
            updates_per_iteration=experiment.updates_per_iteration,
            epochs=1,
            timestep_window=(0.0, 1.0),
            timestep_fraction=1.0,
            clip_range=1e-4,
            advantage_clip=5.0,
            stat_buffer_size=experiment.stat_buffer_size,
            stat_min_count=16,
        ),
        optimizer=OptimizerSettings(
            learning_rate=3e-4,
            learning_rate_schedule="constant",
            adam_beta1=0.9,
            adam_beta2=0.999,
            adam_epsilon=1e-8,
            weight_decay=1e-4,
            max_grad_norm=1.0,
        ),
    )
