"""The checks in their order: first what others stand on, then the parts, then the whole."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from agents.commands.doctor.examination import Check, Examination, examine
from agents.commands.doctor.finding import Finding
from agents.commands.doctor.machine import check_disk, check_machine, check_model, check_policy, check_prompts
from agents.commands.doctor.parity import check_decoder, check_denoiser, check_lora, check_path, check_table
from agents.commands.doctor.samples import (
    check_failing_sample,
    check_inputs,
    check_repeatability,
    check_sampler,
    check_scores,
)
from agents.commands.doctor.speed import check_plan, check_speed
from agents.commands.doctor.update import check_gradient, check_ratio, check_timesteps, check_update
from agents.config.train_config import TrainConfig
from agents.distributed import Processes
from agents.training.preparation import CheckedRun, check_run

CHECKS: dict[str, Check] = {
    "machine": check_machine,
    "model": check_model,
    "weights that learn": check_policy,
    "disk": check_disk,
    "prompts": check_prompts,
    "sampler table": check_table,
    "denoiser": check_denoiser,
    "decoder": check_decoder,
    "parity": check_path,
    "stochastic sampler": check_sampler,
    "failing sample": check_failing_sample,
    "reward": check_scores,
    "reward repeated": check_repeatability,
    "reward inputs": check_inputs,
    "gradient": check_gradient,
    "timesteps": check_timesteps,
    "ratio": check_ratio,
    "update": check_update,
    "LoRA": check_lora,
    "speed and memory": check_speed,
    "plan": check_plan,
}


def examine_run(config: TrainConfig, folder: Path) -> list[Finding]:
    """Examine a run; its model may be the `source` of a model object of this process.

    Args:
        config: every setting of the run.
        folder: for images; it is made.

    Raises:
        ValueError, TypeError, ImportError: for settings with which no run can start, as `check_run`.
    """
    return examine_checked(check_run(config, Processes()), folder)


def examine_checked(
    checked: CheckedRun,
    folder: Path,
    show: Callable[[Finding], None] = lambda _: None,
    checks: Mapping[str, Check] = CHECKS,
) -> list[Finding]:
    """Examine a run whose settings are checked; `show` is told each finding."""
    folder.mkdir(parents=True, exist_ok=True)
    examination = Examination(checked, folder.resolve())
    try:
        return examine(examination, checks, show)
    finally:
        examination.close()
