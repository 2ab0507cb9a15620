"""The window of MixGRPO: noise and training in some steps only, which move on with the iterations."""

import itertools
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from helpers.algorithms import collected, denoising_ppo, denoising_reinforce, denoising_rwr, logged
from helpers.micro_agents import STEPS, stir
from helpers.micro_families import micro_family

from agents.algorithms.options import UpdateOptions
from agents.algorithms.policy_gradient.ppo import PPO
from agents.policy.diffusion_policy import DiffusionPolicy
from ddpo_env.sampler.gaussian_sampler import GaussianSampler


def places_of_mixgrpo(start, end, width, interval, stride):
    """MixGRPO's own state machine ("progressive", with overlap and roll-back), for windows that are whole."""
    first = count = 0
    while True:
        yield start + first, start + first + width
        count += 1
        if count >= interval:
            count, first = 0, first + stride
        if start + first + width > end:
            first = 0


@pytest.mark.parametrize(
    ("steps", "timestep_window", "width", "interval", "stride"),
    [(25, (0.0, 0.92), 4, 25, 1), (10, (0.0, 0.9), 3, 1, 2), (10, (0.2, 0.8), 6, 2, 1), (7, (0.0, 1.0), 1, 3, 6)],
)
def test_window_moves_as_in_mixgrpo(steps, timestep_window, width, interval, stride):
    options = UpdateOptions(
        timestep_window=timestep_window,
        noise_window=width,
        noise_window_iterations=interval,
        noise_window_stride=stride,
    )
    start, end = options.trained_range(steps)
    expected = list(itertools.islice(places_of_mixgrpo(start, end, width, interval, stride), 2000))
    assert [options.noise_window_at(iteration, steps) for iteration in range(2000)] == expected
    assert len(set(expected)) == (end - start - width) // stride + 1


@pytest.mark.parametrize(
    ("timestep_window", "width", "stride", "places"),
    [
        ((0.0, 0.9), 2, 2, [0, 2, 4, 6, 7]),
        ((0.0, 0.9), 2, 1, [0, 1, 2, 3, 4, 5, 6, 7]),
        ((0.2, 0.9), 3, 3, [2, 5, 6]),
        ((0.2, 0.9), 3, 9, [2, 6]),
        ((0.2, 0.9), 7, 9, [2]),
    ],
)
def test_window_visits_the_last_place_whatever_the_stride(timestep_window, width, stride, places):
    options = UpdateOptions(
        timestep_window=timestep_window, noise_window=width, noise_window_iterations=1, noise_window_stride=stride
    )
    expected = [(place, place + width) for place in places]
    assert [options.noise_window_at(iteration, 10) for iteration in range(2 * len(places))] == 2 * expected


def sampled(algorithm):
    """Fill the buffer as the next iteration of `learn` would."""
    _, callback = algorithm._setup_learn(1, reset_num_timesteps=False)
    assert algorithm.collect_rollouts(algorithm.env, callback, algorithm.rollout_buffer, algorithm.n_steps)
    return algorithm


def windowed_ppo(model, **arguments):
    settings = {"noise_window": 2, "noise_window_iterations": 1, "timestep_window": (0.0, 0.8)}
    return denoising_ppo(model, **settings | arguments)


@pytest.fixture(scope="module", params=["stable_diffusion_2", "stable_diffusion_3", "ddpm"])
def family(request):
    """DDIM, a flow and DDPM."""
    policy = {"guidance_scale": 1.0, "lora_targets": "attention"}
    return micro_family(request.param), policy


