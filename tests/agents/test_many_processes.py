"""Several processes are one: same weights as a single process, one writer, and all end together."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers.many_processes import LINEAR, Job, Mishap, again, largest_difference, run_processes, single, trained
from helpers.micro_agents import files_below
from helpers.run_comparison import rows
from helpers.scripts import MINIATURE, SCRIPTS, run_script

from agents.config.train_config import TrainConfig
from agents.distributed import start_processes
from agents.training.checkpoint import latest_checkpoint


@pytest.fixture(scope="module")
def one(micro_pipeline_folder, tmp_path_factory):
    return single(micro_pipeline_folder, tmp_path_factory.mktemp("one") / "run", **LINEAR)


@pytest.fixture(scope="module")
def two(micro_pipeline_folder, tmp_path_factory):
    """A run of two processes, and how it went."""
    folder = tmp_path_factory.mktemp("two") / "run"
    return folder, run_processes(2, Job(str(micro_pipeline_folder), folder, LINEAR))


def test_two_processes_train_the_weights_of_one(one, two):
    folder, outcome = two
    assert outcome.codes == [0, 0]
    assert largest_difference(folder, one) < 1e-6
    assert max(float(value.abs().max()) for name, value in trained(one).items() if "lora_B" in name) > 1e-3
    for mine, theirs in zip(rows(folder), rows(one), strict=True):
        assert mine.keys() == theirs.keys()
        for name in mine.keys() - {"train/ratio_deviation"}:
            if mine[name] and not name.startswith("time/"):
                assert float(mine[name]) == pytest.approx(float(theirs[name]), rel=1e-3, abs=1e-6), name
        assert mine["time/total_timesteps"] == theirs["time/total_timesteps"]


@pytest.mark.slow
def test_two_processes_train_the_weights_of_one_with_the_default_optimizer(tmp_path):
    """With two calls an update, and rows enough in a call that a CPU's kernels are the same for half of them."""
    settings = {
        "reward": "jpeg_compressibility",
        "num_inference_steps": 5,
        **vars(TrainConfig().policy),
        "samples_per_iteration": 36,
        "sample_batch_size": 36,
        "train_batch_size": 36,
        "eval_interval": 0,
        "eval_samples": 2,
    }
    expected = single("tiny", tmp_path / "one", **settings)
    outcome = run_processes(2, Job("tiny", tmp_path / "two", settings), limit=400)
    assert outcome.codes == [0, 0], outcome.said
    assert largest_difference(tmp_path / "two", expected) < 1e-6
    assert max(float(value.abs().max()) for name, value in trained(expected).items() if "lora_B" in name) > 1e-2


def test_weights_are_the_same_bits_in_both_processes_after_every_update(two):
    first, second = two[1].weights
    assert len(first) == 6
    assert first == second
    assert first[0] != first[1]


def test_one_process_writes_what_a_single_one_writes(one, two):
    folder, _ = two
    mine, theirs = ({name for name in files_below(run) if "tfevents" not in name} for run in (folder, one))
    assert mine == theirs
    assert len(list((folder / "tensorboard").iterdir())) == 1
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["processes"] == 2
    assert summary["reward_queries"] == 24
    state = json.loads((latest_checkpoint(folder / "checkpoints") / "state.json").read_text())
    expected = json.loads((latest_checkpoint(one / "checkpoints") / "state.json").read_text())
    assert len(state["env"]["generators"]) == 4, "those of the whole batch"
    for part in ("env", "generators", "counters"):
        assert state[part] == expected[part], part


def test_without_the_exchange_of_gradients_processes_differ(micro_pipeline_folder, tmp_path):
    settings = {**LINEAR, "iterations": 1, "eval_interval": 0, "eval_samples": 2}
    job = Job(str(micro_pipeline_folder), tmp_path / "run", settings, synchronised=False)
    first, second = run_processes(2, job).weights
    assert first[0] != second[0]


