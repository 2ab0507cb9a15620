"""`load_model`: what may be given, that weights are in memory once, and what is refused."""

import gc
import logging
import shutil
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DiffusionPipeline, StableDiffusionPipeline, UNet2DModel
from helpers.scripts import run_script

import ddpo_env
from ddpo_env.models import check_source, load_model, resolve_source, sources, unload_models
from ddpo_env.models import loading as models
from rewards.networks.devices import resolve_device, resolve_dtype


@pytest.fixture
def pipeline(micro_pipeline_folder: Path) -> StableDiffusionPipeline:
    return StableDiffusionPipeline.from_pretrained(micro_pipeline_folder, safety_checker=None)


@pytest.fixture(autouse=True)
def _nothing_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "_loaded", {})


def weights(env: gym.Env[Any, Any]) -> list[torch.nn.Parameter]:
    return list(env.unwrapped.batch.model.denoiser.parameters())


def test_bundled_model_is_loaded_without_a_network() -> None:
    model = load_model("tiny", "cpu")
    assert isinstance(model, ddpo_env.DiffusionModel)
    assert model.latent_shape == (4, 16, 16)
    assert model.source == "tiny"
    assert {weight.dtype for weight in model.denoiser.parameters()} == {torch.float32}


def test_loading_twice_shares_the_weights(micro_pipeline_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = load_model(micro_pipeline_folder)
    monkeypatch.chdir(micro_pipeline_folder.parent)
    for spelling in (str(micro_pipeline_folder), "./micro", f"{micro_pipeline_folder}/", Path("micro")):
        assert load_model(spelling) is first
    assert load_model(micro_pipeline_folder, "cpu", "float32") is first
    assert load_model(micro_pipeline_folder, "cpu:0", torch.float32) is first


def test_environments_share_the_weights(micro_pipeline_folder: Path) -> None:
    one, other = (gym.make("DDPO-SD-v0", model=str(micro_pipeline_folder)) for _ in range(2))
    batch = gym.make_vec("DDPO-SD-v0", num_envs=2, model=str(micro_pipeline_folder))
    for mine, theirs, ours in zip(weights(one), weights(other), batch.model.denoiser.parameters(), strict=True):
        assert mine is theirs is ours


def test_another_dtype_is_another_copy(micro_pipeline_folder: Path) -> None:
    single, half = load_model(micro_pipeline_folder), load_model(micro_pipeline_folder, dtype="bfloat16")
    assert next(half.denoiser.parameters()).dtype == torch.bfloat16
    assert next(single.denoiser.parameters()).dtype == torch.float32
    assert half.encode_prompts(["a cat"])["prompt_embeds"].dtype == torch.float32


def test_weights_are_frozen_and_in_evaluation_mode(micro_pipeline_folder: Path) -> None:
    pipeline = load_model(micro_pipeline_folder).pipeline  # type: ignore[attr-defined]
    for module in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        assert not module.training
        assert not any(weight.requires_grad for weight in module.parameters())


def test_unloading_forgets_the_models(micro_pipeline_folder: Path) -> None:
    first = load_model(micro_pipeline_folder)
    unload_models()
    assert load_model(micro_pipeline_folder) is not first


def test_unloading_frees_the_weights_that_nobody_holds(micro_pipeline_folder: Path) -> None:
    weight = next(load_model(micro_pipeline_folder, resolution=48).denoiser.parameters())
    env = gym.make("DDPO-SD-v0", model=micro_pipeline_folder)
    found = weakref.ref(weight)
    del weight
    unload_models()
    gc.collect()
    assert found() is not None, "the environment has it"
    del env
    gc.collect()
    assert found() is None


def test_pipeline_object_is_a_model(pipeline: StableDiffusionPipeline) -> None:
    model = load_model(pipeline)
    assert model.denoiser is pipeline.unet
    assert load_model(pipeline) is model
    assert load_model(model.source) is model, "a policy finds it again by the name on the observation space"


def test_pipeline_object_is_not_copied_by_make_or_spec(pipeline: StableDiffusionPipeline) -> None:
    env = gym.make("DDPO-SD-v0", model=pipeline)
    assert weights(env)[0] is next(pipeline.unet.parameters())
    assert env.spec is not None
    named = env.spec.kwargs["model"]
    assert isinstance(named, str)
    assert weights(gym.make("DDPO-SD-v0", model=pipeline))[0] is weights(env)[0]
    assert weights(gym.make(env.spec))[0] is weights(env)[0]
    batch = gym.make_vec("DDPO-SD-v0", num_envs=2, model=pipeline)
    assert batch.model.denoiser is pipeline.unet
    assert batch.spec.kwargs["model"] == named
    assert "model" in env.spec.to_json()


def test_pipeline_object_that_was_moved_is_moved_back(pipeline: StableDiffusionPipeline) -> None:
    model = load_model(pipeline, dtype="float32")
    assert next(load_model(pipeline, dtype="bfloat16").denoiser.parameters()).dtype == torch.bfloat16
    assert load_model(pipeline, dtype="float32") is model
    assert {part.dtype for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder)} == {torch.float32}