def test_steps_outside_the_window_are_deterministic_and_not_scored(family):
    model, policy = family
    algorithm = collected(windowed_ppo(model, policy=policy))
    rollout, sampler = algorithm.rollout_buffer, algorithm.policy.sampler
    ode = GaussianSampler.from_model(algorithm.policy.model, STEPS, sampler="ode")
    assert rollout.scored.tolist() == [[True] * 6] * 2 + [[False] * 6] * 3
    for step in range(STEPS):
        indices = step * 6 + np.arange(6)
        batch, row = rollout[indices], torch.full((6,), step)
        latents, timestep, conditioning = algorithm.policy._split(batch.observations)
        with torch.no_grad():
            output = algorithm.policy.predict_output(latents, timestep, conditioning)
        table = sampler if step < 2 else ode
        difference = (batch.actions - table.mean(latents, output, row)).flatten(1).norm(dim=1)
        if step < 2:
            assert difference.min() > 0.1 * sampler.std[step]
            scored = sampler.log_prob(batch.actions, table.mean(latents, output, row), row)
            torch.testing.assert_close(batch.log_probs, scored, rtol=1e-5, atol=1e-5)
        else:
            assert difference.max() < 1e-4
            assert not batch.log_probs.any()


def test_window_alone_is_trained_on_with_ratio_1(family):
    model, policy = family
    algorithm = windowed_ppo(model, policy=policy, batch_size=12, kl_coef=0.1, ema_decay=0.9)
    stir(algorithm.policy, 0.02)
    for first in (0, 1, 2, 0):
        sampled(algorithm)
        chosen = algorithm.select_steps()
        assert sorted(chosen) == [step * 6 + env for step in (first, first + 1) for env in range(6)]
        assert set(algorithm.random_steps(100)) == set(chosen)
        before = algorithm._n_updates
        algorithm.train()
        assert algorithm._n_updates == before + 1
        assert 0 <= logged(algorithm)["train/ratio_deviation"] <= 1e-5
        assert all(np.isfinite(value) for name, value in logged(algorithm).items() if name.startswith("train/"))
    assert all(value.isfinite().all() for value in algorithm.policy.state_dict().values())


def test_training_costs_the_rows_of_the_window_alone(micro_pipeline_folder):
    algorithm = collected(windowed_ppo(micro_pipeline_folder, recompute_log_probs=True, n_epochs=2))
    rows = {True: 0, False: 0}
    drift = 1 * 2  # a 25th of the 12 steps of an epoch, at least one, doubled by guidance

    def count(_, inputs):
        rows[torch.is_grad_enabled()] += len(inputs[0])

    algorithm.policy.denoiser.conv_out.register_forward_pre_hook(count)
    algorithm.train()
    assert rows[True] == 2 * 2 * 6 * 2, "2 epochs of 2 steps of 6 episodes"
    assert rows[False] == 2 * 6 * 2 + drift, "each log-probability once more"


def test_same_noise_and_place_whatever_was_sampled_before(micro_pipeline_folder):
    """Every step draws its noise, also where it is not used: a window changes no other random number."""
    plain, windowed = (collected(denoising_ppo(micro_pipeline_folder, noise_window=width)) for width in (None, STEPS))
    assert torch.equal(plain.rollout_buffer.actions, windowed.rollout_buffer.actions)
    assert torch.equal(plain.rollout_buffer.log_probs, windowed.rollout_buffer.log_probs)
    shorter = collected(denoising_ppo(micro_pipeline_folder, noise_window=1))
    assert torch.equal(shorter.rollout_buffer.actions[0], plain.rollout_buffer.actions[0])
    assert shorter.generator_state() == plain.generator_state()


def test_policy_has_its_own_sampler_again_after_a_rollout(micro_pipeline_folder):
    algorithm = windowed_ppo(micro_pipeline_folder)
    collected(algorithm)
    assert algorithm.policy.stochastic_steps().all()
    assert algorithm.policy.sampler.is_stochastic.all()
    assert algorithm.policy.scored(algorithm._last_obs) is None


def test_one_window_for_all_batches_of_an_iteration(micro_pipeline_folder):
    algorithm = windowed_ppo(micro_pipeline_folder, n_steps=2 * STEPS)
    for first in (0, 1):
        scored = sampled(algorithm).rollout_buffer.scored
        expected = 2 * [first <= step < first + 2 for step in range(STEPS)]
        assert scored.all(axis=1).tolist() == scored.any(axis=1).tolist() == expected


