"""What a run measures on its held-out samples, and where a user finds it."""

import math

import numpy as np
import pytest
import torch
from helpers.micro_agents import micro_config
from helpers.run_comparison import rows
from PIL import Image
from stable_baselines3.common.logger import Logger

from agents import Evaluation, prepare_run
from agents.evaluation.pretrained_comparison import PretrainedComparison
from agents.training.monitoring.held_out_images import HeldOutImages
from agents.training.monitoring.monitors import Monitors

MEASURES = ("eval/kl_to_pretrained", "eval/output_norm_ratio", "eval/diversity", "eval/grid_energy")


def test_every_evaluation_has_the_measures_and_no_other_iteration_has(finished):
    table = rows(finished.folder.path)
    assert [bool(row["eval/reward_mean"]) for row in table] == [True, False, True, True]
    for row in table:
        for name in MEASURES:
            assert bool(row[name]) == bool(row["eval/reward_mean"]), name
            assert not row[name] or math.isfinite(float(row[name]))
    divergences, ratios = ([float(row[name]) for row in table if row[name]] for name in MEASURES[:2])
    assert divergences[0] == pytest.approx(0, abs=1e-9)
    assert ratios[0] == pytest.approx(1, abs=1e-5)
    assert divergences[-1] > 1e-6
    assert all(float(row["eval/diversity"]) > 0 for row in table if row["eval/diversity"])
    assert Image.open(finished.folder.path / "reward_against_kl.png").size[0] > 400


def test_divergence_of_a_run_is_that_of_its_transitions_from_the_pretrained_policy(micro_pipeline_folder, tmp_path):
    """The same number from the algorithm's own measure of drift, on the same observations."""
    run = prepare_run(micro_config(micro_pipeline_folder, tmp_path, iterations=1, eval_samples=4))
    images = next(one for one in run.listeners if isinstance(one, HeldOutImages))
    policy, seen = run.algorithm.policy, []
    act = policy.get_distribution
    policy.get_distribution = lambda obs, *others: seen.append(obs) or act(obs, *others)
    images.compared = [(0, 0), (2, 1)]
    run.train()
    del policy.get_distribution
    last = seen[-3:]  # the three steps of the last evaluation, all samples in one batch
    with torch.no_grad():
        rows_of = [({n: t[row : row + 1] for n, t in last[step].items()}) for row, step in images.compared]
        kl = [policy.evaluate_with_reference(one, one["latents"])[3] for one in rows_of]
    logged = float(rows(tmp_path)[-1]["eval/kl_to_pretrained"])
    assert logged == pytest.approx(float(torch.cat(kl).mean()), rel=1e-3)


@pytest.mark.parametrize(("samples", "most"), [(6, 2), (5, 3), (1, 1)])
def test_each_held_out_prompt_occurs_twice(tmp_path, samples, most):
    run = prepare_run(micro_config("points", tmp_path, eval_samples=samples, sample_batch_size=1, samples_per_prompt=1))
    images = next(one for one in run.listeners if isinstance(one, HeldOutImages))
    texts = [text for text, _ in images.prompts]
    assert len(texts) == samples
    counts = [texts.count(text) for text in set(texts)]
    assert max(counts) == most
    assert min(counts) == min(2, samples)


def test_measure_that_is_not_finite_ends_the_run(micro_pipeline_folder, tmp_path):
    run = prepare_run(micro_config(micro_pipeline_folder, tmp_path))
    run.algorithm.set_logger(Logger(None, []))
    comparison = PretrainedComparison(np.array([math.inf]), np.ones(1), np.ones(1))
    images = np.zeros((2, 32, 32, 3), np.uint8)
    evaluation = Evaluation(images, ["a cat"] * 2, np.zeros(2), {}, comparison=comparison)
    with pytest.raises(FloatingPointError, match="eval/kl_to_pretrained is inf after iteration 0"):
        Monitors(run.algorithm.policy.model).on_evaluation(run, evaluation)
