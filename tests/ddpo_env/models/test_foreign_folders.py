"""A model folder that somebody else wrote: nothing in it runs, and nothing that it lacks is made up."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import transformers
from diffusers import StableDiffusionPipeline
from helpers.micro_families import FAMILIES, micro_family
from safetensors.torch import load_file, save_file

from ddpo_env.models import check_source, load_model, unload_models
from ddpo_env.models.outline import outline_model
from ddpo_env.models.sources import family_in

READERS = [outline_model, check_source, load_model]
Change = Callable[[str, dict[str, Any]], None]


@pytest.fixture
def folder(micro_pipeline_folder: Path, tmp_path: Path) -> Path:
    unload_models()
    return shutil.copytree(micro_pipeline_folder, tmp_path / "foreign")


@pytest.fixture
def change(folder: Path) -> Change:
    def change_json(file: str, entries: dict[str, Any]) -> None:
        content = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps(content | entries))

    return change_json


def plant(folder: Path) -> Path:
    """Write modules that leave a mark when they are imported, wherever a library could look for them."""
    mark = folder.parent / "it_ran"
    for place in (".", "unet", "vae", "text_encoder", "tokenizer", "scheduler"):
        for name in ("pipeline", "modeling", "diffusers", "transformers", "configuration", "tokenization", "bomb"):
            (folder / place / f"{name}.py").write_text(f"open({str(mark)!r}, 'w').close()\nclass Bomb: ...\n")
    return mark


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize(
    ("file", "entries", "is_refused"),
    [
        ("model_index.json", {}, False),
        ("model_index.json", {"custom_pipeline": "pipeline"}, True),
        ("model_index.json", {"_class_name": ["pipeline", "Bomb"]}, True),
        ("model_index.json", {"_class_name": "bomb.Bomb"}, True),
        ("model_index.json", {"unet": ["bomb", "Bomb"]}, True),
        ("model_index.json", {"unet": ["diffusers", "bomb.Bomb"]}, True),
        ("model_index.json", {"unet": ["diffusers", "StableDiffusionPipeline"]}, True),
        ("model_index.json", {"unet": ["diffusers", "DDIMScheduler"]}, True),
        ("model_index.json", {"scheduler": ["diffusers", "UNet2DModel"]}, True),
        ("model_index.json", {"text_encoder": ["transformers", "AutoModel"]}, True),
        ("model_index.json", {"text_encoder": ["transformers", "pipeline"]}, True),
        ("model_index.json", {"tokenizer": ["transformers", "AutoTokenizer"]}, True),
        ("unet/config.json", {"_class_name": "StableDiffusionPipeline"}, True),
        ("unet/config.json", {"_class_name": ["bomb", "Bomb"]}, True),
        ("unet/config.json", {"auto_map": {"AutoModel": "modeling.Bomb"}}, False),
        ("unet/config.json", {"quantization_config": {"quant_method": "bitsandbytes"}}, True),
        ("scheduler/scheduler_config.json", {"_class_name": "bomb.Bomb"}, True),
        ("scheduler/scheduler_config.json", {"_class_name": "utils"}, True),
        ("text_encoder/config.json", {"auto_map": {"AutoModel": "modeling.Bomb"}, "trust_remote_code": True}, False),
        ("text_encoder/config.json", {"quantization_config": {"quant_method": "awq"}}, True),
        ("text_encoder/config.json", {"attn_implementation": "somebody/kernel"}, True),
        ("text_encoder/config.json", {"transformers_weights": "../other.safetensors"}, True),
        ("tokenizer/tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["tokenization.Bomb", None]}}, False),
        ("tokenizer/tokenizer_config.json", {"tokenizer_class": "bomb.Bomb"}, False),
    ],
)
def test_nothing_in_a_folder_runs(
    folder: Path, change: Change, read: Any, file: str, entries: dict[str, Any], is_refused: bool
) -> None:
    mark = plant(folder)
    change(file, entries)
    if is_refused:
        with pytest.raises(ValueError, match="model"):
            read(folder)
    else:
        assert read(folder) is None or read is not check_source
    assert not mark.exists()


def test_a_class_of_another_kind_is_not_even_looked_up(
    folder: Path, change: Change, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked_up: list[str] = []
    for library in (diffusers, transformers):
        find = type(library).__getattr__

        def note(self: Any, name: str, find: Any = find) -> Any:
            looked_up.append(name)
            return find(self, name)

        monkeypatch.setattr(type(library), "__getattr__", note)
    change("model_index.json", {"unet": ["diffusers", "training_utils"], "vae": ["transformers", "trainer"]})
    with pytest.raises(ValueError, match="component unet"):
        check_source(folder)
    assert not {"training_utils", "trainer"} & set(looked_up)


def test_an_adapter_beside_a_text_encoder_is_refused(folder: Path) -> None:
    (folder / "text_encoder" / "adapter_config.json").write_text('{"base_model_name_or_path": "somebody/else"}')
    with pytest.raises(ValueError, match=r"component text_encoder .*adapter_config\.json names an adapter"):
        check_source(folder)


def test_an_index_of_shards_names_safetensors_beside_it_only(folder: Path) -> None:
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    index = {"metadata": {}, "weight_map": dict.fromkeys(load_file(weights), "../../bomb.bin")}
    (folder / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"component unet .*missing \.\./\.\./bomb\.bin"):
        check_source(folder)


@pytest.mark.parametrize("component", ["text_encoder", "unet", "vae"])
def test_weights_of_another_part_are_an_error(folder: Path, component: str) -> None:
    (file,) = (folder / component).glob("*.safetensors")
    other = {"text_encoder": "unet", "unet": "vae", "vae": "text_encoder"}[component]
    shutil.copy(next((folder / other).glob("*.safetensors")), file)
    with pytest.raises(ValueError, match=rf"component {component} of model .*missing keys: .*, \.\.\."):
        load_model(folder)


@pytest.mark.parametrize("component", ["text_encoder", "unet", "vae"])
def test_one_missing_key_is_an_error_that_names_it(folder: Path, component: str) -> None:
    (file,) = (folder / component).glob("*.safetensors")
    tensors = load_file(file)
    key = sorted(tensors)[-1]
    tensors.pop(key)
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"component {component} of model .*1 missing keys: .*{key.split('.')[-2]}"):
        load_model(folder)


@pytest.mark.parametrize("component", ["text_encoder", "unet", "vae"])
def test_a_weight_of_another_shape_is_an_error_that_names_the_component(folder: Path, component: str) -> None:
    (file,) = (folder / component).glob("*.safetensors")
    tensors = load_file(file)
    key = sorted(tensors)[-1]
    save_file(tensors | {key: torch.zeros(3)}, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"component {component} of model"):
        load_model(folder)


@pytest.mark.parametrize("component", ["text_encoder", "unet", "vae"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_an_error(folder: Path, component: str, value: float) -> None:
    (file,) = (folder / component).glob("*.safetensors")
    tensors = load_file(file)
    key = sorted(tensors)[0]
    tensors[key].view(-1)[0] = value
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"component {component} of model .* must have finite weights; .* 1 of "):
        load_model(folder)


def test_weights_that_overflow_in_the_dtype_are_an_error(folder: Path) -> None:
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["conv_in.bias"][0] = 1e6
    save_file(tensors, file, metadata={"format": "pt"})
    assert load_model(folder, dtype="bfloat16")
    with pytest.raises(ValueError, match=r"finite weights; in torch\.float16 .*conv_in\.bias"):
        load_model(folder, dtype="float16")


@pytest.mark.parametrize("value", [0, -1.0, float("nan"), float("inf"), 1e39, "1", None])
def test_scaling_factor_must_be_a_scale(folder: Path, change: Change, value: Any) -> None:
    change("vae/config.json", {"scaling_factor": value})
    with pytest.raises(ValueError, match="scaling_factor in the configuration of component vae .* above 0 and at most"):
        load_model(folder)


def test_a_shift_must_be_finite(folder: Path, change: Change) -> None:
    change("vae/config.json", {"shift_factor": float("nan")})
    with pytest.raises(ValueError, match="shift_factor in the configuration of component vae .* finite and at most"):
        load_model(folder)


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize("component", ["text_encoder", "tokenizer", "unet", "vae", "scheduler"])
def test_a_component_that_is_missing_is_named(folder: Path, change: Change, read: Any, component: str) -> None:
    change("model_index.json", {component: [None, None]})
    with pytest.raises(ValueError, match=f"must have the component {component} of a StableDiffusionPipeline"):
        read(folder)
    index = json.loads((folder / "model_index.json").read_text())
    del index[component]
    (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=f"must have the component {component} of a StableDiffusionPipeline"):
        read(folder)


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize("component", ["text_encoder", "tokenizer", "unet", "vae", "scheduler"])
def test_a_folder_of_a_component_that_is_missing_is_named(folder: Path, read: Any, component: str) -> None:
    shutil.rmtree(folder / component)
    with pytest.raises(ValueError, match=f"must hold the component {component}; it has no folder of that name"):
        read(folder)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_folder_of_every_family_gives_the_pipelines_weights(name: str, tmp_path: Path) -> None:
    pipeline = micro_family(name)
    pipeline.save_pretrained(tmp_path / "model")
    loaded = load_model(tmp_path / "model").pipeline  # type: ignore[attr-defined]
    assert type(loaded) is type(pipeline)
    for part, component in pipeline.components.items():
        if isinstance(component, torch.nn.Module):
            again = getattr(loaded, part).state_dict()
            assert all(torch.equal(value, again[key]) for key, value in component.state_dict().items())
    assert {key: value for key, value in loaded.config.items() if key[0] != "_"} == {
        key: value for key, value in pipeline.config.items() if key[0] != "_"
    }
    assert outline_model(tmp_path / "model") is not None


@pytest.mark.parametrize("sharded", [False, True])
def test_files_of_a_variant_alone_are_taken(micro_pipeline_folder: Path, tmp_path: Path, sharded: bool) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(micro_pipeline_folder, safety_checker=None)
    size = {"max_shard_size": "20KB"} if sharded else {}
    pipeline.to(torch.float16).save_pretrained(tmp_path / "half", variant="fp16", **size)
    assert all(".fp16" in file.name for file in (tmp_path / "half").rglob("*.safetensors"))
    assert (len(list((tmp_path / "half" / "unet").glob("*.safetensors"))) > 1) == sharded
    check_source(tmp_path / "half")
    loaded = load_model(tmp_path / "half", "cpu")
    for name, value in pipeline.unet.state_dict().items():
        assert torch.equal(loaded.denoiser.state_dict()[name], value.float()), name


def test_full_files_beside_a_variant_are_taken_and_two_variants_alone_refused(folder: Path) -> None:
    unet = folder / "unet" / "diffusion_pytorch_model.safetensors"
    halved = {name: value.half() for name, value in load_file(unet).items()}
    save_file(halved, unet.with_suffix(".fp16.safetensors"), metadata={"format": "pt"})
    expected = load_file(unet)
    found = load_model(folder, "cpu").denoiser.state_dict()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    unet.rename(unet.with_suffix(".ema.safetensors"))
    with pytest.raises(ValueError, match="without a variant, or of one; unet has ema, fp16"):
        check_source(folder)


def fingerprint(folder: Path) -> str:
    return str(family_in(str(folder))[1].fingerprint())


def test_fingerprint_follows_the_content_and_not_the_place(folder: Path, micro_pipeline_folder: Path) -> None:
    first = fingerprint(micro_pipeline_folder)
    assert fingerprint(folder) == first
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({key: 1.001 * value for key, value in load_file(file).items()}, file, metadata={"format": "pt"})
    assert fingerprint(folder) != first
