"""`--run` of `ddpo-sample` and `ddpo-evaluate`: what the line does not name is as the run had it."""

import shutil
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import pytest
import yaml
from helpers.scripts import run_script

from agents.commands.evaluate import EvaluateLine
from agents.commands.generation_line import parse_generation_line
from agents.commands.sample import SampleLine
from agents.evaluation.generation import GenerationArguments
from agents.training.command import generation_arguments
from agents.training.result import RunResult
from ddpo_env.models import load_model
from ddpo_env.models.families.pipeline_model import PipelineModel


@pytest.fixture
def parse(monkeypatch: pytest.MonkeyPatch) -> Callable[..., SampleLine]:
    def of(*words: object) -> SampleLine:
        monkeypatch.setattr(sys, "argv", ["ddpo-sample", *map(str, words)])
        return parse_generation_line(SampleLine, None)

    return of


@pytest.fixture
def run(finished: RunResult, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(finished.folder.path, tmp_path / "a run"))


def test_the_arguments_are_those_that_the_run_names_at_its_end(
    parse: Callable[..., SampleLine], run: Path, finished: RunResult
) -> None:
    model = load_model(finished.config.model, "cpu")
    assert isinstance(model, PipelineModel)
    expected = generation_arguments(finished.config, model, run / "lora")
    line = parse("--run", run, "--model", finished.config.model, "--prompts", "a cat")
    assert {one.name: getattr(line, one.name) for one in fields(GenerationArguments)} == vars(expected)
    assert (line.num_inference_steps, line.guidance_scale, line.prompts) == (3, 2.0, ("a cat",))


def test_what_the_line_names_comes_first(
    parse: Callable[..., SampleLine], run: Path, finished: RunResult, tmp_path: Path
) -> None:
    line = parse("--num-inference-steps=20", "--run", run, "--model", finished.config.model, "--lora", tmp_path)
    assert (line.num_inference_steps, line.guidance_scale, line.lora) == (20, 2.0, tmp_path)


def test_both_commands_generate_as_the_run(
    run: Path, finished: RunResult, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    named = ["--run", run, "--model", finished.config.model]
    assert run_script("sample", [*named, "--prompts", "a cat", "--seeds", "1", "--compare"], monkeypatch) == 0
    assert (tmp_path / "samples.png").is_file()
    scored = ["--rewards", "jpeg_compressibility", "--prompts", "simple_animals", "--samples-per-prompt", "1"]
    assert run_script("evaluate", [*named, *scored], monkeypatch) == 0
    settings = yaml.safe_load((tmp_path / "evaluation" / "evaluation.json").read_text())["settings"]
    assert (settings["num_inference_steps"], settings["lora"]) == (3, str(run / "lora"))
    assert set(EvaluateLine.__dataclass_fields__) == settings.keys()


def test_a_run_alone_does_not_choose_a_folder_outside_it(
    parse: Callable[..., SampleLine], run: Path, finished: RunResult, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        parse("--run", run)
    assert stop.value.code == 2
    assert f"name it again by adding: --model={finished.config.model}" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda run: (run / "summary.json").unlink(), "run must be finished; "),
        (lambda run: shutil.rmtree(run / "lora"), "run must be a .safetensors file, or a folder with"),
        (lambda run: (run / "config.yaml").unlink(), "run must be the folder of a run"),
    ],
)
def test_a_run_that_cannot_be_used_is_refused(
    parse: Callable[..., SampleLine],
    run: Path,
    finished: RunResult,
    capsys: pytest.CaptureFixture[str],
    change: Callable[[Path], object],
    message: str,
) -> None:
    change(run)
    with pytest.raises(SystemExit):
        parse("--run", run, "--model", finished.config.model)
    assert message in " ".join(capsys.readouterr().err.split())
