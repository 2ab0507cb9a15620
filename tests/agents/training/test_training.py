"""A whole run: what it leaves behind, how it stops, and that a resumed one equals one that was never stopped."""

import io
import json
import re
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from diffusers import StableDiffusionPipeline
from helpers import micro_agents
from helpers.micro_agents import InterruptedReward, files_below, micro_config, resume_config
from helpers.paths import LORA_FILE
from helpers.run_comparison import assert_same_run, rows
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file

import agents.training.checkpoint
import agents.training.run_folder
import ddpo_env.vector_env
from agents.algorithms.policy_gradient.ppo import PPO
from agents.config.train_config import TrainConfig, train_config
from agents.policy.diffusion_policy import DiffusionPolicy
from agents.training import command
from agents.training.console import ConsoleWriter
from agents.training.preparation import run_training
from ddpo_env.models.families.points import PointsModel


def test_run_folder_holds_what_its_docstring_says(finished):
    files = files_below(finished.folder.path)
    events = {name for name in files if name.startswith("tensorboard/events.out.tfevents.")}
    assert len(events) == 1
    iterations = ("0000", "0002", "0003")
    assert files - events == {
        "config.yaml",
        "progress.csv",
        "summary.json",
        "reward.png",
        "reward_against_kl.png",
        "report.html",
        "samples/before_after.png",
        *(f"{folder}lora/pytorch_lora_weights.safetensors" for folder in ("", "best/")),
        *(f"{folder}policy/policy.{suffix}" for folder in ("", "best/") for suffix in ("json", "safetensors")),
        *(f"samples/{part}iteration_{i}.png" for i in iterations for part in ("", "images/")),
        *(f"samples/images/iteration_{i}.json" for i in iterations),
        *(
            f"checkpoints/iteration_00000{i}/{name}"
            for i in (2, 3)
            for name in ("tensors.safetensors", "state.json", "manifest.json")
        ),
        ".lock",
    }
    documented = re.findall(r"^    ([\w/., ]*?)(?:  |$)", agents.training.run_folder.__doc__, re.MULTILINE)
    parts = [part.split("0000")[0] for line in documented for part in line.split(", ") if part != "..."]
    undocumented = [name for name in files if not any(name.startswith(part) for part in parts)]
    assert undocumented == []
    sometimes = {"judge/", "error.txt", "best/"}
    assert sometimes < set(parts)
    assert all(any(name.startswith(part) for name in files) for part in set(parts) - sometimes if part)


@pytest.mark.parametrize(
    ("before", "after", "change"),
    [(-2.0, -1.5, "+25.0% of |before|"), (1e-16, -2.0, "(-2.000)"), (0.0, 0.25, "(+0.250)")],
)
def test_last_words_have_a_percentage_only_of_what_is_not_zero(finished, before, after, change):
    text = command.summary(replace(finished, reward_before=before, reward_after=after), PointsModel())
    assert change in text
    assert ("%" in text) == ("%" in change)


def test_last_words_name_a_faster_algorithm_only_where_it_was_measured(finished):
    slow = train_config(model="tiny", reward="vlm_alignment", reward_options=("model=tiny",))
    assert "nft" in command.summary(replace(finished, config=slow), PointsModel())
    judged = train_config(model="tiny", reward="aesthetic", reward_options=("model=tiny",))
    assert "--noise-window 2" in command.summary(replace(finished, config=judged), PointsModel())
    for change in ({"algorithm": "nft"}, {"reward": "jpeg_compressibility", "reward_options": ()}):
        assert "nft" not in command.summary(replace(finished, config=slow.changed(**change)), PointsModel())


def test_summary_says_how_the_run_went(finished):
    summary = json.loads((finished.folder.path / "summary.json").read_text())
    assert (summary["reward_before"], summary["reward_after"]) == (finished.reward_before, finished.reward_after)
    assert summary["reward_before"] != summary["reward_after"]
    assert summary["iterations"] == finished.iterations == 3
    assert summary["seed"] == 0
    assert summary["reward_queries"] == 24
    assert 0 < summary["wall_clock_seconds"] <= finished.wall_clock_seconds + 0.1
    assert summary["versions"]["torch"] == version("torch")
    assert {"stable_baselines3", "gymnasium", "diffusers", "transformers", "peft"} < summary["versions"].keys()


def test_metrics_have_a_row_for_every_iteration_and_one_before_the_first(finished):
    table = rows(finished.folder.path)
    assert [row["time/iterations"] for row in table] == ["0", "1", "2", "3"]
    assert [bool(row["eval/reward_mean"]) for row in table] == [True, False, True, True]
    assert float(table[0]["eval/reward_mean"]) == finished.reward_before
    assert float(table[3]["eval/reward_mean"]) == finished.reward_after
    assert [row["train/n_updates"] for row in table[1:]] == ["2", "4", "6"]
    rates = [float(row["train/learning_rate"]) for row in table[1:]]
    assert rates == pytest.approx([2e-3, 2e-3 * 2 / 3, 2e-3 / 3])
    assert all(float(row["train/ratio_deviation"]) <= 1e-5 for row in table[1:])
    assert list(table[0]) == sorted(table[0])