CHOICES = {
    "group": {"advantage": "group"},
    "leave_one_out": {"advantage": "leave_one_out", "non_finite_rewards": "drop"},
    "gae": {"advantage": "gae", "epochs": 2, "recompute_log_probs": True, "critic": True},
    "rwr": {"algorithm": "rwr", "epochs": 2, "updates_per_iteration": 2, "kl_coef": 0.1},
    "averaged": {"ema_decay": 0.9, "target_kl": 1e-5, "epochs": 3},
    "window": {"noise_window": 2, "noise_window_iterations": 1, "ema_decay": 0.9, "kl_coef": 0.1},
    "shared noise": {"noise_window": 1, "noise_window_iterations": 1, "shared_noise": True, "samples_per_prompt": 4},
    "groups that processes share": {"samples_per_prompt": 4, "train_batch_size": 3},
    "one call is for one of them": {"train_batch_size": 1, "updates_per_iteration": 4},
    "nft": {"algorithm": "nft", "updates_per_iteration": 2, "epochs": 2, "kl_coef": 0.1, "ema_decay": 0.5},
    "grpo": {
        "algorithm": "grpo",
        "advantage": "gdpo",
        "reward": "helpers.micro_agents:brightness:1,helpers.micro_agents:contrast:0.5",
        "kl_coef": 0.1,
        "trust_region": "guard",
    },
    "awm": {"algorithm": "awm", "updates_per_iteration": 2, "kl_coef": 0.1, "train_batch_size": 1},
    "draft": {
        "algorithm": "draft",
        "draft_steps": 2,
        "updates_per_iteration": 2,
        "kl_coef": 0.1,
        "train_batch_size": 1,
    },
    "dpo": {"algorithm": "dpo", "updates_per_iteration": 2, "kl_coef": 0.1, "ema_decay": 0.5},
    "a pair that processes share": {"algorithm": "dpo", "train_batch_size": 8},
    "penalised regression": {"algorithm": "rwr", "train_batch_size": 1, "kl_coef": 0.1},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CHOICES)
def test_every_choice_gives_the_weights_of_one_process(micro_pipeline_folder, tmp_path, name):
    settings = {**LINEAR, **CHOICES[name], "iterations": 2, "eval_interval": 0}
    expected = single(micro_pipeline_folder, tmp_path / "one", **settings)
    outcome = run_processes(2, Job(str(micro_pipeline_folder), tmp_path / "two", settings))
    assert outcome.codes == [0, 0], outcome.said
    assert outcome.weights[0] == outcome.weights[1]
    assert largest_difference(tmp_path / "two", expected) < 1e-6
    assert rows(tmp_path / "two")[-1]["train/n_updates"] == rows(expected)[-1]["train/n_updates"]


@pytest.mark.parametrize(
    ("before", "after"), [(2, 1), *(pytest.param(*counts, marks=pytest.mark.slow) for counts in [(1, 2), (2, 4)])]
)
def test_run_goes_on_with_another_number_of_processes(micro_pipeline_folder, one, tmp_path, before, after):
    folder = tmp_path / "run"
    # Calls of the reward in a process: 2 before training, then 2 per iteration.
    job = Job(str(micro_pipeline_folder), folder, LINEAR, Mishap("raise", rank=0, call=5))
    assert run_processes(before, job).codes == [1] * before
    assert latest_checkpoint(folder / "checkpoints").name == "iteration_000001"
    outcome = run_processes(after, again(job))
    assert outcome.codes == [0] * after, outcome.said
    assert largest_difference(folder, one) < 1e-6
    assert [row["time/iterations"] for row in rows(folder)] == ["0", "1", "2", "3"]


@pytest.mark.parametrize(
    ("mishap", "done"),
    [
        ({"call": 6}, 1),
        pytest.param({"call": 1}, 0, marks=pytest.mark.slow),
        pytest.param({"update": 4}, 1, marks=pytest.mark.slow),
    ],
)
def test_what_one_process_raises_ends_all(micro_pipeline_folder, tmp_path, mishap, done):
    folder = tmp_path / "run"
    settings = {**LINEAR, "checkpoint_interval": 0}
    outcome = run_processes(2, Job(str(micro_pipeline_folder), folder, settings, Mishap("raise", rank=1, **mishap)))
    assert outcome.codes == [1, 1]
    assert outcome.said[1] == "RuntimeError: the judge has left"
    assert outcome.said[0].startswith("OtherProcessError: RuntimeError: the judge has left")
    assert outcome.said[0].endswith("(in process 1 of 2)")
    assert "in happen" in (folder / "error.txt").read_text(), "the other process's traceback"
    assert latest_checkpoint(folder / "checkpoints").name == f"iteration_{done:06d}"


