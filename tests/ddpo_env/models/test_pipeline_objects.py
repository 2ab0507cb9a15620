"""Pipeline objects: a model follows the components that the pipeline has now, and holds it no longer than needed."""

import gc
import weakref
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline

from ddpo_env import DenoisingVectorEnv, load_model


def load(folder: Path) -> StableDiffusionPipeline:
    return StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)


def make(pipeline: StableDiffusionPipeline, prompt: str = "a cat", resolution: int | None = None) -> DenoisingVectorEnv:
    return DenoisingVectorEnv(1, model=pipeline, num_inference_steps=4, prompts=[prompt], resolution=resolution)


@pytest.mark.parametrize("resolution", [None, 64])
def test_a_scheduler_that_was_replaced_is_noticed(micro_pipeline_folder: Path, resolution: int | None) -> None:
    pipeline = load(micro_pipeline_folder)
    make(pipeline, resolution=resolution).reset()
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, timestep_spacing="trailing")
    pipeline.scheduler.set_timesteps(4)
    observation, _ = make(pipeline, resolution=resolution).reset()
    assert observation["timestep"][0, 0] == pipeline.scheduler.timesteps[0]


@pytest.mark.parametrize("component", ["unet", "vae", "text_encoder", "tokenizer"])
def test_a_component_that_was_replaced_is_noticed_and_an_older_model_keeps_its_own(
    micro_pipeline_folder: Path, component: str
) -> None:
    pipeline = load(micro_pipeline_folder)
    before = load_model(pipeline)
    own = getattr(pipeline, component)
    setattr(pipeline, component, getattr(load(micro_pipeline_folder), component))
    after = load_model(pipeline)
    assert getattr(after.pipeline, component) is getattr(pipeline, component)  # type: ignore[attr-defined]
    assert after.denoiser is pipeline.unet
    assert getattr(before.pipeline, component) is own  # type: ignore[attr-defined]
    assert load_model(pipeline) is after


@pytest.mark.parametrize("resolution", [None, 64])
def test_textual_inversion_is_noticed(micro_pipeline_folder: Path, resolution: int | None) -> None:
    pipeline = load(micro_pipeline_folder)
    env = make(pipeline, "<mine>", resolution)
    env.reset()
    hidden = pipeline.text_encoder.config.hidden_size
    pipeline.load_textual_inversion({"<mine>": 5 * torch.randn(hidden)}, token="<mine>")
    found = torch.as_tensor(make(pipeline, "<mine>", resolution).reset()[0]["prompt_embeds"])
    expected = pipeline.encode_prompt("<mine>", "cpu", 1, False)[0]
    torch.testing.assert_close(found, expected.detach())


def test_text_encoder_whose_weights_changed_in_place_is_noticed(micro_pipeline_folder: Path) -> None:
    pipeline = load(micro_pipeline_folder)
    make(pipeline).reset()
    with torch.no_grad():
        pipeline.text_encoder.get_input_embeddings().weight.data.mul_(2)
    found = torch.as_tensor(make(pipeline).reset()[0]["prompt_embeds"])
    torch.testing.assert_close(found, pipeline.encode_prompt("a cat", "cpu", 1, False)[0].detach())


@pytest.mark.parametrize("resolution", [None, 64])
def test_pipelines_that_were_dropped_are_freed(micro_pipeline_folder: Path, resolution: int | None) -> None:
    alive = []
    for _ in range(3):
        pipeline = load(micro_pipeline_folder)
        env = make(pipeline, resolution=resolution)
        env.reset()
        env.close()
        alive.append(weakref.ref(pipeline.unet))
        del pipeline, env
        gc.collect()
    assert sum(reference() is not None for reference in alive) <= 1


def test_the_same_arguments_give_the_same_model_while_somebody_holds_it(micro_pipeline_folder: Path) -> None:
    pipeline = load(micro_pipeline_folder)
    model, large = load_model(pipeline), load_model(pipeline, resolution=64)
    assert load_model(pipeline) is model
    assert load_model(pipeline, resolution=64) is load_model(large.source, resolution=64) is large
    del model
    gc.collect()
    assert load_model(pipeline, resolution=64) is large
    assert large.denoiser is pipeline.unet


def test_a_pipeline_class_of_ones_own_is_taken_as_an_object(micro_pipeline_folder: Path, tmp_path: Path) -> None:
    class WeightedPromptPipeline(StableDiffusionPipeline):
        pass

    components = load(micro_pipeline_folder).components
    pipeline = WeightedPromptPipeline(**components, requires_safety_checker=False)
    assert load_model(pipeline).denoiser is pipeline.unet
    pipeline.save_pretrained(tmp_path / "mine")
    with pytest.raises(ValueError, match=r"names WeightedPromptPipeline. Load it with its own class.*model=pipe"):
        load_model(tmp_path / "mine")
