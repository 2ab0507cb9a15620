"""Adapters merged for sampling: the same output, and afterwards every weight is bit for bit what it was."""

import pytest
import torch
from helpers.algorithms import collected, denoising_ppo, logged
from helpers.micro_agents import micro_config, micro_env, micro_policy, stir, train_a_step, weights
from peft.tuners.lora import LoraLayer
from stable_baselines3.common.callbacks import CheckpointCallback
from torch import nn

from agents.evaluation.evaluate import evaluate
from agents.policy.lora import LORA_TARGETS, add_lora, merged_adapters
from agents.training.preparation import prepare_run


class Layers(nn.Module):
    """One layer of each kind, with the names that adapters look for."""

    def __init__(self):
        super().__init__()
        self.to_q = nn.Linear(8, 11)
        self.conv1 = nn.Conv2d(6, 9, 3, stride=2, padding=1)

    def forward(self, rows, images):
        return self.to_q(rows), self.conv1(images)


@pytest.fixture
def layers():
    """Frozen layers, a copy with adapters that are far from the identity, and inputs."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        frozen = Layers().requires_grad_(False)
        adapted = add_lora(frozen, 2, "attention+convolutions")
        for weight in adapters(adapted):
            weight.data += 0.2 * torch.randn_like(weight)
        return frozen, adapted, (torch.randn(2, 5, 8), torch.randn(2, 6, 7, 7))


def adapters(module):
    return [weight for name, weight in module.named_parameters() if "lora_" in name]


def copied(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def assert_unchanged(module, before):
    after = module.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in after.items())


def merged_layers(denoiser):
    """Whether the adapter of each layer is switched off, because its weight includes it."""
    return [layer.disable_adapters for layer in denoiser.modules() if isinstance(layer, LoraLayer)]


def test_merged_output_is_that_of_separate_adapters(layers):
    frozen, adapted, inputs = layers
    with torch.no_grad():
        separate = adapted(*inputs)
        with merged_adapters(adapted):
            merged = adapted(*inputs)
        pretrained = frozen(*inputs)
    for mine, expected, without in zip(merged, separate, pretrained, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-5)
        assert (mine - without).abs().max() > 0.1, "the adapters must matter for this test to mean anything"


@pytest.mark.parametrize("targets", LORA_TARGETS)
def test_merged_denoiser_gives_the_output_of_separate_adapters(micro_pipeline_folder, targets):
    env = micro_env(micro_pipeline_folder)
    policy = stir(micro_policy(env, lora_targets=targets), 0.05)
    observation, _ = env.reset(seed=0)
    with torch.no_grad():
        separate = policy.get_distribution(observation).mode()
        with policy.sampling_weights():
            merged = policy.get_distribution(observation).mode()
    torch.testing.assert_close(merged, separate, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("fails", [False, True])
def test_every_weight_is_afterwards_what_it_was(layers, fails):
    frozen, adapted, inputs = layers
    shared = {name: weight for name, weight in frozen.named_parameters() if name.endswith("weight")}
    before, pretrained = copied(adapted), copied(frozen)
    try:
        with torch.no_grad(), merged_adapters(adapted):
            adapted(*inputs)
            if fails:
                raise RuntimeError("in the middle of sampling")
    except RuntimeError:
        assert fails
    assert_unchanged(adapted, before)
    assert_unchanged(frozen, pretrained)
    for name, layer in (("to_q.weight", adapted.to_q), ("conv1.weight", adapted.conv1)):
        assert layer.base_layer.weight is shared[name], "the copy shares the pretrained weight again"
        assert layer.merged is False
    assert merged_layers(adapted) == [False, False]


def test_an_error_while_merging_leaves_every_weight_as_it_was(layers, monkeypatch):
    _, adapted, inputs = layers
    before = copied(adapted)
    expected = adapted(*inputs)

    def fail(layer, adapter):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(type(adapted.conv1), "get_delta_weight", fail)  # the linear layer is merged before it
    with pytest.raises(RuntimeError, match="out of memory"), merged_adapters(adapted):
        pytest.fail("nothing is sampled")
    assert_unchanged(adapted, before)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(adapted(*inputs), expected, strict=True))


def test_adapters_learn_after_sampling_as_before(layers):
    _, adapted, inputs = layers
    before = {name: weight.requires_grad for name, weight in adapted.named_parameters()}
    assert set(before.values()) == {True, False}
    with torch.no_grad(), merged_adapters(adapted):
        adapted(*inputs)
    assert {name: weight.requires_grad for name, weight in adapted.named_parameters()} == before
    sum(output.square().mean() for output in adapted(*inputs)).backward()
    assert all(weight.grad.abs().max() > 0 for weight in adapters(adapted))


def test_pretrained_denoiser_is_not_affected_while_adapters_are_merged(micro_pipeline_folder):
    env = micro_env(micro_pipeline_folder)
    policy = stir(micro_policy(env))
    observation, _ = env.reset(seed=0)
    before = copied(policy.model.denoiser)
    with torch.no_grad():
        expected = policy.get_distribution(observation, policy.model.denoiser).mode()
        with policy.sampling_weights():
            reference = policy.get_distribution(observation, policy.model.denoiser).mode()
            learned = policy.get_distribution(observation).mode()
            assert_unchanged(policy.model.denoiser, before)
    assert torch.equal(reference, expected)
    assert (learned - reference).abs().max() > 0.01, "the adapters must matter for this test to mean anything"
    assert_unchanged(policy.model.denoiser, before)


def test_a_step_after_sampling_is_seen_by_the_next_sampling(micro_pipeline_folder):
    env = micro_env(micro_pipeline_folder)
    policy = stir(micro_policy(env))
    observation, _ = env.reset(seed=0)
    outputs = []
    for _ in range(2):
        with torch.no_grad(), policy.sampling_weights():
            outputs.append(policy.get_distribution(observation).mode())
        train_a_step(policy, observation)
    assert not torch.equal(*outputs)


@pytest.mark.parametrize(
    ("dtype", "autocast", "merge_lora", "merges"),
    [
        ("float32", None, None, True),
        ("float32", None, False, False),
        ("float32", "bfloat16", None, False),
        ("float32", "bfloat16", True, True),
        ("bfloat16", None, None, False),
        ("bfloat16", None, True, True),
    ],
)
def test_float32_merges_by_default_and_half_precision_when_asked(
    micro_pipeline_folder, dtype, autocast, merge_lora, merges
):
    env = micro_env(micro_pipeline_folder, dtype=dtype)
    policy = micro_policy(env, autocast=autocast, merge_lora=merge_lora)
    with policy.sampling_weights():
        assert set(merged_layers(policy.denoiser)) == {merges}
    assert set(merged_layers(policy.denoiser)) == {False}


@pytest.mark.parametrize("merge_lora", [None, False])
def test_a_rollout_is_sampled_merged_and_trained_separately(micro_pipeline_folder, merge_lora):
    model = denoising_ppo(micro_pipeline_folder, policy={"merge_lora": merge_lora})
    seen = set()
    layer = next(layer for layer in model.policy.denoiser.modules() if isinstance(layer, LoraLayer))
    layer.register_forward_hook(lambda *_: seen.add((torch.is_grad_enabled(), layer.disable_adapters)))
    collected(model).train()
    assert {merged for with_gradient, merged in seen if with_gradient} == {False}
    assert (True in {merged for with_gradient, merged in seen if not with_gradient}) == (merge_lora is None)


def test_merged_sampling_gives_the_images_of_separate_sampling(micro_pipeline_folder):
    env = micro_env(micro_pipeline_folder, 2, autoreset_mode="Disabled")
    sampled = [
        evaluate(stir(micro_policy(env, merge_lora=merge_lora)), env, ["a cat", "a dog"], seed=3).images.astype(int)
        for merge_lora in (True, False)
    ]
    assert abs(sampled[0] - sampled[1]).max() <= 1
    pretrained = evaluate(micro_policy(env), env, ["a cat", "a dog"], seed=3).images.astype(int)
    assert abs(pretrained - sampled[0]).max() > 10, "the adapters must matter for this test to mean anything"


@pytest.mark.parametrize("model_name", ["micro", "tiny"])
def test_ratio_starts_at_1_after_merged_sampling(micro_pipeline_folder, model_name):
    """The actions are sampled with merged adapters, and their log-probabilities are recomputed with separate ones."""
    folder = micro_pipeline_folder if model_name == "micro" else "tiny"
    policy = {"guidance_scale": 5.0, "lora_rank": 4, "merge_lora": True}
    model = denoising_ppo(folder, micro_batch_size=5, batch_size=12, policy=policy)
    stir(model.policy, 0.02)
    collected(model).train()
    assert logged(model)["train/ratio_deviation"] <= 1e-5


def test_training_gives_nearly_the_same_weights_with_and_without_merging(micro_pipeline_folder, tmp_path):
    trained = []
    for merge_lora in (True, False):
        config = micro_config(
            micro_pipeline_folder,
            tmp_path / str(merge_lora),
            merge_lora=merge_lora,
            learning_rate=1e-3,
            adam_epsilon=1e-4,  # a small epsilon turns rounding into steps
        )
        algorithm = prepare_run(config).algorithm
        _, callback = algorithm._setup_learn(1)
        stir(algorithm.policy, 0.05)
        start = weights(algorithm.policy)
        for _ in range(2):
            algorithm.collect_rollouts(algorithm.env, callback, algorithm.rollout_buffer, algorithm.n_steps)
            algorithm.train()
        trained.append(weights(algorithm.policy))
    moved = max(float((trained[0][name] - start[name]).abs().max()) for name in start)
    assert moved > 0
    for name, value in trained[0].items():
        assert float((value - trained[1][name]).abs().max()) <= 1e-2 * moved, name


def test_parameters_learn_or_not_as_before(micro_pipeline_folder):
    policy = stir(micro_policy(micro_env(micro_pipeline_folder)))
    policy.trainable_parameters()[0].requires_grad_(False)  # a user may freeze an adapter
    learns = {name: parameter.requires_grad for name, parameter in policy.named_parameters()}
    saved = policy.state_dict()
    with policy.sampling_weights():
        assert {name: parameter.requires_grad for name, parameter in policy.named_parameters()} == learns
        inside = policy.state_dict()
        assert inside.keys() == saved.keys()
        assert all(torch.equal(inside[name], saved[name]) for name in saved)
    assert {name: parameter.requires_grad for name, parameter in policy.named_parameters()} == learns


def test_checkpoint_during_a_rollout_holds_the_adapters(micro_pipeline_folder, tmp_path):
    model = denoising_ppo(micro_pipeline_folder)
    steps = model.n_steps * model.n_envs
    model.learn(steps, callback=CheckpointCallback(1, tmp_path), log_interval=None)
    path = tmp_path / f"rl_model_{model.n_envs}_steps.zip"
    loaded = type(model).load(path, env=model.get_env(), device="cpu")
    expected = denoising_ppo(micro_pipeline_folder).policy.state_dict()
    assert loaded.policy.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in loaded.policy.state_dict().items())
