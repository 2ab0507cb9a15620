"""Mixed precision: the ratio starts at 1 all the same, and what learns stays float32."""

import numpy as np
import pytest
import torch
from helpers.algorithms import collected, denoising_ppo, denoising_reinforce, logged
from helpers.micro_agents import micro_env, micro_policy, stir, weights

CLIP_RANGE = 3e-3
"""The default of scripts/train_ppo.py, for the bundled model's latents."""


def shape_dependent(model):
    """Give the denoiser the kernels of an accelerator: its last bits depend on how many rows are computed at once."""

    def round_otherwise(module, inputs, output):
        return (output[0] * (1 + 1e-3 * len(inputs[0])),)

    model.policy.denoiser.register_forward_hook(round_otherwise)
    return model


@pytest.mark.slow  # where the CPU has no bfloat16, it takes minutes
@pytest.mark.parametrize("shape_dependent_kernels", [False, True])
def test_ratio_of_the_bundled_model_starts_within_a_tenth_of_the_clip_range(shape_dependent_kernels):
    """Sampled 6 at a time, trained 5 at a time, in bfloat16."""
    policy = {"guidance_scale": 1.0, "autocast": "bfloat16"}
    model = denoising_ppo("tiny", micro_batch_size=5, batch_size=12, clip_range=CLIP_RANGE, policy=policy)
    stir(model.policy, 0.02)
    collected(shape_dependent(model) if shape_dependent_kernels else model).train()
    assert logged(model)["train/ratio_deviation"] <= CLIP_RANGE / 10


@pytest.mark.parametrize("autocast", ["bfloat16", "float16"])
def test_without_a_remedy_the_ratio_would_start_off_1(micro_pipeline_folder, autocast):
    deviations = {}
    for recompute, micro_batch_size in ((False, 5), (None, 5), (False, 6)):
        arguments = {
            "micro_batch_size": micro_batch_size,
            "batch_size": 12,
            "recompute_log_probs": recompute,
            "seed": 3,
        }
        model = denoising_ppo(micro_pipeline_folder, policy={"autocast": autocast, "guidance_scale": 1.0}, **arguments)
        collected(shape_dependent(stirred(model))).train()
        deviations[recompute, micro_batch_size] = logged(model)["train/ratio_deviation"]
    assert deviations[False, 5] > CLIP_RANGE / 10, "sampled 6 at a time and trained 5 at a time"
    assert deviations[None, 5] <= CLIP_RANGE / 10, "recomputed"
    assert deviations[False, 6] <= CLIP_RANGE / 10, "sampled and trained 6 at a time"


def stirred(model):
    stir(model.policy, 0.02)
    return model


def test_log_probabilities_of_two_epochs_on_all_steps_are_recomputed(micro_pipeline_folder):
    model = collected(denoising_ppo(micro_pipeline_folder, n_epochs=2, recompute_log_probs=True))
    model.train()
    assert model._n_updates == 2
    assert logged(model)["train/ratio_deviation"] <= 1e-5


def test_every_epoch_is_compared_with_recomputed_log_probabilities(micro_pipeline_folder):
    """Later epochs choose other steps: all of them are computed again, by the policy that sampled."""
    model = denoising_ppo(micro_pipeline_folder, n_epochs=2, timestep_fraction=0.4, recompute_log_probs=True)
    collected(model).rollout_buffer.log_probs += 5.0
    model._recompute_log_probs(np.random.permutation(model.select_steps()))
    everything = model.rollout_buffer[np.arange(model.rollout_buffer.segments.size)]
    with torch.no_grad():
        assert model.evaluate(everything).log_ratio.abs().max() < 1e-4


def test_float32_recomputes_nothing(micro_pipeline_folder):
    assert denoising_ppo(micro_pipeline_folder).recomputes_log_probs is False
    half = {"policy": {"autocast": "bfloat16"}}
    assert denoising_ppo(micro_pipeline_folder, **half).recomputes_log_probs is True
    assert denoising_reinforce(micro_pipeline_folder, **half).recomputes_log_probs is False, "its loss has no ratio"


def test_what_learns_and_what_is_scored_stay_float32(micro_pipeline_folder):
    model = denoising_ppo(micro_pipeline_folder, policy={"autocast": "bfloat16"})
    seen = []
    hook = model.policy.denoiser.conv_in.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    collected(model).train()
    hook.remove()
    assert set(seen) == {torch.bfloat16}
    assert {value.dtype for value in weights(model.policy).values()} == {torch.float32}
    assert model.rollout_buffer.log_probs.dtype == model.rollout_buffer.actions.dtype == torch.float32


def test_bfloat16_means_are_nearly_those_of_float32(micro_pipeline_folder):
    env = micro_env(micro_pipeline_folder, 4)
    observation, _ = env.reset(seed=0)
    with torch.no_grad():
        means = [
            micro_policy(env, autocast=autocast).get_distribution(observation).mean for autocast in (None, "bfloat16")
        ]
    torch.testing.assert_close(*means, rtol=0.05, atol=0.05)
    assert not torch.equal(*means)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_full_training_computes_in_the_dtype_of_the_frozen_weights_and_starts_at_them(micro_pipeline_folder, dtype):
    env = micro_env(micro_pipeline_folder, 4, dtype=dtype)
    policy = micro_policy(env, lora_rank=0)
    computed = set()
    policy.denoiser.conv_out.register_forward_hook(lambda layer, inputs, output: computed.add(output.dtype))
    observation, _ = env.reset(seed=0)
    with torch.no_grad():
        actions, _, _ = policy(observation)
    _, log_prob, _, kl = policy.evaluate_with_reference(observation, actions)
    log_prob.mean().backward()
    assert computed == {policy.compute_dtype} == {getattr(torch, dtype)}
    assert kl.abs().max() == 0
    assert {parameter.grad.dtype for parameter in policy.trainable_parameters()} == {torch.float32}


def test_float16_gradients_are_scaled_and_an_overflow_is_skipped(micro_pipeline_folder):
    model = denoising_ppo(micro_pipeline_folder, policy={"autocast": "float16"})
    assert model.scaler.is_enabled()
    model.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60)  # overflows for sure
    before = weights(model.policy)
    collected(model).train()
    assert all(torch.equal(value, before[name]) for name, value in weights(model.policy).items())
    assert logged(model)["train/overflowed_updates"] == 1
    assert model.scaler.get_scale() == 2.0**59
    model.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    collected(model).train()
    assert any(not torch.equal(value, before[name]) for name, value in weights(model.policy).items())
    assert logged(model)["train/overflowed_updates"] == 0
    assert all(torch.isfinite(value).all() for value in weights(model.policy).values())


def test_autocast_is_saved_with_the_policy(micro_pipeline_folder, tmp_path):
    policy = micro_policy(micro_env(micro_pipeline_folder), autocast="bfloat16")
    policy.save(tmp_path)
    assert type(policy).load(tmp_path, device="cpu").compute_dtype == torch.bfloat16


def test_unknown_precision_is_refused(micro_pipeline_folder):
    with pytest.raises(ValueError, match="autocast must be None or one of bfloat16, float16; got 'float8'"):
        micro_policy(micro_env(micro_pipeline_folder), autocast="float8")
