"""`train_batch_size=0`: the largest training call that fits, found by halving at out-of-memory."""

import pytest
import torch
import yaml
from helpers.algorithms import denoising_ppo
from helpers.micro_agents import micro_config, resume_config, weights

from agents import prepare_run, run_training
from agents.planning.memory import CPU_ROWS, _training_call, fit_micro_batch_size, largest_fitting


@pytest.mark.parametrize(
    ("most", "limit", "tried", "expected"),
    [(64, 100, [64], 64), (64, 20, [64, 32, 16], 16), (90, 20, [90, 45, 18], 18), (7, 1, [7, 1], 1)],
)
def test_size_is_halved_until_a_call_fits(most, limit, tried, expected):
    sizes = []

    def call(rows):
        sizes.append(rows)
        if rows > limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    assert largest_fitting(most, call) == expected
    assert sizes == tried


def test_no_size_that_fits_is_an_error():
    def call(rows):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    with pytest.raises(RuntimeError, match="No executable batch size found"):
        largest_fitting(4, call)


def test_other_errors_are_not_taken_for_full_memory():
    def call(rows):
        raise ValueError("something else")

    with pytest.raises(ValueError, match="something else"):
        largest_fitting(4, call)


@pytest.mark.parametrize("options", [{}, {"kl_coef": 0.1, "ema_decay": 0.9}])
def test_trial_call_leaves_no_gradient_and_changes_nothing(micro_pipeline_folder, options):
    model = denoising_ppo(micro_pipeline_folder, **options)
    before, state = weights(model.policy), torch.get_rng_state()
    _training_call(model, model.policy, 3)
    assert all(torch.equal(value, before[name]) for name, value in weights(model.policy).items())
    assert all(weight.grad is None for weight in model.policy.trainable_parameters())
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(("guidance", "rows"), [(1.0, CPU_ROWS), (3.0, CPU_ROWS // 2)])
def test_call_on_a_cpu_has_few_rows(micro_pipeline_folder, guidance, rows):
    model = denoising_ppo(micro_pipeline_folder, batch_size=4 * CPU_ROWS, policy={"guidance_scale": guidance})
    assert fit_micro_batch_size(model) == rows


def test_size_is_found_before_training_and_kept_by_a_resumed_run(micro_pipeline_folder, tmp_path):
    run_training(micro_config(micro_pipeline_folder, tmp_path, train_batch_size=0, iterations=1))
    written = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert written["training"]["train_batch_size"] == 8, "4 samples of 2 steps"
    resumed = prepare_run(resume_config(tmp_path, iterations=2))
    assert resumed.algorithm.micro_batch_size == 8