def test_pipeline_object_with_parts_in_several_dtypes_is_made_one(pipeline: StableDiffusionPipeline) -> None:
    pipeline.unet.to(torch.float16)
    pipeline.vae.to(torch.bfloat16)
    load_model(pipeline)
    assert {part.dtype for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder)} == {torch.float32}


def test_pipeline_object_that_is_gone_is_an_error_that_says_so(micro_pipeline_folder: Path) -> None:
    source = load_model(StableDiffusionPipeline.from_pretrained(micro_pipeline_folder, safety_checker=None)).source
    unload_models()
    gc.collect()
    with pytest.raises(ValueError, match=r"pipeline object that is gone.*pass it again"):
        load_model(source)


@pytest.fixture
def other_family(tmp_path: Path) -> DDIMPipeline:
    unet = UNet2DModel(sample_size=8, block_out_channels=(4,), down_block_types=("DownBlock2D",),
                       up_block_types=("UpBlock2D",), layers_per_block=1, norm_num_groups=2)  # fmt: skip
    pipeline = DDIMPipeline(unet, DDIMScheduler())
    pipeline.save_pretrained(tmp_path / "other")
    return pipeline


def test_other_families_are_refused_by_name(
    other_family: DDIMPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "load_pipeline", None)
    for model in (other_family, tmp_path / "other"):
        with pytest.raises(
            ValueError, match=r"must be a pipeline .* takes latents; a DDIMPipeline has unet, scheduler"
        ):
            load_model(model)


def test_hub_id_without_a_network_says_what_to_download(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match=r"'nobody/no-such-model'.*`hf download nobody/no-such-model .*pass it: model='"):
        gym.make("DDPO-SD-v0", model="nobody/no-such-model")


def test_hub_id_without_a_network_is_an_error_of_the_command_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    arguments = ["--model=CompVis/stable-diffusion-v1-4", f"--run-dir={tmp_path / 'run'}"]
    assert run_script("train_ppo", arguments, monkeypatch) == 2
    assert "hf download CompVis/stable-diffusion-v1-4" in capsys.readouterr().err


def test_hub_id_with_pickled_weights_alone_is_not_called_a_failed_download(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **arguments: Any) -> None:
        assert arguments["use_safetensors"] is True
        raise OSError("Could not find the necessary `safetensors` weights in {'unet/model.bin'} (variant=None)")

    index = DiffusionPipeline.load_config(resolve_source("tiny"))
    monkeypatch.setattr(DiffusionPipeline, "load_config", lambda _: index)
    monkeypatch.setattr(DiffusionPipeline, "download", refuse)
    with pytest.raises(
        OSError, match=r"'nobody/pickles' has no safetensors .*pickles are not loaded\. .*save_pretrained"
    ):
        load_model("nobody/pickles")


@pytest.mark.slow
def test_loading_prints_nothing() -> None:
    code = "from ddpo_env import load_model; load_model('tiny', 'cpu')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_warnings_of_transformers_come_back_after_a_pipeline_is_imported() -> None:
    logger = logging.getLogger("transformers.utils.import_utils")
    before = list(logger.filters)
    sources.family_of("StableDiffusionPipeline")
    assert logger.filters == before


def test_source_is_checked_without_loading(
    other_family: DDIMPipeline,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    micro_pipeline_folder: Path,
    pipeline: StableDiffusionPipeline,
) -> None:
    known = load_model(pipeline).source
    monkeypatch.setattr(models, "load_pipeline", None)
    for model in ("tiny", "points", "CompVis/stable-diffusion-v1-4", micro_pipeline_folder, known):
        check_source(model)
    with pytest.raises(ValueError, match="a DDIMPipeline has unet, scheduler"):
        check_source(tmp_path / "other")
    with pytest.raises(ValueError, match=r"model must be a bundled name .*; got 'tinny'"):
        check_source("tinny")


