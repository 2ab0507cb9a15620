"""Time an iteration of training, and compare it with the bare calls of its networks.

    python scripts/benchmarks/overhead.py --device cpu --threads 1 --repeats 3

It reports images per second, peak memory, and the time of sampling and of training relative to the denoiser calls
alone; those of sampling end with one of the decoder. The iterations are those of `scripts/train_ppo.py`. Between them
the script makes as many calls of the same shapes, through plain diffusers and peft, with nothing around them. On a
machine that others use too, only these ratios hold, and absolute times do not. `trl_trainer.py` measures the same for
TRL. `against_trl.py` lets both trainers take turns.
"""

import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from measuring.figures import TrainerIteration, measure, report
from peft import LoraConfig, inject_adapter_in_model
from stable_baselines3.common.logger import Logger
from torch import nn

from agents import DiffusionPolicy, TensorOnPolicyAlgorithm, TrainConfig, prepare_run, train_config
from agents.config.settings import Dtype
from agents.planning.memory import fit_micro_batch_size
from agents.planning.plan import pairs_per_update
from agents.policy.lora import LORA_TARGETS, copy_for_full_training, share_weights
from agents.policy.options import LoraTargets


@dataclass(kw_only=True)
class Arguments:
    """The work of an iteration; the defaults are those of train_ppo.py."""

    model: str = "tiny"
    """Bundled name, sd14-random (Stable Diffusion 1.4 with random weights), a folder, or a Hub id."""
    resolution: int | None = None
    """Side of the images in pixels. Default: the model's own."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, ..."""
    dtype: Dtype = "auto"
    """Dtype of the frozen weights. auto is float32 on a CPU and bfloat16 on an accelerator."""
    samples: int = 72
    """Images per iteration."""
    sample_batch_size: int = 72
    """Images generated at once."""
    train_batch_size: int = 45
    """(sample, timestep) pairs in one training call. 0: as many as fit into the memory."""
    updates: int = 4
    """Optimizer steps per iteration."""
    num_inference_steps: int = 10
    """Denoising steps."""
    timestep_fraction: float = 0.5
    """Fraction of the steps that is trained on."""
    timestep_window: tuple[float, float] = (0.0, 0.9)
    """Start and end of the steps that may be trained on, as fractions of each trajectory."""
    noise_window: int | None = None
    """Steps with noise, which are trained on; the window moves on in every iteration. Default: every step."""
    samples_per_prompt: int = 1
    """Samples of a prompt; with a window of noise they start from the same noise."""
    guidance_scale: float = 1.0
    """Scale of classifier-free guidance; 1 is off."""
    lora_rank: int = 8
    """Rank of the LoRA; 0 trains every weight."""
    lora_targets: LoraTargets = "attention+convolutions"
    """Layers that get an adapter."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    merge_lora: bool | None = None
    """Sample with merged adapters. Default: only in float32."""
    compile_denoiser: bool = False
    """Run the denoiser with torch.compile; the iteration that is not timed compiles it."""
    threads: int = torch.get_num_threads()
    """CPU threads."""
    repeats: int = 5
    """Timed iterations, after one that is not timed."""
    on_request: bool = False
    """Run an iteration for every line of standard input, for against_trl.py."""
    json: Path | None = None
    """File that the figures are written to as well."""


def configuration(arguments: Arguments, run_dir: Path) -> TrainConfig:
    """Return the training configuration that does this work."""
    return train_config(
        run_dir=run_dir,
        device=arguments.device,
        dtype=arguments.dtype,
        eval_samples=1,
        model=arguments.model,
        resolution=arguments.resolution,
        num_inference_steps=arguments.num_inference_steps,
        guidance_scale=arguments.guidance_scale,
        lora_rank=arguments.lora_rank,
        lora_targets=arguments.lora_targets,
        gradient_checkpointing=arguments.gradient_checkpointing,
        merge_lora=arguments.merge_lora,
        compile_denoiser=arguments.compile_denoiser,
        samples_per_iteration=arguments.samples,
        sample_batch_size=arguments.sample_batch_size,
        samples_per_prompt=arguments.samples_per_prompt,
        noise_window=arguments.noise_window,
        **({"noise_window_iterations": 1, "shared_noise": True} if arguments.noise_window else {}),
        train_batch_size=arguments.train_batch_size,
        updates_per_iteration=arguments.updates,
        timestep_fraction=arguments.timestep_fraction,
        timestep_window=arguments.timestep_window,
    )


def plain_denoiser(policy: DiffusionPolicy) -> nn.Module:
    """Return the denoiser as diffusers and peft alone would train it: the baseline does not depend on the policy."""
    options, frozen = policy.options, policy.model.denoiser
    plain = share_weights(frozen) if options.lora_rank else copy_for_full_training(frozen)
    if options.lora_rank:
        targets = list(LORA_TARGETS[options.lora_targets])
        config = LoraConfig(r=options.lora_rank, lora_alpha=options.lora_rank, target_modules=targets)
        inject_adapter_in_model(config, plain, "default")
    if options.gradient_checkpointing:
        plain.enable_gradient_checkpointing()  # type: ignore[operator]
    return plain.to(policy.device)


def bare_calls(
    algorithm: TensorOnPolicyAlgorithm, config: TrainConfig
) -> tuple[Callable[[], None], Callable[[], None]]:
    """Return the calls of an iteration: those that sample and decode, and those that train, with their backward."""
    policy = algorithm.policy
    assert isinstance(policy, DiffusionPolicy)
    model, options, denoiser = policy.model, policy.options, plain_denoiser(policy)
    rows_per_latent = 2 if policy.negative_conditioning else 1
    unprompted = model.encode_prompts([""])

    def call(latent_count: int) -> torch.Tensor:
        rows = latent_count * rows_per_latent
        latents = torch.randn(rows, *model.latent_shape, device=policy.device)
        timestep = torch.full((rows,), 500.0, device=policy.device)
        conditioning = {name: value.repeat(rows, *[1] * (value.ndim - 1)) for name, value in unprompted.items()}
        if policy.guidance_embeds:
            conditioning["guidance"] = torch.full_like(timestep, options.guidance_scale)
        with torch.autocast(policy.device.type, policy.compute_dtype, enabled=options.autocast is not None):
            return model.predict(denoiser, latents, timestep, conditioning)

    @torch.no_grad()
    def sampling() -> None:
        denoiser.eval()
        vae = model.pipeline.vae  # type: ignore[attr-defined]
        for step in range(1, algorithm.n_steps + 1):
            call(algorithm.n_envs)
            if step % config.num_inference_steps == 0:
                latents = torch.randn(algorithm.n_envs, *model.latent_shape, device=policy.device, dtype=vae.dtype)
                vae.decode(latents / vae.config.scaling_factor)

    def training() -> None:
        denoiser.train()
        pairs, size = pairs_per_update(config), config.training.train_batch_size
        for _ in range(config.training.updates_per_iteration):
            for start in range(0, pairs, size):
                call(min(size, pairs - start)).float().square().mean().backward()
            denoiser.zero_grad()

    return sampling, training


def iteration_of(arguments: Arguments, run_dir: Path) -> TrainerIteration:
    """Return a real iteration in two phases, and the bare calls of each phase."""
    run = prepare_run(configuration(arguments, run_dir))
    algorithm, config = run.algorithm, run.config
    algorithm.set_logger(Logger(None, []))
    _, callback = algorithm._setup_learn(1, None)
    if config.training.train_batch_size == 0:  # as Run.train does before the first iteration
        algorithm.micro_batch_size = fit_micro_batch_size(algorithm)
        config = config.changed(train_batch_size=algorithm.micro_batch_size)
    env = algorithm.env
    assert env is not None
    return TrainerIteration(
        sampling=lambda: algorithm.collect_rollouts(env, callback, algorithm.rollout_buffer, algorithm.n_steps),
        training=algorithm.train,
        bare=lambda: bare_calls(algorithm, config),
        samples=arguments.samples,
        pairs=arguments.samples * config.trained_steps,
        device=algorithm.device,
        chosen={"train_batch_size": config.training.train_batch_size},
    )


def main() -> int:
    """Measure, and print and write the figures."""
    arguments = tyro.cli(Arguments, description=__doc__)
    torch.set_num_threads(arguments.threads)
    try:
        with tempfile.TemporaryDirectory() as folder:
            iteration = iteration_of(arguments, Path(folder) / "run")
            packages = ("torch", "diffusers", "peft", "stable_baselines3")
            figures = measure(iteration, arguments.repeats, arguments.on_request, packages)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(report(figures, vars(arguments), arguments.json))
    return 0


if __name__ == "__main__":
    sys.exit(main())
