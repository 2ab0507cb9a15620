"""How adapters are applied: the same numbers as peft's own layers, merged for sampling and in training."""

import pytest
import torch
from micro_agents import micro_config, micro_env, micro_policy, stir, weights
from peft.tuners import lora
from test_ppo import collected, denoising_ppo, logged
from torch import nn

from agents.evaluation import evaluate
from agents.lora import LORA_TARGETS, add_lora
from agents.lora_layers import AdaptedConv2d, AdaptedLinear, merged_adapters
from agents.training import build_run

KINDS = (AdaptedLinear, AdaptedConv2d)


class Layers(nn.Module):
    """Layers of the names that adapters look for; `width` decides how they are trained."""

    def __init__(self, width):
        super().__init__()
        self.to_q = nn.Linear(width, width + 3)
        self.conv1 = nn.Conv2d(width, width + 3, 3, stride=2, padding=1)

    def forward(self, rows, pictures):
        return self.to_q(rows), self.conv1(pictures)


def adapted_layers(width, dtype=torch.float32):
    """The layers with adapters, the same with peft's own, and inputs."""
    with torch.random.fork_rng():
        torch.manual_seed(width)
        layers = Layers(width).requires_grad_(False).to(dtype)
        ours = add_lora(layers, 2, "attention+convolutions")
        inputs = (torch.randn(2, 5, width, dtype=dtype), torch.randn(2, width, 6, 6, dtype=dtype))
        for weight in adapters(ours).values():
            weight.data += 0.2 * torch.randn_like(weight)
    theirs = add_lora(layers, 2, "attention+convolutions")
    theirs.load_state_dict(ours.state_dict())
    for layer, plain in ((theirs.to_q, lora.Linear), (theirs.conv1, lora.Conv2d)):
        layer.__class__ = plain
    return ours, theirs, inputs


def adapters(module):
    return {name: weight for name, weight in module.named_parameters() if weight.requires_grad}


def gradients(module, inputs):
    loss = sum(output.float().sin().square().mean() for output in module(*inputs))
    loss.backward()
    return {name: weight.grad for name, weight in adapters(module).items()}


@pytest.mark.parametrize("width", [8, 300], ids=["narrow", "wide"])
def test_outputs_and_gradients_are_those_of_peft(width):
    ours, theirs, inputs = adapted_layers(width)
    assert {type(ours.to_q), type(ours.conv1)} == set(KINDS)
    for mine, expected in zip(ours(*inputs), theirs(*inputs), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-5)
    expected = gradients(theirs, inputs)
    for name, gradient in gradients(ours, inputs).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6)
        assert gradient.abs().max() > 1e-4, "a gradient must matter for this test to mean anything"


@pytest.mark.parametrize("width", [8, 300], ids=["narrow", "wide"])
def test_merged_layers_compute_the_same_and_leave_every_weight_as_it_was(width):
    ours, _, inputs = adapted_layers(width)
    before = {name: value.clone() for name, value in ours.state_dict().items()}
    with torch.no_grad():
        expected = ours(*inputs)
        with merged_adapters(ours):
            merged = ours(*inputs)
            assert ours.state_dict().keys() == before.keys(), "nothing more is saved"
        assert ours.to_q.merged_weight is None
    for mine, separate in zip(merged, expected, strict=True):
        torch.testing.assert_close(mine, separate, rtol=1e-5, atol=1e-5)
        assert width > 192 or torch.equal(mine, separate), "the very weight that narrow layers train with"
    assert all(torch.equal(value, before[name]) for name, value in ours.state_dict().items())


def test_merged_weights_are_not_used_where_gradients_are_wanted():
    ours, _, inputs = adapted_layers(8)
    with merged_adapters(ours):
        assert all(gradient is not None for gradient in gradients(ours, inputs).values())


def test_half_precision_trains_by_pefts_own_layers():
    ours, theirs, inputs = adapted_layers(8, torch.bfloat16)
    for mine, expected in zip(ours(*inputs), theirs(*inputs), strict=True):
        assert torch.equal(mine, expected)
    ours, theirs, inputs = adapted_layers(8)
    with torch.autocast("cpu", torch.bfloat16):
        for mine, expected in zip(ours(*inputs), theirs(*inputs), strict=True):
            assert torch.equal(mine, expected)


