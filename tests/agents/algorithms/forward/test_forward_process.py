"""What algorithms of the forward process share: which samples are noised, refusals, and the copy that lags behind."""

import copy

import numpy as np
import pytest
import torch
from helpers.algorithms import collected, denoising, denoising_awm, denoising_dpo, denoising_nft, logged
from helpers.micro_agents import STEPS, micro_env, stir, weights

from agents import AWM, DPO, NFT, DiffusionPolicy, DRaFT, VectorEnvAdapter
from agents.config.train_config import train_config
from agents.policy.weight_copies import LaggingWeights, using_weights

KINDS = [denoising_nft, denoising_awm]
CLASSES = [NFT, AWM, DPO]


@pytest.mark.parametrize("kind", CLASSES)
def test_policy_without_a_denoiser_is_refused_by_name(kind):
    with pytest.raises(ValueError, match=f"policy must be a denoiser .* with {kind.__name__}.*ActorCriticPolicy"):
        kind("MlpPolicy", "CartPole-v1", device="cpu")


@pytest.mark.parametrize("kind", CLASSES)
def test_entropy_bonus_is_refused(kind, micro_pipeline_folder):
    with pytest.raises(ValueError, match=f"ent_coef must be 0 with {kind.__name__}.*got 0.1"):
        denoising(kind, micro_pipeline_folder, ent_coef=0.1)


