"""Whole runs of every algorithm and estimator from a configuration: that they run, resume and refuse."""

import ast
import traceback

import numpy as np
import pytest
import yaml
from helpers import micro_agents
from helpers.algorithms import MAKERS
from helpers.micro_agents import InterruptedReward, brightness, micro_config, resume_config
from helpers.paths import ROOT
from helpers.run_comparison import assert_same_run, rows

from agents import AWM, DPO, GRPO, NFT, PPO, REINFORCE, RWR, DRaFT
from agents.algorithms.advantages import DecoupledAdvantage, GroupRelativeAdvantage
from agents.algorithms.on_policy import TensorOnPolicyAlgorithm
from agents.config.algorithms import ALGORITHMS
from agents.config.train_config import train_config
from agents.training.preparation import prepare_run, run_training

SHORT = {"iterations": 2, "eval_interval": 0, "eval_samples": 4}
"""Two iterations: the reward is called once before training, twice in each iteration and once at the end."""
ONE = {"iterations": 1, "eval_samples": 2}
SUM = "helpers.micro_agents:brightness:1,helpers.micro_agents:extent:0.5"


def config_of(model, folder, algorithm="ppo", **settings):
    """A short micro run with another algorithm, whose sizes are its defaults."""
    updates = {
        "updates_per_iteration": 2 if algorithm in ("ppo", "grpo", "draft") else 1,
        "epochs": ALGORITHMS[algorithm].epochs,
    }
    if algorithm == "rwr_sparse":
        updates["epochs"] = 3
    return micro_config(model, folder, algorithm=algorithm, **SHORT | updates | settings)


@pytest.mark.parametrize(
    ("algorithm", "settings"),
    [
        ("reinforce", {"kl_coef": 0.1, "advantage": "group"}),
        ("rwr", {"ema_decay": 0.5, "rwr_per_prompt": True}),
        ("rwr_sparse", {"rwr_percentile": 50.0}),
        ("nft", {"ema_decay": 0.5, "kl_coef": 0.1, "updates_per_iteration": 2}),
        ("awm", {"ema_decay": 0.5, "updates_per_iteration": 2, "epochs": 2}),
        ("awm", {"kl_coef": 0.1, "updates_per_iteration": 2}),
        ("draft", {"draft_steps": 2, "updates_per_iteration": 2, "kl_coef": 0.1, "ema_decay": 0.5, "epochs": 2}),
        ("dpo", {"updates_per_iteration": 2, "kl_coef": 0.1, "ema_decay": 0.5}),
        ("grpo", {"advantage": "gdpo", "reward": SUM, "kl_coef": 0.1, "ema_decay": 0.5, "trust_region": "guard"}),
        ("ppo", {"trust_region": "dppo", "divergence_limit": 1e-4, "epochs": 2}),
        ("ppo", {"advantage": "leave_one_out", "target_kl": 1.0, "recompute_log_probs": True}),
        ("ppo", {"noise_window": 1, "noise_window_iterations": 1, "shared_noise": True, "ema_decay": 0.5, "epochs": 2}),
    ],
)
def test_stopped_and_resumed_run_equals_one_that_was_not(learner, tmp_path, monkeypatch, algorithm, settings):
    run_training(config_of(learner, tmp_path / "whole", algorithm, **settings))
    with monkeypatch.context() as patch:
        patch.setattr(micro_agents, "brightness", InterruptedReward(5))
        stopped = run_training(config_of(learner, tmp_path / "stopped", algorithm, **settings))
    assert stopped.iterations == 1
    run_training(resume_config(tmp_path / "stopped"))
    assert_same_run(tmp_path / "stopped", tmp_path / "whole")


CLASSES = {
    "ppo": PPO,
    "grpo": GRPO,
    "reinforce": REINFORCE,
    "rwr": RWR,
    "rwr_sparse": RWR,
    "nft": NFT,
    "awm": AWM,
    "dpo": DPO,
    "draft": DRaFT,
}


def test_every_algorithm_has_a_class_and_is_tested():
    assert CLASSES.keys() == ALGORITHMS.keys() == MAKERS.keys() | {"rwr_sparse"}


@pytest.mark.parametrize(("algorithm", "kind"), CLASSES.items())
def test_row_of_an_algorithm_says_what_its_class_says(algorithm, kind):
    traits = ALGORITHMS[algorithm]
    said = traits.has_ratio, traits.needs_log_probs, traits.penalises_steps
    assert said == (kind.compares_with_sampling, kind.needs_log_probs, kind.penalises_steps)


