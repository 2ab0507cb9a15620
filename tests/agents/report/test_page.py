"""The page: one file without requests, in which whatever comes from files is text; and how it is written and served."""

import io
import threading
import urllib.error
import urllib.request
import wave
from html.parser import HTMLParser

import numpy as np
import pytest
from helpers.micro_agents import micro_config
from helpers.run_folders import write_answers, write_run
from helpers.scripts import run_script
from PIL import Image

from agents.report import command
from agents.report.page import render
from agents.report.sample_files import sample_paths, write_samples
from agents.report.server import ReportServer

HOSTILE = "</script><script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'>\"'&"


class Page(HTMLParser):
    """What a browser would find: elements, and text that is not in a script or style."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.text, self._open = [], "", []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.text += " "
        self.elements.append((tag, dict(attrs)))
        self._open.append(tag)

    def handle_endtag(self, tag):
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data):
        if not {"script", "style"} & set(self._open[-1:]):
            self.text += data


def hostile_run(folder):
    """A run in which every text that is free is hostile."""
    run = write_run(folder, prompts=[HOSTILE] * 4, details={"answer": [HOSTILE] * 4}, is_finished=False)
    write_answers(run, {"prompt": HOSTILE, "questions": [HOSTILE], "answers": [HOSTILE]})
    (run / "error.txt").write_text(HOSTILE)
    settings = (run / "config.yaml").read_text().replace("prompts: simple_animals", f"prompts: {HOSTILE!r}")
    (run / "config.yaml").write_text(settings.replace("\\'", "''"))
    (run / "doctor.json").write_text(
        '{"findings": [{"name": "<b>", "level": "red\\" onclick=1", "meaning": "<script>window.hacked = 1</script>"}]}'
    )
    return run


def test_text_from_files_stays_text(tmp_path):
    page = Page(render([hostile_run(tmp_path / "<b>run")]))
    names = [tag for tag, _ in page.elements]
    assert names.count("script") == 2
    assert all("onerror" not in attributes and "onclick" not in attributes for _, attributes in page.elements)
    assert all(attributes["src"].startswith("data:") for tag, attributes in page.elements if "src" in attributes)
    for place in ("prompt and judge", "error", "doctor"):
        assert page.text.count("window.hacked = 1") >= 5, place
    assert "<b>run" in page.text


def test_page_asks_for_nothing_and_runs_only_its_own_script(tmp_path):
    text = render([write_run(tmp_path / "run")])
    (policy,) = [a["content"] for tag, a in Page(text).elements if a.get("http-equiv") == "Content-Security-Policy"]
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
    assert rules["default-src"] == "'none'"
    assert rules["script-src"].startswith("'sha256-")
    assert rules["img-src"] == rules["media-src"] == "data:"
    assert "connect-src" not in rules
    assert "://" not in text.replace("data:", "")


def test_report_of_a_real_run_is_written_by_the_run(finished):
    text = finished.folder.report.read_text("utf-8")
    page = Page(text)
    assert "finished" in page.text
    assert f"{finished.reward_after:.3g}" in page.text
    assert "Diversity" in page.text
    assert len(text) < 5_000_000


def test_several_runs_show_the_settings_in_which_they_differ(tmp_path):
    runs = [write_run(tmp_path / name, learning_rate=rate) for name, rate in (("slow", 1e-4), ("fast", 1e-2))]
    page = Page(render(runs))
    differing = page.text.split("Settings that differ")[1].split("All settings")[0]
    assert differing.split() == ["setting", "slow", "fast", "learning_rate", "0.0001", "0.01"]
    with pytest.raises(ValueError, match="1 to 6 folders; got 7"):
        render(runs[:1] * 7)


def test_runs_of_the_same_name_are_told_apart(tmp_path):
    runs = [write_run(tmp_path / parent / "run") for parent in ("a", "b")]
    assert all(str(run) in Page(render(runs)).text for run in runs)


def test_doctor_of_the_run_is_quoted(tmp_path):
    run = write_run(tmp_path / "run")
    (run / "doctor.json").write_text(
        '{"findings": [{"name": "ratio", "level": "amber", "meaning": "It is 1.1.", "advice": "Look."}]}'
    )
    assert "It is 1.1." in Page(render([run])).text


def test_sounds_and_videos_are_files_that_players_read(tmp_path):
    tone = np.stack([np.sin(np.arange(800) / 8), np.linspace(-2, 2, 800)]).astype(np.float32)
    write_samples(tmp_path, "iteration_0000", tone[None], 8000)
    (path,) = sample_paths(tmp_path, "iteration_0000")
    with wave.open(io.BytesIO(path.read_bytes())) as file:
        assert (file.getnchannels(), file.getframerate(), file.getnframes()) == (2, 8000, 800)
        played = np.frombuffer(file.readframes(800), "<i2").reshape(800, 2).T / 32767
    assert np.abs(played - tone.clip(-1, 1)).max() < 1e-4
    frames = np.zeros((1, 5, 300, 600, 3), np.uint8)
    frames[:, :, :, :, 0] = np.arange(5)[None, :, None, None] * 50
    write_samples(tmp_path, "iteration_0002", frames, None)
    (path,) = sample_paths(tmp_path, "iteration_0002")
    with Image.open(path) as film:
        assert (film.n_frames, film.size) == (5, (256, 128))
    write_samples(tmp_path, "iteration_0004", tone[None], None)
    assert sample_paths(tmp_path, "iteration_0004") == []


def test_report_that_cannot_be_written_is_a_warning_and_the_run_ends_well(tmp_path, monkeypatch, capsys):
    from agents.training import run as module
    from agents.training.preparation import run_training

    def fail(*_):
        raise OSError("the disk is full")

    monkeypatch.setattr(module, "write_report", fail)
    result = run_training(micro_config("points", tmp_path / "run", iterations=1, reward="points_ring"))
    assert result.folder.summary.exists()
    assert "report.html was not written: the disk is full" in " ".join(capsys.readouterr().out.split())


def test_report_of_a_run_that_an_error_stopped_says_so(tmp_path, monkeypatch):
    from agents.training.preparation import prepare_run
    from agents.training.run import Run

    run = prepare_run(micro_config("points", tmp_path / "run", reward="points_ring"))

    def fail(*_):
        raise RuntimeError("no more power")

    monkeypatch.setattr(Run, "_watch_reward", fail)
    with pytest.raises(RuntimeError, match="no more power"):
        run.train()
    text = (tmp_path / "run" / "report.html").read_text("utf-8")
    assert "stopped by an error after iteration 1" in text
    assert "no more power" in text


def test_command_writes_the_file_and_refuses_what_is_no_run(tmp_path, monkeypatch, capsys):
    run = write_run(tmp_path / "run")
    assert run_script("report", [run], monkeypatch) == 0
    assert (run / "report.html").read_text("utf-8").startswith("<!doctype html>")
    assert run_script("report", [run, run, "--output", tmp_path / "new" / "both.html"], monkeypatch) == 0
    assert (tmp_path / "new" / "both.html").exists()
    capsys.readouterr()
    assert run_script("report", [tmp_path], monkeypatch) == 2
    assert "must be the folder of a run" in capsys.readouterr().err
    assert run_script("report", [run, "--serve", "--port", "70000"], monkeypatch) == 2
    assert "port must be between 0 and 65535; got 70000" in capsys.readouterr().err
    assert run_script("report", [run, "--port", "8000"], monkeypatch) == 2
    assert "port must not be given without --serve, as nothing is served; got 8000" in capsys.readouterr().err


@pytest.fixture
def server(tmp_path):
    """A server of one run, on a free port."""
    with ReportServer([write_run(tmp_path / "run", is_finished=False)], 0) as served:
        thread = threading.Thread(target=served.serve_forever, daemon=True)
        thread.start()
        yield served
        served.shutdown()
        thread.join()


def asked(server, method="GET", path="", host=None):
    """Status, version and text of an answer."""
    request = urllib.request.Request(server.address + path, method=method, headers={"Host": host} if host else {})
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.status, answer.headers["ETag"], answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.headers["ETag"], error.read().decode()


def test_server_sends_a_new_report_when_the_run_has_gone_on(server, tmp_path):
    assert server.server_address[0] == "127.0.0.1"
    status, version, text = asked(server)
    assert status == 200
    assert f"data-version={version}" in text
    assert asked(server, "HEAD") == (200, version, "")
    table = tmp_path / "run" / "progress.csv"
    table.write_text(table.read_text() + "5,7.25,,\n")
    assert asked(server, "HEAD")[1] != version
    assert "7.25" in asked(server)[2]


def test_server_answers_only_to_its_own_name_and_place(server):
    assert asked(server, host="evil.example")[0] == 403
    assert asked(server, host=f"localhost:{server.server_port}")[0] == 200
    assert asked(server, path="../config.yaml")[0] == 404


def test_server_says_what_is_wrong_with_a_folder_and_goes_on(server, tmp_path):
    table = tmp_path / "run" / "progress.csv"
    good = table.read_text()
    table.write_text("time/iterations\nx\n")
    status, _, text = asked(server)
    assert (status, "must be the table of metrics" in text) == (500, True)
    table.write_text(good)
    assert asked(server)[0] == 200


def test_port_that_is_taken_is_named(server, tmp_path):
    with pytest.raises(ValueError, match=f"port must be free on this machine, or 0 for any; got {server.server_port}"):
        ReportServer([tmp_path / "run"], server.server_port)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{missing}"], "runs must be folders of runs, such as runs/first"),
        (["{race}"], "is that of a race, whose runs are in contenders"),
        (["{run}", "--output", "{race}"], "output must be a file; got the folder"),
    ],
)
def test_wrong_places_are_refused_before_anything_is_made(arguments, message, tmp_path, monkeypatch, capsys):
    places = {name: tmp_path / name for name in ("missing", "run", "race")}
    places["run"].mkdir()
    places["race"].mkdir()
    (places["race"] / "race.json").write_text("{}")
    monkeypatch.setattr("sys.argv", ["ddpo-report", *(one.format(**places) for one in arguments)])
    assert command.main() == 2
    assert message in capsys.readouterr().err
    assert not places["missing"].exists()
    assert not list(places["run"].iterdir())
