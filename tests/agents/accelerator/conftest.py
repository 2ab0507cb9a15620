"""A pretend accelerator with two devices, and no model of another test on it."""

from collections.abc import Iterator

import pytest
import torch
from helpers.pretend_accelerator import Accelerator, pretend_accelerator

from ddpo_env.models.loading import unload_models


@pytest.fixture
def accelerator(micro_pipeline_folder: object) -> Iterator[Accelerator]:
    if torch.cuda.is_available():
        pytest.skip("this machine has a real device: pytest -m gpu")
    unload_models()
    with pretend_accelerator(devices=2) as pretended:
        yield pretended
    unload_models()
