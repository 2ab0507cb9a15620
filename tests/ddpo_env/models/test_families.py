"""Every family through the whole loop: environment, policy, one update, a LoRA, and stock diffusers reading it."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from helpers.algorithms import denoising_ppo, fraction_changed_by_an_update, logged
from helpers.micro_agents import micro_env, micro_policy, stir
from helpers.micro_families import FAMILIES, lora_tensors, micro_family
from helpers.paths import LORA_FILE
from peft import PeftModel

from agents import DiffusionPolicy
from ddpo_env import DenoisingVectorEnv

STEPS = 5
GUIDANCE = 3.0
FLOW = ("stable_diffusion_3", "stable_diffusion_3.5", "flux_dev", "flux_schnell")
ALMOST_DETERMINISTIC = {name: {"noise_level": 2e-3} for name in FLOW} | {"ddpm": {"min_std": 1e-5}}
"""The samplers that the pipelines have are limits of ours."""


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def folder(family: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The family's pipeline as it comes from the Hub."""
    path = tmp_path_factory.mktemp("families") / family
    micro_family(family).save_pretrained(path)
    return path


def policy_settings(family: str) -> dict[str, Any]:
    unguided = {"guidance_scale": 1.0, "min_std": 0.02}
    return unguided if family == "ddpm" else {"guidance_scale": GUIDANCE}


def stock_pipeline(family: str, folder: Path, lora: Path | None = None) -> DiffusionPipeline:
    """The pipeline as anybody has it, with a LoRA read as `save_lora` says."""
    absent = {"text_encoder_3": None, "tokenizer_3": None} if family == "stable_diffusion_3.5" else {}
    pipeline = DiffusionPipeline.from_pretrained(folder, **absent)
    pipeline.set_progress_bar_config(disable=True)
    if lora is not None and family == "ddpm":
        pipeline.unet = PeftModel.from_pretrained(pipeline.unet, lora)
    elif lora is not None:
        pipeline.load_lora_weights(lora, weight_name=LORA_FILE)
    return pipeline


def denoiser_of(pipeline: DiffusionPipeline) -> torch.nn.Module:
    return pipeline.unet if hasattr(pipeline, "unet") else pipeline.transformer


def generate_with_pipeline(family: str, pipeline: DiffusionPipeline, latents: torch.Tensor) -> np.ndarray:
    """The stock pipeline's own image from given noise: DDIM with eta 1, Euler steps of the flow, or DDPM."""
    torch.manual_seed(11)
    arguments: dict[str, Any] = {"num_inference_steps": STEPS, "output_type": "np"}
    if family == "ddpm":
        images = pipeline(**arguments).images  # its first noise is the one that `latents` are
    elif family == "flux_dev":
        arguments |= {"height": 32, "width": 32}
        images = pipeline("a cat", latents=latents, guidance_scale=GUIDANCE, **arguments)
    elif family == "flux_schnell":
        arguments |= {"height": 32, "width": 32}
        images = pipeline("a cat", latents=latents, true_cfg_scale=GUIDANCE, negative_prompt="", **arguments)
    elif family in FLOW:
        images = pipeline("a cat", latents=latents, guidance_scale=GUIDANCE, **arguments)
    else:
        pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
        images = pipeline("a cat", latents=latents, guidance_scale=GUIDANCE, eta=1.0, **arguments)
    pixels = images if isinstance(images, np.ndarray) else images.images
    return (pixels[0] * 255).round().astype(np.uint8)


def generate_with_policy(
    family: str, policy: DiffusionPolicy, env: DenoisingVectorEnv, latents: torch.Tensor
) -> np.ndarray:
    observation, _ = env.reset(options={"prompts": "a cat", "latents": latents})
    torch.manual_seed(11)
    if family == "ddpm":
        torch.randn_like(latents)  # which the pipeline samples itself
    for _ in range(STEPS):
        with torch.no_grad():
            observation, _, _, _, infos = env.step(policy(observation, deterministic=family in FLOW)[0])
    return infos["final_info"]["image"][0]


