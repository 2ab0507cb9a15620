"""An iteration of training: how fast, how much memory, and how long next to the bare denoiser calls inside it.

Runs real iterations of `scripts/train_ppo.py`'s algorithm, and between them the same number of denoiser calls of the
same shapes with nothing around them, by plain diffusers with peft's LoRA. Ratios of one run hold on a shared machine;
absolute times do not. `scripts/benchmarks/trl_trainer.py` measures the same of TRL, `scripts/benchmarks/against_trl.py` lets both
take turns.
"""

import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from benchmark_figures import Work, measure, report
from peft import LoraConfig, inject_adapter_in_model
from rich.console import Console
from stable_baselines3.common.logger import Logger
from torch import nn

from agents.algorithms.on_policy import TensorOnPolicyAlgorithm
from agents.config.settings import Dtype, PolicySettings, RunSettings, TaskSettings, TrainingSettings
from agents.config.train_config import TrainConfig
from agents.distributed import Processes
from agents.planning.memory import settle_train_batch_size
from agents.policy.diffusion_policy import DiffusionPolicy
from agents.policy.lora import LORA_TARGETS, LoraTargets, copy_for_full_training, share_weights
from agents.training.run import build_run


@dataclass(kw_only=True)
class Arguments:
    """The work of an iteration; the defaults are those of train_ppo.py."""

    model: str = "tiny"
    """Bundled name, sd14-random (Stable Diffusion 1.4 with random weights), a folder, or a Hub id."""
    resolution: int | None = None
    """Side of the pictures in pixels. Default: the model's own."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, ..."""
    dtype: Dtype = "auto"
    """Of the frozen weights: auto is float32 on a CPU and bfloat16 on an accelerator."""
    samples: int = 72
    """Pictures in an iteration."""
    sample_batch_size: int = 72
    """Pictures drawn at once."""
    train_batch_size: int = 45
    """(sample, timestep) pairs in one call of the denoiser in training. 0: as many as fit."""
    updates: int = 4
    """Optimizer steps in an iteration."""
    num_inference_steps: int = 10
    """Denoising steps."""
    timestep_fraction: float = 0.5
    """Share of the steps that is trained on."""
    timestep_window: tuple[float, float] = (0.0, 0.9)
    """Part of the steps that may be trained on."""
    guidance_scale: float = 1.0
    """Of classifier-free guidance; 1 is off."""
    lora_rank: int = 8
    """Rank of the LoRA; 0: full training."""
    lora_targets: LoraTargets = "attention+convolutions"
    """Which layers get an adapter."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass."""
    merge_lora: bool | None = None
    """Sample with merged adapters. Default: in float32."""
    compile_denoiser: bool = False
    """Run the denoiser by torch.compile; the iteration that is not timed compiles it."""
    threads: int = torch.get_num_threads()
    """CPU threads."""
    repeats: int = 5
    """Iterations that are timed, after one that is not."""
    on_request: bool = False
    """Take the iterations from standard input, for benchmark_against.py."""
    json: Path | None = None
    """Where to write the figures."""


def configuration(arguments: Arguments, run_dir: Path) -> TrainConfig:
    """Return the training configuration that does this work."""
    return TrainConfig(
        run=RunSettings(run_dir=run_dir, device=arguments.device, dtype=arguments.dtype, eval_samples=1),
        task=TaskSettings(
            model=arguments.model,
            resolution=arguments.resolution,
            num_inference_steps=arguments.num_inference_steps,
        ),
        policy=PolicySettings(
            guidance_scale=arguments.guidance_scale,
            lora_rank=arguments.lora_rank,
            lora_targets=arguments.lora_targets,
            gradient_checkpointing=arguments.gradient_checkpointing,
            merge_lora=arguments.merge_lora,
            compile_denoiser=arguments.compile_denoiser,
        ),
        training=TrainingSettings(
            samples_per_iteration=arguments.samples,
            sample_batch_size=arguments.sample_batch_size,
            samples_per_prompt=1,
            train_batch_size=arguments.train_batch_size,
            updates_per_iteration=arguments.updates,
            timestep_fraction=arguments.timestep_fraction,
            timestep_window=arguments.timestep_window,
        ),
    )