@pytest.mark.parametrize("make", KINDS)
def test_finished_samples_are_noised_to_the_timesteps_of_their_trajectories(micro_pipeline_folder, make):
    model = collected(make(micro_pipeline_folder, timestep_window=(0.2, 0.8), num_envs=4))
    indices = model.select_steps()
    assert sorted(indices // 4) == [1] * 4 + [2] * 4 + [3] * 4, "the three steps inside the window, of 4 samples"
    batch = model.transitions(indices)
    noised = model.noised(batch)
    rollout = model.rollout_buffer
    assert torch.equal(noised.clean, rollout.actions[-1][indices % 4])
    assert torch.equal(noised.timestep, model.policy.sampler.timesteps[indices // 4].float())
    for name, value in noised.conditioning.items():
        assert torch.equal(value, rollout[indices].observations[name])
    noise = (noised.latents - noised.signal * noised.clean) / noised.sigma
    assert noise.std() == pytest.approx(1, abs=0.1)
    assert not torch.allclose(noise[0], noise[1])


@pytest.mark.parametrize("kind", [*CLASSES, DRaFT])
def test_rollout_is_one_episode_unless_a_number_of_whole_ones_is_given(micro_pipeline_folder, kind):
    env = VectorEnvAdapter(micro_env(micro_pipeline_folder, 2, samples_per_prompt=2))
    assert kind(DiffusionPolicy, env, device="cpu").n_steps == STEPS
    assert kind(DiffusionPolicy, env, n_steps=2 * STEPS, device="cpu").n_steps == 2 * STEPS
    for wrong, nearest in ((STEPS + 2, f"{STEPS} and {2 * STEPS} are"), (STEPS - 1, f"{STEPS} is")):
        message = (
            f"n_steps must be a multiple of {STEPS}, the length of an episode, with .*; got {wrong}: {nearest} the"
        )
        with pytest.raises(ValueError, match=message):
            kind(DiffusionPolicy, env, n_steps=wrong, device="cpu")


def test_open_length_of_a_rollout_is_saved_as_such(micro_pipeline_folder, tmp_path):
    model = NFT(DiffusionPolicy, VectorEnvAdapter(micro_env(micro_pipeline_folder, 2)), device="cpu")
    model.save(tmp_path / "model")
    assert NFT.load(tmp_path / "model", device="cpu").n_steps == STEPS


def test_rollout_that_cuts_trajectories_of_unknown_length_is_refused(micro_pipeline_folder, monkeypatch):
    monkeypatch.setattr(DiffusionPolicy, "stochastic_steps", lambda self: None)
    model = denoising_nft(micro_pipeline_folder, n_steps=STEPS + 2, advantage=lambda rollout: torch.ones(STEPS + 2, 6))
    with pytest.raises(ValueError, match=f"n_steps={STEPS + 2} cuts episodes, and NFT trains on finished samples"):
        collected(model).train()


def test_dropped_samples_are_not_trained_on(micro_pipeline_folder):
    model = collected(denoising_nft(micro_pipeline_folder))
    model.rollout_buffer.rewards[-1, 2] = np.nan
    model.rollout_buffer.drop_non_finite()
    indices = model.select_steps()
    assert set(indices % 6) == {0, 1, 3, 4, 5}
    assert (model.finished_by(indices) == (STEPS - 1) * 6 + indices % 6).all()


@pytest.mark.parametrize("make", KINDS)
def test_sampler_without_noise_will_do_and_so_will_a_penalty(micro_pipeline_folder, make):
    model = make(micro_pipeline_folder, kl_coef=0.1, policy={"sampler": "ode"}, timestep_window=(0.0, 0.8))
    collected(model).train()
    assert len(model.select_steps()) == 4 * 6
    assert logged(model)["train/kl_penalty"] >= 0
    assert "train/kl_to_sampling" not in logged(model)


def test_sizes_of_a_run_count_steps_without_noise():
    settings = {"algorithm": "nft", "kl_coef": 0.1, "timestep_window": (0.0, 0.8), "timestep_fraction": 1.0}
    for noise in ({"sampler": "ode"}, {"noise_window": 2}, {}):
        assert train_config(**settings, **noise).resolved().trained_steps == 8
    assert train_config(**settings | {"algorithm": "ppo"}, noise_window=2).resolved().trained_steps == 2


def test_copy_follows_by_hand():
    weight = torch.nn.Parameter(torch.zeros(3))
    copied = LaggingWeights([weight], rate=0.1, limit=0.25)
    expected, value = 0.0, 0.0
    for updates in range(5):
        value += 1.0
        weight.data.fill_(value)
        copied.follow([weight], updates)
        decay = min(0.1 * updates, 0.25)
        expected = decay * expected + (1 - decay) * value
        torch.testing.assert_close(copied.shadow_params[0], torch.full((3,), expected))
    assert expected != value


def test_weights_are_those_of_the_copy_inside_and_gradients_those_of_the_own_ones_outside():
    weight, other = torch.nn.Parameter(torch.tensor([2.0])), torch.tensor([5.0])
    loss = weight**2
    seen = []

    def interrupted():
        with using_weights([weight], [other]):
            seen.append(weight.item())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    loss.backward()
    assert seen == [5]
    assert (weight.item(), weight.grad.item(), other.item()) == (2, 4, 5)


def test_old_policy_samples_and_follows_at_the_end_of_an_iteration(micro_pipeline_folder):
    model = denoising_nft(micro_pipeline_folder, lag_rate=1.0, lag_limit=0.9, batch_size=10)
    stir(model.policy, 0.1)  # given to the policy after the algorithm was made
    before = weights(model.policy)
    model.learn(6 * STEPS, log_interval=None)
    after = weights(model.policy)
    assert model._n_updates == 3
    names = [name for name, parameter in model.policy.named_parameters() if parameter.requires_grad]
    for name, copied in zip(names, model.lagging.shadow_params, strict=True):
        torch.testing.assert_close(copied, 0.9 * before[name] + 0.1 * after[name])
        assert not torch.equal(before[name], after[name])
    collected(model)
    batch = model.rollout_buffer[np.arange(6 * STEPS)]
    with torch.no_grad(), model.as_lagging():
        _, log_prob, _ = model.policy.evaluate_actions(batch.observations, batch.actions)
    torch.testing.assert_close(log_prob, batch.log_probs, rtol=1e-4, atol=1e-5)
    assert model.drift(np.arange(6 * STEPS))["kl_to_sampling"] > 1e-6
    assert all(torch.equal(value, after[name]) for name, value in weights(model.policy).items())


@pytest.mark.parametrize("make", KINDS)
def test_distances_of_the_first_iteration_are_of_one_policy(micro_pipeline_folder, make):
    model = make(micro_pipeline_folder, lag_rate=0.2)
    stir(model.policy, 0.1)
    collected(model).train()
    assert logged(model)["train/lag_distance"] == pytest.approx(0, abs=1e-9)
    collected(model).train()
    assert logged(model)["train/lag_distance"] > 1e-9


@pytest.mark.parametrize("make", [*KINDS, denoising_dpo])
def test_critic_learns_too(micro_pipeline_folder, make):
    model = make(micro_pipeline_folder, policy={"critic": True})
    before = copy.deepcopy(model.policy.critic.state_dict())
    collected(model).train()
    assert logged(model)["train/value_loss"] > 0
    assert any(not torch.equal(value, before[name]) for name, value in model.policy.critic.state_dict().items())
