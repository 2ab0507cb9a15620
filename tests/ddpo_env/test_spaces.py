"""The handle on the observation space: Gymnasium and Stable-Baselines3 copy and pickle spaces with it."""

import copy
import dataclasses
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from gymnasium import spaces
from helpers.points_models import ConstantModel

from ddpo_env import load_model
from ddpo_env.spaces import DenoisingObservationSpace, ModelHandle


@pytest.fixture
def space() -> DenoisingObservationSpace:
    return DenoisingObservationSpace(load_model("tiny", "cpu"), 7)


def test_handle_names_the_model(space: DenoisingObservationSpace) -> None:
    handle = space.handle
    assert handle.model is load_model("tiny", "cpu")
    assert (handle.source, handle.device, handle.dtype, handle.resolution) == ("tiny", "cpu", "float32", None)
    assert handle.num_inference_steps == 7
    assert ModelHandle.of(load_model("tiny", "cpu", resolution=128), 7).resolution == 128


def test_space_keeps_gymnasiums_own_attributes(space: DenoisingObservationSpace) -> None:
    assert space.dtype is None
    assert vars(space).keys() - vars(spaces.Dict(dict(space))).keys() == {"handle", "conditioning_keys"}


def test_handle_does_not_change(space: DenoisingObservationSpace) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        space.handle.num_inference_steps = 3  # type: ignore[misc]


def test_equal_handles_are_one_key(space: DenoisingObservationSpace) -> None:
    model = space.handle.model
    assert {space.handle: "found"}[ModelHandle.of(model, 7)] == "found"
    assert hash(space.handle) != hash(ModelHandle.of(model, 6))


def test_copies_have_the_same_handle(space: DenoisingObservationSpace) -> None:
    again = copy.deepcopy(space)
    assert again == space
    assert again.handle is space.handle is copy.copy(space.handle)


@pytest.mark.parametrize(
    ("model", "steps", "resolution"), [("micro", 7, None), ("tiny", 6, None), ("tiny", 7, 128), ("points", 7, None)]
)
def test_spaces_of_other_models_resolutions_and_timesteps_differ(
    space: DenoisingObservationSpace, micro_pipeline_folder: Path, model: str, steps: int, resolution: int | None
) -> None:
    other = load_model(micro_pipeline_folder if model == "micro" else model, "cpu", resolution=resolution)
    assert space != DenoisingObservationSpace(other, steps)
    assert pickle.loads(pickle.dumps(space)) != DenoisingObservationSpace(other, steps)


def test_spaces_of_models_with_other_weights_or_another_scheduler_differ(micro_pipeline_folder: Path) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(micro_pipeline_folder, safety_checker=None)
    first = DenoisingObservationSpace(load_model(pipeline), 4)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, timestep_spacing="trailing")
    second = DenoisingObservationSpace(load_model(pipeline), 4)
    with torch.no_grad():
        pipeline.unet.conv_in.weight.mul_(1.1)
    assert first != second != DenoisingObservationSpace(load_model(pipeline), 4) != first
    assert DenoisingObservationSpace(load_model(pipeline), 4) == DenoisingObservationSpace(load_model(pipeline), 4)


def test_the_same_model_from_elsewhere_is_the_same_task(micro_pipeline_folder: Path, tmp_path: Path) -> None:
    space = DenoisingObservationSpace(load_model(micro_pipeline_folder), 4)
    moved = shutil.copytree(micro_pipeline_folder, tmp_path / "moved")
    for again in (load_model(moved), load_model(micro_pipeline_folder, dtype="bfloat16")):
        assert DenoisingObservationSpace(again, 4) == space
    pipelines = [StableDiffusionPipeline.from_pretrained(moved, safety_checker=None) for _ in range(2)]
    one, other = (DenoisingObservationSpace(load_model(pipeline), 4) for pipeline in pipelines)
    assert one == other, "two objects with the same weights"


def test_an_ordinary_space_names_no_model(space: DenoisingObservationSpace) -> None:
    assert space != spaces.Dict(dict(space))
    assert spaces.Dict(dict(space)) != space


def test_pickle_holds_names_and_finds_the_model_again(space: DenoisingObservationSpace) -> None:
    pickled = pickle.dumps(space.handle)
    assert len(pickled) < 1000
    again = pickle.loads(pickled)
    assert again == space.handle
    assert again.model is space.handle.model
    assert pickle.loads(pickle.dumps(again)) == again


def test_model_of_ones_own_is_found_in_its_process_and_missed_in_another(tmp_path: Path) -> None:
    model = ConstantModel()
    handle = ModelHandle.of(load_model(model), 1)
    (tmp_path / "handle.pkl").write_bytes(pickle.dumps(handle))
    assert pickle.loads(pickle.dumps(handle)).model is model
    code = (
        "import pickle, sys; handle = pickle.load(open(sys.argv[1], 'rb')); print(handle.source)\n"
        "try: handle.model\nexcept ValueError as error: print(error)"
    )
    arguments = [sys.executable, "-c", code, str(tmp_path / "handle.pkl")]
    source, message = subprocess.run(arguments, capture_output=True, text=True, check=True).stdout.splitlines()
    assert source == model.source
    assert f"by its source while it exists); got '{model.source}'" in message


@pytest.mark.timeout(120)
def test_worker_processes_have_the_same_space() -> None:
    settings = {"vectorization_mode": "async", "num_inference_steps": 2}
    envs = gym.make_vec("ddpo_env:DDPO-Points-v0", num_envs=2, **settings)  # type: ignore[arg-type]
    try:
        assert isinstance(envs.single_observation_space, DenoisingObservationSpace)
        assert envs.single_observation_space.handle.source == "points"
        assert envs.reset(seed=0)[0]["latents"].shape == (2, 2)
    finally:
        envs.close(terminate=True)