def test_config_file_is_the_configuration(finished):
    written = yaml.safe_load((finished.folder.path / "config.yaml").read_text())
    assert TrainConfig.from_dict(written) == finished.config
    assert written["iterations"] == 3
    assert written["reward"] == "helpers.micro_agents:brightness"


def test_configuration_survives_the_file_and_is_not_changed_by_a_run(tmp_path):
    config = train_config(run_dir=tmp_path, seed=3)
    text = yaml.safe_dump(config.as_dict())
    assert TrainConfig.from_dict(yaml.safe_load(text)) == config
    with pytest.raises(ValueError, match="there is no setting 'colour'"):
        TrainConfig.from_dict({**config.as_dict(), "colour": 1})


def test_written_lora_and_policy_give_the_same_output(finished, micro_pipeline_folder):
    folder = finished.folder
    pipeline = StableDiffusionPipeline.from_pretrained(micro_pipeline_folder, safety_checker=None)
    pipeline.load_lora_weights(str(folder.lora), weight_name=LORA_FILE)
    policy = DiffusionPolicy.load(folder.policy, device="cpu")
    embeds = policy.model.encode_prompts(["a cat"])["prompt_embeds"]
    inputs = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([334.0]), embeds
    with torch.no_grad():
        mine, theirs = policy.denoiser(*inputs).sample, pipeline.unet(*inputs).sample
        base = policy.model.denoiser(*inputs).sample
    torch.testing.assert_close(theirs, mine, rtol=1e-6, atol=1e-6)
    assert not torch.allclose(mine, base, rtol=0, atol=1e-5)


# Calls of the reward: 2 before training, then 2 per iteration, and 2 more at the end of the second and the third.
@pytest.mark.parametrize(("call", "done"), [(1, 0), (3, 0), (6, 1), (7, 1), (11, 2)])
def test_run_stopped_in_sampling_and_resumed_equals_one_that_was_not(whole, learner, tmp_path, monkeypatch, call, done):
    with monkeypatch.context() as patch:
        patch.setattr(micro_agents, "brightness", InterruptedReward(call))
        stopped = run_training(micro_config(learner, tmp_path / "run"))
    assert stopped.reward_after is None
    assert stopped.iterations == done
    assert (stopped.reward_before is None) == (done == 0)
    assert not (tmp_path / "run" / "summary.json").exists()
    resumed = run_training(resume_config(tmp_path / "run"))
    assert_same_run(tmp_path / "run", whole.folder.path)
    assert (resumed.reward_before, resumed.reward_after) == (whole.reward_before, whole.reward_after)
    assert resumed.config.reward == whole.config.reward


