"""Images of another size than the model's own: latents, spaces, the denoiser's inputs, and errors."""

import math

import numpy as np
import pytest
import torch
from gymnasium import spaces
from helpers.micro_agents import micro_config, micro_env, micro_policy
from helpers.micro_families import micro_family

from agents.policy.diffusion_policy import DiffusionPolicy
from agents.training.preparation import run_training
from ddpo_env import DenoisingEnv, load_model
from ddpo_env.models.loading import check_source, unload_models
from ddpo_env.models.outline import outline_model

FAMILIES = ("stable_diffusion_xl", "stable_diffusion_3", "flux_dev")


def test_latents_and_images_have_the_size(micro_pipeline_folder):
    own, larger = load_model(micro_pipeline_folder, "cpu"), load_model(micro_pipeline_folder, "cpu", resolution=48)
    assert own.latent_shape == (4, 8, 8)
    assert larger.latent_shape == (4, 12, 12)
    assert larger.decode(torch.zeros(1, 4, 12, 12)).shape == (1, 48, 48, 3)
    env = micro_env(micro_pipeline_folder, num_envs=2, resolution=48)
    observation, _ = env.reset(seed=0)
    assert observation["latents"].shape == (2, 4, 12, 12)
    assert env.single_action_space.shape == (4, 12, 12)
    assert DenoisingEnv(model=micro_pipeline_folder, resolution=48, device="cpu").action_space.shape == (4, 12, 12)


def test_two_resolutions_share_the_weights_and_stay_apart(micro_pipeline_folder):
    unload_models()
    larger = load_model(micro_pipeline_folder, "cpu", resolution=48)
    own = load_model(micro_pipeline_folder, "cpu")
    assert own.denoiser is larger.denoiser
    assert load_model(micro_pipeline_folder, "cpu", resolution=48) is larger
    assert load_model(micro_pipeline_folder, "cpu") is own
    assert own.latent_shape != larger.latent_shape
    assert load_model(larger) is larger, "an adapter is passed on as it is"


def test_the_policy_takes_the_environments_resolution_and_keeps_it(micro_pipeline_folder, tmp_path):
    env = micro_env(micro_pipeline_folder, num_envs=2, resolution=48)
    policy = micro_policy(env)
    observation, _ = env.reset(seed=0)
    assert policy.get_distribution(observation).mean.shape == (2, 4, 12, 12)
    policy.save(tmp_path)
    assert DiffusionPolicy.load(tmp_path, device="cpu").model.latent_shape == (4, 12, 12)
    with pytest.raises(ValueError, match="observation_space must be that of model"):
        DiffusionPolicy(
            spaces.Dict(env.single_observation_space.spaces),
            env.single_action_space,
            lambda _: 1e-2,
            model=load_model(env.model.source, "cpu", resolution=32),
            num_inference_steps=2,
        )


def test_a_run_generates_images_of_the_size(micro_pipeline_folder, tmp_path):
    seen = []

    def shapes(images, prompts, metadata):
        seen.append(images.shape[1:])
        return np.zeros(len(images))

    from helpers import micro_agents

    original = micro_agents.brightness
    micro_agents.brightness = shapes
    try:
        config = micro_config(micro_pipeline_folder, tmp_path / "run", resolution=48, iterations=1)
        run_training(config)
    finally:
        micro_agents.brightness = original
    assert set(seen) == {(48, 48, 3)}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_generates_another_size(family):
    pipeline = micro_family(family)
    own = load_model(pipeline, "cpu")
    side = own.size[0] * 2
    model = load_model(pipeline, "cpu", resolution=side)
    assert math.prod(model.latent_shape) == 4 * math.prod(own.latent_shape)
    latents = torch.randn(2, *model.latent_shape)
    conditioning = model.encode_prompts(["a cat", "a dog"])
    if getattr(model, "guidance_embeds", False):
        conditioning["guidance"] = torch.full((2,), 3.5)
    with torch.no_grad():
        assert model.predict(model.denoiser, latents, torch.full((2,), 500.0), conditioning).shape == latents.shape
    assert model.decode(latents).shape == (2, side, side, 3)


def test_stable_diffusion_xl_is_told_the_size():
    pipeline = micro_family("stable_diffusion_xl")
    told = []
    pipeline.unet.register_forward_pre_hook(
        lambda module, args, kwargs: told.append(kwargs["added_cond_kwargs"]["time_ids"].tolist()), with_kwargs=True
    )
    for resolution in (64, None):
        model = load_model(pipeline, "cpu", resolution=resolution)
        model.predict(model.denoiser, torch.randn(1, *model.latent_shape), torch.ones(1), model.encode_prompts(["a"]))
        side = resolution or 32
        assert told[-1] == [[side, side, 0, 0, side, side]]


