"""How many pairs fit a call: bytes counted without a model against real tensors, and what is made of them."""

import json
from dataclasses import replace

import psutil
import pytest
import torch
import yaml
from agents.planning.activations import Denoiser, LiveBytes, call_bytes, training_call, training_inputs
from helpers.many_processes import Job, run_processes
from helpers.micro_agents import micro_config
from helpers.micro_families import FAMILIES, micro_family
from helpers.micro_pipeline import micro_pipeline
from helpers.scripts import MINIATURE, SCRIPTS, run_script

from agents.config.train_config import TrainConfig
from agents.distributed import Processes
from agents.planning import memory
from agents.planning.memory import SAFETY, fitting_pairs, rows_of_pair, settle_train_batch_size, standing_bytes
from agents.planning.plan import pairs_per_update
from agents.training.run import prepare_run, run_training
from ddpo_env.models.loading import load_model
from ddpo_env.models.outline import outline_model


@pytest.fixture(autouse=True)
def scripts_on_path(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))


def denoiser(model, **changes):
    settings = {"resolution": None, "lora_rank": 2, "lora_targets": "attention", "gradient_checkpointing": False}
    settings |= {"autocast": None, "dtype": torch.float32, "device": "cpu"}
    return Denoiser(model=str(model), **settings | changes)


def measured(folder, described, rows):
    """The same call on real weights: bytes alive at once, and bytes that autograd's hooks are given."""
    import benchmark_memory

    model = load_model(folder, described.device, described.dtype, described.resolution)
    network = benchmark_memory.real_network(model, described)
    inputs = {name: value.normal_() for name, value in training_inputs(model, rows, described.device).items()}
    counter = LiveBytes([*network.parameters(), *network.buffers(), *inputs.values()])
    with counter:
        training_call(model, network, inputs, described.autocast)
    network.zero_grad()
    return counter.peak, benchmark_memory.saved_bytes(model, network, inputs, described.autocast)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"lora_targets": "attention+convolutions"},
        {"lora_rank": 0},
        {"gradient_checkpointing": True},
        {"dtype": torch.bfloat16},
        {"autocast": torch.bfloat16},
        {"resolution": 64},
    ],
)
def test_counted_bytes_are_those_of_real_tensors(micro_pipeline_folder, changes):
    described = denoiser(micro_pipeline_folder, **changes)
    alive, saved = measured(micro_pipeline_folder, described, rows=3)
    # Which casts of weights autocast keeps for later calls is not the same on fake tensors.
    assert call_bytes(described, 3) == (pytest.approx(alive, rel=0.01) if described.autocast else alive)
    assert saved < alive, "beside what autograd keeps, gradients and what they are made of"
    if not changes or changes == {"resolution": 64}:
        assert alive < 1.15 * saved


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_counted(tmp_path, family):
    micro_family(family).save_pretrained(tmp_path)
    assert call_bytes(denoiser(tmp_path), 2) == measured(tmp_path, denoiser(tmp_path), rows=2)[0]


def test_bytes_of_a_perceptron():
    """Two hidden layers of 64: what autograd keeps is written out."""
    described = denoiser("points", lora_rank=0)
    rows = 10_000
    inputs, hidden, outputs = 34, 64, 2
    kept = rows * 4 * (inputs + 4 * hidden)  # the first layer's input; before and after each activation
    gradients = rows * 4 * (outputs + 2 * hidden)
    assert kept < call_bytes(described, rows) < kept + 2 * gradients


def test_attention_writes_no_scores_down(micro_pipeline_folder):
    """The scores of four times the pixels are sixteen times as many."""
    side = 512
    alone, double = (call_bytes(denoiser(micro_pipeline_folder, resolution=one), 2) for one in (side, 2 * side))
    assert double < 4.1 * alone


def test_stable_diffusion_takes_less_than_two_gibibytes_a_guided_pair():
    pair = call_bytes(denoiser("sd14-random", lora_rank=4, dtype=torch.bfloat16), 2)
    assert pair == pytest.approx(1.77 * 2**30, rel=0.02)


def room(monkeypatch, config, bytes_for_a_call):
    """Let a machine have just this much for a call."""
    monkeypatch.setattr(memory, "standing_bytes", lambda *_: 0)
    monkeypatch.setattr(memory, "free_bytes", lambda *_: bytes_for_a_call / SAFETY)
    return fitting_pairs(config, Processes())


