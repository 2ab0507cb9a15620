"""Where an iteration's time goes: sampling and training against the bare denoiser calls inside them.

Runs real iterations of `scripts/train_ppo.py`'s algorithm, and between them the same number of denoiser calls of the
same shapes with nothing around them. Ratios of one run hold on a shared machine; absolute times do not.
"""

import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import tyro
from rich.console import Console

from agents.configuration import PolicySettings, RunSettings, TaskSettings, TrainConfig, TrainingSettings
from agents.diffusion_policy import DiffusionPolicy
from agents.ppo import PPO
from agents.training import build_run


@dataclass(kw_only=True)
class Arguments:
    """The work of an iteration; the defaults are those of train_ppo.py."""

    model: str = "tiny"
    """Bundled name, a folder in diffusers' layout, or a Hub id."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, ..."""
    samples: int = 72
    """Pictures in an iteration."""
    sample_batch_size: int = 72
    """Pictures drawn at once."""
    train_batch_size: int = 45
    """Samples in one call of the denoiser in training."""
    updates: int = 4
    """Optimizer steps in an iteration."""
    num_inference_steps: int = 10
    """Denoising steps."""
    timestep_fraction: float = 0.5
    """Share of the steps that is trained on."""
    guidance_scale: float = 1.0
    """Of classifier-free guidance; 1 is off."""
    lora_rank: int = 8
    """Rank of the LoRA; 0: full training."""
    threads: int = torch.get_num_threads()
    """CPU threads."""
    repeats: int = 5
    """Iterations that are timed, after one that is not."""
    json: Path | None = None
    """Where to write the figures."""


def configuration(arguments: Arguments, run_dir: Path) -> TrainConfig:
    """Return the training configuration that does this work."""
    return TrainConfig(
        run=RunSettings(run_dir=run_dir, device=arguments.device, eval_samples=1),
        task=TaskSettings(model=arguments.model, num_inference_steps=arguments.num_inference_steps),
        policy=PolicySettings(guidance_scale=arguments.guidance_scale, lora_rank=arguments.lora_rank),
        training=TrainingSettings(
            samples_per_iteration=arguments.samples,
            sample_batch_size=arguments.sample_batch_size,
            samples_per_prompt=1,
            train_batch_size=arguments.train_batch_size,
            updates_per_iteration=arguments.updates,
            timestep_fraction=arguments.timestep_fraction,
        ),
    )


def seconds(work: Callable[[], Any], device: torch.device) -> float:
    """Time `work`, with the device's queue empty before and after."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def bare_calls(algorithm: PPO, arguments: Arguments) -> tuple[Callable[[], None], Callable[[], None]]:
    """Return the denoiser calls of an iteration alone: those of sampling, and those of training with their backward."""
    policy = algorithm.policy
    assert isinstance(policy, DiffusionPolicy)
    doubled = 1 if arguments.guidance_scale == 1 else 2

    def call(rows: int) -> torch.Tensor:
        rows *= doubled
        latents = torch.randn(rows, *policy.model.latent_shape, device=policy.device)
        timestep = torch.full((rows,), 500.0, device=policy.device)
        unprompted = policy.model.encode_prompts([""])
        embeds = {name: value.expand(rows, *value.shape[1:]) for name, value in unprompted.items()}
        return policy.model.predict(policy.denoiser, latents, timestep, embeds)

    @torch.no_grad()
    def sampling() -> None:
        for _ in range(algorithm.n_steps):
            call(algorithm.n_envs)

    def training() -> None:
        steps = configuration(arguments, Path()).trained_steps
        left = [arguments.samples * steps // arguments.updates] * arguments.updates
        for transitions in left:
            while transitions > 0:
                rows = min(transitions, algorithm.micro_batch_size)
                call(rows).float().square().mean().backward()
                transitions -= rows
            policy.optimizer.zero_grad()

    return sampling, training


def measure(arguments: Arguments) -> dict[str, Any]:
    """Return the figures, medians over the repeats."""
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as folder:
        algorithm, _ = build_run(configuration(arguments, Path(folder) / "run"))
        _, callback = algorithm._setup_learn(1, None)
    env, device = algorithm.env, algorithm.device
    assert env is not None
    sampling, training = bare_calls(algorithm, arguments)
    times: dict[str, list[float]] = {"sample": [], "train": [], "bare_sample": [], "bare_train": []}
    for repeat in range(arguments.repeats + 1):
        work = {
            "sample": lambda: algorithm.collect_rollouts(env, callback, algorithm.rollout_buffer, algorithm.n_steps),
            "bare_sample": sampling,
            "train": algorithm.train,
            "bare_train": training,
        }
        for name, run in work.items():
            elapsed = seconds(run, device)
            if repeat:
                times[name].append(elapsed)
    median = {name: statistics.median(values) for name, values in times.items()}
    ratios = [
        (a + b) / (c + d)
        for a, b, c, d in zip(times["sample"], times["train"], times["bare_sample"], times["bare_train"], strict=True)
    ]
    pairs = arguments.samples * configuration(arguments, Path()).trained_steps
    return {
        "sampling_images_per_second": arguments.samples / median["sample"],
        "training_pairs_per_second": pairs / median["train"],
        "iteration_seconds": median["sample"] + median["train"],
        "sampling_over_unet": statistics.median(
            a / b for a, b in zip(times["sample"], times["bare_sample"], strict=True)
        ),
        "training_over_unet": statistics.median(
            a / b for a, b in zip(times["train"], times["bare_train"], strict=True)
        ),
        "share_outside_unet": 1 - 1 / statistics.median(ratios),
        "arguments": {name: str(value) for name, value in vars(arguments).items()},
        "versions": {name: version(name) for name in ("torch", "diffusers", "peft", "stable_baselines3")},
        "machine": {
            "platform": platform.platform(),
            "processor": _processor(),
            "threads": arguments.threads,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        },
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor()


def main() -> int:
    """Measure, print and write."""
    arguments = tyro.cli(Arguments, description=__doc__)
    console = Console()
    try:
        figures = measure(arguments)
    except (ValueError, OSError) as error:
        Console(stderr=True).print(f"[red]error:[/red] {error}", highlight=False, soft_wrap=True)
        return 2
    text = json.dumps(figures, indent=2)
    console.print(text, highlight=False, soft_wrap=True)
    if arguments.json is not None:
        arguments.json.write_text(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
