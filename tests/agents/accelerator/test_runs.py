"""Whole runs on the pretend accelerator: what they learn, how they go on, and how they end."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.micro_agents import InterruptedReward, micro_config, resume_config
from helpers.pretend_accelerator import pretend_accelerator
from helpers.run_comparison import assert_same_run, rows
from safetensors.torch import load_file

from agents import run_training
from agents.training.preparation import prepare_run
from ddpo_env.models.loading import unload_models

SETTINGS: dict[str, Any] = {"device": "cuda", "dtype": "float32"}
SHORT: dict[str, Any] = {"num_inference_steps": 2, "samples_per_iteration": 4, "eval_samples": 1}
slow = partial(pytest.param, marks=pytest.mark.slow)
SECOND: dict[str, Any] = {"reward": "clip_score", "iterations": 1, "num_inference_steps": 2}


@pytest.mark.parametrize(
    "settings",
    [
        {"kl_coef": 0.1, "ema_decay": 0.9} | SHORT,
        slow({"algorithm": "reinforce", "updates_per_iteration": 1, "gradient_checkpointing": True}),
        slow({"algorithm": "rwr", "epochs": 2}),
        slow({"algorithm": "nft", "kl_coef": 0.1}),
        slow({"lora_rank": 0, "critic": True}),
    ],
    ids=lambda settings: "-".join(settings),
)
def test_run_learns_what_the_run_on_the_cpu_learns(
    settings: dict[str, Any], micro_pipeline_folder: Path, tmp_path: Path
) -> None:
    run_training(micro_config(micro_pipeline_folder, tmp_path / "cpu", iterations=2, **settings))
    unload_models()
    with pretend_accelerator(noise_of_host=True):
        run_training(micro_config(micro_pipeline_folder, tmp_path / "cuda", iterations=2, **SETTINGS, **settings))
        unload_models()
    weights = [load_file(tmp_path / name / "policy" / "policy.safetensors") for name in ("cpu", "cuda")]
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=1e-3, atol=1e-5)
    rewards = [
        [float(row["rollout/ep_rew_mean"]) for row in rows(tmp_path / name) if row["rollout/ep_rew_mean"]]
        for name in ("cpu", "cuda")
    ]
    assert len(rewards[0]) == 2
    np.testing.assert_allclose(rewards[1], rewards[0], rtol=1e-4)


@pytest.mark.usefixtures("accelerator")
@pytest.mark.parametrize("dtype", [slow("float32"), slow("bfloat16")])
def test_interrupted_run_goes_on_to_the_same_bits(
    dtype: str, micro_pipeline_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"device": "cuda", "dtype": dtype, "ema_decay": 0.9}
    run_training(micro_config(micro_pipeline_folder, tmp_path / "whole", **settings))
    monkeypatch.setattr("helpers.micro_agents.brightness", InterruptedReward(5))
    assert run_training(micro_config(micro_pipeline_folder, tmp_path / "run", **settings)).reward_after is None
    monkeypatch.undo()
    run_training(resume_config(tmp_path / "run"))
    assert_same_run(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize("begins_on", ["cuda", slow("cpu")])
def test_run_of_any_device_goes_on_where_it_is(begins_on: str, micro_pipeline_folder: Path, tmp_path: Path) -> None:
    def go_on(on: str, config: Any) -> None:
        unload_models()
        if on == "cpu":
            run_training(config())
            return
        with pretend_accelerator():
            run_training(config())
            unload_models()

    settings = SHORT | {"device": "auto", "dtype": "float32", "ema_decay": 0.9}
    go_on(begins_on, lambda: micro_config(micro_pipeline_folder, tmp_path, iterations=1, **settings))
    go_on({"cpu": "cuda", "cuda": "cpu"}[begins_on], lambda: resume_config(tmp_path, iterations=2))
    assert len(rows(tmp_path)) >= 2


@pytest.mark.usefixtures("accelerator")
@pytest.mark.parametrize(
    ("policy", "reward"), [slow("cuda", "cpu"), slow("cuda", "cuda:1"), slow("cuda:1", "cuda:0"), ("cpu", "cuda")]
)
def test_reward_may_be_on_another_device(policy: str, reward: str, tmp_path: Path) -> None:
    options = ("model=tiny", f"device={reward}")
    config = micro_config("tiny", tmp_path, device=policy, reward_options=options, **SECOND)
    run = prepare_run(config)
    assert run.train().reward_after is not None
    assert run.algorithm.device == torch.device(policy if ":" in policy or policy == "cpu" else "cuda:0")


@pytest.mark.usefixtures("accelerator")
def test_reward_on_another_device_gives_the_scores_of_the_cpu(tmp_path: Path) -> None:
    from rewards import load_reward

    images = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), dtype=np.uint8)
    scores = [
        load_reward("clip_score", model="tiny", device=device, dtype="float32")(images, ["a cat"] * 3, [{}] * 3)
        for device in ("cpu", "cuda", "cuda:1")
    ]
    for one in scores[1:]:
        np.testing.assert_allclose(one, scores[0], rtol=1e-5)


@pytest.mark.usefixtures("accelerator")
@pytest.mark.parametrize(
    "settings",
    [
        slow({"dtype": "bfloat16"}),
        slow({"dtype": "float16"}),
        slow({"dtype": "float32", "autocast": "bfloat16"}),
        slow({"dtype": "float32", "autocast": "float16"}),
        slow({"dtype": "auto", "gradient_checkpointing": True}),
    ],
    ids=lambda settings: "-".join(map(str, settings.values())),
)
def test_half_precision_trains(settings: dict[str, Any], micro_pipeline_folder: Path, tmp_path: Path) -> None:
    config = micro_config(micro_pipeline_folder, tmp_path, device="cuda", iterations=2, **settings)
    result = run_training(config)
    assert result.reward_after is not None
    trained = rows(tmp_path)
    assert 0 < float(trained[-1]["train/grad_norm"]) < 1e3
    assert float(trained[-1]["train/ratio_deviation"]) < 1e-3


def test_device_without_bfloat16_gets_float32(micro_pipeline_folder: Path, tmp_path: Path) -> None:
    unload_models()
    with pretend_accelerator(bfloat16=False):
        run = prepare_run(micro_config(micro_pipeline_folder, tmp_path, device="auto", iterations=1))
        assert run.algorithm.device.type == "cuda"
        assert next(run.algorithm.policy.parameters()).dtype == torch.float32
        unload_models()
