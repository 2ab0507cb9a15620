"""The grid of the same prompts and seeds before and after training: what a judge said is beneath the images."""

import json
import shutil
from types import SimpleNamespace

import pytest
from gymnasium.vector import AutoresetMode
from helpers.micro_agents import micro_env

from agents.training.monitoring import held_out_images
from agents.training.monitoring.held_out_images import HeldOutImages


@pytest.mark.parametrize("judged", [True, False])
def test_judge_has_its_words_beneath_the_images(finished, micro_pipeline_folder, tmp_path, monkeypatch, judged):
    samples = tmp_path / "samples"
    shutil.copytree(finished.folder.samples, samples)
    folder = SimpleNamespace(samples=samples, images=samples / finished.folder.images.name)
    first = folder.images / "iteration_0000.json"
    record = json.loads(first.read_text())
    if judged:
        record["details"] = {"answer": [f"animal {place}" for place in range(6)], "certain": [0.5] * 6}
    first.write_text(json.dumps(record))
    (folder.images / "iteration_0003.json").unlink()  # somebody deleted it
    env = micro_env(micro_pipeline_folder, 3, autoreset_mode=AutoresetMode.DISABLED)
    images = HeldOutImages(env, samples=6, interval=0, seed=0)
    images.load_state_dict({"shown": [(0, 0.25), (3, 0.5)], "holdout": {}})
    drawn = []
    grid = held_out_images.image_grid
    monkeypatch.setattr(held_out_images, "image_grid", lambda *given: drawn.append(given) or grid(*given))
    images._draw_run(SimpleNamespace(folder=folder))
    _, labels, headings, captions = drawn[0]
    assert labels == ["before\niteration 0\nmean of 6\n0.25", "after\niteration 3\nmean of 6\n0.50"]
    assert list(headings) == [prompt for prompt, _ in images.prompts]
    assert list(captions) == ([[f"animal {place}" for place in range(6)], [""] * 6] if judged else [])