def test_only_the_table_knows_an_algorithm_by_its_name():
    """Except for the default of a run and of the presets."""
    files = {path: ast.parse(path.read_text("utf-8")) for path in (ROOT / "agents").rglob("*.py")}
    named = {
        (path.name, node.value)
        for path, tree in files.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and node.value in ALGORITHMS
    }
    table = {("algorithms.py", name) for name in ALGORITHMS}
    assert named == table | {("train_config.py", "ppo"), ("presets.py", "ppo")}


@pytest.mark.parametrize(("algorithm", "kind"), CLASSES.items())
def test_configuration_names_the_algorithm(tmp_path, algorithm, kind):
    config = config_of("points", tmp_path, algorithm, kl_coef=0.25, ema_decay=0.5)
    model = prepare_run(config).algorithm
    assert type(model) is kind
    assert (model.options.kl_coef, model.options.ema_decay, model.gamma) == (0.25, 0.5, 1.0)
    assert getattr(model, "weighting", "") == {"rwr": "exponential", "rwr_sparse": "percentile"}.get(algorithm, "")


def test_sizes_and_learning_rate_left_open_are_the_algorithms():
    for algorithm, defaults in ALGORITHMS.items():
        config = train_config(algorithm=algorithm, reward="aesthetic").resolved()
        assert config.training.epochs == defaults.epochs
        assert config.training.updates_per_iteration == defaults.updates_per_iteration
        assert config.learning_rate == defaults.learning_rate
        assert config.changed(learning_rate=0.125).resolved().learning_rate == 0.125


def test_resolved_learning_rate_is_in_the_run_folder(learner, tmp_path):
    result = run_training(config_of(learner, tmp_path, "rwr", **ONE))
    written = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert written["learning_rate"] == result.config.learning_rate == ALGORITHMS["rwr"].learning_rate


def test_critic_learns_beside_every_estimator(micro_pipeline_folder, tmp_path):
    for advantage in ("per_prompt", "gae"):
        run_training(config_of(micro_pipeline_folder, tmp_path / advantage, advantage=advantage, critic=True, **ONE))
        assert float(rows(tmp_path / advantage)[1]["train/value_loss"]) > 0
    run_training(config_of(micro_pipeline_folder, tmp_path / "no", **ONE))
    assert "train/value_loss" not in rows(tmp_path / "no")[1]


def test_names_of_advantages_are_estimators_with_their_settings(tmp_path):
    for advantage, expected in {
        "group": GroupRelativeAdvantage("group", 3.0),
        "dr_grpo": GroupRelativeAdvantage("none", np.inf),
        "global_std": GroupRelativeAdvantage("batch", 3.0),
        "gdpo": DecoupledAdvantage({"helpers.micro_agents:brightness": 1.0, "helpers.micro_agents:extent": 0.5}, 3.0),
    }.items():
        clip = {} if advantage == "dr_grpo" else {"advantage_clip": 3.0}  # it would have no effect
        config = config_of("points", tmp_path / advantage, "grpo", advantage=advantage, reward=SUM, **clip)
        assert prepare_run(config).algorithm.advantage == expected
    assert train_config(algorithm="grpo", critic=True).resolved().training.advantage == "group"


def failing(images, prompts, metadata):
    """Works for the first evaluation and breaks in training."""
    if len(images) == 4 and failing.calls:
        raise RuntimeError("the judge has left")
    failing.calls += 1
    return brightness(images, prompts, metadata)


def test_error_of_a_reward_surfaces_with_its_traceback(learner, tmp_path, monkeypatch):
    failing.calls = 0
    monkeypatch.setattr(micro_agents, "brightness", failing)
    config = config_of(learner, tmp_path, eval_samples=3)
    with pytest.raises(RuntimeError, match="the judge has left") as caught:
        run_training(config)
    assert "failing" in [frame.name for frame in traceback.extract_tb(caught.value.__traceback__)]
    assert (tmp_path / "checkpoints" / "iteration_000000").is_dir(), "the run can go on from its last iteration"


