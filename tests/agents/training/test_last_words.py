"""The command that a finished run prints at its end samples as the run did."""

import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tyro
from helpers.scripts import run_script

from agents import train_config
from agents.evaluation.sample import SampleArguments
from agents.training import command
from agents.training.result import RunResult
from ddpo_env.models import load_model
from ddpo_env.models.families.points import PointsModel
from ddpo_env.models.outline import outline_model


def printed_command(text: str) -> list[str]:
    line = next(line for line in text.splitlines() if "ddpo-sample" in line)
    return shlex.split(line[line.index("ddpo-sample") :])


def test_printed_command_makes_images(finished: RunResult, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = load_model(finished.config.model, "cpu")
    program, *arguments = printed_command(command.summary(finished, model))
    assert program == "ddpo-sample"
    parsed = tyro.cli(SampleArguments, args=arguments)
    assert (parsed.num_inference_steps, parsed.guidance_scale) == (3, 2.0)
    monkeypatch.chdir(tmp_path)
    assert run_script("sample", [*arguments, "--prompts", "a cat", "--seeds", "1"], monkeypatch) == 0
    assert (tmp_path / "samples.png").exists()


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, {"num_inference_steps": 10}),
        ({"num_inference_steps": 3}, {"num_inference_steps": 3, "eta": 0.999}),
        ({"num_inference_steps": 3, "eta": 0.5}, {"num_inference_steps": 3, "eta": 0.5}),
        ({"eta": 1.5}, {"num_inference_steps": 10}),
        ({"sampler": "ode"}, {"num_inference_steps": 10, "eta": 0.0}),
        (
            {"guidance_scale": 4.0, "resolution": "64x96", "pipeline_arguments": ("a=1", "b=2")},
            {
                "num_inference_steps": 10,
                "guidance_scale": 4.0,
                "resolution": "64x96",
                "pipeline_arguments": ("a=1", "b=2"),
            },
        ),
    ],
)
def test_command_has_what_differs_from_the_defaults_of_ddpo_sample(
    settings: dict[str, Any], expected: dict[str, Any]
) -> None:
    model = outline_model("tiny")
    assert model is not None
    words = command.sample_command(train_config(**settings), model, "my run/lora")
    parsed = tyro.cli(SampleArguments, args=words[1:])
    assert parsed == replace(SampleArguments(), lora=Path("my run/lora"), **expected)
    assert len(words) == 1 + 2 * len({"lora", *expected}) + ("pipeline_arguments" in expected)


def test_no_command_where_ddpo_sample_makes_no_images() -> None:
    assert command.sample_command(train_config(model="points"), PointsModel(), "lora") == []