@pytest.mark.parametrize("resolution", [30, 3, "32x30", "30x32", "32x16380"])
def test_a_size_that_is_no_multiple_is_refused(micro_pipeline_folder, resolution):
    with pytest.raises(ValueError, match=rf"resolution must be a multiple of 8 pixels .*; got {resolution!r}$"):
        load_model(micro_pipeline_folder, "cpu", resolution=resolution)


@pytest.mark.parametrize(
    "resolution", [0, -4, 32.0, True, "", "32", "32x", "x32", "32 x 32", "32X32", "0x32", "٣٢x32", 16385, "32x20000"]
)
def test_a_size_of_another_form_is_refused(micro_pipeline_folder, resolution):
    for refuse in (load_model, check_source):
        with pytest.raises(ValueError, match=r"resolution must be None, a number .* such as '832x1216', with sides"):
            refuse(micro_pipeline_folder, "cpu", resolution=resolution)
    with pytest.raises(ValueError, match="resolution must be"):
        micro_config(micro_pipeline_folder, None, resolution=resolution)


@pytest.mark.parametrize("family", ["stable_diffusion_2", "stable_diffusion_3", "flux_dev"])
def test_a_sample_of_3_to_2_is_the_stock_pipelines(family):
    """The denoiser's output at the first step, and the image that is decoded from the last latents."""
    pipeline = micro_family(family)
    model = load_model(pipeline, "cpu", resolution="48x32")
    assert model.size == (32, 48)
    conditioning = model.encode_prompts(["a cat"])
    if model.guidance_embeds:
        conditioning["guidance"] = torch.full((1,), 3.5)
    pipeline.set_progress_bar_config(disable=True)
    latents = torch.randn(1, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    scale = {} if model.guidance_embeds else {"guidance_scale": 1.0}
    seen = {}
    given, step = latents, pipeline.scheduler.step

    def record(output, timestep, sample, **options):
        seen.setdefault("first", (output, timestep))
        return step(output, timestep, sample, **options)

    pipeline.scheduler.step = record
    size = {"height": 32, "width": 48}
    images = pipeline("a cat", latents=given, num_inference_steps=2, output_type="np", **size, **scale).images
    pipeline.scheduler.step = step
    assert images.shape == (1, 32, 48, 3)
    output, timestep = seen["first"]
    with torch.no_grad():
        ours = model.predict(model.denoiser, latents, torch.as_tensor(timestep).float().reshape(1), conditioning)
    torch.testing.assert_close(ours, output)
    final = pipeline("a cat", latents=given, num_inference_steps=2, output_type="latent", **size, **scale).images
    np.testing.assert_allclose(model.decode(final)[0].numpy() / 255, images[0], atol=0.51 / 255)


def test_the_form_of_a_size_does_not_matter(micro_pipeline_folder, tmp_path):
    square = load_model(micro_pipeline_folder, "cpu", resolution="48x48")
    assert square is load_model(micro_pipeline_folder, "cpu", resolution=48)
    assert load_model(micro_pipeline_folder, "cpu", resolution="32x32").latent_shape == (4, 8, 8)
    config = micro_config(micro_pipeline_folder, tmp_path, resolution="48x48")
    assert config.run.resolution == 48
    assert micro_config(micro_pipeline_folder, None, resolution="48x32").as_dict()["run"]["resolution"] == "48x32"
    assert outline_model(micro_pipeline_folder, "48x32").latent_shape == (4, 8, 12)


@pytest.mark.slow
def test_a_policy_keeps_a_size_of_3_to_2(micro_pipeline_folder, tmp_path):
    env = micro_env(micro_pipeline_folder, num_envs=1, num_inference_steps=1, resolution="48x32")
    policy = micro_policy(env)
    observation, _ = env.reset(seed=0)
    assert env.step(policy.forward(observation)[0])[-1]["final_info"]["image"][0].shape == (32, 48, 3)
    policy.save(tmp_path)
    assert DiffusionPolicy.load(tmp_path, device="cpu").model is env.model


def test_transformers_need_whole_patches_and_places_for_them():
    pipeline = micro_family("stable_diffusion_3")
    patch, most = (pipeline.transformer.config[name] for name in ("patch_size", "pos_embed_max_size"))
    unit = patch * pipeline.vae_scale_factor
    for resolution in (unit * 2 + pipeline.vae_scale_factor, unit * (most + 1)):
        with pytest.raises(ValueError, match=rf"multiple of {unit} pixels \(at most {unit * most}\)"):
            load_model(pipeline, "cpu", resolution=resolution)


@pytest.mark.parametrize("model", ["points", "ddpm"])
def test_models_of_one_size_refuse_another(model):
    with pytest.raises(ValueError, match=r"resolution must be None with model .*; got 64"):
        load_model(micro_family("ddpm") if model == "ddpm" else model, "cpu", resolution=64)


def test_the_cost_of_another_size_is_known_before_it_is_loaded(micro_pipeline_folder):
    assert outline_model(micro_pipeline_folder, 48).latent_shape == (4, 12, 12)
    assert outline_model("sd14-random", 256).latent_shape == (4, 32, 32)
