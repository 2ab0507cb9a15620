"""The denoiser as a policy: against diffusers' own step and torch's own Gaussian, and what of it learns."""

import json

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from gymnasium import spaces
from helpers.micro_agents import STEPS, files_below, micro_env, micro_policy, stir, train_a_step, weights
from safetensors import safe_open
from torch import nn

from agents.policy.diffusion_policy import DiffusionPolicy
from agents.policy.options import PolicyOptions
from ddpo_env.spaces import latent_box


@pytest.fixture(scope="module")
def env(micro_pipeline_folder):
    return micro_env(micro_pipeline_folder)


@pytest.fixture(scope="module")
def observations(env):
    """What an episode looks like, step by step."""
    env.reset(seed=3)
    generator = torch.Generator().manual_seed(3)
    seen = []
    for _ in range(STEPS):
        seen.append(env.observe())
        env.step(torch.randn(4, *env.model.latent_shape, generator=generator))
    return seen


@pytest.fixture(scope="module")
def pipeline(micro_pipeline_folder):
    """Stock diffusers, loaded apart from the environment's model."""
    return StableDiffusionPipeline.from_pretrained(micro_pipeline_folder, safety_checker=None)


def guided_output(pipeline, observation, guidance_scale):
    """Classifier-free guidance as Ho and Salimans have it, one call a prompt."""
    latents, timestep = observation["latents"], observation["timestep"].flatten()
    tokens = pipeline.tokenizer([""] * len(latents), padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        conditional = pipeline.unet(latents, timestep, observation["prompt_embeds"]).sample
        unconditional = pipeline.unet(latents, timestep, pipeline.text_encoder(tokens)[0]).sample
    return unconditional + guidance_scale * (conditional - unconditional)


@pytest.mark.parametrize(("guidance_scale", "eta"), [(3.0, 1.0), (1.0, 0.5), (0.0, 1.0)])
def test_mean_std_and_log_prob_equal_diffusers_step(env, observations, pipeline, guidance_scale, eta):
    policy = micro_policy(env, guidance_scale=guidance_scale, eta=eta)
    scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    scheduler.set_timesteps(STEPS)
    for timestep, observation in zip(scheduler.timesteps, observations, strict=True):
        latents = observation["latents"]
        output = guided_output(pipeline, observation, guidance_scale)
        mean, shifted = (
            scheduler.step(output, timestep, latents, eta=eta, variance_noise=noise).prev_sample
            for noise in (torch.zeros_like(latents), torch.ones_like(latents))
        )
        with torch.no_grad():
            actions, _, log_prob = policy(observation)
            distribution = policy.get_distribution(observation)
        torch.testing.assert_close(distribution.mode(), mean, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(distribution.std, shifted - mean, rtol=1e-4, atol=1e-5)
        density = torch.distributions.Normal(distribution.mode().double(), distribution.std.double())
        expected = density.log_prob(actions.double()).flatten(1).mean(1)
        torch.testing.assert_close(log_prob.double(), expected, rtol=1e-5, atol=1e-5)


def test_guidance_1_calls_the_denoiser_on_the_prompt_alone(env, observations):
    rows = []
    for guidance_scale in (1.0, 3.0):
        policy = micro_policy(env, guidance_scale=guidance_scale)
        policy.denoiser.conv_out.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
        policy.get_distribution(observations[0])
    assert rows == [4, 8]


def test_sum_is_the_mean_times_the_number_of_dimensions(env, observations):
    mean, total = (micro_policy(env, log_prob_reduction=reduction) for reduction in ("mean", "sum"))
    actions = mean.get_distribution(observations[1]).sample()
    with torch.no_grad():
        _, averaged, averaged_entropy = mean.evaluate_actions(observations[1], actions)
        _, summed, summed_entropy = total.evaluate_actions(observations[1], actions)
    dimensions = actions[0].numel()
    torch.testing.assert_close(summed, averaged * dimensions)
    torch.testing.assert_close(summed_entropy, averaged_entropy * dimensions)


def test_evaluated_actions_score_as_when_they_were_taken(env, observations):
    policy = stir(micro_policy(env, critic=True))
    with torch.no_grad():
        for observation in observations:
            actions, values, log_prob = policy(observation)
            again, log_prob_again, entropy = policy.evaluate_actions(observation, actions)
            assert torch.equal(log_prob, log_prob_again)
            assert torch.equal(values, again)
            std = policy.get_distribution(observation).std.flatten(1)[:, 0]
            torch.testing.assert_close(entropy, torch.distributions.Normal(0.0, std).entropy())


def test_transitions_of_different_timesteps_are_evaluated_together(env, observations):
    policy = stir(micro_policy(env))
    mixed = {name: torch.stack([o[name][0] for o in observations]) for name in observations[0]}
    with torch.no_grad():
        actions, _, together = policy(mixed)
        alone = [
            policy.evaluate_actions({name: value[k : k + 1] for name, value in mixed.items()}, actions[k : k + 1])[1]
            for k in range(STEPS)
        ]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-5, atol=1e-5)


def test_predict_takes_arrays_of_one_and_of_many(env, observations):
    policy = micro_policy(env)
    batch = {name: value.numpy() for name, value in observations[0].items()}
    one = {name: value[0] for name, value in batch.items()}
    mean, _ = policy.predict(batch, deterministic=True)
    with torch.no_grad():
        np.testing.assert_array_equal(mean, policy.get_distribution(observations[0]).mode().numpy())
    single, _ = policy.predict(one, deterministic=True)
    assert single.shape == env.model.latent_shape
    np.testing.assert_allclose(single, mean[0], rtol=1e-5, atol=1e-5)
    torch.manual_seed(0)
    first, second = policy.predict(batch)[0], policy.predict(batch)[0]
    torch.manual_seed(0)
    assert np.abs(first - second).mean() > 0.01
    np.testing.assert_array_equal(first, policy.predict(batch)[0])


def test_values_are_zero_without_a_critic(env, observations):
    assert torch.equal(micro_policy(env).predict_values(observations[0]), torch.zeros(4, 1))


def test_critic_sees_latents_timestep_and_prompt_and_learns(env, observations):
    policy = micro_policy(env, critic=True)
    values = policy.predict_values(observations[0])
    assert values.shape == (4, 1)
    for name in observations[0]:
        changed = {**observations[0], name: observations[0][name] + 1}
        assert (policy.predict_values(changed) - values).abs().min() > 1e-6, name
    values.sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in policy.critic.parameters())


