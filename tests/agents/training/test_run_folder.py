"""A run folder has one run, one writer, and no way out of it."""

import os
import signal
import subprocess
import sys

import pytest
from helpers.paths import ROOT

from agents.training.run_folder import RunFolder

HOLD = """
import sys, time
from agents.training.run_folder import RunFolder
folder = RunFolder(sys.argv[1], resume=True)
folder.make()
print("held", flush=True)
time.sleep(60)
"""


def test_lock_is_seen_by_other_processes_and_ends_with_its_own(tmp_path):
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], env=os.environ | {"PYTHONPATH": path}, stdout=subprocess.PIPE
    )
    assert process.stdout.readline() == b"held\n"
    for resume in (True, False):
        with pytest.raises(ValueError, match=f"run_dir '{tmp_path}' is in use by another process"):
            RunFolder(tmp_path, resume).make()
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    folder = RunFolder(tmp_path, resume=True)
    folder.make()
    folder.release()
    RunFolder(tmp_path, resume=True).make()


def test_runs_of_the_same_second_have_folders_of_their_own(tmp_path):
    runs = [RunFolder(tmp_path / "run", unique=True) for _ in range(3)]
    for run in runs:
        run.make()
    assert [run.path.name for run in runs] == ["run", "run-2", "run-3"]
    assert all(run.checkpoints.is_dir() and run.checkpoints.parent == run.path for run in runs)


@pytest.mark.parametrize(
    "file",
    ["checkpoints/iteration_000010/state.json", "progress.csv", "lora/weights", "tensorboard/events", "policy/x"],
)
def test_folder_with_files_of_another_run_is_refused_and_named(tmp_path, file):
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).touch()
    with pytest.raises(ValueError, match=rf"holds a run already \({file.split('/')[0]}\)"):
        RunFolder(tmp_path)


def test_folder_of_a_start_that_was_killed_and_of_other_things_is_taken(tmp_path):
    (tmp_path / "notes.txt").touch()
    folder = RunFolder(tmp_path)
    folder.make()
    folder.release()
    part = tmp_path / "checkpoints" / ".iteration_000000.1.part"
    part.mkdir()
    RunFolder(tmp_path).make()
    assert (tmp_path / "notes.txt").is_file()
    assert not part.exists()


@pytest.mark.parametrize("link", ["samples", "policy/policy.json", "checkpoints/iteration_000001", "config.yaml.part"])
def test_run_with_a_link_in_it_is_not_resumed(tmp_path, link):
    (tmp_path / "outside").mkdir()
    path = tmp_path / "run" / link
    path.parent.mkdir(parents=True)
    path.symlink_to(tmp_path / "outside")
    with pytest.raises(ValueError, match=f"must not contain links.*{link}"):
        RunFolder(tmp_path / "run", resume=True)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes in folders here")
def test_run_with_a_pipe_in_it_is_not_resumed(tmp_path):
    os.mkfifo(tmp_path / "progress.csv")  # reading it would wait forever
    with pytest.raises(ValueError, match=r"must contain only files and folders; .*progress\.csv' is neither"):
        RunFolder(tmp_path, resume=True)


@pytest.mark.parametrize(
    "content", [b"\xff\xfe", b"iteration,reward\nx,1\n", b"iteration,reward\n1\n", b"iteration\n1,2\n", b'a\n"1\n']
)
def test_damaged_metrics_are_seen_before_anything_is_loaded(tmp_path, content):
    (tmp_path / "progress.csv").write_bytes(content)
    with pytest.raises(ValueError, match=r"progress\.csv' must be the table of metrics that the run wrote; "):
        RunFolder(tmp_path, resume=True)


def test_folder_itself_may_be_a_link(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "name").symlink_to(tmp_path / "real")
    folder = RunFolder(tmp_path / "name")
    folder.make()
    folder.write_config({"a": 1})
    assert (tmp_path / "real" / "config.yaml").read_text() == "a: 1\n"


@pytest.mark.parametrize(("name", "kind"), [("lora", "folder"), ("policy", "folder"), ("summary.json", "file")])
def test_file_where_a_folder_must_be_is_seen_before_training(tmp_path, name, kind):
    path = tmp_path / name
    path.touch() if kind == "folder" else path.mkdir()
    with pytest.raises(ValueError, match=f"{name}' must be a {kind}"):
        RunFolder(tmp_path, resume=True)


def test_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"run_dir .*file/run' cannot be written"):
        RunFolder(tmp_path / "file" / "run").make()
    with pytest.raises(ValueError, match="run_dir must be the path of a folder; got ''"):
        RunFolder("")


def test_nothing_depends_on_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = RunFolder("run")
    folder.make()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    folder.write_error(RuntimeError("ε"))
    assert "ε" in (tmp_path / "run" / "error.txt").read_text(encoding="utf-8")
    assert str(folder) == "run", "as it was given"


def test_curve_is_drawn_whatever_the_backend_is_called(tmp_path):
    program = "import sys; from pathlib import Path; from agents.evaluation.plots import reward_curve\n"
    program += "reward_curve(Path(sys.argv[1]), [1.0], [(0, 1.0)], 'reward')"
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"MPLBACKEND": "foo", "PYTHONPATH": path}
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "reward.png")], env=environment, check=True)
    assert (tmp_path / "reward.png").read_bytes().startswith(b"\x89PNG")
