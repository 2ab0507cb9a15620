"""A callback that looks between two steps of a rollout sees the policy that learns, not the one that samples."""

import numpy as np
import pytest
import torch
from helpers.algorithms import denoising_nft, denoising_ppo
from helpers.micro_agents import STEPS, micro_env, stir, weights
from stable_baselines3.common.callbacks import BaseCallback, CheckpointCallback

from agents.algorithms.forward.nft import NFT
from agents.evaluation.evaluate import evaluate

MAKERS = {
    "merged adapters": denoising_ppo,
    "noise window": lambda folder: denoising_ppo(folder, noise_window=1),
    "lagging policy": lambda folder: denoising_nft(folder, learning_rate=0.1, lag_limit=0.9, lag_rate=0.9),
}


class Evaluated(BaseCallback):
    """Evaluate at every step."""

    def __init__(self, held_out):
        super().__init__()
        self.held_out, self.rewards = held_out, []

    def _on_step(self):
        prompts = [prompt for prompt, _ in self.held_out.prompts][: self.held_out.num_envs]
        self.rewards.append(evaluate(self.model.policy, self.held_out, prompts, seed=3).rewards)
        return True

    def evaluated(self):
        self._on_step()
        return self.rewards.pop()


@pytest.mark.parametrize("maker", MAKERS.values(), ids=MAKERS)
def test_callback_evaluates_what_an_evaluation_before_the_rollout_does(micro_pipeline_folder, maker):
    model = maker(micro_pipeline_folder)
    stir(model.policy, 0.05)
    model.learn(6 * STEPS)
    callback = Evaluated(micro_env(micro_pipeline_folder, 4, autoreset_mode="Disabled"))
    callback.init_callback(model)
    before = callback.evaluated()
    model.learn(6 * STEPS, callback=callback, reset_num_timesteps=False)
    assert len(callback.rewards) == STEPS
    for rewards in callback.rewards:
        np.testing.assert_array_equal(rewards, before)


def test_algorithm_that_is_saved_within_a_rollout_has_the_weights_that_learn(micro_pipeline_folder, tmp_path):
    model = MAKERS["lagging policy"](micro_pipeline_folder).learn(6 * STEPS)
    learner = weights(model.policy)
    lagging = torch.cat([value.flatten() for value in model.lagging.shadow_params])
    assert not torch.equal(lagging, torch.cat([value.flatten() for value in learner.values()]))
    checkpoints = CheckpointCallback(save_freq=2, save_path=str(tmp_path), name_prefix="model")
    model.learn(6 * STEPS, callback=checkpoints, reset_num_timesteps=False)
    file = tmp_path / f"model_{6 * (STEPS + 2)}_steps.zip"
    loaded = NFT.load(file, env=model.env, device="cpu", advantage=model.advantage)
    for name, value in weights(loaded.policy).items():
        assert torch.equal(value, learner[name]), name
    for own, other in zip(
        loaded.lagging.shadow_params, lagging.split([v.numel() for v in learner.values()]), strict=True
    ):
        assert torch.equal(own.flatten(), other)
