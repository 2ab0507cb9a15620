"""Families of pipelines on the pretend accelerator: environment, policy, an update, a saved LoRA, samples."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.algorithms import denoising_ppo, fraction_changed_by_an_update, logged
from helpers.micro_agents import micro_config, micro_env, stir
from helpers.micro_families import FAMILIES, lora_tensors, micro_family
from helpers.more_families import CASES, build
from safetensors.torch import load_file

from agents import DiffusionPolicy, run_training
from agents.evaluation.sample import SampleArguments, generate
from ddpo_env.models.loading import load_model, unload_models

slow = partial(pytest.param, marks=pytest.mark.slow)
QUICK = ("wan", "flux_dev")


def level(samples: np.ndarray, prompts: list[str], metadata: list[dict[str, Any]]) -> np.ndarray:
    """Mean value of images, videos or sounds."""
    return samples.reshape(len(samples), -1).astype(float).mean(1) / 255


@pytest.mark.usefixtures("accelerator")
@pytest.mark.parametrize("dtype", ["float32", slow("bfloat16")])
@pytest.mark.parametrize(
    "name", [name if name in QUICK else slow(name) for name in (*CASES, *FAMILIES) if name != "ddpm"]
)
def test_family_trains_and_predicts_what_it_predicts_on_the_cpu(name: str, dtype: str, tmp_path: Path) -> None:
    arguments = CASES[name].arguments if name in CASES else {}
    make = partial(build if name in CASES else micro_family, name)
    env = micro_env(
        make(), 2, num_inference_steps=2, samples_per_prompt=2, prompts=["a cat"], reward=level,
        pipeline_arguments=arguments, device="cuda", dtype=dtype,
    )  # fmt: skip
    policy = {"lora_targets": "attention", "guidance_scale": 1.0, "min_std": 0.02}
    algorithm = denoising_ppo(env, policy=policy, n_steps=2, batch_size=4, device="cuda")
    assert fraction_changed_by_an_update(algorithm) > 1 / 3
    assert logged(algorithm)["train/ratio_deviation"] < 1e-4
    trained = stir(algorithm.policy)
    trained.save(tmp_path)
    on_cpu = DiffusionPolicy.load(
        tmp_path, model=load_model(make(), "cpu", "float32", pipeline_arguments=arguments), device="cpu"
    )
    mine, theirs = lora_tensors(trained.denoiser), lora_tensors(on_cpu.denoiser)
    assert all(torch.equal(value.cpu().float(), theirs[key]) for key, value in mine.items())
    latents = torch.randn(2, *env.model.latent_shape, generator=torch.Generator().manual_seed(0))
    outputs = []
    for one in (trained, on_cpu):
        conditioning = one.model.encode_prompts(["a cat", "a dog"])
        timestep = torch.full((2,), 0.5 * one.model.scheduler.config.num_train_timesteps)
        with torch.no_grad():
            outputs.append(one.predict_output(latents.to(one.device), timestep.to(one.device), conditioning).cpu())
    tolerance = {"float32": 1e-5, "bfloat16": 0.1}[dtype]
    assert (outputs[0] - outputs[1]).norm() <= tolerance * outputs[1].norm()
    decoded = [one.model.decode(latents.to(one.device)).cpu().float() for one in (trained, on_cpu)]
    assert (decoded[0] - decoded[1]).norm() <= max(tolerance, 2e-3) * decoded[1].norm()


@pytest.mark.slow
@pytest.mark.usefixtures("accelerator")
@pytest.mark.parametrize("name", ["stable_diffusion_xl", "stable_diffusion_3.5", "flux_dev"])
def test_sample_command_loads_the_lora_that_a_run_on_the_device_has_saved(name: str, tmp_path: Path) -> None:
    micro_family(name).save_pretrained(tmp_path / "model")
    config = micro_config(
        tmp_path / "model", tmp_path / "run", device="cuda", iterations=1, num_inference_steps=2, eval_samples=1
    )
    run_training(config)
    assert load_file(tmp_path / "run" / "lora" / "pytorch_lora_weights.safetensors")
    unload_models()
    arguments = SampleArguments(
        model=str(tmp_path / "model"), device="cuda", prompts=("a cat",), num_inference_steps=2, seeds=(0,),
        lora=tmp_path / "run" / "lora", compare=True,
    )  # fmt: skip
    base, trained = generate(arguments)[0]
    assert base.shape == trained.shape == (1, *base.shape[1:])
    assert base.any()


@pytest.mark.slow
@pytest.mark.usefixtures("accelerator")
def test_run_of_a_video_model_shows_its_frames(tmp_path: Path) -> None:
    build("wan").save_pretrained(tmp_path / "model")
    config = micro_config(
        tmp_path / "model", tmp_path / "run", device="cuda", dtype="bfloat16", iterations=1, eval_samples=2,
        reward="temporal_consistency", num_inference_steps=2,
        pipeline_arguments=("height=16", "width=16", "num_frames=5", "max_sequence_length=24"),
    )  # fmt: skip
    assert run_training(config).reward_after is not None
    assert (tmp_path / "run" / "samples" / "before_after.png").is_file()
