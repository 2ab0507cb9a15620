"""Files of a reward's model: no code of theirs runs, no weight is missing or NaN, no setting leads elsewhere."""

import contextlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from rewards import load_reward
from rewards.judge.bert_score import TextEncoder
from rewards.networks.pretrained import BUNDLED_MODELS, check_settings, load_processor

Load = Callable[[Path], Any]


def load_clip(folder: Path) -> Any:
    reward = load_reward("clip_score", model=str(folder), device="cpu")
    reward.load()
    return reward


def load_judge(folder: Path) -> Any:
    reward = load_reward("vlm_vqa", model=str(folder), device="cpu")
    reward.load()
    return reward


def load_text_encoder(folder: Path) -> Any:
    return TextEncoder(str(folder), torch.device("cpu"), torch.float32)


LOADERS: dict[str, Load] = {"tiny_clip": load_clip, "tiny_llava": load_judge, "tiny_text_encoder": load_text_encoder}


@pytest.fixture(params=LOADERS)
def case(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Load]:
    source = next(Path(place) for place in BUNDLED_MODELS.values() if place.endswith(request.param))
    package = Path(__import__("rewards").__file__ or "").parent
    return shutil.copytree(package / source, tmp_path / "model"), LOADERS[request.param]


def change(file: Path, entries: dict[str, Any]) -> None:
    content = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(content | entries))


@pytest.mark.parametrize("settings", [{}, {"model_type": "bomb"}])  # of a type that it does not know, it asks
def test_modules_in_the_folder_are_not_imported(
    case: tuple[Path, Load], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    folder, load = case
    mark = tmp_path / "it_ran"
    (folder / "bomb.py").write_text(f"open({str(mark)!r}, 'w').close()\nclass Bomb: ...\n")
    classes = ("AutoConfig", "AutoModel", "AutoModelForImageTextToText", "AutoProcessor", "AutoImageProcessor")
    for name in ("config.json", "processor_config.json", "preprocessor_config.json"):
        change(folder / name, {"auto_map": dict.fromkeys(classes, "bomb.Bomb"), "trust_remote_code": True})
    change(folder / "config.json", settings)
    change(folder / "tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["bomb.Bomb", "bomb.Bomb"]}})
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # transformers asks whether to run the code
    with contextlib.suppress(ValueError, OSError):
        load(folder)
    assert not mark.exists()


@pytest.mark.parametrize(
    "settings",
    [
        {"attn_implementation": "somebody/kernel"},
        {"_attn_implementation": "flash_attention_2"},
        {"quantization_config": {"quant_method": "awq"}},
        {"transformers_weights": "../other.safetensors"},
        {"vision_config": {"attn_implementation": "somebody/kernel"}},
        {"text_config": {"quantization_config": {"quant_method": "awq"}}},
        {"any": [{"use_kernels": True}]},
    ],
)
def test_settings_that_lead_elsewhere_are_refused(case: tuple[Path, Load], settings: dict[str, Any]) -> None:
    folder, load = case
    content = json.loads((folder / "config.json").read_text())
    for name, value in settings.items():
        both = isinstance(value, dict) and isinstance(content.get(name), dict)
        content[name] = {**content[name], **value} if both else value
    (folder / "config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"model .* must not have \w+ in its config.json, which is not followed"):
        load(folder)


def test_adapter_beside_a_network_is_refused(case: tuple[Path, Load]) -> None:
    folder, load = case
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "somebody/else"}')
    with pytest.raises(ValueError, match="must be a plain network; adapter_config.json names an adapter"):
        load(folder)


@pytest.mark.parametrize("fault", ["missing", "NaN"])
def test_weights_that_are_missing_or_not_finite_are_refused(case: tuple[Path, Load], fault: str) -> None:
    folder, load = case
    file = folder / "model.safetensors"
    tensors = load_file(file)
    key = sorted(key for key, value in tensors.items() if value.is_floating_point() and "weight" in key)[0]
    if fault == "missing":
        del tensors[key]
    else:
        tensors[key].view(-1)[0] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})
    message = (
        "[12] missing keys: " if fault == "missing" else "must have finite weights; .* NaN or infinite values in [12] "
    )
    with pytest.raises(ValueError, match=message):
        load(folder)


def test_plain_settings_are_taken() -> None:
    plain = {"attn_implementation": "sdpa", "text_config": {"_attn_implementation": None}, "use_kernels": False}
    assert check_settings(plain | {"quantization_config": None}, "model 'a'") is None


def test_processors_are_loaded_without_code() -> None:
    class Loader:
        @staticmethod
        def from_pretrained(source: str, **options: Any) -> dict[str, Any]:
            return options

    assert load_processor(Loader, "folder", backend="pil") == {"backend": "pil", "trust_remote_code": False}
