"""What algorithms may ask of a policy: the defaults of a stock policy, and what `DiffusionPolicy` declares."""

import torch
from gymnasium import spaces
from helpers.micro_agents import micro_env, micro_policy
from stable_baselines3.common.policies import ActorCriticPolicy

from agents import PolicyAbilities, Transitions
from agents.policy.abilities import policy_abilities


def stock_policy():
    return ActorCriticPolicy(spaces.Box(-1, 1, (3,)), spaces.Discrete(2), lambda _: 1e-3)


def test_stock_policy_has_the_defaults():
    abilities = policy_abilities(stock_policy())
    assert (abilities.knows_reference, abilities.shares_batches, abilities.rows) == (False, False, None)
    assert abilities.compute_dtype == torch.float32
    with abilities.sampling_weights():
        pass


def test_stock_policy_imitates_by_likelihood():
    policy = stock_policy()
    observations, actions = torch.randn(5, 3), torch.tensor([0, 1, 1, 0, 1])
    zeros = torch.zeros(5)
    loss = policy_abilities(policy).regression_loss(Transitions(observations, actions, zeros, zeros, zeros, zeros))
    assert torch.equal(loss, -policy.evaluate_actions(observations, actions)[1])
    assert policy_abilities(policy).evaluate_with_reference(observations, actions)[3] is None


def test_diffusion_policy_declares_its_own(micro_pipeline_folder):
    policy = micro_policy(micro_env(micro_pipeline_folder))
    assert isinstance(policy, PolicyAbilities)
    assert policy_abilities(policy) is policy
    assert policy.knows_reference
    assert policy.shares_batches
