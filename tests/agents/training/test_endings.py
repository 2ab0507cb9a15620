"""Every way out of a run is an end: what is finished is saved, the exit code tells why, and the run can go on."""

import io
import os
import re
import shutil
import signal
import sys
import threading

import pytest
from helpers import micro_agents
from helpers.micro_agents import brightness, files_below, micro_config, resume_config
from helpers.run_comparison import assert_same_run, rows
from helpers.scripts import MINIATURE, run_script

import agents.training.run
from agents import RunListener, prepare_run
from agents.output.files import remove
from agents.training import command
from agents.training.checkpoint import Snapshot, latest_checkpoint
from agents.training.console import TensorBoardCurves
from agents.training.preparation import run_training


class ActingReward:
    """Brightness; its `n`-th call does something first."""

    def __init__(self, n, act):
        self.left = n
        self.act = act
        self.__name__ = "brightness"

    def __call__(self, images, prompts, metadata):
        self.left -= 1
        if self.left == 0:
            self.act()
        return brightness(images, prompts, metadata)


@pytest.fixture(autouse=True)
def signals_are_not_ignored():
    """Whoever starts the tests in the background or with nohup lets them ignore signals, and a run would too."""
    names = [name for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    before = {name: signal.getsignal(getattr(signal, name)) for name in names}
    for name in names:
        handler = signal.default_int_handler if name == "SIGINT" else signal.SIG_DFL
        signal.signal(getattr(signal, name), handler)
    yield
    for name, handler in before.items():
        signal.signal(getattr(signal, name), handler)


def sending(number):
    return lambda: os.kill(os.getpid(), number)


def leave():
    sys.exit("no API key")


def script(run, model, *arguments):
    return [
        *MINIATURE,
        *(["--lora-rank=0"] if model == "points" else []),
        "--iterations=3",
        "--checkpoint-interval=0",
        "--reward=helpers.micro_agents:brightness",
        f"--model={model}",
        f"--run-dir={run}",
        *arguments,
    ]


def newest(run):
    return latest_checkpoint(run / "checkpoints").name


# Calls of the reward: one before training, then one per iteration.
def test_reward_that_leaves_is_an_error(learner, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(micro_agents, "brightness", ActingReward(4, leave))
    assert run_script("train_ppo", script(tmp_path / "run", learner), monkeypatch) == 1
    shown = capsys.readouterr()
    assert shown.err.startswith("error: RuntimeError: sys.exit('no API key') was raised by the reward brightness")
    assert "The run is saved after 2 iterations" in shown.out
    assert "--resume" in shown.out
    assert "no API key" in (tmp_path / "run" / "error.txt").read_text()
    assert newest(tmp_path / "run") == "iteration_000002"


def test_module_that_leaves_is_an_error_before_the_run(monkeypatch, capsys, tmp_path):
    (tmp_path / "leaving_reward.py").write_text("import sys\nsys.exit()\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    arguments = [*MINIATURE, "--reward=leaving_reward:score", f"--run-dir={tmp_path / 'run'}"]
    assert run_script("train_ppo", arguments, monkeypatch) == 2
    assert capsys.readouterr().err.startswith("error: sys.exit(None) was raised by the import of the reward")


class Leaving(RunListener):
    """Leaves after the second iteration."""

    def on_iteration(self, run):
        if run.iteration == 2:
            sys.exit(0)


def test_listener_that_leaves_keeps_the_finished_iteration(whole, learner, tmp_path):
    run = prepare_run(micro_config(learner, tmp_path, checkpoint_interval=0))
    run.listeners.append(Leaving())
    with pytest.raises(SystemExit):
        run.train()
    assert (tmp_path / "error.txt").exists()
    assert newest(tmp_path) == "iteration_000001"
    run_training(resume_config(tmp_path))
    assert_same_run(tmp_path, whole.folder.path)


STOPS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


@pytest.mark.parametrize("number", STOPS)
def test_signals_save_the_finished_iterations(learner, monkeypatch, capsys, tmp_path, number):
    run = tmp_path / "run"
    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        patch.setattr(micro_agents, "brightness", ActingReward(4, sending(number)))
        assert run_script("train_ppo", script(run, learner), patch) == 128 + number
    assert signal.getsignal(number) is before
    assert "Stopped after 2 iterations; the run is saved. To continue:" in capsys.readouterr().out
    assert newest(run) == "iteration_000002"
    assert (run / "policy" / "policy.safetensors").exists()
    assert not (run / "error.txt").exists()
    assert run_script("train_ppo", script(tmp_path / "alone", learner), monkeypatch) == 0
    run_training(resume_config(run))
    assert_same_run(run, tmp_path / "alone")


def test_signals_during_the_saving_are_ignored(whole, learner, monkeypatch, tmp_path):
    write = Snapshot.write

    def interrupted(self, *arguments, **options):
        os.kill(os.getpid(), signal.SIGTERM)
        path = write(self, *arguments, **options)
        os.kill(os.getpid(), signal.SIGINT)
        return path

    reward = ActingReward(6, lambda: (monkeypatch.setattr(Snapshot, "write", interrupted), sending(signal.SIGINT)()))
    monkeypatch.setattr(micro_agents, "brightness", reward)
    stopped = run_training(micro_config(learner, tmp_path, checkpoint_interval=0))
    assert (stopped.iterations, stopped.reward_after) == (1, None)
    monkeypatch.undo()
    assert newest(tmp_path) == "iteration_000001"
    run_training(resume_config(tmp_path))
    assert_same_run(tmp_path, whole.folder.path)


def test_signal_while_an_iteration_is_logged_and_saved_comes_after_both(learner, monkeypatch, tmp_path):
    write = Snapshot.write

    def interrupted(self, *arguments, **options):
        if self.iteration == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return write(self, *arguments, **options)

    monkeypatch.setattr(Snapshot, "write", interrupted)
    assert run_training(micro_config(learner, tmp_path)).iterations == 2
    assert newest(tmp_path) == "iteration_000002"
    assert [row["time/iterations"] for row in rows(tmp_path)] == ["0", "1", "2"]


def test_signal_while_the_run_starts_leaves_a_run_that_goes_on(whole, learner, monkeypatch, tmp_path):
    start = TensorBoardCurves.__init__

    def interrupted(self, *arguments, **options):
        os.kill(os.getpid(), signal.SIGTERM)
        start(self, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(TensorBoardCurves, "__init__", interrupted)
        assert run_training(micro_config(learner, tmp_path)).iterations == 0
    assert newest(tmp_path) == "iteration_000000"
    assert not (tmp_path / "error.txt").exists()
    run_training(resume_config(tmp_path))
    assert_same_run(tmp_path, whole.folder.path)


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="needs SIGHUP")
def test_signal_that_the_program_ignores_stays_ignored(learner, monkeypatch, tmp_path):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        monkeypatch.setattr(micro_agents, "brightness", ActingReward(4, sending(signal.SIGHUP)))
        assert run_training(micro_config(learner, tmp_path)).iterations == 3
    finally:
        signal.signal(signal.SIGHUP, before)


def test_run_in_a_thread_needs_no_signals(learner, tmp_path):
    results = []
    config = micro_config(learner, tmp_path, iterations=1, eval_interval=0, eval_samples=2)
    thread = threading.Thread(target=lambda: results.append(run_training(config)))
    thread.start()
    thread.join()
    assert results[0].iterations == 1


def times(folder):
    return {name: (folder / name).stat().st_mtime_ns for name in files_below(folder)}


def test_resuming_a_finished_run_says_so_and_changes_nothing(learner, monkeypatch, capsys, tmp_path):
    run = tmp_path / "my run"
    assert run_script("train_ppo", script(run, learner), monkeypatch) == 0
    capsys.readouterr()
    before = times(run)
    monkeypatch.setattr(micro_agents, "brightness", ActingReward(1, leave))
    resume = [f"--resume={run}", "--reward=helpers.micro_agents:brightness", f"--model={learner}"]
    assert run_script("train_ppo", resume, monkeypatch) == 0
    shown = capsys.readouterr().out
    assert "The run had finished its 3 iterations already" in shown
    assert f"--resume '{run}'" in shown
    assert times(run) == before


def test_run_that_died_before_its_summary_is_completed(whole, learner, monkeypatch, tmp_path):
    with monkeypatch.context() as patch:
        patch.setattr(agents.training.run, "reward_curve", lambda *_: leave())
        with pytest.raises(SystemExit):
            run_training(micro_config(learner, tmp_path))
    assert (tmp_path / "policy" / "policy.safetensors").exists(), "weights are saved before pictures"
    assert learner == "points" or (tmp_path / "lora" / "pytorch_lora_weights.safetensors").exists()
    assert not (tmp_path / "summary.json").exists()
    run_training(resume_config(tmp_path))
    assert_same_run(tmp_path, whole.folder.path)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_more_iterations_than_planned_never_raise_the_learning_rate(learner, tmp_path, schedule):
    settings = {"learning_rate_schedule": schedule, "eval_interval": 0, "eval_samples": 2}
    run_training(micro_config(learner, tmp_path, iterations=2, **settings))
    run_training(resume_config(tmp_path, iterations=4))
    rates = [float(row["train/learning_rate"]) for row in rows(tmp_path)[1:]]
    assert len(rates) == 4
    assert sorted(rates, reverse=True) == rates
    assert rates[1] == rates[2] == rates[3] > 0, "the last planned rate stays"


def test_last_words_of_a_resumed_run_give_its_seconds_to_its_own_iterations(capsys, tmp_path):
    run_training(micro_config("points", tmp_path / "run", iterations=1, reward="points_ring"))
    capsys.readouterr()
    run = prepare_run(resume_config(tmp_path / "run", iterations=3))
    assert command.train(run) == 0
    shown = capsys.readouterr().out
    assert re.search(r"  3 iterations; this process trained 2 of them in \d+ s, start included", shown)


def test_points_train_from_the_command_line(monkeypatch, capsys, tmp_path):
    arguments = ["--model=points", "--reward=points_ring", "--lora-rank=0", "--iterations=2", "--eval-samples=4"]
    arguments += ["--samples-per-iteration=8", "--num-inference-steps=4", f"--run-dir={tmp_path / 'run'}"]
    assert run_script("train_ppo", arguments, monkeypatch) == 0
    assert f"{tmp_path / 'run'}/samples/before_after.png" in capsys.readouterr().out
    assert (tmp_path / "run" / "samples" / "before_after.png").exists(), "the model renders its points"


def test_samples_that_nothing_renders_need_no_pictures(monkeypatch, capsys, tmp_path):
    from ddpo_env.models import ModelAbilities
    from ddpo_env.models.families.points import PointsModel

    monkeypatch.setattr(PointsModel, "render", ModelAbilities.render)
    arguments = ["--model=points", "--reward=points_ring", "--lora-rank=0", "--iterations=1", "--eval-samples=4"]
    arguments += ["--samples-per-iteration=8", "--num-inference-steps=4", f"--run-dir={tmp_path / 'run'}"]
    assert run_script("train_ppo", arguments, monkeypatch) == 0
    assert "before_after" not in capsys.readouterr().out
    assert rows(tmp_path / "run")[1]["eval/reward_mean"]


def test_finished_training_ends_well_where_the_terminal_lacks_letters(learner, monkeypatch, tmp_path):
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    monkeypatch.setattr(sys, "stdout", terminal)
    assert run_script("train_ppo", script(tmp_path / "run", learner), monkeypatch) == 0
    terminal.seek(0)
    assert "before 0." in terminal.read()


def test_help_is_shown_where_the_terminal_lacks_letters(monkeypatch):
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    monkeypatch.setattr(sys, "stdout", terminal)
    with pytest.raises(SystemExit) as left:
        run_script("train_ppo", ["--help"], monkeypatch)
    assert left.value.code == 0
    terminal.seek(0)
    assert "--clip-range" in terminal.read()


@pytest.mark.parametrize("kept", ["samples/images/iteration_0003.png", None])
def test_run_whose_images_somebody_has_deleted_goes_on_to_its_end(whole, learner, tmp_path, kept):
    shutil.copytree(whole.folder.path, tmp_path / "run")
    for name in ("samples", "lora", "progress.csv"):
        remove(tmp_path / "run" / name)
    if kept is not None:
        (tmp_path / "run" / kept).parent.mkdir(parents=True)
        shutil.copyfile(whole.folder.path / kept, tmp_path / "run" / kept)
    run_training(resume_config(tmp_path / "run", iterations=4))
    assert (tmp_path / "run" / "summary.json").exists()
    assert (tmp_path / "run" / "samples" / "before_after.png").exists()
