"""Wrong arguments of the environment are errors that name the parameter, the value and what is valid."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ddpo_env import DenoisingVectorEnv
from ddpo_env.models import check_source
from ddpo_env.validation import arguments as validation


@pytest.mark.parametrize("name", ["num_envs", "samples_per_prompt", "num_inference_steps"])
@pytest.mark.parametrize("value", [0, -1, 10**12, 2.0, True, "2", None, float("nan")])
def test_counts_are_checked_before_anything_is_loaded(monkeypatch: pytest.MonkeyPatch, name: str, value: Any) -> None:
    monkeypatch.setattr("ddpo_env.vector_env.load_model", None)
    with pytest.raises(ValueError, match=f"{name} must be an integer from 1 to 1000000; got {value!r}"):
        DenoisingVectorEnv(**{"num_envs": 2} | {name: value})


@pytest.mark.parametrize("part", [5, None, "01", (0,), (1, 1), (0.0, 2), (False, 2), (-1, 2), (0, 1, 2)])
def test_part_is_a_pair_of_integers(part: Any) -> None:
    with pytest.raises(ValueError, match=r"part must be \(index, count\) with 0 <= index < count; got "):
        DenoisingVectorEnv(2, part=part)


@pytest.mark.parametrize("values", [np.ones(2, np.complex64), torch.ones(2, dtype=torch.complex64), [1j], "a", None])
def test_latents_are_real_numbers(values: Any) -> None:
    with pytest.raises(ValueError, match="actions must be an array or a tensor of real numbers"):
        validation.as_float(values, "actions")


MULTIPLE = r"resolution must be a multiple of 8 pixels \(at most 16384\) .*; got 7"
SIZE = "resolution must be None, a number of pixels .*, or width x height such as '832x1216', .*; got "


@pytest.mark.parametrize(("resolution", "message"), [(7, MULTIPLE), *((one, SIZE) for one in (0, -8, 10**12, True))])
def test_a_resolution_is_checked_without_loading(micro_pipeline_folder: Path, resolution: Any, message: str) -> None:
    for model in (micro_pipeline_folder, "tiny"):
        with pytest.raises(ValueError, match=message):
            check_source(model, resolution=resolution)
    with pytest.raises(ValueError, match="resolution must be None with model 'points'"):
        check_source("points", resolution=64)


def test_steps_are_checked_without_loading(micro_pipeline_folder: Path) -> None:
    check_source(micro_pipeline_folder, num_inference_steps=500)
    with pytest.raises(ValueError, match="num_inference_steps must be between 1 and 1000 .*; got 1001"):
        check_source(micro_pipeline_folder, num_inference_steps=1001)