@pytest.mark.parametrize("update", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_run_stopped_in_an_update_and_resumed_equals_one_that_was_not(
    finished, micro_pipeline_folder, tmp_path, monkeypatch, update
):
    calls = []

    def interrupted(self, *arguments):
        calls.append(1)
        if len(calls) == update:
            raise KeyboardInterrupt
        return original(self, *arguments)

    original = PPO._update
    with monkeypatch.context() as patch:
        patch.setattr(PPO, "_update", interrupted)
        stopped = run_training(micro_config(micro_pipeline_folder, tmp_path / "run"))
    assert stopped.iterations == (update - 1) // 2
    saved = load_file(tmp_path / "run" / "policy" / "policy.safetensors")
    checkpoint = agents.training.checkpoint.latest_checkpoint(tmp_path / "run" / "checkpoints")
    kept = load_file(checkpoint / "tensors.safetensors")
    assert all(torch.equal(value, kept[f"policy.{name}"]) for name, value in saved.items()), "no half iteration is left"
    run_training(resume_config(tmp_path / "run"))
    assert_same_run(tmp_path / "run", finished.folder.path)


def test_run_killed_in_a_save_and_resumed_equals_one_that_was_not(whole, learner, tmp_path, monkeypatch):
    saves = []

    def full_disk(tensors, path):
        saves.append(path)
        if len(saves) >= 3:
            path.write_bytes(b"half")
            raise OSError("no space left on device")
        original(tensors, path)

    original = agents.training.checkpoint.save_file
    with monkeypatch.context() as patch:
        patch.setattr(agents.training.checkpoint, "save_file", full_disk)
        with pytest.raises(OSError, match="no space left"):
            run_training(micro_config(learner, tmp_path / "run"))
    assert list((tmp_path / "run" / "checkpoints").glob(".iteration_000002.*.part"))
    assert len(rows(tmp_path / "run")) == 3, "the iteration whose checkpoint failed is in the table"
    run_training(resume_config(tmp_path / "run"))
    assert_same_run(tmp_path / "run", whole.folder.path)


def test_finished_run_goes_on_to_more_iterations(learner, tmp_path):
    constant = {"learning_rate_schedule": "constant", "schedule_iterations": 1}
    for name, iterations in (("run", 1), ("at once", 2)):
        settings = {**constant, "iterations": iterations, "eval_interval": 1}
        run_training(micro_config(learner, tmp_path / name, **settings).with_given(()))
    longer = run_training(resume_config(tmp_path / "run", iterations=2))
    assert longer.config.iterations == longer.iterations == 2
    assert_same_run(tmp_path / "run", tmp_path / "at once")
    with pytest.raises(ValueError, match="iterations must be at least 2, which the run has finished; got 1"):
        run_training(resume_config(tmp_path / "run", iterations=1))


@pytest.mark.parametrize("interval", [0, 2])
def test_run_stopped_between_checkpoints_goes_on_from_its_last_iteration(
    whole, learner, tmp_path, monkeypatch, interval
):
    settings = {"checkpoint_interval": interval}
    with monkeypatch.context() as patch:
        patch.setattr(micro_agents, "brightness", InterruptedReward(6))
        assert run_training(micro_config(learner, tmp_path / "run", **settings)).iterations == 1
    assert agents.training.checkpoint.latest_checkpoint(tmp_path / "run" / "checkpoints").name == "iteration_000001"
    run_training(resume_config(tmp_path / "run"))
    assert_same_run(tmp_path / "run", whole.folder.path)


@pytest.mark.parametrize("policy", [{"critic": True}, {"lora_rank": 0}])
def test_critic_and_full_fine_tuning_run(micro_pipeline_folder, tmp_path, policy):
    config = micro_config(micro_pipeline_folder, tmp_path, **policy, iterations=1, eval_interval=0)
    result = run_training(config)
    assert (tmp_path / "lora").exists() == ("critic" in policy)
    assert ("train/explained_variance" in rows(tmp_path)[1]) == ("critic" in policy)
    assert DiffusionPolicy.load(tmp_path / "policy").options.lora_rank == config.policy.lora_rank
    assert result.reward_after != result.reward_before


@pytest.fixture
def no_model(monkeypatch):
    """Loading a model is a failure."""
    monkeypatch.setattr(ddpo_env.vector_env, "load_model", lambda *_: pytest.fail("a model was loaded"))


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"sample_batch_size": 5},
            "sample_batch_size must divide samples_per_iteration=8; got 5; .* is 4 or 8",
        ),
        ({"sample_batch_size": 3}, "sample_batch_size must divide samples_per_iteration=8; .* is 2 or 4"),
        ({"samples_per_prompt": 3}, "samples_per_prompt must divide sample_batch_size=4; .* is 2 or 4"),
        (
            {"updates_per_iteration": 7},
            "updates_per_iteration must divide samples_per_iteration=8; .* is 4 or 8",
        ),
        ({"train_batch_size": -1}, "train_batch_size must be in \\[0, 1000000\\]; got -1"),
        ({"timestep_fraction": 1.5}, r"timestep_fraction must be in \(0, 1\]; got 1.5"),
        ({"clip_range": float("nan")}, "clip_range must be in .*; got nan"),
        ({"stat_min_count": 40}, "stat_min_count must be between 2 and stat_buffer_size=32; got 40"),
        ({"target_kl": -1.0}, "target_kl must be in .*; got -1.0"),
        ({"eta": -1.0}, r"eta must be in \[0, 10\]; got -1.0"),
        ({"eta": 0.0}, "algorithm must not be ppo with a sampler without noise in the steps that are trained on.*rwr"),
        ({"eta": (0.0, 0.0, 1.0), "timestep_window": (0.0, 0.6)}, "algorithm must not be ppo .* 0 to 1 of 3"),
        (
            {"sampler": "ode", "algorithm": "reinforce", "updates_per_iteration": 1},
            "algorithm must not be reinforce with a sampler without noise",
        ),
        ({"eta": (0.0, 1.0)}, "eta must be one number, or one for each of the num_inference_steps=3 steps; got 2"),
        ({"noise_window": 4}, r"noise_window must be at most 3, .*timestep_window=\(0.0, 0.9\) of 3; got 4"),
        ({"shared_noise": True, "samples_per_prompt": 1}, "samples_per_prompt must be at least 2 with shared_noise"),
        (
            {"shared_noise": True, "algorithm": "rwr", "sampler": "ode"},
            "shared_noise must be False with a sampler with",
        ),
        ({"guidance_scale": -2.0}, r"guidance_scale must be in \[0, 100\]; got -2.0"),
        ({"lora_rank": -1}, r"lora_rank must be in \[0, 4096\]; got -1"),
        ({"lora_targets": "everything"}, "lora_targets must be one of attention, .*; got 'everything'"),
        ({"log_prob_reduction": "max"}, "log_prob_reduction must be one of mean, sum; got 'max'"),
        ({"learning_rate": 0.0}, "learning_rate must be in .*; got 0.0"),
        ({"adam_beta2": 1.0}, r"adam_beta2 must be in \[0, 1\); got 1.0"),
        ({"iterations": 0}, "iterations must be in .*; got 0"),
        ({"seed": -1}, "seed must be in .*; got -1"),
        ({"num_inference_steps": 0}, "num_inference_steps must be in .*; got 0"),
        ({"reward": "beauty"}, "reward must be one of"),
        ({"prompts": "monsters"}, "prompts must be one of"),
    ],
)
def test_what_cannot_run_is_refused_before_a_model_is_loaded(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        run_training(micro_config("tiny", tmp_path / "run", **settings))
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("no_model")
def test_folder_that_holds_a_run_is_refused(finished, tmp_path):
    before = (finished.folder.path / "config.yaml").read_bytes()
    with pytest.raises(ValueError, match=r"holds a run already \(samples, .*choose another folder, or resume the run"):
        run_training(micro_config("tiny", finished.folder.path, seed=5))
    assert (finished.folder.path / "config.yaml").read_bytes() == before
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="run_dir must be a folder; .* is a file"):
        run_training(micro_config("tiny", tmp_path / "file"))


