"""`ddpo-sample` refuses wrong arguments with one clear line and exit code 2, before any weights are loaded."""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.scripts import run_script
from safetensors.torch import save_file

from agents.config.resolve import resolve
from agents.config.train_config import train_config
from agents.evaluation.sample import SampleArguments
from ddpo_env.models import loading
from ddpo_env.models.lora.lora_file import find_lora

LAYER = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"


@pytest.fixture(autouse=True)
def no_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: Any, **__: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(loading, "load_pipeline", load)
    monkeypatch.setattr(loading, "_loaded", {})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seeds", "-1"], r"seeds[0] must be in [0, "),
        (["--seeds", str(2**63)], r"seeds[0] must be in [0, "),
        (["--num-inference-steps", "1000000000"], "num_inference_steps must be in [1, "),
        (["--num-inference-steps", "1001"], "num_inference_steps must be at most 1000"),
        (["--guidance-scale", "nan"], "guidance_scale must be in"),
        (["--eta", "2"], "eta must be in [0, 1]; got 2"),
        (["--prompts", "a cat", " "], "prompts[1] must be a string that is not empty"),
        (["--prompts", "missing.txt"], "prompts must be one of simple_animals, "),
        (["--prompts", "a cat", "empty.csv"], "prompts 'empty.csv' must"),
        (["--resolution", "7"], "resolution must be"),
        (["--device", "tpu"], "device must be auto or one of"),
        (["--model", ""], "model must be a string that is not empty"),
        (["--model", "points"], "model must be a text-to-image pipeline"),
        (["--output", "."], "output must end in .png"),
        (["--output", "grid.txt"], "output must end in .png"),
        (["--output", "folder.png"], "output must be a file in a folder"),
        (["--output", "file/grid.png"], "output must be a file in a folder"),
        (["--film", "film.png"], "film must end in .gif"),
        (["--film", "one.gif", "--output", "one.gif"], "film must be another file than output"),
        (["--film", "file/film.gif"], "film must be a file in a folder"),
        (["--lora", "none"], "lora must be a .safetensors file, or a folder with"),
        (["--lora", "damaged"], "is no complete safetensors file"),
        (["--lora", "empty"], "holds no weights"),
        (["--lora", "other"], "was trained for another model than"),
        (["--lora", "larger"], "was trained for another model than"),
    ],
)
def test_wrong_arguments_are_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    micro_pipeline_folder: Path,
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "empty.csv").touch()
    for name, tensors in {
        "damaged": {"a": torch.zeros(9)},
        "empty": {},
        "other": {"unet.no.such.layer.lora_A.weight": torch.zeros(2, 4)},
        "larger": {f"{LAYER}.lora_A.weight": torch.zeros(2, 4096)},
    }.items():
        file = tmp_path / name / "pytorch_lora_weights.safetensors"
        file.parent.mkdir()
        save_file(tensors, file)
        if name == "damaged":
            file.write_bytes(file.read_bytes()[:-9])
    if "--model" not in arguments:
        arguments = [*arguments, "--model", str(micro_pipeline_folder)]
    assert run_script("sample", arguments, monkeypatch) == 2
    shown = capsys.readouterr()
    assert message in shown.err
    assert "Traceback" not in shown.err + shown.out
    assert not list(tmp_path.glob("*.png/*")) + list(tmp_path.glob("samples.png"))


def test_folder_of_a_run_is_refused_because_it_may_hold_two_loras(tmp_path: Path) -> None:
    config, lora, best = tmp_path / "config.yaml", tmp_path / "lora", tmp_path / "best" / "lora"
    with pytest.raises(ValueError, match=r"lora must be a \.safetensors file, or a folder with"):
        SampleArguments(lora=tmp_path).check()
    config.touch()
    with pytest.raises(ValueError, match="lora must not be the folder of a run but a LoRA, and it has none"):
        SampleArguments(lora=tmp_path).check()
    for folder in (lora, best):
        folder.mkdir(parents=True)
        save_file({"unet.layer.lora_A.weight": torch.zeros(2, 4)}, folder / "pytorch_lora_weights.safetensors")
        assert find_lora(folder).parent == folder
    with pytest.raises(ValueError, match="lora must not be the folder of a run") as refused:
        SampleArguments(lora=tmp_path).check()
    assert all(one in str(refused.value) for one in (f"'{lora}'", f"'{best}'", "--run"))
    with pytest.raises(ValueError, match="lora must not be the folder of a run"):
        resolve(train_config(lora=tmp_path))
