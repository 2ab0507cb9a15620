"""The benchmark of TRL's trainer; TRL itself is needed for one test only."""

import importlib.util
import sys

import pytest
import torch

SIZES = [
    *("--device=cpu", "--samples=4", "--sample-batch-size=4", "--train-batch-size=2", "--updates=2"),
    *("--num-inference-steps=2", "--guidance-scale=5", "--lora-rank=2", "--threads=1"),
]
FIGURES = (
    "sampling_images_per_second training_pairs_per_second iteration_seconds sampling_over_bare training_over_bare "
    "peak_memory_mb versions machine"
).split()


def test_trl_is_given_the_same_number_of_updates():
    import trl_trainer

    settings = trl_trainer.settings(trl_trainer.parse(["--model=folder", *SIZES]))
    accumulated = settings["train_gradient_accumulation_steps"] * settings["train_batch_size"]
    assert 4 // accumulated == 2
    assert settings["sample_num_batches_per_epoch"] * settings["sample_batch_size"] == 4
    assert settings["train_cfg"]


def test_trl_is_given_the_same_reward():
    import trl_trainer

    from rewards import configured_reward, evaluate_reward

    images = torch.randint(0, 256, (2, 32, 32, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    theirs, _ = trl_trainer.file_sizes(images.permute(0, 3, 1, 2) / 255, ("", ""), ({}, {}))
    ours, _ = evaluate_reward(configured_reward("jpeg_compressibility", {}), images.numpy(), ["", ""], [{}, {}])
    assert theirs.tolist() == pytest.approx(ours.tolist())


@pytest.mark.parametrize("argument", ["--train-batch-size=3", "--updates=3", "--lora-rank=0"])
def test_sizes_that_trl_cannot_have_are_refused(argument, monkeypatch, capsys):
    import trl_trainer

    monkeypatch.setattr(sys, "argv", ["trl_trainer.py", "--model=folder", *SIZES, argument])
    assert trl_trainer.main() == 2
    assert "error: " in capsys.readouterr().err


@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="TRL has an environment of its own")
def test_trl_does_the_work(micro_pipeline_folder, figures_of):
    import trl_trainer

    arguments = [*SIZES, f"--model={micro_pipeline_folder}", "--repeats=1"]
    assert set(FIGURES) <= set(figures_of(trl_trainer, arguments))
