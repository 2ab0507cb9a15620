"""The plan of a run, in words and numbers."""

import pytest
from helpers.micro_agents import micro_config

from agents.config.train_config import train_config
from agents.planning.plan import denoiser_rows, describe_plan
from agents.training.build import _learning_rate


def test_plan_of_the_default_run():
    assert describe_plan(train_config(device="cpu").resolved()) == [
        "model      tiny, 10 steps, no guidance",
        "reward     jpeg_compressibility",
        "sampling   72 samples of 10 steps per iteration: 1 batch of 72, 9 prompts with 8 samples each",
        "training   ppo: 1 epoch of 4 updates with 18 samples × 5 of 10 steps = 90 pairs, in calls of up to 45 pairs",
        "total      12 iterations, 864 reward queries, at most 48 updates",
        "denoiser   18,720 rows: 8,640 to sample, 4,320 to train, 5,760 for held-out images",
    ]


def test_plan_names_processes_and_ends_with_the_estimate():
    plan = describe_plan(train_config().resolved(), processes=2, estimate="about 3 minutes")
    assert plan[2] == "processes  2, which share every batch"
    assert plan[-1] == "time       about 3 minutes"


def test_plan_of_sparse_regression():
    config = train_config(
        algorithm="rwr_sparse", samples_per_iteration=40, sample_batch_size=8, iterations=2, eval_samples=8
    )
    plan = describe_plan(config.resolved())
    assert "5 batches of 8, 5 prompts with 8 samples each" in plan[2]
    assert "50 epochs of 1 update on the finished samples (the best 10 %), in calls of up to 40 samples" in plan[3]
    assert plan[4].endswith("2 iterations, 80 reward queries, at most 100 updates")
    # 2 × 40 × 10; 2 × 50 epochs × 4 samples; 2 evaluations × 8 × 10
    assert plan[5] == "denoiser   1,360 rows: 800 to sample, 400 to train, 160 for held-out images"


def test_plan_of_dpo_does_not_call_a_sample_at_a_timestep_a_pair():
    (training,) = [line for line in describe_plan(train_config(algorithm="dpo").resolved()) if "dpo" in line]
    assert "= 90 rows, two for a pair of samples at a timestep, in calls of up to 45 rows" in training


@pytest.mark.parametrize(
    ("settings", "measuring"),
    [
        ({}, 0),
        ({"dtype": "bfloat16"}, 2 * 8 * 2),
        ({"dtype": "bfloat16", "recompute_log_probs": False}, 0),
        ({"dtype": "bfloat16", "algorithm": "rwr"}, 0),
        ({"recompute_log_probs": True, "epochs": 3}, 2 * 8 * 3),
        ({"autocast": "float16"}, 2 * 8 * 2),
        ({"guidance_scale": 1.0, "autocast": "float16"}, 8 * 2),
        ({"kl_coef": 0.1}, 2 * 8 * 2),
        ({"algorithm": "nft"}, 2 * 8 * 2),
        ({"algorithm": "awm"}, 2 * 8 * 2 + 2 * 4 * 2),
        ({"algorithm": "draft", "draft_steps": 3, "reward": "aesthetic", "kl_coef": 0.1}, 2 * 8 * 3 + 2 * 4 * 3),
        ({"algorithm": "dpo", "kl_coef": 0.1, "samples_per_prompt": 4}, 2 * 4 * 2),
        ({"algorithm": "grpo", "dtype": "bfloat16"}, 2 * 8 * 2),
        ({"algorithm": "grpo", "trust_region": "dppo", "kl_coef": 0.1}, 2 * 8 * 2 + 2 * 4 * 2),
        ({"algorithm": "nft", "kl_coef": 0.1, "epochs": 2, "dtype": "bfloat16"}, 2 * (2 * 2 * 8 * 2)),
    ],
)
def test_rows_without_gradients(settings, measuring):
    """An iteration of `micro_config` has 8 guided samples of 3 steps, 2 of which are trained on; there are 3."""
    rows = denoiser_rows(micro_config("tiny", None, **settings).resolved())
    assert rows.measuring == 3 * measuring


def test_rows_and_words_of_a_window_with_shared_noise():
    window = {"noise_window": 1, "noise_window_iterations": 1, "epochs": 2, "recompute_log_probs": True}
    config = micro_config("tiny", None, sampler="ddim", shared_noise=True, **window).resolved()
    rows = denoiser_rows(config)
    # The window is at steps 0, 1, 2 of 3. Up to its first step 4 prompts are sampled, and then 8 samples.
    assert rows.sampling == 2 * ((4 + 16) + (8 + 8) + 12)
    assert rows.training == 2 * 3 * 2 * 8
    assert rows.measuring == 2 * 3 * 8
    assert denoiser_rows(config.changed(shared_noise=False)).sampling == 2 * 3 * 24
    assert denoiser_rows(config.changed(noise_window=None)).sampling == 2 * 3 * (4 + 16)
    resting = config.changed(noise_window_iterations=3)
    assert "in 1 of 3 steps, the same ones in the whole run" in "".join(describe_plan(resting))
    (noise,) = [line for line in describe_plan(config) if line.startswith("noise")]
    assert noise == (
        "noise      ddim, in 1 of 3 steps, which move on by 1 every 1 iteration, samples of a prompt start from the "
        "same noise"
    )


def test_held_out_images_are_generated_in_whole_batches():
    config = train_config(
        iterations=10,
        eval_samples=9,
        eval_interval=5,
        samples_per_iteration=8,
        sample_batch_size=8,
        guidance_scale=3.0,
    ).resolved()
    assert denoiser_rows(config).held_out == 3 * 2 * 16 * 10, "before, after the 5th iteration and after the 10th"
    assert denoiser_rows(config.changed(eval_interval=0)).held_out == 2 * 2 * 16 * 10


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.4, 0.4, 0.4, 0.4]),
        ("linear", [0.4, 0.3, 0.2, 0.1]),
        ("cosine", [0.4, 0.3414, 0.2, 0.0586]),
    ],
)
def test_learning_rate_over_four_iterations(schedule, expected):
    rate = _learning_rate(train_config(learning_rate=0.4, learning_rate_schedule=schedule, iterations=4).resolved())
    rates = [rate(1 - done / 4) if callable(rate) else rate for done in range(4)]
    assert rates == pytest.approx(expected, abs=1e-4)


def test_unknown_schedule_is_refused():
    with pytest.raises(
        ValueError, match="learning_rate_schedule must be one of constant, linear, cosine; got 'square'"
    ):
        train_config(learning_rate_schedule="square")
