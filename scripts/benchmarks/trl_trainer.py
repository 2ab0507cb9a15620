"""Time an iteration of TRL's `DDPOTrainer` on the work of overhead.py, with the same arguments and the same figures.

TRL 0.23.1 is the last release that has this trainer. Install it in a virtual environment of its own; ddpo-env is not
needed there:

    python -m venv trl-venv
    trl-venv/bin/pip install torch==2.13.0
    trl-venv/bin/pip install "trl[diffusers]==0.23.1" peft
    trl-venv/bin/python scripts/benchmarks/trl_trainer.py --model FOLDER --device cpu --threads 1 ...

Both trainers do the same work: images, batches, denoising steps, guidance, updates, LoRA on the attention's
projections, running statistics per prompt, file size as the reward. (TRL fixes the LoRA's rank at 4; `--lora-rank`
replaces it.) These differences remain:

* A training call of TRL has one timestep of `--train-batch-size` samples. Ours has that many (sample, timestep) pairs.
* TRL encodes the prompts of every batch. Ours encodes each distinct prompt once. After the updates, ours also measures
  on a 25th of the transitions how far the policy has moved, and it draws the next initial latents.
* `--dtype bfloat16` is TRL's `mixed_precision`.
"""

import argparse
import io
import itertools
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measuring.figures import TrainerIteration, measure, report

PROMPTS = ("a cat", "a dog", "a horse", "a fox", "a lion", "a penguin", "a bear", "a bird")
LORA_TARGETS = ["to_k", "to_q", "to_v", "to_out.0"]


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line; the flags have the same meaning as in overhead.py."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder in diffusers' layout, or a Hub id")
    parser.add_argument("--resolution", type=int, default=None, help="side of the images in pixels")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--samples", type=int, default=72)
    parser.add_argument("--sample-batch-size", type=int, default=72)
    parser.add_argument("--train-batch-size", type=int, default=36)
    parser.add_argument("--updates", type=int, default=2)
    parser.add_argument("--num-inference-steps", type=int, default=10)
    parser.add_argument("--timestep-fraction", type=float, default=1.0)
    parser.add_argument("--guidance-scale", type=float, default=5.0)
    parser.add_argument("--lora-rank", type=int, default=4)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--on-request", action="store_true", help="run an iteration for every line of standard input")
    parser.add_argument("--json", type=Path, default=None)
    chosen = parser.parse_args(arguments)
    check(chosen)
    return chosen


def check(arguments: argparse.Namespace) -> None:
    """Refuse sizes that TRL does not allow.

    Raises:
        ValueError: naming the argument.
    """
    divisors = {
        "sample_batch_size": (arguments.sample_batch_size, "samples", arguments.samples),
        "train_batch_size": (arguments.train_batch_size, "sample_batch_size", arguments.sample_batch_size),
        "updates": (arguments.updates, "samples / train_batch_size", arguments.samples // arguments.train_batch_size),
    }
    for name, (value, total_name, total) in divisors.items():
        if value < 1 or total % value:
            raise ValueError(f"{name} must divide {total_name}={total}; got {value}")
    if arguments.lora_rank < 1:
        raise ValueError(f"lora_rank must be at least 1; got {arguments.lora_rank}")


def settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments of TRL's `DDPOConfig`."""
    return {
        "num_epochs": 1,
        "save_freq": 10**9,
        "mixed_precision": "bf16" if arguments.dtype == "bfloat16" else "no",
        "accelerator_kwargs": {"cpu": arguments.device == "cpu"},
        "sample_num_steps": arguments.num_inference_steps,
        "sample_eta": 1.0,
        "sample_guidance_scale": arguments.guidance_scale,
        "sample_batch_size": arguments.sample_batch_size,
        "sample_num_batches_per_epoch": arguments.samples // arguments.sample_batch_size,
        "train_batch_size": arguments.train_batch_size,
        "train_gradient_accumulation_steps": arguments.samples // arguments.train_batch_size // arguments.updates,
        "train_learning_rate": 3e-4,
        "train_cfg": arguments.guidance_scale != 1,
        "train_timestep_fraction": arguments.timestep_fraction,
        "per_prompt_stat_tracking": True,
        "per_prompt_stat_tracking_buffer_size": 32,
        "per_prompt_stat_tracking_min_count": 8,
    }


def file_sizes(images: torch.Tensor, prompts: Any, metadata: Any) -> tuple[torch.Tensor, dict[str, Any]]:
    """Return minus the size in kB of each image as a JPEG file: the reward `jpeg_compressibility`."""
    from PIL import Image

    sizes = []
    for pixels in (images.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy():
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, format="JPEG", quality=95)
        sizes.append(-file.tell() / 1000)
    return torch.tensor(sizes), {}


def trainer_of(arguments: argparse.Namespace, next_prompt: Callable[[], str] | None = None, **others: Any) -> Any:
    """Return TRL's trainer.

    Args:
        arguments: of the command line.
        next_prompt: returns the prompt of the next sample. Default: `PROMPTS` in turn.
        others: settings of `DDPOConfig` that replace the benchmark's.
    """
    from accelerate import PartialState

    PartialState(cpu=arguments.device == "cpu")  # TRL's LoRA code logs through accelerate before it starts it
    from peft import LoraConfig
    from trl import DDPOConfig, DDPOTrainer, DefaultDDPOStableDiffusionPipeline

    class Pipeline(DefaultDDPOStableDiffusionPipeline):
        """TRL's pipeline with another LoRA rank and another resolution."""

        def get_trainable_layers(self) -> Any:
            rank = arguments.lora_rank
            self.sd_pipeline.unet.add_adapter(
                LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=LORA_TARGETS)
            )
            for parameter in self.sd_pipeline.unet.parameters():
                if parameter.requires_grad:
                    parameter.data = parameter.to(torch.float32)
            return self.sd_pipeline.unet

        def __call__(self, *given: Any, **named: Any) -> Any:
            side = arguments.resolution
            return super().__call__(*given, height=side, width=side, **named)

    prompt = next_prompt or partial(next, itertools.cycle(PROMPTS))
    pipeline = Pipeline(arguments.model, use_lora=True)
    config = DDPOConfig(**{**settings(arguments), **others})
    trainer = DDPOTrainer(config, file_sizes, lambda: (prompt(), {}), pipeline)
    trainer.sd_pipeline.set_progress_bar_config(disable=True)
    return trainer


