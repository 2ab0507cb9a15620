"""A reward that fails: the run ends with its error, and goes on later as if nothing had happened."""

import sys

import numpy as np
import pytest
import yaml
from helpers import micro_agents
from helpers.micro_agents import InterruptedReward, brightness, micro_config, resume_config
from helpers.run_comparison import assert_same_run, rows
from helpers.scripts import MINIATURE, run_script

from agents.config.train_config import train_config
from agents.distributed import Processes
from agents.training.checkpoint import latest_checkpoint
from agents.training.preparation import check_run, run_training


class FailingReward:
    """Brightness, but the `n`-th call finds nobody at home."""

    def __init__(self, n):
        self.left = n
        self.__name__ = "brightness"

    def __call__(self, images, prompts, metadata):
        self.left -= 1
        if self.left == 0:
            try:
                raise ConnectionError("refused")
            except ConnectionError as error:
                raise RuntimeError("the judge [at home] has left") from error
        return brightness(images, prompts, metadata)


class LosesTheThird:
    """Brightness, but the third image of every call has none."""

    def __init__(self):
        self.__name__ = "brightness"

    def __call__(self, images, prompts, metadata):
        scores = brightness(images, prompts, metadata)
        scores[2:3] = np.nan
        return scores


# Calls of the reward: 2 before training, then 2 per iteration, and 2 more at the end of the second and the third.
@pytest.mark.parametrize(
    ("interval", "call", "done"), [(0, 1, 0), (0, 3, 0), (0, 7, 1), (1, 6, 1), (3, 5, 1), (3, 10, 2), (0, 11, 2)]
)
def test_run_goes_on_from_the_last_finished_iteration(whole, learner, tmp_path, monkeypatch, interval, call, done):
    folder = tmp_path / "run"
    config = micro_config(learner, folder, checkpoint_interval=interval)
    with monkeypatch.context() as patch:
        patch.setattr(micro_agents, "brightness", FailingReward(call))
        with pytest.raises(RuntimeError, match="has left") as caught:
            run_training(config)
    assert "raised by the reward brightness" in caught.value.__notes__[0]
    text = (folder / "error.txt").read_text()
    assert "ConnectionError: refused" in text
    assert "the judge [at home] has left" in text
    assert latest_checkpoint(folder / "checkpoints").name == f"iteration_{done:06d}"
    run_training(resume_config(folder))
    assert_same_run(folder, whole.folder.path)


def test_script_says_what_failed_and_how_to_go_on(learner, monkeypatch, capsys, tmp_path):
    run = tmp_path / "a run"
    reward = FailingReward(4)
    monkeypatch.setattr(micro_agents, "brightness", reward)
    places = [] if learner == "points" else [f"--model={learner}"]
    arguments = [*MINIATURE, "--iterations=3", "--checkpoint-interval=0"]
    arguments += ["--model=points", "--lora-rank=0"] if learner == "points" else places
    named = [*places, "--reward=helpers.micro_agents:brightness"]
    arguments.append(named[-1])
    assert run_script("train_ppo", [*arguments, f"--run-dir={run}"], monkeypatch) == 1
    shown = capsys.readouterr()
    expected = (
        "error: RuntimeError: the judge [at home] has left (raised by the reward brightness, asked about 4 samples)"
    )
    assert shown.err.splitlines() == [expected]
    assert "The run is saved after 2 iterations" in shown.out
    assert f"{sys.executable} train_ppo.py --resume '{run}' {' '.join(named)}" in shown.out
    assert "Traceback" not in shown.out
    assert run_script("train_ppo", [f"--resume={run}", *named], monkeypatch) == 0
    assert not (run / "error.txt").exists()


class Absent:
    """A judge that is not there when it is looked for."""

    def load(self):
        raise RuntimeError("no answer from http://localhost:8000/v1")

    def __call__(self, images, prompts, metadata):
        raise AssertionError("nobody asked")


