"""A dry run refuses what the run would refuse, in the same words and before anything is loaded."""

from pathlib import Path
from typing import Any

import pytest
from helpers.micro_agents import micro_config

from agents.distributed import Processes
from agents.training.preparation import check_run
from ddpo_env.models import loading


@pytest.fixture(autouse=True)
def no_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: Any, **__: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(loading, "load_pipeline", load)


POINTS = {"model": "points", "reward": "points_ring", "guidance_scale": 1.0}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_inference_steps": 1001}, r"num_inference_steps must be between 1 and 1000 .*got 1001"),
        ({"resolution": 7}, "resolution must be .*7"),
        ({"eta": 1.5}, "eta must be at most"),
        ({"noise_level": 0.5}, "noise_level applies to"),
        ({"reward": "points_ring"}, "reward points_ring scores samples of another kind, and model .* generates images"),
        ({"holdout_reward": "points_mixture"}, "reward points_mixture scores samples of another kind"),
        (POINTS | {"guidance_scale": 5.0}, "guidance_scale must be 1 with model 'points'"),
        (POINTS | {"offload_text_encoder": True, "lora_rank": 0}, "offload_text_encoder must be False with"),
        (POINTS | {"vae_tiling": True, "lora_rank": 0}, "vae_tiling must be False with model 'points'"),
        (POINTS | {"resolution": 64, "lora_rank": 0}, "resolution must be None with model 'points'"),
        (POINTS | {"lora_rank": 2}, "lora_targets=.* matches no layer of this PointsDenoiser"),
        (POINTS | {"lora_rank": 0, "gradient_checkpointing": True}, "gradient_checkpointing must be False"),
        (POINTS | {"lora_rank": 0, "reward": "jpeg_compressibility"}, "reward jpeg_compressibility scores images"),
    ],
)
def test_model_and_settings_must_fit(
    micro_pipeline_folder: Path, tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    model = settings.get("model", str(micro_pipeline_folder))
    config = micro_config(model, tmp_path / "run", **{name: one for name, one in settings.items() if name != "model"})
    with pytest.raises(ValueError, match=message):
        check_run(config, Processes())


def test_a_run_that_fits_is_not_refused(micro_pipeline_folder: Path, tmp_path: Path) -> None:
    config = micro_config(micro_pipeline_folder, tmp_path / "run", vae_tiling=True, gradient_checkpointing=True)
    assert check_run(config, Processes()).config.run.vae_tiling


def test_folder_below_a_file_is_refused(micro_pipeline_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"run_dir must be a folder that can be written; .*file"):
        check_run(micro_config(micro_pipeline_folder, tmp_path / "file" / "run"), Processes())
