"""Fixtures of many test files: offline libraries, a tiny Stable Diffusion, a finished run, counted operations."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before huggingface_hub is imported: no test reaches for the network
os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is: on a busy machine threads wait for each other

import multiprocessing.forkserver
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from helpers.micro_pipeline import micro_pipeline
from helpers.paths import SCRIPTS

if TYPE_CHECKING:  # a test of `rewards` alone does not import a training run
    from agents.training.run import RunResult


@pytest.fixture(scope="session", autouse=True)
def forkserver(request: pytest.FixtureRequest) -> None:
    """Start the server of `helpers.many_processes` at once if a test needs it, so that none waits for its imports."""
    items = [item for item in request.session.items if isinstance(item, pytest.Function)]
    if any(hasattr(item.module, "run_processes") for item in items):
        multiprocessing.forkserver.ensure_running()


@pytest.fixture(scope="session")
def micro_pipeline_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random micro `StableDiffusionPipeline`, as `save_pretrained` writes it."""
    folder = tmp_path_factory.mktemp("models") / "micro"
    micro_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def finished(micro_pipeline_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> "RunResult":
    """The run of `micro_config` that nothing stopped; tests only read its folder."""
    from helpers.micro_agents import micro_config

    from agents.training.preparation import run_training

    return run_training(micro_config(micro_pipeline_folder, tmp_path_factory.mktemp("runs") / "finished"))


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