def test_process_that_dies_ends_the_other(micro_pipeline_folder, tmp_path):
    job = Job(str(micro_pipeline_folder), tmp_path / "run", LINEAR, Mishap("kill", rank=1, call=5))
    assert run_processes(2, job, limit=90).codes == [1, -signal.SIGKILL]
    assert latest_checkpoint(tmp_path / "run" / "checkpoints").name == "iteration_000001"


@pytest.mark.slow
@pytest.mark.parametrize(("rank", "mishap"), [(0, {"call": 5}), (1, {"update": 3})])
def test_run_of_which_a_process_died_goes_on(micro_pipeline_folder, one, tmp_path, rank, mishap):
    job = Job(str(micro_pipeline_folder), tmp_path / "run", LINEAR, Mishap("kill", rank=rank, **mishap))
    assert sorted(run_processes(2, job, limit=90).codes) == [-signal.SIGKILL, 1]
    assert run_processes(2, again(job)).codes == [0, 0]
    assert largest_difference(tmp_path / "run", one) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("mishap", [{"call": 5}, {"update": 4}])
def test_ctrl_c_in_one_process_stops_all_at_a_finished_iteration(micro_pipeline_folder, one, tmp_path, mishap):
    job = Job(str(micro_pipeline_folder), tmp_path / "run", LINEAR, Mishap("interrupt", rank=1, **mishap))
    outcome = run_processes(2, job)
    assert outcome.codes == [0, 0]
    assert outcome.said == ["stopped", "stopped"]
    assert latest_checkpoint(tmp_path / "run" / "checkpoints").name == "iteration_000001"
    assert run_processes(2, again(job)).codes == [0, 0]
    assert largest_difference(tmp_path / "run", one) < 1e-6


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sample_batch_size": 1, "samples_per_prompt": 1}, "sample_batch_size must be a multiple of"),
        ({"eval_samples": 3}, "eval_samples must be a multiple of the number of processes, 2; got 3"),
        ({"device": "cuda:0"}, "device must be auto, cpu or cuda with several processes"),
        (
            {"reward": "helpers.stateful_rewards:Remembering"},
            "reward Remembering keeps a state (state_dict)",
        ),
    ],
)
def test_what_processes_cannot_share_is_refused(micro_pipeline_folder, tmp_path, settings, message):
    outcome = run_processes(2, Job(str(micro_pipeline_folder), tmp_path / "run", settings))
    assert outcome.codes == [1, 1]
    assert all(message in said for said in outcome.said)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_weighted_sum_of_raw_terms_is_shared(micro_pipeline_folder, tmp_path):
    settings = {"reward": "helpers.micro_agents:brightness:1:raw", "iterations": 1, "eval_interval": 0}
    expected = single(micro_pipeline_folder, tmp_path / "one", **LINEAR, **settings)
    assert run_processes(2, Job(str(micro_pipeline_folder), tmp_path / "two", LINEAR | settings)).codes == [0, 0]
    assert largest_difference(tmp_path / "two", expected) < 1e-6
    first, second = (rows(run)[1]["reward/helpers.micro_agents:brightness"] for run in (tmp_path / "two", expected))
    assert float(first) == pytest.approx(float(second))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (
            "ACCELERATE_USE_FSDP",
            "true",
            "ACCELERATE_USE_FSDP must be 'false', or not asked of the launcher; got 'true'",
        ),
        ("ACCELERATE_USE_DEEPSPEED", "true", "DeepSpeed is not supported"),
        ("ACCELERATE_MIXED_PRECISION", "bf16", "use the script's --autocast bfloat16"),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", "ACCELERATE_DYNAMO_BACKEND must be 'no'"),
    ],
)
def test_what_a_launcher_asks_for_in_vain_is_refused(monkeypatch, name, value, message):
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        start_processes()
    monkeypatch.setenv(name, "NO" if name.endswith(("BACKEND", "PRECISION")) else "false")
    assert start_processes().count == 1