def plain_denoiser(policy: DiffusionPolicy) -> nn.Module:
    """Return the denoiser as peft and diffusers alone would train it: the baseline, whatever the policy does."""
    if policy.lora_rank == 0:
        return _checkpointing(copy_for_full_training(policy.model.denoiser), policy)
    plain = share_weights(policy.model.denoiser)
    rank, targets = policy.lora_rank, list(LORA_TARGETS[policy.lora_targets])
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=targets), plain, "default")
    return _checkpointing(plain.to(policy.device), policy)


def _checkpointing(denoiser: nn.Module, policy: DiffusionPolicy) -> nn.Module:
    if policy.gradient_checkpointing:
        denoiser.enable_gradient_checkpointing()
    return denoiser


def bare_calls(
    algorithm: TensorOnPolicyAlgorithm, config: TrainConfig
) -> tuple[Callable[[], None], Callable[[], None]]:
    """Return the denoiser calls of an iteration alone: those of sampling, and those of training with their backward."""
    policy = algorithm.policy
    assert isinstance(policy, DiffusionPolicy)
    model, denoiser = policy.model, plain_denoiser(policy)
    doubled = 2 if policy.negative_conditioning else 1
    unprompted = model.encode_prompts([""])

    def call(rows: int) -> torch.Tensor:
        rows *= doubled
        latents = torch.randn(rows, *model.latent_shape, device=policy.device)
        timestep = torch.full((rows,), 500.0, device=policy.device)
        embeds = {name: value.repeat(rows, *[1] * (value.ndim - 1)) for name, value in unprompted.items()}
        if policy.guidance_embeds:
            embeds["guidance"] = torch.full_like(timestep, policy.guidance_scale)
        with torch.autocast(policy.device.type, policy.compute_dtype, enabled=policy.autocast is not None):
            return model.predict(denoiser, latents, timestep, embeds)

    @torch.no_grad()
    def sampling() -> None:
        denoiser.eval()
        for _ in range(algorithm.n_steps):
            call(algorithm.n_envs)

    def training() -> None:
        denoiser.train()
        training = config.training
        pairs = training.samples_per_iteration * config.trained_steps // training.updates_per_iteration
        for _ in range(training.updates_per_iteration):
            for start in range(0, pairs, training.train_batch_size):
                call(min(training.train_batch_size, pairs - start)).float().square().mean().backward()
            denoiser.zero_grad()

    return sampling, training


def work_of(arguments: Arguments, run_dir: Path) -> Work:
    """Return a real iteration in two parts, and the bare calls of each."""
    config = configuration(arguments, run_dir)
    config.check()
    config = settle_train_batch_size(config, Processes())
    algorithm, _ = build_run(config)
    algorithm.set_logger(Logger(None, []))
    _, callback = algorithm._setup_learn(1, None)
    env = algorithm.env
    assert env is not None
    return Work(
        sampling=lambda: algorithm.collect_rollouts(env, callback, algorithm.rollout_buffer, algorithm.n_steps),
        training=algorithm.train,
        bare=lambda: bare_calls(algorithm, config),
        samples=arguments.samples,
        pairs=arguments.samples * config.trained_steps,
        device=algorithm.device,
        chosen={"train_batch_size": config.training.train_batch_size},
    )


def main() -> int:
    """Measure, print and write."""
    arguments = tyro.cli(Arguments, description=__doc__)
    torch.set_num_threads(arguments.threads)
    try:
        with tempfile.TemporaryDirectory() as folder:
            work = work_of(arguments, Path(folder) / "run")
            packages = ("torch", "diffusers", "peft", "stable_baselines3")
            figures = measure(work, arguments.repeats, arguments.on_request, packages)
    except (ValueError, OSError) as error:
        Console(stderr=True).print(f"[red]error:[/red] {error}", highlight=False, soft_wrap=True)
        return 2
    print(report(figures, vars(arguments), arguments.json))
    return 0


if __name__ == "__main__":
    sys.exit(main())
