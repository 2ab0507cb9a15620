"""`ddpo-export`: the exported files give the images of the run's LoRA in stock diffusers, and the card is true."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from diffusers import DDIMScheduler, DiffusionPipeline, StableDiffusionPipeline
from helpers.micro_agents import files_below, micro_config
from helpers.micro_families import micro_family
from helpers.scripts import run_script
from huggingface_hub import ModelCard
from PIL import Image

from agents.commands.export.command import ExportArguments, export
from agents.commands.export.kohya import KOHYA_FILE
from agents.evaluation.compare import EvaluateArguments, evaluate_models
from agents.training.preparation import run_training
from agents.training.result import RunResult

LORA = "pytorch_lora_weights.safetensors"
CALL: dict[str, Any] = {"num_inference_steps": 3, "guidance_scale": 2.0, "eta": 1.0, "output_type": "np"}


def image_of(pipe: Any, lora: Path | None, weight_name: str = LORA, **call: Any) -> Any:
    if lora is not None:
        pipe.load_lora_weights(lora, weight_name=weight_name)
    made = pipe("a cat", generator=torch.Generator().manual_seed(0), **{**CALL, **call}).images
    if lora is not None:
        pipe.unload_lora_weights()
    return made


@pytest.fixture(scope="module")
def exported(finished: RunResult, micro_pipeline_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export") / "lora"
    export(ExportArguments(run=finished.folder.path, output=folder, base_model=str(micro_pipeline_folder)))
    return folder


def test_both_files_give_the_images_of_the_runs_lora(
    exported: Path, finished: RunResult, micro_pipeline_folder: Path
) -> None:
    pipe = StableDiffusionPipeline.from_pretrained(micro_pipeline_folder)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    expected = image_of(pipe, finished.folder.lora)
    assert not np.array_equal(expected, image_of(pipe, None))
    for name in (LORA, KOHYA_FILE):
        np.testing.assert_array_equal(image_of(pipe, exported, name), expected)
    pipe.load_lora_weights(exported)  # two files are there, and diffusers takes its own
    np.testing.assert_array_equal(image_of(pipe, None), expected)
    assert files_below(exported) == {LORA, KOHYA_FILE, "README.md", "curve.png", "samples.png"}


def test_card_says_what_the_hub_and_a_reader_need(exported: Path, finished: RunResult) -> None:
    text = (exported / "README.md").read_text("utf-8")
    metadata = ModelCard(text).data.to_dict()
    assert metadata == yaml.safe_load(text.split("---")[1])
    assert metadata["library_name"] == "diffusers"
    assert metadata["license"] == "unknown"
    assert {"text-to-image", "stable-diffusion", "lora"} <= set(metadata["tags"])
    assert "base_model" not in metadata  # a folder is no id of the Hub
    before, after = finished.reward_before, finished.reward_after
    assert f"| {before:.4g} | {after:.4g} |" in text
    assert "No other strength than 1 was measured" in text
    for name in re.findall(r"!\[[^]]*\]\(([^)]*)\)", text):
        assert Image.open(exported / name).size[0] > 100
    assert str(finished.folder.path.parent) not in text


def run_example(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    (code,) = re.findall(r"^```python\n(.*?)^```$", (folder / "README.md").read_text("utf-8"), re.DOTALL | re.MULTILINE)
    monkeypatch.chdir(folder)
    names: dict[str, Any] = {}
    torch.manual_seed(7)
    exec(compile(code, "README.md", "exec"), names)
    return names["sample"]


def test_example_samples_as_the_run_did(
    exported: Path,
    finished: RunResult,
    micro_pipeline_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(exported, folder)
    sample = run_example(folder, monkeypatch)
    pipe = StableDiffusionPipeline.from_pretrained(micro_pipeline_folder)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.load_lora_weights(finished.folder.lora)
    torch.manual_seed(7)
    expected = pipe("a cat", num_inference_steps=3, guidance_scale=2.0, eta=1.0).images[0]
    np.testing.assert_array_equal(np.asarray(sample), np.asarray(expected))
    np.testing.assert_array_equal(np.asarray(Image.open(folder / "sample.png")), np.asarray(expected))


def test_flow_has_no_kohya_form_and_the_command_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, run, folder = tmp_path / "model", tmp_path / "run", tmp_path / "lora"
    micro_family("stable_diffusion_3").save_pretrained(model)
    run_training(micro_config(model, run, iterations=1, eval_samples=2, guidance_scale=1.5))
    assert run_script("export", [run, folder, "--base-model", model, "--license", "mit"], monkeypatch) == 0
    assert (
        "no file for ComfyUI or AUTOMATIC1111: kohya's form is for UNets, and a StableDiffusion3Pipeline"
        in capsys.readouterr().out
    )
    assert not (folder / KOHYA_FILE).exists()
    sample = run_example(folder, monkeypatch)
    pipe = DiffusionPipeline.from_pretrained(model)
    pipe.load_lora_weights(run / "lora")
    torch.manual_seed(7)
    expected = pipe("a cat", num_inference_steps=3, guidance_scale=1.5).images[0]
    np.testing.assert_array_equal(np.asarray(sample), np.asarray(expected))


def test_strength_is_that_of_the_evaluation(
    finished: RunResult, micro_pipeline_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lora, run = finished.folder.lora, finished.folder.path
    (tmp_path / "two.txt").write_text("a cat\na fox")
    evaluate_models(
        EvaluateArguments(
            model=str(micro_pipeline_folder),
            lora=lora,
            num_inference_steps=2,
            device="cpu",
            rewards=("jpeg_compressibility",),
            prompts=(str(tmp_path / "two.txt"),),
            samples_per_prompt=1,
            strengths=(0.5, 1.0),
            output=tmp_path / "evaluation",
        )
    )
    path = tmp_path / "evaluation" / "evaluation.json"
    report = json.loads(path.read_text())
    for result in report["results"]:  # the best one is the one in the middle, whatever the images are
        result["score"]["mean"] = {0.0: 1.0, 0.5: 3.0, 1.0: 2.0}[result["strength"]]
    path.write_text(json.dumps(report))
    own = {"base_model": str(micro_pipeline_folder), "evaluation": tmp_path / "evaluation"}
    export(ExportArguments(run=run, output=tmp_path / "lora", **own))
    text = (tmp_path / "lora" / "README.md").read_text("utf-8")
    assert 'pipe.set_adapters("ddpo", 0.5)' in text
    assert "### jpeg\\_compressibility" in text
    assert "strength 0.5 has the highest mean" in capsys.readouterr().out
    report["lora_sha256"] = "0" * 64
    path.write_text(json.dumps(report))
    command = f"ddpo-evaluate --run {run} --lora {lora}"
    with pytest.raises(ValueError, match=f"evaluation must be of the LoRA that is exported.*{re.escape(command)}"):
        export(ExportArguments(run=run, output=tmp_path / "other", **own))


def test_what_cannot_be_exported_is_refused_and_nothing_is_written(
    finished: RunResult, micro_pipeline_folder: Path, tmp_path: Path
) -> None:
    whole = tmp_path / "whole"
    shutil.copytree(finished.folder.path, whole)
    names = {"copy": "config.yaml", "unfinished": "summary.json", "damaged": "progress.csv", "files": None}
    for name, missing in names.items():
        shutil.copytree(whole, tmp_path / name)
        if missing is not None:
            (tmp_path / name / missing).unlink()
    config = yaml.safe_load((whole / "config.yaml").read_text())
    (tmp_path / "files" / "config.yaml").write_text(yaml.safe_dump(config | {"prompts": "/secret/words.txt"}))
    run_training(micro_config("points", tmp_path / "points", iterations=1))
    (tmp_path / "taken").mkdir()
    own = {"base_model": str(micro_pipeline_folder)}
    cases: list[tuple[str, dict[str, Any], str]] = [
        ("nowhere", own, "run must be the folder of a run, with a config.yaml; got .*nowhere"),
        ("copy", own, "run must be the folder of a run, with a config.yaml; got .*copy"),
        ("unfinished", own, r"run must be finished; .* ddpo-train --resume .*unfinished.* --iterations 3$"),
        ("damaged", own, "damaged' is damaged: progress.csv has no rewards"),
        ("points", own, r"run must have trained a LoRA; .*\(lora_rank=0\)"),
        ("whole", {}, "base_model must be given, because others do not have the run's model .*micro"),
        ("whole", {"base_model": "sd14-random"}, "base_model must be given"),
        ("whole", {"base_model": str(whole / "config.yaml")}, "base_model must be a Hub id, or a folder .* the file"),
        ("whole", {"base_model": "tiny"}, "lora .* does not fit model 'tiny'|was trained for another model"),
        ("whole", {"base_model": "a`b/c"}, "base_model must be a Hub id"),
        ("files", own, r"prompt must be given for a run with a prompt file, 'words\.txt'"),
        ("whole", {**own, "prompt": "a\nb"}, "prompt must be one line"),
        ("whole", {**own, "license": "My Own"}, "license must be an identifier of the Hub"),
        ("whole", {**own, "repo_id": "name"}, "repo_id must be user/name"),
        ("whole", {**own, "evaluation": whole}, "evaluation must be the folder that ddpo-evaluate wrote"),
        ("whole", {**own, "output": tmp_path / "taken"}, "output must be a folder that does not exist yet"),
    ]
    for run, arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            export(ExportArguments(**{"run": tmp_path / run, "output": tmp_path / "new", **arguments}))
        assert not (tmp_path / "new").exists(), message
    assert not list(tmp_path.glob(".*"))


def test_model_of_the_hub_needs_its_configurations(finished: RunResult, tmp_path: Path, monkeypatch: Any) -> None:
    """Without them nobody knows how the pipeline is called; nothing is downloaded for it."""
    shutil.copytree(finished.folder.path, tmp_path / "run")
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(config | {"model": "somebody/micro-model"}))
    arguments = ExportArguments(run=tmp_path / "run", output=tmp_path / "lora", repo_id="me/lora")
    with pytest.raises(ValueError, match=r"hf download somebody/micro-model --include '\*\.json'"):
        export(arguments)
    monkeypatch.setattr("agents.commands.export.base_model.snapshot_download", lambda name, **_: config["model"])
    export(arguments)
    text = (tmp_path / "lora" / "README.md").read_text("utf-8")
    metadata = ModelCard(text).data.to_dict()
    assert (metadata["base_model"], metadata["base_model_relation"]) == ("somebody/micro-model", "adapter")
    assert 'pipe.load_lora_weights("me/lora", weight_name="pytorch_lora_weights.safetensors"' in text