def test_the_largest_divisor_that_fits(micro_pipeline_folder, monkeypatch):
    config = micro_config(micro_pipeline_folder, None, policy={"guidance_scale": 3.0})
    assert pairs_per_update(config) == 4 * 2
    described, outline = memory._outlined(config, Processes())
    assert rows_of_pair(config, outline.model) == 2
    for pairs in (1, 2, 4, 8):
        exactly = call_bytes(described, 2 * pairs)
        assert room(monkeypatch, config, exactly + 1) == pairs
        if pairs > 1:
            assert room(monkeypatch, config, exactly - 1) == pairs // 2
    with pytest.raises(
        ValueError, match=r"train_batch_size .*not one fits.* GiB free on cpu.*--gradient-checkpointing"
    ):
        room(monkeypatch, config, call_bytes(described, 2) - 1)


def test_a_cpu_gets_no_more_rows_than_gain(micro_pipeline_folder):
    training = {"samples_per_iteration": 96, "sample_batch_size": 4, "updates_per_iteration": 1}
    guided, plain = (
        micro_config(micro_pipeline_folder, None, policy={"guidance_scale": scale}, training=training)
        for scale in (3.0, 1.0)
    )
    assert (fitting_pairs(guided, Processes()), fitting_pairs(plain, Processes())) == (16, 32)


@pytest.mark.parametrize(
    ("groups", "pairs", "rows"),
    [
        ({}, 8, 2),
        ({"policy": {"guidance_scale": 1.0}}, 8, 1),
        ({"policy": {"unconditional_gradient": False}}, 8, 1),
        ({"training": {"algorithm": "rwr"}}, 4, 1),
        ({"training": {"algorithm": "rwr", "kl_coef": 0.1}}, 4, 3),
        ({"training": {"algorithm": "rwr_sparse", "updates_per_iteration": 1, "rwr_percentile": 50.0}}, 4, 1),
    ],
)
def test_rows_of_a_pair(micro_pipeline_folder, monkeypatch, groups, pairs, rows):
    """Against the rows that calls with a gradient have in a run, of one call an update."""
    groups = {**groups, "training": {"train_batch_size": 8, **groups.get("training", {})}}
    config = micro_config(micro_pipeline_folder, None, **groups)
    model = outline_model(config.model)
    assert (pairs_per_update(config), rows_of_pair(config, model)) == (pairs, rows)
    algorithm = prepare_run(replace(config, run=replace(config.run, run_dir=micro_pipeline_folder / "no"))).algorithm
    _, callback = algorithm._setup_learn(1)
    algorithm.collect_rollouts(algorithm.env, callback, algorithm.rollout_buffer, algorithm.n_steps)
    calls = []
    kind = type(algorithm.policy.model)
    predict = kind.predict

    def counted(self, denoiser, latents, timestep, conditioning):
        if torch.is_grad_enabled():
            calls.append(len(latents))
        return predict(self, denoiser, latents, timestep, conditioning)

    monkeypatch.setattr(kind, "predict", counted)
    algorithm.train()
    assert sum(calls) == config.training.epochs * config.training.updates_per_iteration * pairs * rows