def test_update_trains_the_policy_and_stock_diffusers_reads_it_exactly(
    family: str, folder: Path, tmp_path: Path
) -> None:
    model = denoising_ppo(folder, num_envs=4, policy=policy_settings(family), batch_size=2 * STEPS)
    assert fraction_changed_by_an_update(model) > 1 / 2
    assert logged(model)["train/ratio_deviation"] <= 1e-5

    policy = stir(model.policy)
    policy.save_lora(tmp_path)
    env = micro_env(folder, num_envs=3)
    latents = torch.randn(3, *env.model.latent_shape, generator=torch.Generator().manual_seed(0))
    conditioning = env.model.encode_prompts(["a cat", "a dog", "a fox"]) | {"guidance": torch.full((3,), 3.5)}
    stock = denoiser_of(stock_pipeline(family, folder, tmp_path))
    trained, loaded = (lora_tensors(denoiser) for denoiser in (policy.denoiser, stock))
    assert len(trained) == len(loaded) > 0
    assert all(torch.equal(value, loaded[name]) for name, value in trained.items())
    with torch.no_grad():
        mine, theirs, base = (
            env.model.predict(denoiser, latents, torch.tensor([801.0, 401.0, 1.0]), conditioning)
            for denoiser in (policy.denoiser, stock, env.model.denoiser)
        )
    # With the same weights, peft's wrapper leaves last bits of one UNet to the layout of its tensors in memory.
    torch.testing.assert_close(theirs, mine, rtol=0, atol=1e-5 if family == "ddpm" else 0)
    assert (mine - base).abs().max() > 0.01, "the adapters must matter for this test to mean anything"


def test_stock_pipeline_generates_the_trained_image(family: str, folder: Path, tmp_path: Path) -> None:
    env = micro_env(folder, num_envs=1)
    policy = stir(micro_policy(env, **policy_settings(family) | ALMOST_DETERMINISTIC.get(family, {})))
    policy.save_lora(tmp_path)
    torch.manual_seed(11)
    latents = torch.randn(1, *env.model.latent_shape)
    image = generate_with_policy(family, policy, env, latents)
    trained, base = (
        generate_with_pipeline(family, stock_pipeline(family, folder, lora), latents) for lora in (tmp_path, None)
    )
    difference = np.abs(image.astype(int) - trained.astype(int))
    assert image.shape == trained.shape
    assert difference.max() <= 1
    assert (difference > 0).mean() < 0.01
    assert np.abs(image.astype(int) - base.astype(int)).max() > 5, "training must matter for this test"


def test_saved_policy_is_loaded_with_all_its_settings(family: str, folder: Path, tmp_path: Path) -> None:
    env = micro_env(folder)
    settings = policy_settings(family) | ({"noise_level": 0.4} if family in FLOW else {})
    policy = stir(micro_policy(env, **settings))
    policy.save(tmp_path)
    loaded = DiffusionPolicy.load(tmp_path, device="cpu")
    observation, _ = env.reset(seed=0)
    with torch.no_grad():
        mine, theirs = (one.get_distribution(observation) for one in (policy, loaded))
    assert torch.equal(mine.mean, theirs.mean)
    assert torch.equal(mine.sampler.std, theirs.sampler.std)


def test_environment_and_policy_have_the_pipelines_timesteps(family: str, folder: Path) -> None:
    pipeline = stock_pipeline(family, folder)
    seen: list[float] = []
    denoiser_of(pipeline).register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(
            float((args[1] if len(args) > 1 else kwargs["timestep"]).flatten()[0])
        ),
        with_kwargs=True,
    )
    env = micro_env(folder, num_envs=1)
    generate_with_pipeline(family, pipeline, torch.randn(1, *env.model.latent_shape))
    policy = micro_policy(env, **policy_settings(family))
    observation, _ = env.reset(seed=0)
    mine = []
    for _ in range(STEPS):
        mine.append(observation["timestep"].item())
        with torch.no_grad():
            observation, *_ = env.step(policy(observation)[0])
    assert mine == policy.sampler.timesteps.tolist()
    scale = 1000 if "flux" in family else 1
    assert mine == pytest.approx([scale * value for value in dict.fromkeys(seen)], rel=1e-6)


def test_eta_and_noise_level_are_refused_where_they_mean_nothing(family: str, folder: Path) -> None:
    env = micro_env(folder)
    wrong = {"eta": 0.5} if family in FLOW else {"noise_level": 0.5}
    with pytest.raises(ValueError, match=r"eta must be 1 with Flow|noise_level applies to FlowMatch.* only"):
        micro_policy(env, **policy_settings(family) | wrong)