@pytest.mark.usefixtures("no_model")
def test_resuming_what_is_no_run_is_a_clear_error(finished, tmp_path):
    def resume():
        return run_training(resume_config(tmp_path))

    with pytest.raises(ValueError, match=r"resume must be the folder of a run, with a config.yaml; got"):
        resume()
    for text in ("", "just text", "run: {colour: 1}", "run: [", "task: {}"):
        (tmp_path / "config.yaml").write_text(text)
        with pytest.raises(ValueError, match=r"resume: .*config.yaml' does not hold the settings of a run"):
            resume()
    (tmp_path / "config.yaml").write_text((finished.folder.path / "config.yaml").read_text())
    with pytest.raises(ValueError, match="resume: there is no checkpoint in"):
        resume()


def test_default_folder_is_named_after_the_reward(learner, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = micro_config(learner, None, iterations=1, eval_interval=0, eval_samples=2)
    result = run_training(config)
    assert config.run_dir is None, "a configuration is not changed"
    assert Path(str(result.folder)).parent == Path("runs")
    assert result.folder.path.parent == tmp_path / "runs"
    assert result.folder.path.name.startswith("helpers-micro_agents-brightness-20")


def test_images_before_and_after_are_of_the_same_prompts_and_seeds(finished):
    strips = [np.asarray(Image.open(finished.folder.images / f"iteration_000{i}.png")) for i in (0, 3)]
    assert strips[0].shape == strips[1].shape == (32, 6 * 32, 3)
    difference = np.abs(strips[0].astype(int) - strips[1].astype(int))
    assert 0 < difference.mean() < 5, "trained a little, from the same noise"
    width, height = Image.open(finished.folder.samples / "before_after.png").size
    assert width > 6 * 112
    assert height > 3 * 112


@pytest.mark.parametrize("terminal", [True, False])
def test_console_shows_iteration_reward_kl_and_time_left(terminal):
    text = io.StringIO()
    writer = ConsoleWriter(10, 4, Console(file=text, force_terminal=terminal, width=120))
    writer.write({"eval/reward_mean": 1.0}, {})
    writer.write({"rollout/reward_mean": -1.23456, "train/approx_kl": 2e-5, "rollout/dropped_samples": 3}, {})
    writer.close()
    shown = text.getvalue()
    for part in ("5/10", "reward -1.235", "KL 2.0e-05", "dropped 3", "left"):
        assert part in shown
    assert terminal == ("\x1b[" in shown)
    if not terminal:
        assert shown.count("\n") == 1


@pytest.mark.parametrize(
    ("samples", "sizes"), [(72, (72, 8, 4)), (256, (64, 8, 4)), (8, (8, 8, 4)), (10, (10, 5, 2)), (7, (7, 7, 1))]
)
def test_sizes_left_open_divide_the_samples_of_an_iteration(samples, sizes):
    training = train_config(samples_per_iteration=samples).resolved().training
    assert (training.sample_batch_size, training.samples_per_prompt, training.updates_per_iteration) == sizes
