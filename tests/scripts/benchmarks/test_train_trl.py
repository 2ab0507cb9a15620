"""`scripts/benchmarks/train_trl.py`: TRL's own trainer on the task of the experiments that count reward queries."""

import csv
import sys

import torch
from helpers.paths import ROOT

from ddpo_env.prompts import load_prompts

PROMPTS = ROOT / "docs" / "prompts" / "simple_animals.txt"


def test_prompts_of_the_file_are_those_of_the_set():
    assert tuple(PROMPTS.read_text().splitlines()) == tuple(load_prompts("simple_animals").prompts)


def test_trl_trains_with_the_rates_it_is_given(micro_pipeline_folder, monkeypatch, capsys):
    import train_trl
    import trl_trainer

    made, make = [], trl_trainer.trainer_of
    monkeypatch.setattr(
        trl_trainer, "trainer_of", lambda *given, **named: made.append(make(*given, **named)) or made[0]
    )
    sizes = ("--iterations=2", "--samples=8", "--train-batch-size=2", "--num-inference-steps=3", "--seed=5")
    given = (f"--model={micro_pipeline_folder}", f"--prompts={PROMPTS}", "--learning-rate=0.01", "--clip-range=0.002")
    monkeypatch.setattr(sys, "argv", ["train_trl.py", *given, *sizes, f"--threads={torch.get_num_threads()}"])
    assert train_trl.main() == 0
    lines = capsys.readouterr().out.splitlines()
    rows = list(csv.DictReader(lines[lines.index("iteration,reward_queries,reward_mean,seconds") :]))
    assert [(row["iteration"], row["reward_queries"]) for row in rows] == [("0", "0"), ("1", "8")]
    assert all(float(row["reward_mean"]) < 0 for row in rows)
    assert 0 <= float(rows[0]["seconds"]) < float(rows[1]["seconds"])
    config = made[0].config
    assert (config.train_learning_rate, config.train_clip_range, config.seed) == (0.01, 0.002, 5)
    assert any(
        weight.abs().max() > 0 for name, weight in made[0].sd_pipeline.unet.named_parameters() if "lora_B" in name
    )