def iteration_of(arguments: argparse.Namespace) -> TrainerIteration:
    """Return TRL's iteration in two phases, and the bare calls of each phase."""
    trainer = trainer_of(arguments)
    generate, score = trainer._generate_samples, trainer.compute_rewards
    sampled: dict[str, Any] = {}

    def sampling() -> None:
        batches = arguments.samples // arguments.sample_batch_size
        sampled["samples"], sampled["pairs"] = generate(iterations=batches, batch_size=arguments.sample_batch_size)
        sampled["rewards"] = list(score(sampled["pairs"]))

    def training() -> None:
        trainer.step(0, 0)

    # `step` samples, scores and trains. `sampling` has done the first two already.
    trainer._generate_samples = lambda **_: (sampled["samples"], sampled["pairs"])
    trainer.compute_rewards = lambda *_, **__: sampled["rewards"]
    return TrainerIteration(
        sampling=sampling,
        training=training,
        bare=lambda: bare_calls(trainer, arguments),
        samples=arguments.samples,
        pairs=arguments.samples * trainer.num_train_timesteps,
        device=trainer.accelerator.device,
    )


def bare_calls(trainer: Any, arguments: argparse.Namespace) -> tuple[Any, Any]:
    """Return the calls of an iteration: those that sample and decode, and those that train, with their backward."""
    unet, device = trainer.sd_pipeline.unet, trainer.accelerator.device
    dtype = next(unet.parameters()).dtype
    side = unet.config.sample_size
    if arguments.resolution is not None:
        side = arguments.resolution // trainer.sd_pipeline.sd_pipeline.vae_scale_factor
    doubled = 1 if arguments.guidance_scale == 1 else 2

    def call(rows: int) -> torch.Tensor:
        rows *= doubled
        latents = torch.randn(rows, unet.config.in_channels, side, side, device=device, dtype=dtype)
        timestep = torch.full((rows,), 500, device=device)
        with trainer.autocast():
            return unet(latents, timestep, trainer.neg_prompt_embed.repeat(rows, 1, 1)).sample

    @torch.no_grad()
    def sampling() -> None:
        vae, size = trainer.sd_pipeline.vae, arguments.sample_batch_size
        for _ in range(arguments.samples // size):
            for _ in range(arguments.num_inference_steps):
                call(size)
            latents = torch.randn(size, unet.config.in_channels, side, side, device=device, dtype=vae.dtype)
            vae.decode(latents / vae.config.scaling_factor)

    def training() -> None:
        calls = trainer.num_train_timesteps * (arguments.samples // arguments.train_batch_size)
        for number in range(calls):
            call(arguments.train_batch_size).float().square().mean().backward()
            if (number + 1) % (calls // arguments.updates) == 0:
                unet.zero_grad()

    return sampling, training


def main() -> int:
    """Measure, print and write."""
    try:
        arguments = parse()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    torch.set_num_threads(arguments.threads)
    packages = ("torch", "diffusers", "peft", "trl")
    figures = measure(iteration_of(arguments), arguments.repeats, arguments.on_request, packages)
    print(report(figures, vars(arguments), arguments.json))
    return 0


if __name__ == "__main__":
    sys.exit(main())
