"""Registration, the quick import, and the data files of the package."""

import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import gymnasium as gym
import pytest

import ddpo_env

HEAVY = ("torch", "diffusers", "transformers", "peft", "stable_baselines3", "inflect")


def run_python(code: str, folder: Path) -> str:
    """Run code in a process that has imported nothing yet, in a folder from which nothing can be imported."""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=folder, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_import_leaves_the_heavy_libraries_alone(tmp_path: Path) -> None:
    code = f"import sys, ddpo_env; print([name for name in {HEAVY} if name in sys.modules])"
    assert run_python(code, tmp_path) == "[]"


def test_environment_is_made_from_a_process_that_did_not_import_the_package(tmp_path: Path) -> None:
    code = (
        "import gymnasium; env = gymnasium.make('ddpo_env:DDPO-SD-v0', prompts=['a cat']);"
        "print(env.reset(seed=0)[1], env.spec.id)"
    )
    assert run_python(code, tmp_path) == "{'prompt': 'a cat'} DDPO-SD-v0"


@pytest.mark.parametrize("name", ["DDPO-SD-v0", "DDPO-Points-v0"])
def test_registered_once_with_both_entry_points(name: str) -> None:
    spec = gym.spec(name)
    assert spec.entry_point == "ddpo_env.env:DenoisingEnv"
    assert spec.vector_entry_point == "ddpo_env.vector_env:DenoisingVectorEnv"
    assert spec.max_episode_steps is None
    assert not spec.nondeterministic


@pytest.mark.parametrize("name", ddpo_env.__all__)
def test_public_names_are_there_and_documented(name: str) -> None:
    assert getattr(ddpo_env, name).__doc__


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = ddpo_env.no_such_name  # type: ignore[attr-defined]


@pytest.mark.parametrize("package", ["ddpo_env", "agents", "rewards"])
def test_packages_are_marked_as_typed(package: str) -> None:
    assert (files(package) / "py.typed").is_file()


@pytest.mark.parametrize(
    "path",
    [
        "words/imagenet_animals.txt",
        "tiny/model_index.json",
        "tiny/scheduler/scheduler_config.json",
        "tiny/tokenizer/tokenizer_config.json",
        "tiny/text_encoder/model.safetensors",
        "tiny/unet/diffusion_pytorch_model.safetensors",
        "tiny/vae/diffusion_pytorch_model.safetensors",
    ],
)
def test_data_files_are_in_the_package(path: str) -> None:
    assert (files("ddpo_env") / "data" / path).is_file()
