"""A miniature of each script that times an iteration, and what can be tested of TRL's without TRL."""

import importlib.util
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.scripts import SCRIPTS

SIZES = [
    *("--device=cpu", "--samples=4", "--sample-batch-size=4", "--train-batch-size=2", "--updates=2"),
    *("--num-inference-steps=2", "--guidance-scale=5", "--lora-rank=2", "--threads=1"),
]
FIGURES = (
    "sampling_images_per_second training_pairs_per_second iteration_seconds sampling_over_unet training_over_unet "
    "peak_memory_mb versions machine"
).split()


@pytest.fixture(autouse=True)
def scripts_on_path(monkeypatch):
    """As for a script that is run: its folder is where imports are looked up."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)


def figures_of(script, arguments, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, arguments)])
    code = script.main()
    shown = capsys.readouterr()
    assert code == 0, shown.err
    return json.loads(shown.out[shown.out.index("{\n") :])


def test_the_iteration_is_compared_with_plain_peft(micro_pipeline_folder, monkeypatch, capsys, tmp_path):
    import benchmark

    output = tmp_path / "figures.json"
    arguments = [*SIZES, f"--model={micro_pipeline_folder}", "--resolution=16", "--repeats=1", f"--json={output}"]
    figures = figures_of(
        benchmark, [*arguments, "--timestep-fraction=1", "--timestep-window", "0", "1"], monkeypatch, capsys
    )
    assert set(FIGURES) <= set(figures)
    assert all(figures[name] > 0 for name in FIGURES[:6])
    assert json.loads(output.read_text()) == figures
    assert figures["arguments"]["resolution"] == "16"
    assert figures["training_pairs_per_second"] * figures["iteration_seconds"] > 4 * 2


def test_bad_sizes_exit_with_the_valid_ones(monkeypatch, capsys):
    import benchmark

    monkeypatch.setattr(sys, "argv", ["benchmark.py", "--samples=4", "--sample-batch-size=3"])
    assert benchmark.main() == 2
    assert "2 or 4" in capsys.readouterr().err


def test_the_baseline_is_not_made_faster(micro_pipeline_folder, tmp_path):
    import benchmark
    from peft.tuners import lora

    from agents.training.run import build_run

    arguments = benchmark.Arguments(model=str(micro_pipeline_folder), device="cpu", samples=4, sample_batch_size=4)
    policy = build_run(benchmark.configuration(arguments, tmp_path / "run"))[0].policy
    plain = benchmark.plain_denoiser(policy)
    layers = [type(layer) for layer in plain.modules() if isinstance(layer, lora.LoraLayer)]
    assert set(layers) == {lora.Linear, lora.Conv2d}
    learning = [sum(w.numel() for w in one.parameters() if w.requires_grad) for one in (plain, policy.denoiser)]
    assert learning[0] == learning[1]


def test_processes_take_turns_on_request(monkeypatch, capsys):
    import benchmark_figures

    calls = []
    work = benchmark_figures.Work(
        sampling=lambda: calls.append("sampling"),
        training=lambda: calls.append("training"),
        bare=lambda: (lambda: calls.append("bare sampling"), lambda: calls.append("bare training")),
        samples=4,
        pairs=8,
        device=torch.device("cpu"),
    )
    monkeypatch.setattr(sys, "stdin", io.StringIO("iteration\nbare\n"))
    figures = benchmark_figures.measure(work, repeats=99, on_request=True, packages=("torch",))
    shown = capsys.readouterr().out.splitlines()
    assert shown[0] == "ready"
    answers = [json.loads(line) for line in shown[1:]]
    assert [set(answer) & {"training", "bare_training"} for answer in answers] == [
        {"training"},
        {"training", "bare_training"},
    ]
    assert calls == [*("sampling", "training") * 2, "sampling", "bare sampling", "training", "bare training"]
    assert figures["training_over_unet"] > 0


def test_both_are_given_the_same_work():
    import benchmark_against

    arguments = benchmark_against.Arguments(against=Path("python"), model="folder", ours="--train-batch-size=16")
    commands = benchmark_against.commands(arguments)
    ours, theirs = (set(commands[name][2:]) for name in ("ours", "trl"))
    assert theirs <= ours
    assert ours - theirs == {"--lora-targets=attention", "--timestep-window", "0", "1", "--train-batch-size=16"}
    assert {"--samples=32", "--num-inference-steps=20", "--guidance-scale=5.0", "--lora-rank=4"} <= theirs


def test_trl_is_given_the_same_number_of_updates():
    import benchmark_trl

    settings = benchmark_trl.settings(benchmark_trl.parse(["--model=folder", *SIZES]))
    accumulated = settings["train_gradient_accumulation_steps"] * settings["train_batch_size"]
    assert 4 // accumulated == 2
    assert settings["sample_num_batches_per_epoch"] * settings["sample_batch_size"] == 4
    assert settings["train_cfg"]


def test_trl_is_given_the_same_reward():
    import benchmark_trl

    from rewards import configured_reward, evaluate_reward

    pictures = torch.randint(0, 256, (2, 32, 32, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    theirs, _ = benchmark_trl.file_sizes(pictures.permute(0, 3, 1, 2) / 255, ("", ""), ({}, {}))
    ours, _ = evaluate_reward(configured_reward("jpeg_compressibility", {}), pictures.numpy(), ["", ""], [{}, {}])
    assert theirs.tolist() == pytest.approx(ours.tolist())


@pytest.mark.parametrize("argument", ["--train-batch-size=3", "--updates=3", "--lora-rank=0"])
def test_sizes_that_trl_cannot_have_are_refused(argument, monkeypatch, capsys):
    import benchmark_trl

    monkeypatch.setattr(sys, "argv", ["benchmark_trl.py", "--model=folder", *SIZES, argument])
    assert benchmark_trl.main() == 2
    assert "error: " in capsys.readouterr().err


@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="TRL has an environment of its own")
def test_trl_does_the_work(micro_pipeline_folder, monkeypatch, capsys):
    import benchmark_trl

    arguments = [*SIZES, f"--model={micro_pipeline_folder}", "--repeats=1"]
    assert set(FIGURES) <= set(figures_of(benchmark_trl, arguments, monkeypatch, capsys))


def test_the_random_model_is_read_by_both_and_has_the_size(monkeypatch, tmp_path):
    import random_stable_diffusion

    from ddpo_env import load_model

    monkeypatch.setattr(sys, "argv", ["random_stable_diffusion.py", str(tmp_path / "model")])
    assert random_stable_diffusion.main() == 0
    model = load_model(tmp_path / "model", "cpu")
    assert model.latent_shape == (4, 16, 16)
    assert sum(weight.numel() for weight in model.denoiser.parameters()) == 1_427_012
    assert model.conditioning_shapes == {"prompt_embeds": (77, 32)}


PUBLISHED = {  # of CompVis/stable-diffusion-v1-4 and stabilityai/stable-diffusion-xl-base-1.0
    "sd14": {"unet": 859_520_964, "vae": 83_653_863, "text_encoder": 123_060_480},
    "sdxl": {
        "unet": 2_567_463_684,
        "vae": 83_653_863,
        "text_encoder": 123_060_480,
        "text_encoder_2": 694_659_840,
    },
}


@pytest.mark.parametrize("architecture", PUBLISHED)
def test_published_architectures_have_the_published_numbers_of_weights(architecture):
    from ddpo_env.models.random_pipelines import build_pipeline

    pipeline = build_pipeline(architecture, "meta", torch.bfloat16)
    parts = {name: getattr(pipeline, name) for name in PUBLISHED[architecture]}
    found = {name: sum(weight.numel() for weight in part.parameters()) for name, part in parts.items()}
    assert found == PUBLISHED[architecture]
    assert {weight.dtype for part in parts.values() for weight in part.parameters()} == {torch.bfloat16}
    assert torch.get_default_dtype() == torch.float32


@pytest.fixture
def small_published(monkeypatch):
    """Let sd14 be as small as the small one."""
    import random_stable_diffusion

    architectures = random_stable_diffusion.pipelines.ARCHITECTURES
    monkeypatch.setitem(architectures, "sd14", architectures["small"])


def test_an_architecture_is_written_in_a_dtype(small_published, monkeypatch, capsys, tmp_path):
    import random_stable_diffusion
    from safetensors.torch import load_file

    arguments = ["x.py", str(tmp_path / "model"), "--architecture=sd14", "--dtype=bfloat16"]
    monkeypatch.setattr(sys, "argv", arguments)
    assert random_stable_diffusion.main() == 0
    weights = load_file(tmp_path / "model" / "unet" / "diffusion_pytorch_model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
    assert random_stable_diffusion.main() == 2
    assert "folder must be empty or not there" in capsys.readouterr().err


def test_the_random_model_is_written_where_the_package_is_not(tmp_path):
    code = (
        "import sys; sys.modules.update({name: None for name in ('ddpo_env', 'agents', 'rewards', 'gymnasium')}); "
        f"sys.path.insert(0, {str(SCRIPTS)!r}); import random_stable_diffusion as r; from pathlib import Path; "
        f"r.write(Path({str(tmp_path / 'model')!r}))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=200)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "model" / "model_index.json").is_file()


def test_the_comparison_writes_the_folder_that_trl_needs(small_published, monkeypatch, capsys, tmp_path):
    import benchmark_against

    against = {"against": Path("python")}
    seen = []

    def compare(arguments):
        seen.append(Path(arguments.model))
        assert (seen[-1] / "model_index.json").is_file()
        return {}

    monkeypatch.setattr(benchmark_against, "_compare", compare)
    kept = benchmark_against.Arguments(model="sd14-random", model_folder=tmp_path / "sd14", **against)
    assert benchmark_against.compare(kept) == {"model": "sd14-random"}
    benchmark_against.compare(kept)  # found again
    assert capsys.readouterr().err.count("writing sd14-random to") == 1
    benchmark_against.compare(benchmark_against.Arguments(model="sd14-random", **against))
    assert seen[:2] == [tmp_path / "sd14"] * 2
    assert not seen[2].exists(), "it was a temporary one"
    with pytest.raises(ValueError, match="model_folder must be given with sd14-random alone; got model 'tiny'"):
        benchmark_against.compare(benchmark_against.Arguments(model="tiny", model_folder=tmp_path, **against))


def test_a_benchmark_that_chooses_says_what(micro_pipeline_folder, monkeypatch, capsys):
    import benchmark

    arguments = [*SIZES, f"--model={micro_pipeline_folder}", "--repeats=1", "--train-batch-size=0"]
    figures = figures_of(benchmark, [*arguments, "--gradient-checkpointing"], monkeypatch, capsys)
    assert figures["chosen"] == {"train_batch_size": 2}


def test_the_floor_of_a_guided_sample_is_two_calls_a_step(monkeypatch, capsys):
    import floor

    plain, guided = (
        figures_of(floor, ["--device=cpu", "--threads=1", f"--guidance-scale={scale}"], monkeypatch, capsys)
        for scale in (1, 5)
    )
    assert plain["update_operations"] == 5 * plain["training_operations"]
    assert guided["update_operations"] == 2 * plain["update_operations"]
    assert plain["training_operations"] > 1.5 * plain["forward_operations"]
    assert guided["sample_operations"] - plain["sample_operations"] == 10 * plain["forward_operations"]
    assert plain["sample_floor_seconds"] > 0
    assert plain["output_bytes_of_a_row"] > 4 * 4 * 16 * 16
