"""How long a rollout is: one episode of a denoising environment by default, and whole ones where pieces won't do."""

import pytest
from helpers.algorithms import denoising, denoising_dpo, denoising_grpo, denoising_ppo, denoising_rwr
from helpers.micro_agents import STEPS, micro_env

from agents.algorithms.advantages import GeneralizedAdvantage, LeaveOneOutAdvantage
from agents.algorithms.policy_gradient.grpo import GRPO
from agents.algorithms.policy_gradient.ppo import PPO
from agents.algorithms.policy_gradient.reinforce import REINFORCE
from agents.algorithms.rwr import RWR
from agents.policy.diffusion_policy import DiffusionPolicy
from agents.rollout.vec_env import VectorEnvAdapter

POINTS = {"policy_kwargs": {"lora_rank": 0, "guidance_scale": 1.0}, "device": "cpu"}
CRITIC = {"policy": {"critic": True}, "advantage": GeneralizedAdvantage(), "gae_lambda": 0.95}


@pytest.mark.filterwarnings("ignore:batch_size=64 does not divide")
@pytest.mark.parametrize(("kind", "generic"), [(PPO, 2048), (GRPO, 2048), (REINFORCE, 32), (RWR, 256)])
def test_rollout_is_one_episode_by_default_or_as_long_as_in_stable_baselines3(kind, generic, tmp_path):
    env = VectorEnvAdapter(micro_env("points", 4, samples_per_prompt=2))
    model = kind(DiffusionPolicy, env, **POINTS)
    assert model.n_steps == STEPS
    model.learn(4 * STEPS)
    assert model.num_timesteps == 4 * STEPS
    model.save(tmp_path / "model")
    assert kind.load(tmp_path / "model", device="cpu").n_steps == STEPS
    assert kind("MlpPolicy", "CartPole-v1", device="cpu").n_steps == generic
    assert kind(DiffusionPolicy, env, n_steps=2 * STEPS, **POINTS).n_steps == 2 * STEPS


@pytest.mark.filterwarnings("ignore:batch_size=")
@pytest.mark.parametrize("n_steps", [STEPS - 2, STEPS + 1])
def test_window_of_steps_is_that_of_whole_episodes(micro_pipeline_folder, n_steps):
    with pytest.raises(ValueError, match=rf"n_steps must be a multiple of {STEPS}.*timestep_window=.*; got {n_steps}"):
        denoising_ppo(micro_pipeline_folder, n_steps=n_steps, timestep_window=(0.5, 1.0), **CRITIC)
    denoising_ppo(micro_pipeline_folder, n_steps=n_steps, **CRITIC).learn(6 * n_steps)


def test_regression_on_finished_samples_refuses_cut_episodes(micro_pipeline_folder):
    with pytest.raises(ValueError, match=f"n_steps must be a multiple of {STEPS}.* with RWR; got 2"):
        denoising_rwr(micro_pipeline_folder, n_steps=2, **CRITIC)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (denoising_grpo, "GroupRelativeAdvantage"),
        (denoising_dpo, "DPO"),
        (
            lambda env, **named: denoising(REINFORCE, env, advantage=LeaveOneOutAdvantage(), **named),
            "LeaveOneOutAdvantage",
        ),
    ],
)
def test_prompts_that_samples_do_not_share_are_refused_at_once(make, name):
    def env(prompts, **arguments):
        return micro_env("points", 3, prompts=[f"prompt {index}" for index in range(prompts)], **arguments)

    points = {"policy_kwargs": POINTS["policy_kwargs"]}
    with pytest.raises(
        ValueError, match=f"samples_per_prompt must be at least 2 with {name}.*; got 1, and a rollout of 3 "
    ):
        make(env(3), **points)
    make(env(2), **points)  # two of three samples share a prompt
    make(env(3, samples_per_prompt=3), **points)
    with pytest.raises(ValueError, match="samples_per_prompt must be at least 2"):
        make(micro_env("points", 1, prompts=["a prompt"]), **points)
