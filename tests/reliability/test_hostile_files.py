"""A bomb in every file that is ever read: whatever else happens, nothing runs.

A bomb is a pickle, a YAML tag, a module name or a module beside the weights; each would leave a mark.
"""

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.micro_agents import files_below, micro_config

import agents
from agents import DiffusionPolicy
from agents.distributed import Processes
from agents.evaluation.sample import SampleArguments, generate
from agents.training.preparation import check_run, prepare_run, run_training
from ddpo_env import load_model
from ddpo_env.models.outline import outline_model
from ddpo_env.prompts import load_prompts
from rewards import load_reward


class Bomb:
    """Unpickling it writes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return (Path.touch, (self.mark,))


BOMBS: dict[str, Callable[[Path], bytes]] = {
    "pickle": lambda mark: pickle.dumps(Bomb(mark)),
    "yaml": lambda mark: (
        f"!!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path ['{mark}']]".encode()
    ),
    "json": lambda mark: json.dumps({"py/object": "os.system", "__reduce__": ["os.system", f"touch {mark}"]}).encode(),
    "deep": lambda mark: b"[" * 200_000,
    "aliases": lambda mark: "\n".join(
        ["a0: &a0 [x, x]", *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12))]
    ).encode(),
    "random": lambda mark: bytes(range(256)) * 16,
    "empty": lambda mark: b"",
}
TORCH_BOMB = "torch"


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory, micro_pipeline_folder: Path) -> Path:
    folder = tmp_path_factory.mktemp("hostile") / "run"
    run_training(micro_config(micro_pipeline_folder, folder, iterations=1, reward="jpeg_compressibility"))
    return folder


def write_bomb(path: Path, kind: str, mark: Path) -> None:
    if kind == TORCH_BOMB:
        torch.save({"weights": Bomb(mark)}, path)
    else:
        path.write_bytes(BOMBS[kind](mark))


def try_everything(folder: Path, model: Path) -> list[str]:
    """Read a run folder in every way that there is; return the types of the errors."""
    readings: list[Callable[[], Any]] = [
        lambda: check_run(micro_config(model, None).changed(resume=folder), Processes()),
        lambda: prepare_run(micro_config(model, None).changed(resume=folder)),
        lambda: check_run(agents.train_config(resume=folder, iterations=2), Processes()),
        lambda: prepare_run(agents.train_config(resume=folder, iterations=2)),
        lambda: DiffusionPolicy.load(folder / "policy"),
        lambda: generate(SampleArguments(model=str(model), lora=folder / "lora", num_inference_steps=1, device="cpu")),
    ]
    return [_error_of(reading) for reading in readings]


def _error_of(reading: Callable[[], Any]) -> str:
    try:
        reading()
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*BOMBS, TORCH_BOMB])
def test_nothing_runs_in_a_run_folder(run_folder: Path, micro_pipeline_folder: Path, tmp_path: Path, kind: str) -> None:
    mark = tmp_path / "mark"
    for name in sorted(files_below(run_folder)):
        if "events.out" in name or name.endswith((".png", ".lock")):
            continue
        folder = tmp_path / "copy"
        shutil.copytree(run_folder, folder)
        write_bomb(folder / name, kind, mark)
        try_everything(folder, micro_pipeline_folder)
        assert not mark.exists(), name
        shutil.rmtree(folder)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*BOMBS, TORCH_BOMB])
def test_nothing_runs_in_a_model_folder(micro_pipeline_folder: Path, tmp_path: Path, kind: str) -> None:
    mark = tmp_path / "mark"
    for name in sorted(files_below(micro_pipeline_folder)):
        folder = tmp_path / "model"
        shutil.copytree(micro_pipeline_folder, folder)
        write_bomb(folder / name, kind, mark)
        _error_of(lambda: outline_model(str(folder)))  # noqa: B023
        _error_of(lambda: load_model(str(folder)))  # noqa: B023
        assert not mark.exists(), name
        shutil.rmtree(folder)


MODULE = "from pathlib import Path\nPath({mark!r}).touch()\nclass Bomb: ...\n"


@pytest.mark.parametrize(
    ("file", "entry"),
    [
        ("model_index.json", {"_class_name": "bomb.Bomb"}),
        ("model_index.json", {"_class_name": ["bomb", "Bomb"]}),
        ("model_index.json", {"unet": ["bomb", "Bomb"]}),
        ("model_index.json", {"vae": ["bomb", "Bomb"]}),
        ("model_index.json", {"scheduler": ["os", "system"]}),
        ("model_index.json", {"scheduler": ["diffusers", "utils.import_utils.bomb"]}),
        ("model_index.json", {"extra": ["bomb", "Bomb"]}),
        ("model_index.json", {"_diffusers_custom_pipeline": "bomb"}),
        ("unet/config.json", {"_class_name": "bomb.Bomb"}),
        ("unet/config.json", {"auto_map": {"AutoModel": "bomb.Bomb"}}),
        ("text_encoder/config.json", {"auto_map": {"AutoModel": "bomb.Bomb", "AutoConfig": "bomb.Bomb"}}),
        ("text_encoder/config.json", {"architectures": ["bomb.Bomb"], "model_type": "bomb"}),
        ("tokenizer/tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["bomb.Bomb", None]}}),
        ("tokenizer/tokenizer_config.json", {"tokenizer_class": "bomb.Bomb"}),
        ("scheduler/scheduler_config.json", {"_class_name": "bomb.Bomb"}),
    ],
    ids=str,
)
def test_no_module_beside_a_model_is_imported(
    micro_pipeline_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, entry: dict[str, Any]
) -> None:
    folder, mark = tmp_path / "model", tmp_path / "mark"
    shutil.copytree(micro_pipeline_folder, folder)
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | entry))
    for place in [folder, *(one for one in folder.iterdir() if one.is_dir())]:
        for name in ("bomb", "pipeline", "modeling", "unet"):
            (place / f"{name}.py").write_text(MODULE.format(mark=str(mark)))
    monkeypatch.syspath_prepend(str(folder))
    for reading in (outline_model, load_model):
        _error_of(lambda: reading(str(folder)))  # noqa: B023
        assert not mark.exists()


@pytest.mark.parametrize("kind", [*BOMBS, TORCH_BOMB])
@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".json", ".csv", ".tsv", ".yaml", ".pkl", ".pt"])
def test_nothing_runs_in_a_prompt_file(tmp_path: Path, kind: str, suffix: str) -> None:
    path, mark = tmp_path / f"prompts{suffix}", tmp_path / "mark"
    write_bomb(path, kind, mark)
    _error_of(lambda: load_prompts(str(path)))
    assert not mark.exists()


@pytest.mark.parametrize("kind", [*BOMBS, TORCH_BOMB])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ".bin"])
def test_nothing_runs_in_the_weights_of_a_reward(tmp_path: Path, kind: str, suffix: str) -> None:
    path, mark = tmp_path / f"head{suffix}", tmp_path / "mark"
    write_bomb(path, kind, mark)

    def load() -> None:
        reward: Any = load_reward("aesthetic", weights=path, model="tiny")
        reward.load()

    _error_of(load)
    assert not mark.exists()


@pytest.mark.parametrize("kind", [*BOMBS, TORCH_BOMB])
def test_nothing_runs_in_a_saved_algorithm(tmp_path: Path, kind: str) -> None:
    path, mark = tmp_path / "model.zip", tmp_path / "mark"
    write_bomb(path, kind, mark)
    _error_of(lambda: agents.PPO.load(path))
    assert not mark.exists()


def test_nothing_runs_in_a_zip_of_stable_baselines3(tmp_path: Path) -> None:
    import stable_baselines3

    mark = tmp_path / "mark"
    model = stable_baselines3.PPO("MlpPolicy", "CartPole-v1", n_steps=8, batch_size=8, device="cpu")
    model.bomb = Bomb(mark)  # type: ignore[attr-defined]
    model.save(tmp_path / "model.zip")
    assert _error_of(lambda: agents.PPO.load(tmp_path / "model.zip"))
    assert not mark.exists()
