"""What a run says of itself before it starts."""

import pytest

from agents.build import _learning_rate
from agents.configuration import OptimizerSettings, RunSettings, TrainConfig, TrainingSettings
from agents.plan import describe_plan


def test_plan_of_the_default_run():
    assert describe_plan(TrainConfig()) == [
        "sampling   72 samples of 10 steps an iteration: 1 batch of 72, 9 prompts of 8 samples",
        "training   ppo: 1 epoch of 4 updates of 18 samples × 5 of 10 steps = 90 pairs, in calls of up to 45 pairs",
        "in all     20 iterations, 1,440 reward queries, 80 updates at most",
    ]


def test_plan_of_sparse_regression():
    training = TrainingSettings(algorithm="rwr_sparse", samples_per_iteration=40, sample_batch_size=8)
    plan = describe_plan(TrainConfig(training=training, run=RunSettings(iterations=2)))
    assert "5 batches of 8, 5 prompts of 8 samples" in plan[0]
    assert "50 epochs of 1 update on the finished samples (the best 10 %), in calls of up to 40 samples" in plan[1]
    assert plan[2].endswith("2 iterations, 80 reward queries, 100 updates at most")


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.4, 0.4, 0.4, 0.4]),
        ("linear", [0.4, 0.3, 0.2, 0.1]),
        ("cosine", [0.4, 0.3414, 0.2, 0.0586]),
    ],
)
def test_learning_rate_over_four_iterations(schedule, expected):
    optimizer = OptimizerSettings(learning_rate=0.4, learning_rate_schedule=schedule)
    rate = _learning_rate(TrainConfig(run=RunSettings(iterations=4), optimizer=optimizer))
    rates = [rate(1 - iteration / 4) if callable(rate) else rate for iteration in (1, 2, 3, 4)]
    assert rates == pytest.approx(expected, abs=1e-4)


def test_unknown_schedule_is_refused():
    config = TrainConfig(optimizer=OptimizerSettings(learning_rate_schedule="square"))
    with pytest.raises(
        ValueError, match="learning_rate_schedule must be one of constant, linear, cosine; got 'square'"
    ):
        config.check()
