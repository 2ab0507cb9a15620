"""The exact policy gradient and the exact gradient of regression, of one step on the points, against closed forms."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from helpers.points_models import SCRATCH, ConstantModel, make_vec
from torch import Tensor

from agents import PPO, REINFORCE, RWR, DiffusionPolicy, RawReturn, VectorEnvAdapter
from agents.algorithms.on_policy import TensorOnPolicyAlgorithm
from agents.rollout.buffer import TensorRolloutBuffer, Transitions


@pytest.fixture
def constant() -> ConstantModel:
    return ConstantModel()


# The exact policy gradient of one step, N(mu, std² I): for r(x) = -|x - g|², d E[r] / d mu = 2 (g - mu).

GOAL = np.array([1.0, 0.6])
ENVS = 8192


def distance(points: np.ndarray, prompts: list[str], metadata: list[dict[str, Any]]) -> np.ndarray:
    return -((points - GOAL) ** 2).sum(1)


def centred(rollout: TensorRolloutBuffer) -> Tensor:
    """Return less the mean return: the baseline that changes no expectation."""
    returns = torch.as_tensor(rollout.rewards)
    return returns - returns.mean()


def one_step(
    kind: type[TensorOnPolicyAlgorithm], env: VectorEnvAdapter, policy: dict[str, Any], **arguments: Any
) -> Any:
    return kind(DiffusionPolicy, env, n_steps=1, gamma=1.0, policy_kwargs=SCRATCH | policy, seed=0, **arguments)


def ppo(env: VectorEnvAdapter, **policy_kwargs: Any) -> PPO:
    return one_step(PPO, env, policy_kwargs, batch_size=ENVS, advantage=centred)


def reinforce(env: VectorEnvAdapter, **policy_kwargs: Any) -> REINFORCE:
    return one_step(REINFORCE, env, policy_kwargs, advantage=centred)


def policy_gradient(algorithm: TensorOnPolicyAlgorithm) -> tuple[np.ndarray, np.ndarray]:
    """One rollout of one-step episodes: the reward's gradient in mu by `loss`, (2,), and its standard error."""
    _, callback = algorithm._setup_learn(ENVS)
    algorithm.collect_rollouts(algorithm.env, callback, algorithm.rollout_buffer, 1)
    batch = algorithm.rollout_buffer[np.arange(ENVS)]
    mu = algorithm.policy.denoiser.bias
    loss, _ = algorithm.loss(batch)
    (gradient,) = torch.autograd.grad(loss, mu)
    samples = batch.advantages[:, None] * (batch.actions - mu.detach()) / 0.5**2
    return -gradient.numpy(), (samples.std(0) / ENVS**0.5).numpy()


@pytest.mark.parametrize("make_algorithm", [ppo, reinforce])
@pytest.mark.parametrize(("reduction", "scale"), [("sum", 1.0), ("mean", 0.5)])
def test_gradient_of_the_loss_is_the_closed_form_policy_gradient(
    constant: ConstantModel, make_algorithm: Callable[..., Any], reduction: str, scale: float
) -> None:
    env = make_vec(ENVS, model=constant, reward=distance, num_inference_steps=1)
    algorithm = make_algorithm(VectorEnvAdapter(env), log_prob_reduction=reduction)
    assert algorithm.policy.sampler.std.tolist() == pytest.approx([0.5])
    exact = scale * 2 * (GOAL - algorithm.policy.denoiser.bias.detach().numpy())
    gradient, error = policy_gradient(algorithm)
    tolerance = 4 * scale * error
    assert (tolerance < np.abs(exact) / 3).all(), "a wrong sign, or a factor of 1.5 either way, must not pass"
    np.testing.assert_array_less(np.abs(gradient - exact), tolerance)


def regression_gradient(algorithm: RWR) -> tuple[np.ndarray, np.ndarray, Transitions]:
    """One rollout of one-step episodes: minus the loss's gradient in mu, mu, and the rollout."""
    _, callback = algorithm._setup_learn(ENVS)
    algorithm.collect_rollouts(algorithm.env, callback, algorithm.rollout_buffer, 1)
    batch = algorithm.rollout_buffer[np.arange(ENVS)]
    mu = algorithm.policy.denoiser.bias
    (gradient,) = torch.autograd.grad(algorithm.loss(batch)[0], mu)
    return -gradient.numpy(), mu.detach().numpy(), batch


@pytest.mark.parametrize("beta", [0.5, 2.0])
def test_gradient_of_weighted_regression_is_the_closed_form(constant: ConstantModel, beta: float) -> None:
    """Samples of N(mu, std² I) with weights exp(-β|x - g|²) are those of another Gaussian, whose mean is known.

    The model answers mu at every timestep, so the denoising loss is |mu - x|² / 2 and its gradient mu less that mean.
    """
    env = make_vec(ENVS, model=constant, reward=distance, num_inference_steps=1)
    algorithm = one_step(RWR, VectorEnvAdapter(env), {}, beta=beta, advantage=RawReturn())
    gradient, start, batch = regression_gradient(algorithm)
    precision = 1 / 0.5**2
    tilted = (precision * start + 2 * beta * GOAL) / (precision + 2 * beta)
    samples = batch.advantages[:, None] * (batch.actions - torch.as_tensor(tilted).float())
    tolerance = 4 * (samples.std(0) / ENVS**0.5).numpy()
    assert (tolerance < np.abs(tilted - start) / 3).all(), "a wrong sign, or a factor of 1.5 either way, must not pass"
    np.testing.assert_array_less(np.abs(gradient - (tilted - start)), tolerance)


def to_the_right(points: np.ndarray, prompts: list[str], metadata: list[dict[str, Any]]) -> np.ndarray:
    return points[:, 0]


@pytest.mark.parametrize("percentile", [50.0, 90.0])
def test_gradient_of_sparse_regression_is_the_closed_form(constant: ConstantModel, percentile: float) -> None:
    """The best fraction of N(mu, std² I) along an axis is a truncated Gaussian: inverse Mills ratio."""
    env = make_vec(ENVS, model=constant, reward=to_the_right, num_inference_steps=1)
    arguments = {"weighting": "percentile", "percentile": percentile, "advantage": RawReturn()}
    gradient, _, _ = regression_gradient(one_step(RWR, VectorEnvAdapter(env), {}, **arguments))
    normal = torch.distributions.Normal(0.0, 1.0)
    threshold = normal.icdf(torch.tensor(percentile / 100))
    mills = normal.log_prob(threshold).exp() / (1 - percentile / 100)
    expected = np.array([0.5 * float(mills), 0.0])
    standard_error = 0.5 / (ENVS * (1 - percentile / 100)) ** 0.5
    assert 4 * standard_error < expected[0] / 3, "a wrong sign, or a factor of 1.5 either way, must not pass"
    np.testing.assert_array_less(np.abs(gradient - expected), 4 * standard_error)