def test_processes_wait_for_some_time(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="process_timeout must be above 0; got 0"):
        start_processes("cpu", timeout=0)


TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc-per-node=2")
ACCELERATE = ("accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--main_process_port=0")


def launched(*arguments, launcher=TORCHRUN):
    """The script in two processes, as a user starts it."""
    command = [sys.executable, "-m", *launcher]
    command += [str(SCRIPTS / "train_ppo.py"), *MINIATURE, "--eval-samples=4", *arguments]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [TORCHRUN, ACCELERATE])
def test_script_runs_under_launchers(micro_pipeline_folder, tmp_path, launcher):
    settings = (f"--model={micro_pipeline_folder}", "--iterations=1", f"--run-dir={tmp_path / 'run'}")
    process = launched(*settings, launcher=launcher)
    shown, _ = process.communicate(timeout=200)
    assert process.returncode == 0, shown
    assert shown.count("processes  2, which share every batch") == 1
    assert shown.count("Look at") == 1
    assert (tmp_path / "run" / "summary.json").exists()


@pytest.mark.slow
def test_two_nodes_share_a_run_and_one_of_them_writes(micro_pipeline_folder, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    nodes = [
        launched(
            f"--model={micro_pipeline_folder}",
            "--iterations=1",
            f"--run-dir={tmp_path / f'node-{node}'}",
            launcher=("torch.distributed.run", "--nnodes=2", f"--node-rank={node}", f"--master-port={port}"),
        )
        for node in range(2)
    ]
    shown = [node.communicate(timeout=200)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], shown
    assert "processes  2, which share every batch" in shown[0]
    assert "Look at" not in shown[1]
    assert (tmp_path / "node-0" / "summary.json").exists()
    assert not (tmp_path / "node-1").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "fails", "said"),
    [
        ([], False, "processes  2, which share every batch"),
        (["--sample-batch-size=1", "--samples-per-prompt=1"], True, "error: sample_batch_size must be a multiple of"),
        (["--preset=sd15"], True, "error: preset must be one of sd14-compressibility"),
    ],
)
def test_dry_run_under_torchrun_says_everything_once(tmp_path, arguments, fails, said):
    process = launched("--dry-run", f"--run-dir={tmp_path / 'run'}", *arguments)
    shown, _ = process.communicate(timeout=200)
    assert bool(process.returncode) is fails, shown
    assert shown.count(said) == 1, shown
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_ctrl_c_stops_a_launched_run_and_it_goes_on(micro_pipeline_folder, tmp_path):
    run = tmp_path / "run"
    process = launched(f"--model={micro_pipeline_folder}", "--iterations=5000", f"--run-dir={run}")
    deadline = time.monotonic() + 200
    while not list(run.glob("checkpoints/iteration_000002")) and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    shown, _ = process.communicate(timeout=100)
    assert "the run is saved. To continue:" in shown
    assert process.returncode != 0
    assert not Path(run / "summary.json").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("scripts_on_path")
def test_benchmark_compares_processes_with_one(micro_pipeline_folder, monkeypatch, tmp_path):
    sizes = ["--samples=4", "--sample-batch-size=4", "--train-batch-size=4", "--num-inference-steps=2", "--updates=1"]
    turns = [f"--model={micro_pipeline_folder}", "--iterations=1", "--repeats=1", f"--json={tmp_path / 'figures.json'}"]
    assert run_script("benchmarks/scaling", [*sizes, *turns], monkeypatch) == 0
    figures = json.loads((tmp_path / "figures.json").read_text())
    rates = {count: rate["iteration"] for count, rate in figures["samples_per_second"].items()}
    assert figures["ratio"]["iteration"] == pytest.approx(rates["2"] / rates["1"])


@pytest.mark.parametrize(
    ("name", "value"),
    [("LOCAL_WORLD_SIZE", "0"), ("WORLD_SIZE", "two"), ("WORLD_SIZE", ""), ("RANK", "-1"), ("MASTER_PORT", "1e4")],
)
def test_launcher_variables_must_be_numbers(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=f"{name} must be an integer of at least .*; got '{value}'"):
        start_processes("cpu")