@pytest.mark.parametrize("targets", LORA_TARGETS)
def test_every_layer_that_learns_is_one_of_these(micro_pipeline_folder, targets):
    policy = micro_policy(micro_env(micro_pipeline_folder), lora_targets=targets)
    found = [type(layer) for layer in policy.denoiser.modules() if isinstance(layer, lora.LoraLayer)]
    assert found
    assert set(found) <= set(KINDS)


@pytest.mark.parametrize("merge_lora", [None, True, False])
def test_a_rollout_is_sampled_with_merged_adapters_in_float32(micro_pipeline_folder, merge_lora, monkeypatch):
    model = denoising_ppo(micro_pipeline_folder, policy={"merge_lora": merge_lora})
    seen = []
    layer = next(layer for layer in model.policy.denoiser.modules() if isinstance(layer, AdaptedLinear))
    layer.register_forward_hook(lambda *_: seen.append((torch.is_grad_enabled(), layer.merged_weight is not None)))
    collected(model).train()
    sampled = {merged for with_gradient, merged in seen if not with_gradient}
    assert (True in sampled) == (merge_lora is not False)
    assert {merged for with_gradient, merged in seen if with_gradient} == {False}
    assert layer.merged_weight is None


def test_half_precision_is_sampled_without_unless_asked(micro_pipeline_folder):
    for merge_lora, expected in ((None, False), (True, True)):
        policy = micro_policy(micro_env(micro_pipeline_folder), autocast="bfloat16", merge_lora=merge_lora)
        with policy.sampling_weights():
            merged = {
                layer.merged_weight is not None for layer in policy.denoiser.modules() if isinstance(layer, KINDS)
            }
        assert merged == {expected}


def test_merged_sampling_draws_what_separate_sampling_draws(micro_pipeline_folder):
    env = micro_env(micro_pipeline_folder, autoreset_mode="Disabled")
    drawn = []
    for merge_lora in (True, False):
        policy = stir(micro_policy(env, merge_lora=merge_lora))
        drawn.append(evaluate(policy, env, ["a cat", "a dog"], seed=3))
    difference = abs(drawn[0].images.astype(int) - drawn[1].images.astype(int))
    assert difference.max() <= 1
    base = evaluate(micro_policy(env), env, ["a cat", "a dog"], seed=3)
    assert abs(base.images.astype(int) - drawn[0].images.astype(int)).max() > 10, "the adapters must matter here"


@pytest.mark.parametrize("model_name", ["micro", "tiny"])
def test_ratio_starts_at_1_with_merged_sampling(micro_pipeline_folder, model_name):
    """Sampled with merged adapters, scored by the recomputed log-density with separate ones."""
    folder = micro_pipeline_folder if model_name == "micro" else "tiny"
    model = denoising_ppo(folder, micro_batch_size=5, batch_size=12, policy={"guidance_scale": 5.0, "lora_rank": 4})
    stir(model.policy, 0.02)
    collected(model).train()
    assert logged(model)["train/ratio_deviation"] <= 1e-5


def test_training_gives_the_same_weights_with_and_without_merging(micro_pipeline_folder, tmp_path):
    trained = []
    for merge_lora in (True, False):
        config = micro_config(
            micro_pipeline_folder,
            tmp_path / str(merge_lora),
            policy={"merge_lora": merge_lora},
            optimizer={"learning_rate": 1e-3, "adam_epsilon": 1e-4},  # Adam divides rounding by itself otherwise
        )
        algorithm, _ = build_run(config)
        _, callback = algorithm._setup_learn(1)
        stir(algorithm.policy, 0.05)
        start = weights(algorithm.policy)
        for _ in range(2):
            algorithm.collect_rollouts(algorithm.env, callback, algorithm.rollout_buffer, algorithm.n_steps)
            algorithm.train()
        algorithm.policy.save_lora(tmp_path / f"lora_{merge_lora}")
        trained.append(weights(algorithm.policy))
    moved = max(float((trained[0][name] - start[name]).abs().max()) for name in start)
    for name, value in trained[0].items():
        assert float((value - trained[1][name]).abs().max()) <= 1e-2 * moved, name
    assert moved > 0
    names = [{file.name for file in (tmp_path / f"lora_{one}").iterdir()} for one in (True, False)]
    assert names[0] == names[1]