def test_folder_that_is_no_pipeline(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no diffusers pipeline: it has no model_index\.json"):
        load_model(tmp_path)


@pytest.mark.parametrize("content", ["not json", "{}", "[]", '{"_class_name": 5}'])
def test_folder_with_a_broken_index(tmp_path: Path, content: str) -> None:
    (tmp_path / "model_index.json").write_text(content)
    with pytest.raises(ValueError, match="holds no diffusers pipeline"):
        load_model(tmp_path)


@pytest.mark.parametrize("component", ["unet", "vae", "text_encoder"])
def test_pickled_weights_are_not_read(
    micro_pipeline_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, component: str
) -> None:
    folder = shutil.copytree(micro_pipeline_folder, tmp_path / "pickled")
    (weights,) = (folder / component).glob("*.safetensors")
    name = "pytorch_model.bin" if component == "text_encoder" else "diffusion_pytorch_model.bin"
    torch.save({}, weights.with_name(name))
    assert load_model(folder), "a pickle beside the safetensors is left alone"
    weights.unlink()
    unload_models()
    monkeypatch.setattr(torch, "load", None)
    with pytest.raises(
        ValueError, match=rf"must hold safetensors; {component} has only {name}, a pickle.*save_pretrained"
    ):
        load_model(folder)


@pytest.mark.parametrize("component", ["unet", "vae", "text_encoder"])
def test_missing_weights_are_an_error(micro_pipeline_folder: Path, tmp_path: Path, component: str) -> None:
    folder = shutil.copytree(micro_pipeline_folder, tmp_path / "incomplete")
    next((folder / component).glob("*.safetensors")).unlink()
    with pytest.raises(ValueError, match=rf"must hold safetensors; {component} has none"):
        load_model(folder)


def test_bundled_name_goes_before_a_folder_and_a_home_is_expanded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, micro_pipeline_folder: Path
) -> None:
    (tmp_path / "tiny").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(micro_pipeline_folder.parent))
    assert resolve_source("tiny") == str(Path(ddpo_env.__file__).parent / "data" / "tiny")
    assert resolve_source("~/micro") == str(micro_pipeline_folder.resolve())
    assert resolve_source("CompVis/stable-diffusion-v1-4") == "CompVis/stable-diffusion-v1-4"


def test_auto_device_and_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    assert resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert resolve_dtype("auto", torch.device("cpu")) == torch.float32
    assert resolve_dtype("auto", torch.device("cuda")) == torch.bfloat16


def test_embeddings_do_not_depend_on_the_batch_and_are_computed_once(
    micro_pipeline_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model(micro_pipeline_folder)
    together = model.encode_prompts(["a cat", "an ant", "a cat"])["prompt_embeds"]
    assert together.shape == (3, *model.conditioning_shapes["prompt_embeds"])
    assert torch.equal(together[0], together[2])
    assert not torch.equal(together[0], together[1])
    monkeypatch.setattr(model.pipeline, "encode_prompt", None)  # type: ignore[attr-defined]
    together.zero_()
    assert model.encode_prompts(["an ant"])["prompt_embeds"].abs().sum() > 0, "the cache is nobody else's to change"


def test_cached_prompts_have_a_limit_in_bytes(micro_pipeline_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_model(micro_pipeline_folder)
    prompts = ["a cat", "an ant", "a dog", "a fox"]
    expected = model.encode_prompts(prompts)["prompt_embeds"]
    monkeypatch.setattr("ddpo_env.models.families.encoded_prompts.CACHED_BYTES", 3 * expected[0].nbytes)
    assert torch.equal(model.encode_prompts(prompts)["prompt_embeds"], expected)
    kept = [prompt.text for prompt in model._encoded]  # type: ignore[attr-defined]
    assert kept == prompts[1:], "the ones that were used last"
    assert torch.equal(model.encode_prompts(prompts[:1])["prompt_embeds"][0], expected[0])


def test_image_does_not_depend_on_the_batch(micro_pipeline_folder: Path) -> None:
    for name in (micro_pipeline_folder, "tiny"):
        model = load_model(name, "cpu")
        latents = torch.randn(5, *model.latent_shape, generator=torch.Generator().manual_seed(0))
        together = model.decode(latents)
        assert together.dtype == torch.uint8
        assert together.is_contiguous()
        for row in range(5):
            assert torch.equal(together[row], model.decode(latents[row : row + 1])[0])