def test_gradients_reach_every_adapter_and_nothing_else(env, observations):
    policy = stir(micro_policy(env))
    _, log_prob, _ = policy.evaluate_actions(observations[1], torch.zeros_like(observations[1]["latents"]))
    log_prob.sum().backward()
    with_gradient = {name for name, p in policy.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    targets = [
        name
        for name, module in env.model.denoiser.named_modules()
        if (isinstance(module, nn.Linear) and ".to_" in name) or (isinstance(module, nn.Conv2d) and "proj" not in name)
    ]
    expected = {f"denoiser.{name}.lora_{half}.default.weight" for name in targets for half in "AB"}
    assert any("conv_shortcut" in name for name in expected)
    assert any("to_out.0" in name for name in expected)
    assert with_gradient == expected
    assert {name for name, p in policy.named_parameters() if p.grad is not None} == expected


def assert_untouched(env, observation, pipeline):
    """The model that everybody shares still gives what stock diffusers gives, bit for bit."""
    inputs = observation["latents"], observation["timestep"].flatten(), observation["prompt_embeds"]
    with torch.no_grad():
        assert torch.equal(env.model.denoiser(*inputs).sample, pipeline.unet(*inputs).sample)


def test_two_policies_share_the_frozen_weights_and_leave_each_other_alone(env, observations, pipeline):
    first, second = micro_policy(env), micro_policy(env, lora_targets="attention")
    base = {id(parameter) for parameter in env.model.denoiser.parameters()}
    for policy in (first, second):
        assert {id(p) for p in policy.denoiser.parameters() if not p.requires_grad} == base
    with torch.no_grad():
        before = second.get_distribution(observations[0]).mode()
    for _ in range(2):
        train_a_step(first, observations[0])
    with torch.no_grad():
        assert torch.equal(second.get_distribution(observations[0]).mode(), before)
        assert not torch.allclose(first.get_distribution(observations[0]).mode(), before, atol=1e-3)
    assert_untouched(env, observations[0], pipeline)
    assert not any("lora" in name for name, _ in env.model.denoiser.named_modules())


def test_rank_0_trains_a_copy_of_every_weight(env, observations, pipeline):
    policy = micro_policy(env, lora_rank=0)
    assert len(policy.trainable_parameters()) == len(list(env.model.denoiser.parameters()))
    with torch.no_grad():
        before = policy.get_distribution(observations[0]).mode()
        assert torch.equal(before, micro_policy(env).get_distribution(observations[0]).mode())
    train_a_step(policy, observations[0])
    with torch.no_grad():
        assert not torch.allclose(policy.get_distribution(observations[0]).mode(), before, atol=1e-3)
    assert_untouched(env, observations[0], pipeline)
    with pytest.raises(ValueError, match="save_lora needs lora_rank above 0"):
        policy.save_lora("nowhere")


@pytest.mark.parametrize("arguments", [{}, {"critic": True, "lora_targets": "attention"}, {"lora_rank": 0}])
def test_saved_policy_acts_the_same_and_holds_only_what_learns(env, observations, tmp_path, arguments):
    policy = stir(micro_policy(env, eta=0.7, **arguments), scale=0.05)
    learned = {name for name, parameter in policy.named_parameters() if parameter.requires_grad}
    assert set(policy.state_dict()) == learned
    policy.save(tmp_path / "policy")
    assert files_below(tmp_path / "policy") == {"policy.json", "policy.safetensors"}
    with safe_open(tmp_path / "policy" / "policy.safetensors", "pt") as file:
        assert set(file.keys()) == learned
    again = DiffusionPolicy.load(tmp_path / "policy", device="cpu")
    torch.manual_seed(5)
    actions, values, log_prob = policy(observations[2])
    torch.manual_seed(5)
    for mine, theirs in zip((actions, values, log_prob), again(observations[2]), strict=True):
        assert torch.equal(mine, theirs)


def test_saved_adapters_are_small(env, tmp_path):
    policy = micro_policy(env, lora_rank=1, lora_targets="attention")
    policy.save(tmp_path)
    numbers = sum(parameter.numel() for parameter in policy.trainable_parameters())
    saved = (tmp_path / "policy.safetensors").stat().st_size
    assert saved < 4 * numbers + 200 * len(policy.trainable_parameters())
    assert saved < sum(parameter.nbytes for parameter in env.model.denoiser.parameters()) / 2


def test_loading_what_does_not_fit_is_a_clear_error(env, tmp_path):
    with pytest.raises(ValueError, match=r"must be a folder that DiffusionPolicy.save wrote; .* has no policy.json"):
        DiffusionPolicy.load(tmp_path / "nothing")
    attention, everything = micro_policy(env, lora_targets="attention"), micro_policy(env)
    with pytest.raises(ValueError, match=r"must hold the \d+ tensors that learn; missing .*conv.*: same lora_rank"):
        everything.load_state_dict(attention.state_dict())
    with pytest.raises(ValueError, match=r"unexpected \['denoiser.*conv"):
        attention.load_state_dict(everything.state_dict())
    everything.load_state_dict(stir(attention).state_dict(), strict=False)
    for name, value in attention.state_dict().items():
        assert torch.equal(everything.state_dict()[name], value)
    everything.save(tmp_path)
    settings = json.loads((tmp_path / "policy.json").read_text())
    (tmp_path / "policy.json").write_text(json.dumps(settings | {"model": str(tmp_path / "gone")}))
    with pytest.raises(ValueError, match="model"):
        DiffusionPolicy.load(tmp_path)
    again = DiffusionPolicy.load(tmp_path, model=settings["model"])
    assert again.model.source == settings["model"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"use_sde": True}, "use_sde must be False"),
        ({"eta": -0.1}, r"eta must be in \[0, 10\]; got -0.1"),
        ({"eta": (1.0, 0.0)}, "eta must be one number, or one for each of the num_inference_steps=5 steps; got 2"),
        ({"sampler": "dpm"}, "sampler must be None or one of ddim, ddpm, flow-sde, dance, cps, ode; got 'dpm'"),
        ({"sampler": "cps"}, "sampler must be one of ddim, ode for a model with DDIMScheduler; got 'cps'"),
        ({"guidance_scale": -1.0}, r"guidance_scale must be in \[0, 100\]; got -1.0"),
        ({"guidance_scale": float("nan")}, r"guidance_scale must be in \[0, 100\]"),
        ({"lora_targets": "everything"}, r"lora_targets must be one of attention, .*; got 'everything'"),
        ({"lora_rnk": 1}, "policy_kwargs must be among .*lora_rank, .*; got lora_rnk; did you mean lora_rank?"),
        ({"num_inference_step": 1}, "policy_kwargs must be among .*; did you mean num_inference_steps?"),
        ({"lora_rank": -1}, r"lora_rank must be in \[0, 4096\]; got -1"),
        ({"log_prob_reduction": "max"}, "log_prob_reduction must be one of mean, sum; got 'max'"),
        ({"num_inference_steps": 0}, "num_inference_steps must be at least 1; got 0"),
        ({"model": "enormous"}, "model must be a bundled name"),
    ],
)
def test_bad_argument_is_refused(env, arguments, message):
    with pytest.raises(ValueError, match=message):
        micro_policy(env, **arguments)


