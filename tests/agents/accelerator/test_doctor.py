"""The doctor on the pretend accelerator."""

from pathlib import Path
from typing import Any

import pytest
from helpers.micro_agents import micro_config
from helpers.micro_pipeline import micro_pipeline
from helpers.patients import findings_of
from helpers.pretend_accelerator import Accelerator, pretend_accelerator

from agents.commands.doctor.checks import CHECKS
from agents.commands.doctor.examination import Examination, examine
from agents.distributed import Processes
from agents.training.preparation import check_run

SETTINGS: dict[str, Any] = {"device": "cuda", "dtype": "float32", "lora_targets": "attention"}


def levels(findings: dict[str, Any]) -> dict[str, str]:
    return {name: finding.meaning for name, finding in findings.items() if finding.level != "green"}


@pytest.mark.slow
@pytest.mark.usefixtures("accelerator")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_healthy_model_is_green_in_every_check(device: str, dtype: str, tmp_path: Path) -> None:
    findings = findings_of(micro_pipeline(), tmp_path, device=device, dtype=dtype)
    assert levels(findings) == {}
    assert list(findings) == list(CHECKS)
    assert findings["model"].numbers["offloaded"] == ["text_encoder"]
    assert findings["model"].numbers["allocated_gb"] > 0
    assert findings["speed and memory"].numbers["peak_gb"].keys() >= {1, 5}  # a slow machine tries no size between


@pytest.mark.usefixtures("accelerator")
def test_model_agrees_with_its_pipeline(tmp_path: Path) -> None:
    names = ("machine", "model", "denoiser", "decoder", "parity")
    findings = findings_of(micro_pipeline(), tmp_path, *names, **SETTINGS | {"num_inference_steps": 2})
    assert levels(findings) == {}
    assert findings["machine"].numbers["device_memory_gb"] == 8
    assert findings["parity"].numbers["relative_difference"] < 1e-5


def test_device_that_emulates_bfloat16_is_named(tmp_path: Path) -> None:
    with pretend_accelerator(bfloat16=False):
        finding = findings_of(micro_pipeline(), tmp_path, "machine", device="cuda", dtype="auto")["machine"]
    assert finding.numbers["bfloat16"] is False
    assert finding.numbers["dtype"] == "float32"


@pytest.mark.slow
def test_batches_that_do_not_fit_are_found_and_a_smaller_one_is_recommended(
    accelerator: Accelerator, tmp_path: Path
) -> None:
    def check(name: str, **settings: Any) -> Any:
        return findings_of(micro_pipeline(), tmp_path, name, **SETTINGS | {"samples_per_iteration": 64} | settings)[
            name
        ]

    sizes: dict[str, Any] = {"sample_batch_size": 2, "train_batch_size": 64, "updates_per_iteration": 1}
    accelerator.limit_memory(4 * 2**20)
    finding = check("speed and memory", **sizes)
    assert finding.level == "red"
    fits = finding.settings["train_batch_size"]
    assert 1 <= fits < 64
    assert finding.numbers["out_of_memory"]["training"] > fits
    assert check("speed and memory", **sizes | {"train_batch_size": fits}).level != "red"


def test_model_that_does_not_fit_is_an_error_that_says_what_to_do(
    accelerator: Accelerator, micro_pipeline_folder: Path, tmp_path: Path
) -> None:
    accelerator.limit_memory(2**16)
    config = micro_config(micro_pipeline_folder, tmp_path / "run", learning_rate=1e-3, **SETTINGS)
    examination = Examination(check_run(config, Processes()), tmp_path)
    findings = examine(examination, {name: CHECKS[name] for name in ("model", "prompts")})
    assert [finding.level for finding in findings] == ["red", "amber"]
    assert "CUDA out of memory" in findings[0].meaning
    assert "--dtype bfloat16" in findings[0].advice
