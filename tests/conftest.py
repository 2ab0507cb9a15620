"""Fixtures of many test files: offline libraries, a tiny Stable Diffusion, a finished run, counted operations."""

import gc
import json
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before huggingface_hub is imported: no test reaches for the network
os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is: on a busy machine threads wait for each other

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from helpers.paths import SCRIPTS

if TYPE_CHECKING:  # the process that hands out the tests does not import torch, nor a test of `rewards` a training run
    from agents.training.run import RunResult


def pytest_collection_finish() -> None:
    """Leave what the imports have made, a million objects, out of every later search for garbage."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def stable_baselines3_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Give Stable-Baselines3 one folder, where it would make one in the system's temporary folder for every `learn`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SB3_LOGDIR", str(tmp_path_factory.mktemp("stable_baselines3")))
        yield


@pytest.fixture(scope="session")
def micro_pipeline_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random micro `StableDiffusionPipeline`, as `save_pretrained` writes it."""
    from helpers.micro_pipeline import micro_pipeline

    folder = tmp_path_factory.mktemp("models") / "micro"
    micro_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def finished(micro_pipeline_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> "RunResult":
    """The run of `micro_config` that nothing stopped; tests only read its folder."""
    from helpers.micro_agents import micro_config

    from agents.training.preparation import run_training

    return run_training(micro_config(micro_pipeline_folder, tmp_path_factory.mktemp("runs") / "finished"))


@pytest.fixture(scope="session", params=["points", pytest.param("images", marks=pytest.mark.slow)])
def learner(request: pytest.FixtureRequest) -> str:
    """The model of a `micro_config` whose run stops, fails or goes on, none of which depends on what it generates.

    So the quick tests train points in the plane, and the slow ones also LoRA on the micro pipeline.
    """
    return "points" if request.param == "points" else str(request.getfixturevalue("micro_pipeline_folder"))


@pytest.fixture(autouse=True)
def undrawn_figures(request: pytest.FixtureRequest) -> Iterator[None]:
    """Leave figures and reports, half of the time of a run on points, to the slow tests and to `finished`."""
    if "learner" not in request.fixturenames or request.getfixturevalue("learner") != "points":
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("agents.evaluation.plots.write_figure", write_numbers)
        patch.setattr("agents.training.run.write_report", lambda file, _: file.touch())
        yield


def write_numbers(path: Path, figure: Any) -> None:
    """Write the numbers that a figure shows, so that figures can be compared."""
    lines = [line.get_xydata().tolist() for axes in figure.axes for line in axes.get_lines()]
    path.write_text(json.dumps(lines))


@pytest.fixture(scope="session")
def whole(learner: str, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> "RunResult":
    """The run of the `learner` that nothing stopped; tests only read its folder."""
    if learner != "points":
        finished: RunResult = request.getfixturevalue("finished")
        return finished
    from helpers.micro_agents import micro_config

    from agents.training.preparation import run_training

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("agents.evaluation.plots.write_figure", write_numbers)
        patch.setattr("agents.training.run.write_report", lambda file, _: file.touch())
        return run_training(micro_config(learner, tmp_path_factory.mktemp("runs") / "points"))


@pytest.fixture(scope="session")
def counted_flops() -> dict[Any, Any]:
    """Operations by model, as `count_once` has counted them."""
    return {}


@pytest.fixture
def count_once(monkeypatch: pytest.MonkeyPatch, counted_flops: dict[Any, Any]) -> None:
    """Count the operations of each model once per session: counting those of Stable Diffusion 1.4 takes two seconds."""
    from agents.planning import flops

    count = flops.count_flops

    def look_up(model: Any, lora_rank: int, lora_targets: Any = "attention") -> Any:
        weights = tuple(weight.shape for weight in model.denoiser.parameters())
        key = (type(model), model.latent_shape, weights, lora_rank, lora_targets)
        if key not in counted_flops:
            counted_flops[key] = count(model, lora_rank, lora_targets)
        return counted_flops[key]

    monkeypatch.setattr(flops, "count_flops", look_up)


@pytest.fixture
def scripts_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Look imports up in the scripts' folders too, as for a script that is run."""
    for folder in ("benchmarks", "experiments", "bundled_models"):
        monkeypatch.syspath_prepend(str(SCRIPTS / folder))