def test_noise_by_step_is_trained_on_where_there_is_some(micro_pipeline_folder):
    algorithm = collected(
        denoising_ppo(micro_pipeline_folder, policy={"eta": (0.0, 1.0, 0.0, 0.5, 0.0)}, timestep_fraction=0.2)
    )
    assert algorithm.rollout_buffer.scored.all(axis=1).tolist() == [False, True, False, True, False]
    counts = sum(np.bincount(algorithm.select_steps(), minlength=6 * STEPS) for _ in range(30))
    assert counts.reshape(STEPS, 6).sum(axis=1)[[0, 2, 4]].sum() == 0
    assert counts.reshape(STEPS, 6)[[1, 3]].min() > 0
    algorithm.train()
    assert 0 <= logged(algorithm)["train/ratio_deviation"] <= 1e-5


@pytest.mark.parametrize(
    ("make", "policy", "arguments", "message"),
    [
        (denoising_ppo, {"sampler": "ode"}, {}, "algorithm must not be PPO with a sampler without noise in the steps"),
        (denoising_ppo, {"eta": (0.0,) * 4 + (1.0,)}, {"timestep_window": (0.0, 0.8)}, "PPO .* 0 to 3 of 5"),
        (denoising_ppo, {"eta": (0.0,) * 4 + (1.0,)}, {"noise_window": 1}, "PPO with .* 0 to 0 of 5"),
        (denoising_reinforce, {"eta": 0.0}, {}, "algorithm must not be REINFORCE"),
        (denoising_rwr, {"sampler": "ode"}, {"kl_coef": 0.1}, "kl_coef must not be 0.1 with a sampler without noise"),
        (denoising_rwr, {"sampler": "ode"}, {"target_kl": 1.0}, "target_kl must not be 1.0 with a sampler without"),
        (
            denoising_rwr,
            {"sampler": "ode"},
            {"noise_window": 1},
            "noise_window must be None with a sampler without noise",
        ),
        (denoising_rwr, {"eta": 0.0}, {"noise_window": 1}, "noise_window must be None with a sampler without noise"),
        (denoising_ppo, {}, {"noise_window": 5, "timestep_window": (0.0, 0.8)}, "noise_window must be at most 4"),
    ],
)
def test_what_needs_noise_is_refused_where_there_is_none(micro_pipeline_folder, make, policy, arguments, message):
    with pytest.raises(ValueError, match=message):
        make(micro_pipeline_folder, policy=policy, **arguments)


def test_regression_takes_samples_of_a_deterministic_sampler(micro_pipeline_folder):
    algorithm = collected(denoising_rwr(micro_pipeline_folder, policy={"sampler": "ode"}))
    assert not algorithm.rollout_buffer.scored.any()
    algorithm.train()
    assert algorithm._n_updates > 0
    assert "train/kl_to_sampling" not in logged(algorithm)


def test_policy_without_a_sampler_has_no_window():
    with pytest.raises(
        ValueError, match="noise_window must be None with a policy that does not say which of its steps"
    ):
        PPO("MlpPolicy", gym.make("CartPole-v1"), noise_window=2, device="cpu")


def test_stock_algorithms_see_no_ratio_in_a_step_without_noise(micro_pipeline_folder):
    """Its log-probability is 0 under every policy, so that it neither raises nor lowers anything."""
    env = SimpleNamespace(env=denoising_ppo(micro_pipeline_folder).env.vector_env).env
    policy = DiffusionPolicy(
        env.single_observation_space, env.single_action_space, lambda _: 1e-3, eta=(0.0, 1.0, 1.0, 1.0, 1.0)
    )
    observation, _ = env.reset(seed=0)
    with torch.no_grad():
        actions, _, log_prob = policy(observation)
    stir(policy, 0.1)
    _, moved, entropy = policy.evaluate_actions(observation, actions)
    assert not log_prob.any()
    assert not moved.any()
    assert not entropy.any()
