"""Sampling, evaluation and saved policies on the pretend accelerator."""

import dataclasses
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode
from helpers.micro_agents import micro_env, micro_policy, stir, weights

from agents.evaluation.evaluate import evaluate
from agents.evaluation.sample import SampleArguments, check_model, generate
from agents.policy.diffusion_policy import DiffusionPolicy
from ddpo_env.models.loading import load_model, unload_models
from ddpo_env.models.random_pipelines import ARCHITECTURES, build_pipeline
from rewards.judge.bert_score import BertScoreRecall

pytestmark = pytest.mark.usefixtures("accelerator")


@pytest.mark.slow
def test_sample_command_generates_on_the_device(micro_pipeline_folder: Path, tmp_path: Path) -> None:
    env = micro_env(micro_pipeline_folder, device="cuda", dtype="float32")
    stir(micro_policy(env)).save_lora(tmp_path)
    arguments = SampleArguments(
        model=str(micro_pipeline_folder),
        device="cuda",
        prompts=("a cat", "a dog"),
        num_inference_steps=1,
        seeds=(0,),
        lora=tmp_path,
        compare=True,
    )
    check_model(arguments)
    rows, labels = generate(arguments)
    assert [row.shape for row in rows] == [(2, 32, 32, 3)] * len(labels)
    assert not np.array_equal(rows[0], rows[1])
    unload_models()
    again, _ = generate(dataclasses.replace(arguments, lora=None, compare=False))
    np.testing.assert_array_equal(again[0], rows[0])


def test_evaluation_gives_the_same_samples_again_and_leaves_the_generators(micro_pipeline_folder: Path) -> None:
    env = micro_env(micro_pipeline_folder, 2, device="cuda", dtype="float32", autoreset_mode=AutoresetMode.DISABLED)
    policy = micro_policy(env)
    state = torch.cuda.get_rng_state()
    first, second = (evaluate(policy, env, ["a cat", "a dog", "a fox"], seed=3) for _ in range(2))
    np.testing.assert_array_equal(first.images, second.images)
    np.testing.assert_array_equal(first.rewards, second.rewards)
    assert torch.equal(torch.cuda.get_rng_state(), state)


@pytest.mark.parametrize(
    ("saved_on", "loaded_on"),
    [("cuda:1", "cuda:0"), *(pytest.param(*one, marks=pytest.mark.slow) for one in (("cuda", "cpu"), ("cpu", "cuda")))],
)
def test_policy_is_saved_on_one_device_and_loaded_on_another(
    saved_on: str, loaded_on: str, micro_pipeline_folder: Path, tmp_path: Path
) -> None:
    policy = micro_policy(micro_env(micro_pipeline_folder, device=saved_on, dtype="float32"))
    policy.save(tmp_path)
    loaded = DiffusionPolicy.load(tmp_path, device=loaded_on, dtype="float32")
    assert loaded.device == torch.device("cuda:0" if loaded_on == "cuda" else loaded_on)
    expected = weights(policy)
    assert all(torch.equal(value.cpu(), expected[name].cpu()) for name, value in weights(loaded).items())


def test_random_pipeline_is_made_without_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.random, "_fork_rng_warned_already", False)
    states = [torch.get_rng_state(), *torch.cuda.get_rng_state_all()]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipeline: Any = build_pipeline(next(iter(ARCHITECTURES)), "meta")
    assert pipeline is not None
    assert all(map(torch.equal, [torch.get_rng_state(), *torch.cuda.get_rng_state_all()], states))


def test_numpy_interface_of_the_environment_copies(micro_pipeline_folder: Path) -> None:
    env = micro_env(micro_pipeline_folder, 2, device="cuda", backend="numpy", render_mode="rgb_array")
    observation, _ = env.reset(seed=0)
    for _ in range(env.num_inference_steps):
        observation, _, ended, _, infos = env.step(observation["latents"] * 0.5)
    assert ended.all()
    assert isinstance(observation["latents"], np.ndarray)
    rendered = env.render()
    assert rendered is not None
    assert rendered[0].shape == (32, 32, 3)
    assert infos["final_info"]["image"].dtype == np.uint8
    assert load_model(micro_pipeline_folder, "cuda").denoiser is env.model.denoiser


def test_sentences_are_compared_whatever_device_encodes_them() -> None:
    candidates, references = ["a cat riding a bike", "a dog"], ["a cat on a bike", "a fox"]
    recalls = [BertScoreRecall("tiny", device=device, dtype="float32") for device in ("cpu", "cuda")]
    expected, scores = (recall(candidates, references) for recall in recalls)
    np.testing.assert_allclose(scores, expected, rtol=1e-5)
    assert recalls[1].loaded.model.device.type == "cuda", "it stays where it is"
