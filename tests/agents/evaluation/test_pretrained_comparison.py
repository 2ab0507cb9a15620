"""The policy next to the pretrained one, against torch's own divergence and a denoiser whose adapters peft disables."""

import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode
from helpers.micro_agents import STEPS, micro_env, micro_policy, stir
from peft.tuners.lora import LoraLayer

from agents.evaluation.evaluate import evaluate
from agents.evaluation.pretrained_comparison import PretrainedComparison, chosen_transitions

PROMPTS = ["a cat", "a dog", "a fox", "a bee"]


@pytest.fixture(scope="module")
def env(micro_pipeline_folder):
    return micro_env(micro_pipeline_folder, 3, autoreset_mode=AutoresetMode.DISABLED)


def adapters(policy, enabled):
    for layer in policy.denoiser.modules():
        if isinstance(layer, LoraLayer):
            layer.enable_adapters(enabled)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_kl_and_norms_are_those_of_an_independent_computation(env, monkeypatch, reduction):
    policy = stir(micro_policy(env, log_prob_reduction=reduction), 0.05)
    seen, act = [], policy.get_distribution
    monkeypatch.setattr(policy, "get_distribution", lambda obs: seen.append(obs) or act(obs))
    compared = [(0, 1), (3, STEPS - 1)]  # the fourth sample is the first of the second batch
    comparison = evaluate(policy, env, PROMPTS, seed=5, compared=compared).comparison
    monkeypatch.undo()
    batches = [(seen[1], 0), (seen[2 * STEPS - 1], 0)]
    assert comparison.kl.shape == (2,)
    for index, (observation, row) in enumerate(batches):
        one = {name: tensor[row : row + 1] for name, tensor in observation.items()}
        distributions, norms = [], []
        for enabled in (True, False):
            adapters(policy, enabled)
            with torch.no_grad():
                distributions.append(policy.get_distribution(one).distribution)
                conditioning = {name: one[name] for name in policy.model.conditioning_shapes}
                output = policy.predict_output(one["latents"], one["timestep"].flatten(), conditioning)
                norms.append(float(output.norm()))
        adapters(policy, True)
        kl = torch.distributions.kl_divergence(*distributions)
        expected = float(kl.mean() if reduction == "mean" else kl.sum())
        assert expected > 1e-4
        assert comparison.kl[index] == pytest.approx(expected, rel=1e-3)
        assert comparison.output_norm[index] == pytest.approx(norms[0], rel=1e-4)
        assert comparison.pretrained_norm[index] == pytest.approx(norms[1], rel=1e-4)


def test_fresh_adapters_are_the_pretrained_policy_and_the_samples_stay_the_same(env):
    policy = micro_policy(env)
    evaluation = evaluate(policy, env, PROMPTS, seed=5, compared=[(1, 0), (2, 4)])
    np.testing.assert_allclose(evaluation.comparison.kl, 0, atol=1e-9)
    assert evaluation.comparison.norm_ratio == pytest.approx(1, abs=1e-5)
    alone = evaluate(policy, env, PROMPTS, seed=5)
    assert alone.comparison is None
    np.testing.assert_array_equal(alone.images, evaluation.images)


def test_outputs_of_norm_0_have_no_ratio():
    assert PretrainedComparison(np.zeros(2), np.ones(2), np.zeros(2)).norm_ratio is None
    assert PretrainedComparison(np.zeros(2), np.array([3.0, 4.0]), np.array([0.0, 10.0])).norm_ratio == 0.5


@pytest.mark.parametrize(
    ("samples", "steps", "window", "count"),
    [
        (90, 10, (0.0, 0.9), 9),
        (64, 50, (0.0, 1.0), 32),
        (64, 1000, (0.0, 1.0), 640),
        (90, 4, (0.0, 1.0), 3),
        (2, 4, (0.5, 1.0), 1),
    ],
)
def test_transitions_are_spread_over_samples_and_trained_steps(samples, steps, window, count):
    chosen = chosen_transitions(samples, steps, window)
    assert len(chosen) == count
    assert count == 1 or 2 * count <= 0.02 * samples * steps  # two rows for each
    assert all(0 <= sample < samples and window[0] * steps <= step < window[1] * steps for sample, step in chosen)
    assert len({step for _, step in chosen}) == min(count, round((window[1] - window[0]) * steps))
    assert len({sample for sample, _ in chosen}) == min(count, samples)
