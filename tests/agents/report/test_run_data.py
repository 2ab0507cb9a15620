"""What the report reads from a run folder, also from one that is unfinished, old, damaged or hostile."""

import json
import math
import shlex

import numpy as np
import pytest
from helpers.run_folders import write_answers, write_run

from agents.config.command_line import parse_command_line
from agents.config.train_config import TrainConfig
from agents.report.page import render
from agents.report.pictures import pictures_of
from agents.report.run_data import read_run


def test_command_in_the_report_of_a_real_run_gives_its_settings(finished):
    command, problem = read_run(finished.folder.path).command
    assert problem == ""
    again = parse_command_line(shlex.split(command)[1:]).config.resolved()
    own = TrainConfig.read(finished.folder.path)
    hashes = {name: value for name, value in own.flat().items() if name.endswith("_sha256")}
    assert again.changed(run_dir=own.run_dir, **hashes).flat() == own.flat()


def test_queries_are_counted_apart_for_training_and_evaluations(finished):
    run = read_run(finished.folder.path)
    assert run.training_queries == 24
    assert run.evaluation_queries == 3 * 6
    assert run.seconds == json.loads(finished.folder.summary.read_text())["wall_clock_seconds"]


def test_state_of_a_run_is_told(tmp_path):
    assert read_run(write_run(tmp_path / "done")).status == ("done", "finished")
    folder = write_run(tmp_path / "open", is_finished=False, iterations=9)
    assert read_run(folder).status == ("open", "iteration 4 of 9")
    (folder / "error.txt").write_text("Traceback ...\nValueError: the reward is NaN\n")
    assert read_run(folder).status == ("failed", "stopped by an error after iteration 4")
    assert read_run(folder).error == "ValueError: the reward is NaN"


def test_details_are_numbers_or_short_texts(tmp_path):
    details = {"word": [np.float32(0.5), True, math.nan, None], "answers": [("yes", "two"), [], "x" * 3000, "<b>"]}
    folder = write_run(tmp_path / "run", rewards=[[1.0, math.nan, 2.0, 3.0]], details=details)
    record = read_run(folder).records[0]
    assert record.details["word"] == [0.5, 1.0, None, None]
    assert record.details["answers"][:2] == ["yes · two", ""]
    assert record.details["answers"][2].endswith("[cut: 2000 of 3000 characters]")
    assert np.array_equal(record.rewards, [1, math.nan, 2, 3], equal_nan=True)


def test_run_that_has_only_begun_has_a_report(tmp_path):
    folder = write_run(tmp_path / "run", is_finished=False)
    for file in folder.rglob("*.*"):
        if file.is_file() and file.name != "config.yaml":
            file.unlink()
    assert read_run(folder).status == ("open", "iteration 0 of 4")
    assert "iteration 0 of 4" in render([folder])


def test_run_of_an_older_version_has_images_without_prompts(tmp_path):
    folder = write_run(tmp_path / "run")
    for record in (folder / "samples" / "images").glob("*.json"):
        record.unlink()
    run = read_run(folder)
    assert run.records == {}
    assert [len(images) for images in pictures_of(run, 10**6).images] == [4, 4, 4]


def test_evaluation_that_a_killed_run_has_not_logged_is_left_out(tmp_path):
    folder = write_run(tmp_path / "run")
    lines = (folder / "progress.csv").read_text().splitlines()
    (folder / "progress.csv").write_text("\n".join(lines[:4]) + "\n")
    run = read_run(folder)
    assert sorted(run.records) == [0, 2]
    assert pictures_of(run, 10**6).iterations == [0, 2]


def test_of_a_long_run_as_many_evaluations_are_shown_as_fit(tmp_path):
    run = read_run(write_run(tmp_path / "run", rewards=[[0.0] * 4] * 12))
    whole = pictures_of(run, 10**6)
    assert whole.iterations == list(range(0, 24, 2))
    some = pictures_of(run, sum(len(image) for images in whole.images for image in images) // 3)
    assert 2 < len(some.iterations) <= 4
    assert (some.iterations[0], some.iterations[-1], some.stored) == (0, 22, 12)
    assert sum(len(image) for images in some.images for image in images) <= sum(map(len, whole.images[0])) * 4 + 99
    assert pictures_of(run, 1).iterations == [0, 22]


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.yaml", "a: &b c", "aliases and anchors"),
        ("progress.csv", "time/iterations,a\n1,x\n", "progress.csv' must be the table of metrics"),
        ("summary.json", "[1]", "summary.json' must hold an object"),
        ("summary.json", '{"processes": "2"}', "processes in "),
        ("doctor.json", '{"findings": 3}', "findings in "),
        ("samples/images/iteration_0000.json", "{}", "must be the record of an evaluation"),
        ("samples/images/iteration_0000.png", "no image", "must be a PNG image"),
    ],
)
def test_damaged_file_is_named(tmp_path, file, content, message):
    folder = write_run(tmp_path / "run")
    (folder / file).write_text(content)
    with pytest.raises(ValueError, match=message):
        pictures_of(read_run(folder), 10**6)


@pytest.mark.parametrize("file", ["progress.csv", "samples/images/iteration_0002.png"])
def test_link_out_of_the_folder_is_not_followed(tmp_path, file):
    folder = write_run(tmp_path / "run")
    outside = tmp_path / "outside"
    (folder / file).rename(outside)
    (folder / file).symlink_to(outside)
    with pytest.raises(ValueError, match="must not contain links"):
        pictures_of(read_run(folder), 10**6)


def test_answers_that_name_a_file_elsewhere_or_are_damaged_are_left_out(tmp_path):
    folder = write_run(tmp_path / "run")
    write_answers(folder, {}, {"image": "../../secret.jpg"}, {"answers": []}, {"score": None})
    with (folder / "judge" / "answers.jsonl").open("a") as file:
        file.write('{"image": "00')
    assert [one.image.name for one in read_run(folder).answers["judge"]] == ["000001.jpg", "000004.jpg"]


def test_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"must be the folder of a run, with a config.yaml"):
        read_run(tmp_path)
