"""Runs that start from a LoRA: they resume to the same bits, and a LoRA that has changed is noticed."""

import shutil
from pathlib import Path
from typing import Any

import helpers.micro_agents
import pytest
from helpers.lora_files import save_kohya_lora
from helpers.micro_agents import InterruptedReward, micro_config, resume_config
from helpers.micro_pipeline import micro_pipeline
from helpers.run_comparison import assert_same_run, rows

from agents.config.resolve import resolve
from agents.config.train_config import TrainConfig
from agents.distributed import Processes
from agents.planning.plan import describe_plan
from agents.training.preparation import check_run, run_training


@pytest.fixture
def loras(tmp_path: Path) -> dict[str, Path]:
    pipeline = micro_pipeline()
    save_kohya_lora(tmp_path / "base.safetensors", pipeline.unet, pipeline.text_encoder)
    save_kohya_lora(tmp_path / "style.safetensors", pipeline.unet)
    return {"lora": tmp_path / "style.safetensors", "base_lora": tmp_path / "base.safetensors"}


@pytest.mark.slow
def test_run_with_both_is_the_same_when_it_is_resumed(
    micro_pipeline_folder: Path, tmp_path: Path, loras: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run_training(micro_config(micro_pipeline_folder, tmp_path / "whole", iterations=2, **loras))
    first = rows(whole.folder.path)[1]
    assert float(first["train/ratio_deviation"]) < 1e-5
    assert float(first["train/kl_to_pretrained"]) > 1e-4  # the reference is the model without the LoRA
    monkeypatch.setattr(helpers.micro_agents, "brightness", InterruptedReward(6))
    assert run_training(micro_config(micro_pipeline_folder, tmp_path / "part", iterations=2, **loras)).iterations == 1
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"path outside its folder \(model, lora, base_lora, reward\)"):
        check_run(TrainConfig().changed(resume=tmp_path / "part"), Processes())
    run_training(resume_config(tmp_path / "part", **loras))
    assert_same_run(tmp_path / "part", tmp_path / "whole")


def test_lora_that_has_changed_or_moved_is_noticed(
    micro_pipeline_folder: Path, tmp_path: Path, loras: dict[str, Path]
) -> None:
    run_training(micro_config(micro_pipeline_folder, tmp_path / "run", iterations=1, lora=loras["lora"]))
    moved = Path(shutil.copy(loras["lora"], tmp_path / "moved.safetensors"))
    shutil.copy(loras["base_lora"], loras["lora"])
    with pytest.raises(ValueError, match=r"lora: '.*style\.safetensors' has changed since the run began"):
        resolve(resume_config(tmp_path / "run", iterations=2, lora=loras["lora"]))
    assert resolve(resume_config(tmp_path / "run", iterations=2, lora=moved)).policy.lora == moved


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lora": "no/such"}, r"lora must be a \.safetensors file, or a folder with .*; got 'no/such'"),
        ({"base_lora": "no/such"}, r"base_lora must be a \.safetensors file, or a folder .*; got 'no/such'"),
        ({"lora": "{lora}", "lora_rank": 0}, "lora must be None with lora_rank=0.*base_lora"),
        ({"lora": "{lora}", "lora_rank": 3}, "lora_rank must not be given with lora, .*; got 3"),
        ({"lora": "{base_lora}"}, "also adapts text_encoder"),
        ({"lora": "{lora}", "model": "tiny"}, r"lora .*style\.safetensors' does not fit model .*tiny"),
        ({"base_lora": "{lora}", "model": "tiny"}, r"lora .*style\.safetensors' does not fit model .*tiny"),
    ],
)
def test_wrong_loras_are_refused_before_anything_is_loaded(
    micro_pipeline_folder: Path, tmp_path: Path, loras: dict[str, Path], settings: dict[str, Any], message: str
) -> None:
    filled = {name: value.format(**loras) if isinstance(value, str) else value for name, value in settings.items()}
    model = filled.pop("model", micro_pipeline_folder)
    config = TrainConfig().changed(model=str(model), run_dir=tmp_path / "run")
    with pytest.raises(ValueError, match=message):
        check_run(config.changed(**filled), Processes())
    assert not (tmp_path / "run").exists()


def test_plan_names_both(loras: dict[str, Path], tmp_path: Path) -> None:
    config = resolve(micro_config("tiny", tmp_path / "run", **loras).with_given(()))
    (line,) = [line for line in describe_plan(config) if line.startswith("LoRA")]
    assert line == f"LoRA       {loras['base_lora']} is merged, {loras['lora']} is trained further"
