"""Adapters: they share the frozen weights, and stock diffusers reads them back without losing one."""

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from helpers.micro_agents import STEPS, micro_env, micro_policy, stir
from helpers.paths import LORA_FILE
from peft import get_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn

from agents.policy.lora import (
    LORA_TARGETS,
    add_lora,
    copy_for_full_training,
    share_weights,
)

GUIDANCE = 3.0
PROMPTS = ("a cat", "a dog", "a fox")


@pytest.fixture(scope="module")
def env(micro_pipeline_folder):
    return micro_env(micro_pipeline_folder)


def stock_pipeline(folder, lora=None):
    pipeline = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None, requires_safety_checker=False)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    if lora is not None:
        pipeline.load_lora_weights(str(lora), weight_name=LORA_FILE)
    return pipeline


def inputs(env, batch=3):
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(batch, *env.model.latent_shape, generator=generator)
    return latents, torch.tensor([801.0, 401.0, 1.0]), env.model.encode_prompts(PROMPTS)["prompt_embeds"]


def test_shared_copy_has_its_own_modules_and_the_same_tensors():
    module = nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3))
    shared = share_weights(module)
    assert shared is not module
    assert shared[0] is not module[0]
    for mine, theirs in ((module.parameters, shared.parameters), (module.buffers, shared.buffers)):
        assert [id(tensor) for tensor in mine()] == [id(tensor) for tensor in theirs()]
    shared[0] = nn.Identity()
    assert isinstance(module[0], nn.Conv2d)


@pytest.mark.parametrize("targets", LORA_TARGETS)
def test_fresh_adapters_are_the_identity(env, targets):
    adapted = add_lora(env.model.denoiser, 2, targets)
    with torch.no_grad():
        assert torch.equal(adapted(*inputs(env)).sample, env.model.denoiser(*inputs(env)).sample)


def test_full_copy_is_float32_and_apart():
    frozen = nn.Linear(2, 2, dtype=torch.bfloat16).requires_grad_(False)
    frozen.register_buffer("steps", torch.arange(3))
    trained = copy_for_full_training(frozen)
    assert {parameter.dtype for parameter in trained.parameters()} == {torch.float32}
    assert trained.steps.dtype == torch.int64
    assert all(parameter.requires_grad for parameter in trained.parameters())
    nn.init.zeros_(trained.weight)
    assert frozen.weight.abs().sum() > 0
    assert frozen.weight.dtype == torch.bfloat16


def test_bad_rank_targets_and_second_adapter_are_refused(env):
    with pytest.raises(ValueError, match=r"lora_rank must be at least 1 \(0 trains every weight\); got 0"):
        add_lora(env.model.denoiser, 0, "attention")
    with pytest.raises(ValueError, match=r"lora_targets must be one of attention, .*; got 'all'"):
        add_lora(env.model.denoiser, 2, "all")
    with pytest.raises(ValueError, match="model already has a LoRA"):
        add_lora(add_lora(env.model.denoiser, 2, "attention"), 2, "attention")


@pytest.mark.parametrize("targets", LORA_TARGETS)
def test_stock_diffusers_loads_every_tensor(env, micro_pipeline_folder, tmp_path, targets):
    policy = stir(micro_policy(env, lora_targets=targets))
    policy.save_lora(tmp_path)
    saved = load_file(tmp_path / "pytorch_lora_weights.safetensors")
    kinds = [type(module) for _, module in adapted_modules(env, targets)]
    assert (nn.Conv2d in kinds) == ("convolutions" in targets)
    assert nn.Linear in kinds
    assert len(saved) == 2 * len(kinds)
    pipeline = stock_pipeline(micro_pipeline_folder, tmp_path)
    loaded = get_peft_model_state_dict(pipeline.unet, adapter_name=pipeline.get_active_adapters()[0])
    trained = get_peft_model_state_dict(policy.denoiser)
    assert len(trained) == len(saved)
    assert loaded.keys() == trained.keys()
    for name, value in trained.items():
        assert torch.equal(loaded[name], value), name


def adapted_modules(env, targets):
    """The layers that ought to have an adapter, found by their type rather than by the list of names."""
    for name, module in env.model.denoiser.named_modules():
        attention = isinstance(module, nn.Linear) and ".to_" in name
        convolution = isinstance(module, nn.Conv2d) and "proj" not in name
        if attention or (convolution and "convolutions" in targets):
            yield name, module


@pytest.mark.parametrize("targets", LORA_TARGETS)
def test_stock_unet_gives_the_policys_output(env, micro_pipeline_folder, tmp_path, targets):
    policy = stir(micro_policy(env, lora_targets=targets))
    policy.save_lora(tmp_path)
    with torch.no_grad():
        base = env.model.denoiser(*inputs(env)).sample
        mine = policy.denoiser(*inputs(env)).sample
        theirs = stock_pipeline(micro_pipeline_folder, tmp_path).unet(*inputs(env)).sample
    torch.testing.assert_close(theirs, mine, rtol=1e-6, atol=1e-6)
    assert (mine - base).abs().max() > 0.01, "the adapters must matter for this test to mean anything"


@pytest.mark.parametrize("targets", LORA_TARGETS)
def test_stock_pipeline_reproduces_the_trained_image(env, micro_pipeline_folder, tmp_path, targets):
    policy = stir(micro_policy(env, lora_targets=targets, guidance_scale=GUIDANCE))
    policy.save_lora(tmp_path)
    latents = torch.randn(1, *env.model.latent_shape, generator=torch.Generator().manual_seed(4))
    image = sample_with_policy(policy, micro_pipeline_folder, "a cat", latents)
    trained, base = (
        sample_with_pipeline(stock_pipeline(micro_pipeline_folder, lora), "a cat", latents) for lora in (tmp_path, None)
    )
    difference = np.abs(image.astype(int) - trained.astype(int))
    assert difference.max() <= 1
    assert (difference > 0).mean() < 0.01
    assert np.abs(image.astype(int) - base.astype(int)).max() > 10, "training must matter for this test"


def sample_with_policy(policy, folder, prompt, latents):
    env = micro_env(folder, num_envs=1)
    observation, _ = env.reset(options={"prompts": prompt, "latents": latents})
    torch.manual_seed(11)
    for _ in range(STEPS):
        with torch.no_grad():
            observation, _, _, _, infos = env.step(policy(observation)[0])
    return infos["final_info"]["image"][0]


def sample_with_pipeline(pipeline, prompt, latents):
    torch.manual_seed(11)
    images = pipeline(
        prompt, latents=latents, num_inference_steps=STEPS, guidance_scale=GUIDANCE, eta=1.0, output_type="pil"
    ).images
    return np.asarray(images[0])