def test_space_without_a_model_needs_one_by_name(env, micro_pipeline_folder):
    plain = spaces.Dict(dict(env.single_observation_space.spaces))
    arguments = (plain, env.single_action_space, lambda _: 1e-3)
    with pytest.raises(ValueError, match="model and num_inference_steps must be given in policy_kwargs"):
        DiffusionPolicy(*arguments)
    policy = DiffusionPolicy(*arguments, model=micro_pipeline_folder, num_inference_steps=STEPS)
    assert policy.model is env.model
    assert policy.options == PolicyOptions(), "a model with prompts and attention can have every default"


def test_model_with_another_guidance_than_its_pipeline_is_not_guided_by_default(env, monkeypatch):
    monkeypatch.setattr(env.model, "guidance_problem", "the pipeline guides in another way")
    spaces = env.single_observation_space, env.single_action_space
    assert DiffusionPolicy(*spaces, lambda _: 1e-3).options.guidance_scale == 1
    with pytest.raises(ValueError, match="guidance_scale must be 1 .*in another way; got 5"):
        DiffusionPolicy(*spaces, lambda _: 1e-3, guidance_scale=5)


def test_spaces_of_another_model_are_refused(env):
    observation_space, action_space = env.single_observation_space, env.single_action_space
    without_time = spaces.Dict({name: s for name, s in observation_space.spaces.items() if name != "timestep"})
    for observations, actions in (
        (spaces.Box(-1, 1, (3,)), action_space),
        (without_time, action_space),
        (observation_space, latent_box((4, 16, 16))),
    ):
        with pytest.raises(ValueError, match="observation_space must be that of model"):
            DiffusionPolicy(observations, actions, lambda _: 1e-3, model=env.model, num_inference_steps=STEPS)


