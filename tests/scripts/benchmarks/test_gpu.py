"""The benchmark of a GPU: its miniature on a CPU, its command lines, and its bars."""

import json
import sys
from pathlib import Path

import pytest

MINIATURE_PARTS = ("iteration", "memory", "sdxl")


@pytest.fixture
def recipe():
    import gpu

    return gpu


def in_this_process(monkeypatch):
    """Run a part without a process of its own."""

    def run(line, output):
        import overhead

        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", [*line, f"--json={output}"])
            code = overhead.main()
        if code:
            raise RuntimeError(f"{line[0]} ended with {code}")
        return json.loads(output.read_text())

    return run


def run_recipe(recipe, arguments, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["gpu.py", *arguments])
    return recipe.main()


def test_miniature(recipe, monkeypatch, tmp_path):
    monkeypatch.setattr(recipe, "run_script", in_this_process(monkeypatch))
    arguments = ["--miniature", f"--json={tmp_path / 'gpu.json'}", f"--models={tmp_path / 'models'}"]
    assert run_recipe(recipe, arguments, monkeypatch) == 0
    result = json.loads((tmp_path / "gpu.json").read_text())
    assert result["miniature"]
    assert result["not_measured"] == ["against"]
    assert set(result["parts"]) == set(MINIATURE_PARTS)
    assert set(result["bars"]) == set(recipe.BARS) - {"iteration_over_trl"}
    assert all(bar["figure"] > 0 and bar["met"] is None for bar in result["bars"].values())
    assert result["parts"]["iteration"]["chosen"] == {"train_batch_size": 4}
    assert result["parts"]["sdxl"]["arguments"]["gradient_checkpointing"] == "True"


def test_a_part_that_fails_does_not_stop_the_others(recipe, monkeypatch, tmp_path, capsys):
    def run(line, output):
        if any("sdxl" in word for word in line):
            raise RuntimeError("out of memory")
        return {"iteration_seconds": 100.0, "sampling_over_bare": 1.2, "training_over_bare": 1.0, "peak_memory_mb": 7e3}

    monkeypatch.setattr(recipe, "run_script", run)
    monkeypatch.setattr(recipe, "write_models", lambda *_: None)
    assert run_recipe(recipe, [f"--json={tmp_path / 'gpu.json'}"], monkeypatch) == 1
    result = json.loads((tmp_path / "gpu.json").read_text())
    assert result["parts"]["sdxl"] == {"error": "out of memory"}
    assert {name: bar["met"] for name, bar in result["bars"].items()} == {
        "iteration_seconds": True,
        "sampling_over_bare": False,
        "training_over_bare": True,
        "peak_memory_mb_at_batch_1": False,
    }
    assert "error: out of memory" in capsys.readouterr().err


def test_the_work_is_that_of_the_bars(recipe):
    commands = recipe.commands(recipe.Arguments(against=Path("python")), Path("models"))
    assert set(commands) == {"iteration", "against", "memory", "sdxl"}
    iteration = {"--model=sd14-random", "--samples=256", "--num-inference-steps=50", "--guidance-scale=5"}
    iteration |= {"--updates=4", "--lora-rank=4", "--dtype=bfloat16", "--timestep-fraction=1", "--device=cuda"}
    assert iteration <= set(commands["iteration"])
    assert {"--sample-batch-size=1", "--train-batch-size=1", "--model=models/sdxl"} <= set(commands["sdxl"])
    assert "--ours=--sample-batch-size=32 --train-batch-size=0" in commands["against"]


@pytest.mark.parametrize("miniature", [False, True])
def test_every_script_takes_its_arguments(recipe, miniature):
    import against_trl
    import overhead
    import trl_trainer
    import tyro

    given = recipe.Arguments(against=Path("python"), miniature=miniature)
    scripts = {"overhead.py": overhead.Arguments, "against_trl.py": against_trl.Arguments}
    for name, line in recipe.commands(given, Path("models")).items():
        parsed = tyro.cli(scripts[line[0]], args=line[1:])
        if name == "against":
            ours, theirs = (against_trl.commands(parsed)[one][2:] for one in ("ours", "trl"))
            parsed = tyro.cli(overhead.Arguments, args=ours)
            assert trl_trainer.parse(theirs).num_inference_steps == parsed.num_inference_steps
        config = overhead.configuration(parsed, Path("run")).resolved()
        assert config.trained_steps == parsed.num_inference_steps, f"{name}: all steps are trained on"
        assert config.policy.guidance_scale == 5


def test_nothing_to_measure_is_an_error(recipe, monkeypatch, capsys):
    assert run_recipe(recipe, ["--parts", "against"], monkeypatch) == 2
    assert "against needs --against" in capsys.readouterr().err


@pytest.mark.slow
def test_parts_are_processes_of_their_own(recipe, tmp_path):
    arguments = recipe.Arguments(miniature=True, parts=("memory",), json=tmp_path / "gpu.json")
    assert "error" not in recipe.measure(arguments)["parts"]["memory"]
