"""What several files of tests share: offline libraries, and a Stable Diffusion so small that it is made on the spot."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before huggingface_hub is imported: no test reaches for the network
os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is: on a busy machine threads wait for each other

from pathlib import Path

import pytest
from helpers.micro_pipeline import micro_pipeline
from helpers.paths import SCRIPTS


@pytest.fixture(scope="session")
def micro_pipeline_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random micro `StableDiffusionPipeline`, as `save_pretrained` writes it."""
    folder = tmp_path_factory.mktemp("models") / "micro"
    micro_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture
def scripts_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Look imports up in the scripts' folders too, as for a script that is run."""
    for folder in ("benchmarks", "experiments", "bundled_models"):
        monkeypatch.syspath_prepend(str(SCRIPTS / folder))
