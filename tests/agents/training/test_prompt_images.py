"""Runs whose prompts have images: from a JSON Lines file to an update, resumed, examined and evaluated."""

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from helpers.micro_agents import micro_config, resume_config
from helpers.more_families import build
from helpers.prompt_images import KONTEXT, likeness, picture, prompt_file

from agents import DiffusionPolicy
from agents.commands.doctor.checks import CHECKS
from agents.commands.doctor.examination import Examination
from agents.config.resolve import resolve
from agents.config.train_config import TrainConfig
from agents.distributed import Processes
from agents.evaluation.compare import EvaluateArguments, evaluate_models
from agents.evaluation.sample import SampleArguments, generate, generate_films
from agents.planning.flops import estimate_time
from agents.planning.plan import describe_plan
from agents.training.preparation import check_run, prepare_run, run_training
from ddpo_env.models.protocol import encode
from ddpo_env.prompts.images import describe_image

EDITS = [("make it red", 0), ("make it red", 1), ("a dog", 1)]
ARGUMENTS = tuple(f"{name}={value}" for name, value in KONTEXT.items())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """FLUX.1 Kontext as it comes from the Hub, and prompts with images."""
    path = tmp_path_factory.mktemp("kontext")
    build("flux_kontext").save_pretrained(path / "model")
    prompt_file(path / "set", EDITS)
    return path


def picture_of(folder: Path, seed: int) -> Path:
    return folder / "set" / "pictures" / f"{seed}.png"


def config_of(folder: Path, run: Path, **settings: Any) -> TrainConfig:
    own: dict[str, Any] = {
        "prompts": str(folder / "set/edits.jsonl"),
        "reward": "helpers.prompt_images:likeness",
        "pipeline_arguments": ARGUMENTS,
        "guidance_scale": 3.5,
        "iterations": 1,
        "eval_interval": 0,
        "eval_samples": 2,
    }
    return micro_config(folder / "model", run, **own | settings)


