"""The experiments of the DDPO paper (Black et al. 2023, arXiv 2305.13301) as configurations.

`sd14-*` are the paper's own, with Stable Diffusion 1.4. The table of `docs/training.md` says which numbers come from
the paper, which from its author's PyTorch repository (https://github.com/kvablack/ddpo-pytorch), and which are ours.
`tiny-*` are the same tasks in miniature, with the bundled model and bundled rewards.

All are tuned for PPO. With another algorithm, what is tuned for PPO alone has that algorithm's default.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from agents.config.train_config import TrainConfig, Tuning, train_config
from rewards.registry import did_you_mean


class _Experiment(NamedTuple):
    """The settings in which the experiments differ."""

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

_MINIATURES: dict[str, dict[str, Any]] = {
    "tiny-compressibility": {"reward": "jpeg_compressibility"},
    "tiny-incompressibility": {"reward": "jpeg_incompressibility"},
    "tiny-aesthetic": {
        "reward": "aesthetic",
        "reward_options": ("model=tiny",),
        # Long enough for its over-optimisation to be seen.
        "iterations": 20,
        "learning_rate": 5e-3,
    },
    "tiny-alignment": {
        "reward": "vlm_alignment",
        "reward_options": ("model=tiny",),
        "prompts": "animal_activities",
        # The descriptions of a judge are a coarser signal than a file's size: more samples for each update.
        "iterations": 20,
        "num_inference_steps": 5,
        "samples_per_iteration": 144,
        "updates_per_iteration": 2,
        "eval_interval": 5,
    },
}

PRESETS = (*_EXPERIMENTS, *_MINIATURES)
"""Names of the presets, for `preset_config` and `--preset`."""


_OF_THE_ALGORITHM = frozenset({"updates_per_iteration", "epochs"})
"""Settings that a preset has for its algorithm, whatever the model is."""
_OF_THE_BUNDLED_MODEL = frozenset({"learning_rate"})
"""The defaults of the algorithms are tuned on the bundled model, so they take the place only of a miniature's."""


def preset_config(name: str) -> TrainConfig:
    """Return the configuration of a preset; `changed` returns a variant.

    A variant with another algorithm resolves to that algorithm's updates and epochs, and with `tiny-*` to its learning
    rate, unless it names them.

    Args:
        name: one of `PRESETS`.

    Raises:
        ValueError: for any other name.
    """
    if name not in PRESETS:
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}; got {name!r}{did_you_mean(name, PRESETS)}")
    if name in _MINIATURES:
        return _tuned(_OF_THE_ALGORITHM | _OF_THE_BUNDLED_MODEL, preset=name, **_MINIATURES[name])
    return _tuned(
        _OF_THE_ALGORITHM,
        preset=name,
        model="CompVis/stable-diffusion-v1-4",
        **_EXPERIMENTS[name]._asdict(),
        num_inference_steps=50,
        guidance_scale=5.0,
        eta=1.0,
        lora_rank=4,
        lora_targets="attention",
        log_prob_reduction="mean",
        algorithm="ppo",
        advantage="per_prompt",
        samples_per_prompt=1,
        sample_batch_size=8,
        # For one GPU of 24 GB: in bfloat16 the denoiser keeps 2 GiB of activations for the backward pass of a guided
        # pair (autograd's saved tensors, with a fused attention). Four pairs leave room for 2 GiB of weights, 1 GiB of
        # rollout, a reward of CLIP's size and what kernels need; eight would not.
        train_batch_size=4,
        timestep_window=(0.0, 1.0),
        timestep_fraction=1.0,
        clip_range=1e-4,
        advantage_clip=5.0,
        stat_min_count=16,
        learning_rate=3e-4,
        learning_rate_schedule="constant",
        adam_beta1=0.9,
        adam_beta2=0.999,
        adam_epsilon=1e-8,
        weight_decay=1e-4,
        max_grad_norm=1.0,
        # A held-out image costs as much as a sample: 64 of them every tenth iteration are 2.5 % of the samples, and
        # fill whole batches.
        eval_samples=64,
        eval_interval=10,
    )


def _tuned(names: frozenset[str], **settings: Any) -> TrainConfig:
    """Return the settings of a preset, of which those with these names are for its algorithm alone."""
    config = train_config(**settings)
    return config.with_tuning(Tuning(config.algorithm, names.intersection(settings)))


def check_preset(config: TrainConfig) -> None:
    """Refuse a preset that does not exist, and a preset for a run that is resumed.

    Raises:
        ValueError: naming the setting, its value and what is valid.
    """
    if config.preset is None:
        return
    preset_config(config.preset)
    if config.resume is not None:
        raise ValueError(
            f"preset must not be given with resume, because a resumed run has its own settings; got {config.preset!r}"
        )
