"""Algorithms on the smallest denoising MDP, and what their tests read off them."""

import torch
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy

from agents.algorithms.advantages import BatchAdvantage, RawReturn
from agents.algorithms.draft import DRaFT
from agents.algorithms.forward.awm import AWM
from agents.algorithms.forward.dpo import DPO
from agents.algorithms.forward.nft import NFT
from agents.algorithms.policy_gradient.grpo import GRPO
from agents.algorithms.policy_gradient.ppo import PPO
from agents.algorithms.policy_gradient.reinforce import REINFORCE
from agents.algorithms.rwr import RWR
from agents.evaluation.evaluate import evaluate
from agents.policy.diffusion_policy import DiffusionPolicy
from agents.rollout.vec_env import VectorEnvAdapter
from ddpo_env.vector_env import DenoisingVectorEnv
from helpers.micro_agents import STEPS, micro_env, weights

POLICY = {"lora_rank": 2, "lora_targets": "attention+convolutions", "guidance_scale": 3.0}


def denoising(kind, model, num_envs=6, policy=None, **arguments):
    """An algorithm of a class on the denoising MDP of a model, or on an environment."""
    settings = {
        "n_steps": STEPS,
        "gamma": 1.0,
        "learning_rate": 1e-2,
        "advantage": BatchAdvantage(),
        "policy_kwargs": POLICY | (policy or {}),
        "seed": 0,
        "device": "cpu",
    }
    return kind(DiffusionPolicy, _env(model, num_envs), **settings | arguments)


def _env(model, num_envs):
    env = model if isinstance(model, DenoisingVectorEnv) else micro_env(model, num_envs, samples_per_prompt=2)
    return VectorEnvAdapter(env)


def denoising_nft(model, num_envs=6, policy=None, **arguments):
    """DiffusionNFT on the denoising MDP."""
    return denoising(NFT, model, num_envs, policy, **arguments)


def denoising_awm(model, num_envs=6, policy=None, **arguments):
    """Advantage weighted matching on the denoising MDP."""
    return denoising(AWM, model, num_envs, policy, **arguments)


def denoising_draft(model, num_envs=6, policy=None, **arguments):
    """DRaFT on the denoising MDP."""
    return denoising(DRaFT, model, num_envs, policy, **{"advantage": None} | arguments)


def denoising_dpo(model, num_envs=6, policy=None, **arguments):
    """Online DPO on the denoising MDP: two samples of each prompt, which are a pair."""
    return denoising(DPO, model, num_envs, policy, **{"beta": 50.0} | arguments)


def denoising_grpo(model, num_envs=6, policy=None, **arguments):
    """GRPO on the denoising MDP: the advantages are its own."""
    return denoising_ppo(model, num_envs, policy, **{"kind": GRPO, "advantage": None} | arguments)


def denoising_ppo(model, num_envs=6, policy=None, kind=PPO, **arguments):
    """PPO on the denoising MDP, as DDPO has it; of a model, or of an environment."""
    settings = {
        "n_steps": STEPS,
        "batch_size": num_envs * STEPS,
        "n_epochs": 1,
        "gamma": 1.0,
        "gae_lambda": 1.0,
        "clip_range": 1e-2,
        "learning_rate": 1e-2,
        "advantage": BatchAdvantage(),
        "policy_kwargs": POLICY | (policy or {}),
        "seed": 0,
        "device": "cpu",
    }
    return kind(DiffusionPolicy, _env(model, num_envs), **settings | arguments)


def logged(model):
    return model.logger.name_to_value


def collected(model):
    """Fill the buffer as `learn` would, and stop before the update."""
    _, callback = model._setup_learn(1)
    assert model.collect_rollouts(model.env, callback, model.rollout_buffer, model.n_steps)
    model._update_current_progress_remaining(0, 1)
    return model


def fraction_changed_by_an_update(model):
    """Collect a rollout and update once; return the fraction of tensors that changed, all of them still finite."""
    before = weights(model.policy)
    collected(model).train()
    after = weights(model.policy)
    assert all(torch.isfinite(value).all() for value in after.values())
    return sum(not torch.equal(after[name], before[name]) for name in after) / len(after)


def mean_cartpole_return(model, episodes):
    mean, _ = evaluate_policy(model, make_vec_env("CartPole-v1", 8, seed=100), episodes, deterministic=False)
    return mean


def denoising_reinforce(model, num_envs=6, policy=None, **arguments):
    """REINFORCE on the denoising MDP, as DDPO-SF has it."""
    return denoising(REINFORCE, model, num_envs, policy, **arguments)


def denoising_rwr(model, num_envs=6, policy=None, **arguments):
    """RWR on the denoising MDP, as the paper has it."""
    return denoising(RWR, model, num_envs, policy, **{"advantage": RawReturn()} | arguments)


def brightness_rise(model, folder, steps):
    """Train; return the rewards of 32 held-out samples before, and by how much the same samples' rewards rise."""
    held_out = micro_env(folder, 32, autoreset_mode="Disabled")
    prompts = [prompt for prompt, _ in held_out.prompts][:32]
    before = evaluate(model.policy, held_out, prompts, seed=10_000).rewards
    model.learn(steps)
    return before, evaluate(model.policy, held_out, prompts, seed=10_000).rewards - before


MAKERS = {
    "ppo": denoising_ppo,
    "grpo": denoising_grpo,
    "reinforce": denoising_reinforce,
    "rwr": denoising_rwr,
    "nft": denoising_nft,
    "awm": denoising_awm,
    "draft": denoising_draft,
    "dpo": denoising_dpo,
}
"""Every algorithm, by its name in a configuration."""