def test_draft_refuses_images_of_the_prompts_before_and_after_the_model_is_known(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(folder, tmp_path / "run", algorithm="draft", reward="aesthetic", reward_options=("model=tiny",))
    message = "^prompts must have no images that the pipeline gets with algorithm draft, .*edits.jsonl'$"
    with pytest.raises(ValueError, match=message):
        check_run(config, Processes())
    monkeypatch.setattr("agents.config.resolve.with_images", lambda config: config)  # as with a model on the Hub
    with pytest.raises(ValueError, match=message):
        prepare_run(config)


def test_run_trains_on_the_image_of_each_prompt(folder: Path, tmp_path: Path) -> None:
    run = prepare_run(config_of(folder, tmp_path / "run"))
    assert run.config.run.pipeline_arguments == (*ARGUMENTS, "image=prompt:32x32")
    assert run.algorithm.context_key == "context"
    assert run.train(0.0).iterations == 1
    contexts = set(run.algorithm.rollout_buffer.contexts)
    assert contexts <= {
        f"{text} [image {describe_image(picture_of(folder, seed), '').digest[:16]}]" for text, seed in EDITS
    }
    assert len(contexts) > 1
    assert TrainConfig.read(tmp_path / "run").run.pipeline_arguments == run.config.run.pipeline_arguments

    policy = DiffusionPolicy.load(tmp_path / "run" / "policy", device="cpu")
    assert policy.model.conditioning_shapes["image_latents"] == (16, 16)
    latents = torch.randn(1, *policy.model.latent_shape).expand(2, -1, -1)
    prompts = [("a dog", {"image": picture(seed)}) for seed in (0, 1)]
    with torch.no_grad():
        first, second = policy.predict_output(latents, torch.full((2,), 900.0), encode(policy.model, prompts))
    assert (first - second).abs().max() > 1e-3


def test_resumed_run_gives_the_bits_of_an_uninterrupted_one(folder: Path, tmp_path: Path) -> None:
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    run_training(config_of(folder, whole, iterations=2))
    shutil.copytree(whole, halves)
    shutil.rmtree(halves / "checkpoints" / "iteration_000002")
    for name in ("policy/policy.safetensors", "lora/pytorch_lora_weights.safetensors", "summary.json"):
        (halves / name).unlink()
    assert run_training(resume_config(halves)).iterations == 2
    for name in ("policy/policy.safetensors", "lora/pytorch_lora_weights.safetensors"):
        assert (halves / name).read_bytes() == (whole / name).read_bytes(), name


def test_resumed_run_may_find_the_same_images_elsewhere_and_takes_no_others(folder: Path, tmp_path: Path) -> None:
    moved, run = Path(shutil.copytree(folder / "set", tmp_path / "set")) / "edits.jsonl", tmp_path / "run"
    config = resolve(config_of(folder, run, prompts=str(moved)))
    run.mkdir()
    (run / "config.yaml").write_text(yaml.safe_dump(config.as_dict()), encoding="utf-8")
    elsewhere = resolve(resume_config(run, prompts=str(folder / "set/edits.jsonl")))
    assert elsewhere.run.prompts_sha256 == config.run.prompts_sha256
    picture(5).save(tmp_path / "set/pictures/1.png")
    with pytest.raises(ValueError, match=r"prompts: '.*edits.jsonl' has changed since the run began"):
        resolve(resume_config(run))


def test_plan_says_who_gets_the_images(folder: Path, micro_pipeline_folder: Path, tmp_path: Path) -> None:
    checked = check_run(config_of(folder, tmp_path / "run"), Processes())
    lines = describe_plan(checked.config, estimate=estimate_time(checked.config))
    assert "images     one for each prompt, for the pipeline and the reward: 32x32 pixels" in lines
    other = config_of(folder, tmp_path / "run", pipeline_arguments=()).changed(model=str(micro_pipeline_folder))
    lines = describe_plan(check_run(other, Processes()).config)
    assert "images     one for each prompt, for the reward only: the pipeline's call takes no image" in lines
    hub = replace(checked.config, model="somebody/an-editor").changed(pipeline_arguments=())
    assert any("for the pipeline if its call takes an image" in line for line in describe_plan(hub))


def test_doctor_finds_such_a_run_healthy(folder: Path, tmp_path: Path) -> None:
    checked = check_run(config_of(folder, tmp_path / "run", dtype="float32"), Processes())
    examination = Examination(checked, tmp_path)
    names = ("prompts", "denoiser", "decoder", "parity", "stochastic sampler", "ratio", "LoRA")
    findings = [CHECKS[name](examination) for name in names]
    examination.close()
    assert {one.name: one.level for one in findings} == {one.name: "green" for one in findings}


def test_evaluation_gives_the_images_to_the_stock_pipeline(folder: Path, tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"model": str(folder / "model"), "device": "cpu", "num_inference_steps": 2}
    arguments |= {"pipeline_arguments": ARGUMENTS, "guidance_scale": 3.5}
    evaluate_models(
        EvaluateArguments(
            prompts=(str(folder / "set/edits.jsonl"),), rewards=("helpers.prompt_images:likeness",),
            samples_per_prompt=1, output=tmp_path / "out", **arguments,
        )
    )  # fmt: skip
    report = json.loads((tmp_path / "out/evaluation.json").read_text())
    assert "image=prompt:32x32" in report["settings"]["pipeline_arguments"]

    stock = build("flux_kontext")
    noise = torch.Generator().manual_seed(report["settings"]["seed"])
    pixels = stock(
        prompt="make it red", image=picture(0), num_inference_steps=2, guidance_scale=3.5, generator=noise,
        output_type="np", **KONTEXT,
    ).images  # fmt: skip
    expected = likeness((pixels * 255).round(), [], [{"image": picture_of(folder, 0)}])[0]
    with (tmp_path / "out/scores.csv").open(newline="") as file:
        first = next(csv.DictReader(file))
    assert float(first["helpers.prompt_images:likeness"]) == pytest.approx(expected, abs=1e-3)
    seed = report["settings"]["seed"]
    chosen = SampleArguments(prompts=(str(folder / "set/edits.jsonl"),), seeds=(seed,), **arguments)
    (images,), _ = generate(chosen)
    np.testing.assert_array_equal(images[0], (pixels[0] * 255).round())
    (film,), _ = generate_films(chosen)
    assert film.shape == (2, *images.shape)
    np.testing.assert_array_equal(film[-1], images)
    with pytest.raises(ValueError, match="image of prompt 'a cat' must be the path of an image file; got None"):
        generate(SampleArguments(prompts=("a cat",), seeds=(0,), **arguments | {
            "pipeline_arguments": (*ARGUMENTS, "image=prompt:32x32")}))  # fmt: skip