def test_gradient_checkpointing_gives_the_same_gradients(env, observations):
    gradients = []
    for checkpointing in (False, True):
        policy = stir(micro_policy(env, gradient_checkpointing=checkpointing))
        policy.set_training_mode(True)
        _, log_prob, _ = policy.evaluate_actions(observations[1], torch.zeros_like(observations[1]["latents"]))
        log_prob.sum().backward()
        gradients.append([parameter.grad for parameter in policy.trainable_parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, plain, rtol=1e-5, atol=1e-7)
    assert not env.model.denoiser.is_gradient_checkpointing


def test_what_learns_is_float32_around_frozen_half_precision(micro_pipeline_folder):
    env = micro_env(micro_pipeline_folder, dtype="bfloat16")
    env.reset(seed=0)
    for rank in (2, 0):
        policy = micro_policy(env, lora_rank=rank)
        assert {parameter.dtype for parameter in policy.trainable_parameters()} == {torch.float32}
        train_a_step(policy, env.observe())
        actions, _, log_prob = policy(env.observe())
        assert actions.dtype == log_prob.dtype == torch.float32
        assert torch.isfinite(log_prob).all()
    assert {parameter.dtype for parameter in env.model.denoiser.parameters()} == {torch.bfloat16}


def test_optimizer_takes_arguments_of_any_class(env):
    policy = micro_policy(env, optimizer_class=torch.optim.RMSprop, optimizer_kwargs={"alpha": 0.9})
    assert policy.optimizer.param_groups[0]["alpha"] == 0.9
    default = micro_policy(env, optimizer_kwargs={"eps": 1e-6}).optimizer.param_groups[0]
    assert (default["betas"], default["weight_decay"], default["eps"]) == ((0.9, 0.999), 1e-4, 1e-6)
    assert weights(policy).keys() == policy.state_dict().keys()