def test_what_training_holds_is_that_of_a_run(micro_pipeline_folder, tmp_path):
    config = micro_config(micro_pipeline_folder, tmp_path / "run", training={"ema_decay": 0.9})
    described, outline = memory._outlined(config, Processes())
    algorithm = prepare_run(config).algorithm
    algorithm.iterate(algorithm._setup_learn(0)[1], 1, 10**9)
    policy, pipeline = algorithm.policy, micro_pipeline()
    parts = (pipeline.unet, pipeline.vae, pipeline.text_encoder)
    frozen = sum(weight.nbytes for part in parts for weight in part.parameters())
    moments = [state[name] for state in policy.optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    learning = [*policy.trainable_parameters(), *moments, *algorithm.ema.shadow_params]
    expected = frozen + sum(tensor.nbytes for tensor in learning) + algorithm.rollout_buffer.nbytes
    assert standing_bytes(config, outline, described.dtype) == pytest.approx(expected, rel=0.01)


def test_the_number_is_stored_and_a_resumed_run_has_it(micro_pipeline_folder, tmp_path, monkeypatch):
    config = micro_config(micro_pipeline_folder, tmp_path, training={"train_batch_size": 0}, run={"iterations": 1})
    run_training(config)
    assert config.training.train_batch_size == 0, "it is not changed"
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["training"]["train_batch_size"] == 8
    monkeypatch.setattr(memory, "free_bytes", lambda *_: 0)
    resumed = prepare_run(TrainConfig(run=RunSettings(resume=tmp_path, iterations=2)))
    assert (resumed.config.training.train_batch_size, resumed.algorithm.micro_batch_size) == (8, 8)


def test_the_smallest_of_all_processes(micro_pipeline_folder, monkeypatch):
    processes = Processes()
    monkeypatch.setattr(processes, "gather_objects", lambda own: [own, 4, 8])
    config = micro_config(micro_pipeline_folder, None, training={"train_batch_size": 0})
    assert settle_train_batch_size(config, processes).training.train_batch_size == 4


def test_two_processes_agree(micro_pipeline_folder, tmp_path):
    groups = {"training": {"train_batch_size": 0}, "run": {"iterations": 1}}
    outcome = run_processes(2, Job(str(micro_pipeline_folder), tmp_path / "run", groups))
    assert outcome.codes == [0, 0], outcome.said
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["training"]["train_batch_size"] == 8


def test_processes_of_a_machine_share_its_memory(monkeypatch):
    available = psutil.virtual_memory()._replace(available=12_000)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: available)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert [memory.free_bytes(torch.device("cpu"), count) for count in (1, 3)] == [12_000, 4_000]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert memory.free_bytes(torch.device("cpu"), 8) == 6_000


def test_an_unknown_architecture_cannot_be_counted():
    config = micro_config("somebody/something", None, training={"train_batch_size": 0})
    with pytest.raises(ValueError, match="train_batch_size must be at least 1 with model 'somebody/something'"):
        settle_train_batch_size(config, Processes())


def test_dry_run_says_what_was_chosen(monkeypatch, capsys, tmp_path, micro_pipeline_folder):
    arguments = [*MINIATURE, f"--model={micro_pipeline_folder}", f"--run-dir={tmp_path / 'run'}", "--dry-run"]
    assert run_script("train_ppo", [*arguments, "--train-batch-size=0"], monkeypatch) == 0
    lines = capsys.readouterr().out.splitlines()
    assert next(line for line in lines if line.startswith("training")).endswith("= 1 pair, in calls of up to 1 pair")
    assert next(line for line in lines if line.startswith("memory")).startswith(
        "memory     0.00 GiB for a training call of 1 pair, chosen to fit in 80% of what weights, optimizer and rollout"
    )
    assert run_script("train_ppo", arguments, monkeypatch) == 0
    assert "memory " not in capsys.readouterr().out
    assert run_script("train_ppo", [*arguments, "--train-batch-size=-1"], monkeypatch) == 2
    assert "train_batch_size must be at least 0; got -1" in capsys.readouterr().err


def test_counted_and_measured_growth_are_told(micro_pipeline_folder, monkeypatch, capsys):
    import benchmark_memory

    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    arguments = [f"--model={micro_pipeline_folder}", "--device=cpu", "--rows", "2", "4", "--lora-rank=2"]
    monkeypatch.setattr("sys.argv", ["benchmark_memory.py", *arguments])
    assert benchmark_memory.main() == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["counted_bytes"] == figures["live_bytes"]
    assert figures["saved_bytes"][0] < figures["saved_bytes"][1] < figures["live_bytes"][1]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("changes", [{}, {"dtype": torch.bfloat16}, {"autocast": torch.bfloat16}])
def test_counted_bytes_are_those_of_a_gpus_allocator(micro_pipeline_folder, changes):
    described = denoiser(micro_pipeline_folder, device="cuda", resolution=512, **changes)
    alive, _ = measured(micro_pipeline_folder, described, rows=4)
    assert call_bytes(described, 4) == pytest.approx(alive, rel=0.02)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    measured(micro_pipeline_folder, described, rows=4)
    assert torch.cuda.max_memory_allocated() - before < call_bytes(described, 4) / SAFETY
