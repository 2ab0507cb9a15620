"""A model folder is data: a library that its index names is looked up in diffusers and transformers, never imported."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.more_families import CASES, build
from torch import nn

from ddpo_env.models import check_source, load_model
from ddpo_env.models.outline import outline_model
from ddpo_env.sampler.gaussian_sampler import GaussianSampler

LIBRARY = "library_named_by_a_model"


@pytest.fixture
def change_index(micro_pipeline_folder: Path, tmp_path: Path) -> Callable[[str, Any], Path]:
    def change(component: str, place: Any) -> Path:
        folder = shutil.copytree(micro_pipeline_folder, tmp_path / "foreign")
        index = json.loads((folder / "model_index.json").read_text())
        (folder / "model_index.json").write_text(json.dumps(index | {component: place}))
        return folder

    return change


@pytest.mark.parametrize("read", [outline_model, check_source, load_model])
@pytest.mark.parametrize("component", ["unet", "tokenizer", "one_more"])
def test_no_other_library_is_imported(
    change_index: Callable[[str, Any], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    component: str,
    read: Callable[[Path], Any],
) -> None:
    (tmp_path / f"{LIBRARY}.py").write_text(f"open({str(tmp_path / 'it_ran')!r}, 'w')\nclass Part: ...\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    folder = change_index(component, [LIBRARY, "Part"])
    with pytest.raises(
        ValueError, match=rf"component {component} of model .* must be a class of diffusers or .*'{LIBRARY}'"
    ):
        read(folder)
    assert LIBRARY not in sys.modules
    assert not (tmp_path / "it_ran").exists()


@pytest.mark.parametrize("name", ["NoSuchClass", "pipelines", "__name__", "DDIMScheduler", "models.UNet2DModel", 5])
def test_a_name_that_is_no_class_is_refused(change_index: Callable[[str, Any], Path], name: Any) -> None:
    with pytest.raises(ValueError, match=rf"component unet of model .* must be a class of diffusers; .*{name!r}"):
        outline_model(change_index("unet", ["diffusers", name]))


def test_component_that_is_not_loaded_may_be_of_any_library(change_index: Callable[[str, Any], Path]) -> None:
    folder = change_index("safety_checker", ["stable_diffusion", "StableDiffusionSafetyChecker"])
    check_source(folder)
    outlined = outline_model(folder)
    assert outlined is not None
    assert {weight.device.type for weight in outlined.denoiser.parameters()} == {"meta"}


@pytest.mark.parametrize(
    "name",
    [
        name if name in ("qwen_image", "wan") else pytest.param(name, marks=pytest.mark.slow)
        for name in CASES
        if name != "stable_audio_3"  # a component is of a library that is not imported
    ],
)
def test_pipelines_whose_encoder_reads_its_mask_have_an_outline(name: str, tmp_path: Path) -> None:
    pipeline = build(name)
    pipeline.save_pretrained(tmp_path)
    outlined: Any = outline_model(tmp_path, pipeline_arguments=CASES[name].arguments)
    loaded: Any = load_model(pipeline, "cpu", "float32", pipeline_arguments=CASES[name].arguments)
    for shapes in ("latent_shape", "conditioning_shapes", "size"):
        assert vars(outlined)[shapes] == vars(loaded)[shapes]
    networks = [part for part in outlined.pipeline.components.values() if isinstance(part, nn.Module)]
    assert {weight.device.type for network in networks for weight in network.parameters()} == {"meta"}
    assert not any({"forward", "_hf_hook"} & vars(network).keys() for network in networks), "they are as they were"
    of_both = [GaussianSampler.from_model(model, 3, min_std=0.01) for model in (outlined, loaded)]
    assert of_both[0].timesteps.tolist() == of_both[1].timesteps.tolist()
