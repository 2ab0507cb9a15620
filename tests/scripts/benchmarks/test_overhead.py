"""An iteration of ours next to the bare calls of its networks, and how iterations are timed."""

import io
import json
import sys

import torch

SIZES = [
    *("--device=cpu", "--samples=4", "--sample-batch-size=4", "--train-batch-size=2", "--updates=2"),
    *("--num-inference-steps=2", "--guidance-scale=5", "--lora-rank=2", "--threads=1"),
]
FIGURES = (
    "sampling_images_per_second training_pairs_per_second iteration_seconds sampling_over_bare training_over_bare "
    "peak_memory_mb versions machine"
).split()


def test_the_iteration_is_compared_with_plain_peft(micro_pipeline_folder, figures_of, tmp_path):
    import overhead

    output = tmp_path / "figures.json"
    arguments = [*SIZES, f"--model={micro_pipeline_folder}", "--resolution=16", "--repeats=1", f"--json={output}"]
    figures = figures_of(overhead, [*arguments, "--timestep-fraction=1", "--timestep-window", "0", "1"])
    assert set(FIGURES) <= set(figures)
    assert all(figures[name] > 0 for name in FIGURES[:6])
    assert json.loads(output.read_text()) == figures
    assert figures["arguments"]["resolution"] == "16"
    assert figures["training_pairs_per_second"] * figures["iteration_seconds"] > 4 * 2


def test_bad_sizes_exit_with_the_valid_ones(monkeypatch, capsys):
    import overhead

    monkeypatch.setattr(sys, "argv", ["overhead.py", "--samples=4", "--sample-batch-size=3"])
    assert overhead.main() == 2
    assert "2 or 4" in capsys.readouterr().err


def test_the_baseline_is_plain_peft(micro_pipeline_folder, tmp_path):
    import overhead
    from peft.tuners import lora

    from agents import prepare_run

    arguments = overhead.Arguments(model=str(micro_pipeline_folder), device="cpu", samples=4, sample_batch_size=4)
    policy = prepare_run(overhead.configuration(arguments, tmp_path / "run")).algorithm.policy
    plain = overhead.plain_denoiser(policy)
    layers = [type(layer) for layer in plain.modules() if isinstance(layer, lora.LoraLayer)]
    assert set(layers) == {lora.Linear, lora.Conv2d}
    learning = [sum(w.numel() for w in one.parameters() if w.requires_grad) for one in (plain, policy.denoiser)]
    assert learning[0] == learning[1]


def test_processes_take_turns_on_request(monkeypatch, capsys):
    from measuring import figures

    calls = []
    iteration = figures.TrainerIteration(
        sampling=lambda: calls.append("sampling"),
        training=lambda: calls.append("training"),
        bare=lambda: (lambda: calls.append("bare sampling"), lambda: calls.append("bare training")),
        samples=4,
        pairs=8,
        device=torch.device("cpu"),
    )
    monkeypatch.setattr(sys, "stdin", io.StringIO("iteration\nbare\n"))
    measured = figures.measure(iteration, repeats=99, on_request=True, packages=("torch",))
    shown = capsys.readouterr().out.splitlines()
    assert shown[0] == "ready"
    answers = [json.loads(line) for line in shown[1:]]
    assert [set(answer) & {"training", "bare_training"} for answer in answers] == [
        {"training"},
        {"training", "bare_training"},
    ]
    assert calls == [*("sampling", "training") * 2, "sampling", "bare sampling", "training", "bare training"]
    assert measured["training_over_bare"] > 0


def test_an_open_train_batch_size_is_reported(micro_pipeline_folder, figures_of):
    import overhead

    arguments = [*SIZES, f"--model={micro_pipeline_folder}", "--repeats=1", "--train-batch-size=0"]
    figures = figures_of(overhead, [*arguments, "--gradient-checkpointing"])
    assert figures["chosen"] == {"train_batch_size": 2}
