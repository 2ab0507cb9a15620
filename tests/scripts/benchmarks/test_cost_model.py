"""The cost model of an iteration: its arithmetic, and a miniature of the comparison with runs."""

import dataclasses
import json
import sys

import pytest
from helpers.paths import SCRIPTS
from helpers.scripts import run_script

sys.path.insert(0, str(SCRIPTS / "benchmarks"))
from cost_model import ASSUMED, Constants, Workload, plan, predict

CONSTANTS = Constants(
    forward=0.01,
    training=0.02,
    decode=0.1,
    encode=1.0,
    reward=0.5,
    update=2.0,
    exchange=0.001,
    byte=1e-6,
    exchanged=4000,
)
WORK = Workload(images=8, sampled=800, trained=400, recomputed=200, prompts=2, updates=3, rollout=50_000)


def test_one_process_does_everything_and_exchanges_nothing():
    seconds = predict(CONSTANTS, WORK, 1)
    assert seconds == {
        "UNet, sampling": 8.0,
        "VAE": 0.8,
        "text": 2.0,
        "reward": 4.0,
        "UNet, log-probabilities": 2.0,
        "UNet, training": 8.0,
        "optimizer": 6.0,
        "communication": 0.0,
    }


def test_processes_divide_all_work_but_the_optimizer_step_and_communicate():
    one, four = predict(CONSTANTS, WORK, 1), predict(CONSTANTS, WORK, 4)
    for name in ("UNet, sampling", "VAE", "text", "reward", "UNet, log-probabilities", "UNet, training"):
        assert four[name] == one[name] / 4
    assert four["optimizer"] == one["optimizer"]
    assert four["communication"] == pytest.approx((3 * 3 + 20) * 0.001 + 3 * 4000e-6 + 50_000e-6)


def test_rewards_that_are_computed_elsewhere_take_no_time():
    assert predict(CONSTANTS, dataclasses.replace(WORK, overlaps=True), 1)["reward"] == 0


def test_constants_of_the_plan_are_the_operations_that_torch_counts():
    from agents.planning.flops import count_flops
    from ddpo_env.models.outline import outline_model

    flops = count_flops(outline_model("sd14-random"), lora_rank=4)
    for assumed, counted in ((ASSUMED.forward, flops.forward), (ASSUMED.training, flops.training)):
        assert assumed * 300e12 == pytest.approx(counted, rel=1e-3)
    assert ASSUMED.decode * 300e12 == pytest.approx(flops.decoding, rel=1e-3)
    assert plan().row_count == 9


def test_plan_is_printed(monkeypatch, capsys):
    assert run_script("benchmarks/cost_model", ["--plan"], monkeypatch) == 0
    shown = capsys.readouterr().out
    assert "constants are assumed" in shown
    assert "1000 GPUs" in shown


@pytest.mark.slow
def test_check_compares_with_runs(micro_pipeline_folder, monkeypatch, tmp_path):
    sizes = ["--samples=4", "--sample-batch-size=4", "--train-batch-size=4", "--num-inference-steps=2", "--updates=1"]
    turns = [f"--model={micro_pipeline_folder}", "--iterations=1", "--repeats=1", f"--json={tmp_path / 'costs.json'}"]
    assert run_script("benchmarks/cost_model", [*sizes, *turns], monkeypatch) == 0
    figures = json.loads((tmp_path / "costs.json").read_text())["processes"]
    assert figures.keys() == {"1", "2"}
    for one in figures.values():
        assert one["predicted_iteration_seconds"] == pytest.approx(sum(one["predicted_seconds"].values()))
        assert one["predicted_over_measured"] == pytest.approx(
            one["predicted_iteration_seconds"] / one["measured_iteration_seconds"]
        )
        assert min(one["constants"].values()) >= 0
    assert figures["1"]["predicted_seconds"]["communication"] == 0
