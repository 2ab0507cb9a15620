"""The header of a LoRA's file: diffusers gives its settings to peft, so nothing but a plain adapter may be in it."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from agents.evaluation.sample import SampleArguments, generate
from ddpo_env.models.lora.lora_file import lora_tensors


def write(folder: Path, **settings: Any) -> Path:
    file = folder / "lora" / "pytorch_lora_weights.safetensors"
    file.parent.mkdir()
    weights = load_file(folder / "model" / "unet" / "diffusion_pytorch_model.safetensors")
    layer, weight = next((name, value) for name, value in weights.items() if name.endswith("attn1.to_q.weight"))
    layer = f"unet.{layer.removesuffix('.weight')}"
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"{layer}.lora_A.weight": torch.randn(2, weight.shape[1], generator=generator),
        f"{layer}.lora_B.weight": torch.randn(weight.shape[0], 2, generator=generator),
    }
    header = {f"unet.{name}": value for name, value in settings.items()}
    save_file(tensors, file, metadata={"format": "pt", "lora_adapter_metadata": json.dumps(header)})
    return file.parent


def sample(model: Path, lora: Path) -> Any:
    settings = {"prompts": ("a cat",), "seeds": (0,), "num_inference_steps": 1, "device": "cpu"}
    return generate(SampleArguments(model=str(model), lora=lora, **settings))[0][0]


@pytest.fixture
def model(micro_pipeline_folder: Path, tmp_path: Path) -> Path:
    (tmp_path / "model").symlink_to(micro_pipeline_folder)
    return micro_pipeline_folder


@pytest.mark.parametrize(
    "settings",
    [
        {"megatron_core": "megatron.bomb"},
        {"lora_alpha": 4},
        {"rank_pattern": {"to_q": 1_000_000_000}},
        {"use_dora": True},
        {"auto_mapping": {"parent_library": "bomb"}},
        {"layers_pattern": "(a+)+$"},
    ],
)
def test_settings_that_would_be_followed_are_refused(model: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    lora = write(tmp_path, **settings)
    with pytest.raises(ValueError, match=f"settings in its header that are not followed: unet.{next(iter(settings))}="):
        sample(model, lora)


@pytest.mark.parametrize("text", ["[", "[]", "5", "[" * 100_000])
def test_header_that_is_no_object_is_refused(tmp_path: Path, text: str) -> None:
    save_file({"a": torch.zeros(2)}, tmp_path / "lora.safetensors", metadata={"lora_adapter_metadata": text})
    with pytest.raises(ValueError, match="settings in its header that are no JSON object"):
        lora_tensors(tmp_path / "lora.safetensors")


def test_rank_and_targets_of_a_header_are_not_used(model: Path, tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "model").symlink_to(model)
    plain = sample(model, write(tmp_path / "plain"))
    # As a pattern, these targets take hours; as a rank, the number takes 144 GB.
    lora = write(tmp_path, r=1_000_000_000, lora_alpha=1_000_000_000, target_modules="(([a-z0-9_.])+)+!")
    started = time.monotonic()
    assert (sample(model, lora) == plain).all()
    assert time.monotonic() - started < 60