def test_reward_that_cannot_be_loaded_is_an_error_before_anything_is_written(monkeypatch, capsys, tmp_path):
    arguments = [*MINIATURE, f"--reward={__name__}:Absent", f"--run-dir={tmp_path / 'run'}"]
    assert run_script("train_ppo", arguments, monkeypatch) == 2
    assert capsys.readouterr().err == "error: no answer from http://localhost:8000/v1\n"
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("reward", "options", "message"),
    [
        ("vlm_vqa", ("model=tiny",), "vlm_vqa needs metadata with questions and .*; prompt 'a quokka' has {}"),
        ("tiny_reader", (), "tiny_reader knows only prompts of the bundled model's words .*; got 'a quokka'"),
        ("jpeg_compressibility:1,tiny_reader:1:raw", (), "tiny_reader knows only .*; got 'a quokka'"),
    ],
)
def test_prompts_that_a_reward_cannot_score_are_refused_before_anything_is_loaded(
    monkeypatch, tmp_path, reward, options, message
):
    monkeypatch.setattr("rewards.networks.pretrained.load_cached", lambda *_: pytest.fail("a network was loaded"))
    (tmp_path / "prompts.txt").write_text("a quokka")
    settings = {"prompts": str(tmp_path / "prompts.txt"), "run_dir": tmp_path / "run", "device": "cpu"}
    with pytest.raises(ValueError, match=message):
        check_run(train_config(reward=reward, reward_options=options, **settings), Processes())
    held_out = {"holdout_reward": reward, "holdout_reward_options": options}
    with pytest.raises(ValueError, match=message) as refused:
        check_run(train_config(**held_out, **settings), Processes())
    assert f"of holdout_reward={reward!r}" in refused.value.__notes__


def test_ctrl_c_before_training_is_one_line(monkeypatch, capsys, tmp_path):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("ddpo_env.vector_env.load_model", interrupted)
    assert run_script("train_ppo", [*MINIATURE, f"--run-dir={tmp_path / 'run'}"], monkeypatch) == 130
    assert capsys.readouterr().err == "Interrupted.\n"


def test_run_that_drops_samples_is_resumed_like_any_other(learner, tmp_path, monkeypatch):
    drop = {"non_finite_rewards": "drop"}
    with monkeypatch.context() as patch:
        patch.setattr(micro_agents, "brightness", LosesTheThird())
        run_training(micro_config(learner, tmp_path / "whole", **drop))
    stopping = InterruptedReward(6)
    stopping._reward = LosesTheThird()
    with monkeypatch.context() as patch:
        patch.setattr(micro_agents, "brightness", stopping)
        assert run_training(micro_config(learner, tmp_path / "run", **drop)).iterations == 1
        run_training(resume_config(tmp_path / "run"))
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    table = rows(tmp_path / "whole")
    assert [row["rollout/dropped_samples"] for row in table] == ["", "2", "2", "2"]
    assert [row["eval/dropped_samples"] for row in table] == ["1", "", "1", "1"]
    assert all(np.isfinite(float(row["eval/reward_mean"])) for row in table if row["eval/reward_mean"])
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["training"]["non_finite_rewards"] == "drop"


def test_option_changes_nothing_where_nothing_is_dropped(whole, learner, tmp_path):
    whole = whole.folder.path
    run_training(micro_config(learner, tmp_path, non_finite_rewards="drop"))
    for name in ("policy/policy.safetensors", "checkpoints/iteration_000003/tensors.safetensors"):
        assert (tmp_path / name).read_bytes() == (whole / name).read_bytes()
    extra = {"rollout/dropped_samples", "eval/dropped_samples"}
    for mine, theirs in zip(rows(tmp_path), rows(whole), strict=True):
        assert {k: v for k, v in mine.items() if k not in extra and not k.startswith("time/")} == {
            k: v for k, v in theirs.items() if not k.startswith("time/")
        }
        assert {mine[name] for name in extra} <= {"0", ""}


def test_held_out_samples_without_any_score_are_an_error(learner, tmp_path, monkeypatch):
    monkeypatch.setattr(micro_agents, "brightness", lambda images, prompts, metadata: [np.nan] * len(images))
    with pytest.raises(ValueError, match="all 6 rewards of the held-out samples are NaN or infinite"):
        run_training(micro_config(learner, tmp_path, non_finite_rewards="drop"))