def test_details_of_a_reward_are_logged(learner, tmp_path, monkeypatch):
    def detailed(images, prompts, metadata):
        scores = brightness(images, prompts, metadata)
        return scores, {"doubled": 2 * scores, "said": ["bright"] * len(images)}

    monkeypatch.setattr(micro_agents, "brightness", detailed)
    run_training(config_of(learner, tmp_path))
    for row in rows(tmp_path)[1:]:  # the first one is the evaluation before training
        assert float(row["reward/doubled"]) == pytest.approx(2 * float(row["rollout/reward_mean"]), rel=1e-4)
        assert "reward/said" not in row


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"algorithm": "sac"}, f"algorithm must be one of {', '.join(ALGORITHMS)}; got 'sac'"),
        (
            {"advantage": "best"},
            "advantage must be None or one of per_prompt, batch, group, dr_grpo, global_std, gdpo, leave_one_out, gae; "
            "got 'best'",
        ),
        (
            {"algorithm": "grpo", "advantage": "batch"},
            "advantage must be one of group, dr_grpo, global_std, gdpo, leave_one_out with grpo, .*; got 'batch'",
        ),
        ({"advantage": "gdpo"}, "reward must be a weighted sum with advantage gdpo, .*; got 'jpeg_compressibility'"),
        (
            {"advantage": "gdpo", "reward": "aesthetic:1,clip_score:2:raw"},
            "reward must have no raw terms with advantage gdpo, .*; got clip_score:raw",
        ),
        ({"advantage": "gae"}, "advantage must not be gae without a critic: add --critic"),
        ({"algorithm": "nft", "critic": True}, "critic must be False with nft, .*; got True"),
        ({"algorithm": "awm", "advantage": "gae"}, "advantage must not be gae with awm, which takes no critic; got"),
        ({"algorithm": "dpo", "advantage": "batch", "critic": True}, "critic must be False with dpo, .*; got True"),
        (
            {"algorithm": "grpo", "eta": 0.0},
            "algorithm must not be grpo with .*log-probabilities: nft, awm, dpo or rwr",
        ),
        ({"advantage": "group", "samples_per_prompt": 1}, "samples_per_prompt must be at least 2 with advantage group"),
        (
            {"algorithm": "rwr", "rwr_per_prompt": True, "samples_per_prompt": 1},
            "samples_per_prompt must be at least 2 with rwr_per_prompt, .*; got 1",
        ),
        ({"algorithm": "reinforce", "epochs": 2}, "epochs and updates_per_iteration must be 1 with reinforce"),
        ({"algorithm": "rwr_sparse", "updates_per_iteration": 2}, "updates_per_iteration must be 1 with rwr_sparse"),
        ({"algorithm": "rwr", "trust_region": "dppo"}, "trust_region must be clip with rwr, .*; got 'dppo'"),
        ({"algorithm": "dpo", "train_batch_size": 1}, "train_batch_size must be 0 or at least 2 with dpo.*; got 1"),
        ({"algorithm": "dpo", "samples_per_prompt": 1}, "samples_per_prompt must be at least 2 with dpo"),
        ({"algorithm": "dpo", "updates_per_iteration": 12}, "updates_per_iteration must be at most 9 with dpo"),
        ({"rwr_beta": 0.0}, "rwr_beta must be in .*; got 0.0"),
        ({"rwr_percentile": 100.0}, r"rwr_percentile must be in \[0, 100\); got 100.0"),
        ({"ema_decay": 1.0}, r"ema_decay must be in \[0, 1\); got 1.0"),
        ({"kl_coef": -0.5}, r"kl_coef must be in \[0, 1e\+06\]; got -0.5"),
    ],
)
def test_what_does_not_fit_together_is_refused_before_a_model_is_loaded(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        prepare_run(train_config(run_dir=tmp_path, model="no-such-model", **settings))


def test_integer_rewards_keep_their_fractions(tmp_path, monkeypatch):
    """Rewards 1, 2, 3, 4 standardise to -1.34, -0.45, 0.45, 1.34, not to -1, 0, 0, 1."""
    monkeypatch.setattr(micro_agents, "brightness", lambda images, prompts, metadata: np.arange(1, 5))
    model = prepare_run(config_of("points", tmp_path, advantage="batch", samples_per_iteration=4)).algorithm
    _, callback = model._setup_learn(1)
    model.collect_rollouts(model.env, callback, model.rollout_buffer, model.n_steps)
    expected = (np.arange(1, 5) - 2.5) / np.std([1, 2, 3, 4])
    np.testing.assert_allclose(model.rollout_buffer.advantages[0].numpy(), expected, rtol=1e-4)


def test_an_algorithm_is_its_loss():
    class Nothing(TensorOnPolicyAlgorithm):
        pass

    with pytest.raises(TypeError, match="abstract .*loss"):
        Nothing("MlpPolicy", "CartPole-v1", n_steps=4, learning_rate=1e-3)


@pytest.mark.parametrize("algorithm", ["rwr", "nft"])
def test_run_without_noise_ends_without_a_divergence(micro_pipeline_folder, tmp_path, algorithm):
    run_training(config_of(micro_pipeline_folder, tmp_path, algorithm, sampler="ode", **ONE))
    logged = rows(tmp_path)[1]
    assert float(logged["eval/output_norm_ratio"]) > 0
    assert not any("kl_to" in name for name in logged), "steps without noise have none"
    assert not (tmp_path / "reward_against_kl.png").exists()
