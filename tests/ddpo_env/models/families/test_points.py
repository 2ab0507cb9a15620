"""`DDPO-Points-v0`: training from scratch in seconds, models of one's own, and the exact policy gradient."""

import gc
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from helpers.points_models import SCRATCH, ConstantModel, make_vec
from torch import nn

import rewards
from agents import PPO, DiffusionPolicy, PerPromptAdvantage, VectorEnvAdapter
from agents.evaluation.evaluate import evaluate
from ddpo_env import DenoisingVectorEnv, GaussianSampler, load_model
from ddpo_env.models import DiffusionModel, unload_models
from ddpo_env.models import loading as models
from ddpo_env.models.families.points import PointsModel, points_scheduler
from rewards import evaluate_reward, load_reward


def test_environment_is_a_gymnasium_environment() -> None:
    env = gym.make("DDPO-Points-v0", render_mode="rgb_array")
    check_env(env.unwrapped)
    assert set(env.observation_space) == {"latents", "timestep"}
    assert env.action_space.shape == (2,)
    assert env.unwrapped.batch.num_inference_steps == 10
    assert env.reset(seed=0)[1] == {"prompt": "a point"}


def test_last_action_is_the_sample_that_is_scored() -> None:
    env = gym.make_vec("DDPO-Points-v0", num_envs=4, num_inference_steps=1)
    env.reset(seed=0)
    points = np.random.default_rng(0).standard_normal((4, 2), np.float32)
    _, scores, _, _, infos = env.step(points)
    assert "image" not in infos
    assert infos["sample"].dtype == np.float32
    assert np.array_equal(infos["sample"], points)
    assert np.array_equal(scores, rewards.load_reward("points_ring")(points, [], []))


def test_render_shows_the_point_of_each_sub_environment() -> None:
    env = gym.make_vec("DDPO-Points-v0", num_envs=2, render_mode="rgb_array")
    env.reset(options={"latents": np.array([[1.25, 1.25], [-2.0, 0.0]], np.float32)})
    frames = np.array(env.render())
    assert (frames.shape, frames.dtype) == ((2, 64, 64, 3), np.dtype(np.uint8))
    red = (frames[..., 0] > 200) & (frames[..., 1] < 100)
    rows, columns = red[0].nonzero()
    assert (rows.mean(), columns.mean()) == pytest.approx((15.75, 47.25), abs=1), "y points up"
    assert red[1].any()
    assert not (red[0] & red[1]).any()


def test_a_reward_for_images_is_refused_before_an_episode() -> None:
    for reward in ("jpeg_compressibility", "clip_score", "points_ring:1,jpeg_compressibility:1"):
        with pytest.raises(
            ValueError, match="reward .* scores (images|nothing).* model 'points' generates samples of another kind"
        ):
            gym.make("DDPO-Points-v0", reward=reward)
    with pytest.raises(ValueError, match=r"points_ring scores samples of another kind; got uint8 .*\(2, 8, 8, 3\)"):
        evaluate_reward(load_reward("points_ring"), np.zeros((2, 8, 8, 3), np.uint8), ["", ""], [{}, {}])


@pytest.mark.parametrize("samples", [np.zeros((3, 2), int), np.zeros((3, 3)), np.zeros(3), np.zeros((3, 2, 1, 1))])
@pytest.mark.parametrize("name", ["points_ring", "points_mixture"])
def test_rewards_of_points_refuse_everything_else(name: str, samples: np.ndarray) -> None:
    with pytest.raises(ValueError, match=rf"reward {name} scores points, a float array \(batch, 2\); got"):
        evaluate_reward(load_reward(name), samples, [""] * 3, [{}] * 3)


def test_rewards_are_their_formulas() -> None:
    points = np.array([[1, 0], [0, -1], [0.6, 0.8], [0, 0], [1.5, 0], [1, 1], [-1, 1]], np.float32)
    ring, _ = evaluate_reward(load_reward("points_ring"), points, [""] * 7, [{}] * 7)
    np.testing.assert_allclose(
        ring, [1, 1, 1, np.exp(-8), np.exp(-2), *[np.exp(-8 * (2**0.5 - 1) ** 2)] * 2], rtol=1e-6
    )
    mixture, _ = evaluate_reward(load_reward("points_mixture"), points, [""] * 7, [{}] * 7)
    torch_mixture = torch.distributions.MixtureSameFamily(
        torch.distributions.Categorical(torch.ones(4)),
        torch.distributions.Independent(
            torch.distributions.Normal(torch.tensor([[1.0, 1], [-1, 1], [-1, -1], [1, -1]]), 0.3), 1
        ),
    )
    expected = torch_mixture.log_prob(torch.as_tensor(points)) + np.log(4 * 2 * np.pi * 0.3**2)
    np.testing.assert_allclose(mixture, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 10, 30, 50])
def test_table_is_the_schedulers_own_step(steps: int) -> None:
    scheduler = points_scheduler()
    table = GaussianSampler.from_scheduler(scheduler, steps, eta=1.0)
    scheduler.set_timesteps(steps)
    assert scheduler.timesteps.tolist() == table.timesteps.tolist()
    latents, output, noise = torch.randn(3, 64, 2, generator=torch.Generator().manual_seed(0))
    for row, timestep in enumerate(scheduler.timesteps):
        index = torch.full((64,), row)
        ours, _ = table.sample(latents, output, index, noise)
        theirs = scheduler.step(output, timestep, latents, eta=1.0, variance_noise=noise).prev_sample
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_last_step_has_noise_at_any_number_of_steps() -> None:
    for steps in range(1, 51):
        table = GaussianSampler.from_scheduler(points_scheduler(), steps)
        assert table.timesteps[0] == 99
        assert 0.07 < table.std[-1] <= 0.1
        assert table.std.min() == table.std[-1]


def test_points_model_is_one_object_with_reproducible_weights() -> None:
    state = torch.random.get_rng_state()
    model = load_model("points", "cpu")
    assert isinstance(model, DiffusionModel)
    assert load_model("points", "cpu") is model
    assert load_model(model) is model
    fresh = PointsModel().denoiser.state_dict()
    assert all(torch.equal(value, fresh[name]) for name, value in model.denoiser.state_dict().items())
    assert torch.equal(torch.random.get_rng_state(), state)
    half = load_model("points", "cpu", "bfloat16")
    assert next(half.denoiser.parameters()).dtype == torch.bfloat16
    assert half.decode(torch.zeros(1, 2, dtype=torch.bfloat16)).dtype == torch.float32


def test_what_needs_a_prompt_or_attention_is_refused(tmp_path: Path) -> None:
    env = make_vec(2)
    spaces = (env.single_observation_space, env.single_action_space)
    with pytest.raises(ValueError, match=r"guidance_scale must be 1 with model 'points'.*got 5\.0"):
        DiffusionPolicy(*spaces, lambda _: 0.0, guidance_scale=5.0)
    with pytest.raises(
        ValueError, match="lora_targets='attention' matches no layer of this PointsDenoiser: .*lora_rank=0"
    ):
        DiffusionPolicy(*spaces, lambda _: 0.0, lora_rank=4)
    with pytest.raises(ValueError, match=r"lora_targets='attention\+convolutions' matches no layer"):
        DiffusionPolicy(*spaces, lambda _: 0.0, lora_targets="attention+convolutions")
    policy = DiffusionPolicy(*spaces, lambda _: 0.0, **SCRATCH)  # type: ignore[arg-type]
    for save in (policy.save_lora, lambda folder: policy.model.save_lora(policy.denoiser, folder)):
        with pytest.raises(ValueError, match="lora_rank"):
            save(tmp_path)


def test_a_policy_without_any_option_learns_without_guidance_and_in_full(tmp_path: Path) -> None:
    algorithm = PPO(DiffusionPolicy, VectorEnvAdapter(make_vec(4, num_inference_steps=2)), n_steps=2, batch_size=8)
    policy = algorithm.policy
    assert isinstance(policy, DiffusionPolicy)
    assert (policy.options.guidance_scale, policy.options.lora_rank) == (1.0, 0)
    before = [parameter.clone() for parameter in policy.trainable_parameters()]
    algorithm.learn(8)
    assert any(not torch.equal(one, two) for one, two in zip(before, policy.trainable_parameters(), strict=True))
    policy.save(tmp_path)
    saved = json.loads((tmp_path / "policy.json").read_text())
    assert (saved["guidance_scale"], saved["lora_rank"]) == (1.0, 0)
    assert DiffusionPolicy.load(tmp_path, device="cpu").options == policy.options


@pytest.mark.parametrize(("reward", "before", "after"), [("points_ring", 0.5, 0.8), ("points_mixture", -3.5, -1.0)])
def test_training_from_scratch_reaches_the_reward(reward: str, before: float, after: float) -> None:
    env = make_vec(256, reward=reward, num_inference_steps=10)
    algorithm = PPO(
        DiffusionPolicy,
        VectorEnvAdapter(env),
        learning_rate=5e-3,
        n_steps=10,
        batch_size=2560,
        n_epochs=10,
        gamma=1.0,
        clip_range=0.2,
        advantage=PerPromptAdvantage(buffer_size=256),
        policy_kwargs=SCRATCH,
        seed=0,
    )
    held_out = make_vec(256, reward=reward, num_inference_steps=10, autoreset_mode="Disabled")
    untrained = evaluate(algorithm.policy, held_out, ["a point"] * 256, seed=1000)
    assert untrained.images.shape == (256, 2)
    assert untrained.rewards.mean() < before
    algorithm.learn(40 * 2560)
    trained = evaluate(algorithm.policy, held_out, ["a point"] * 256, seed=1000)
    assert trained.rewards.mean() > after


def test_critic_and_saving_work_without_conditioning(tmp_path: Path) -> None:
    env = make_vec(8, num_inference_steps=2)
    algorithm = PPO(
        DiffusionPolicy, VectorEnvAdapter(env), n_steps=4, batch_size=16, policy_kwargs=SCRATCH | {"critic": True}
    )
    algorithm.learn(32)
    algorithm.policy.save(tmp_path)
    again = DiffusionPolicy.load(tmp_path, device="cpu")
    for name, value in algorithm.policy.state_dict().items():
        assert torch.equal(again.state_dict()[name], value)


@pytest.fixture
def constant() -> ConstantModel:
    return ConstantModel()


def test_model_of_ones_own_is_found_again_by_its_source(constant: ConstantModel) -> None:
    env = DenoisingVectorEnv(2, model=constant, reward="points_ring", prompts=["a point"], num_inference_steps=1)
    assert env.model is constant
    assert env.single_observation_space.handle.model is constant
    for given in (constant, constant.source):
        assert load_model(given) is load_model(given, "cpu", "float32") is constant
    policy = DiffusionPolicy(env.single_observation_space, env.single_action_space, lambda _: 0.0, **SCRATCH)  # type: ignore[arg-type]
    assert policy.model is constant
    made = gym.make("DDPO-Points-v0", model=constant, num_inference_steps=1)
    assert made.spec is not None
    assert made.spec.kwargs["model"] == constant.source
    assert gym.make(made.spec).unwrapped.batch.model is constant


def test_model_of_ones_own_is_gone_when_nobody_holds_it() -> None:
    source = load_model(ConstantModel()).source
    gc.collect()
    with pytest.raises(ValueError, match=f"DiffusionModel .by its source while it exists.; got '{source}'"):
        load_model(source)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda model: setattr(model, "source", "tiny"), "source .* must be a name of its own, .*got 'tiny'"),
        (lambda model: setattr(model, "source", ""), "source .* must be a name of its own, .*got ''"),
        (lambda model: model.denoiser.double(), "its weights are torch.float64"),
        (lambda model: model.denoiser.register_parameter("gain", nn.Parameter(torch.zeros(1).half())), "in one dtype"),
        (lambda model: setattr(model, "denoiser", nn.Identity()), "must have weights .*got none"),
        (lambda model: delattr(model, "denoiser"), "got a ConstantModel without denoiser"),
    ],
)
def test_model_that_cannot_be_registered(constant: ConstantModel, change: Callable[..., Any], message: str) -> None:
    change(constant)
    with pytest.raises(ValueError, match=message):
        load_model(constant)
    assert constant not in models._objects.values()


def test_a_source_belongs_to_one_model(constant: ConstantModel) -> None:
    other = ConstantModel()
    other.source = constant.source
    load_model(constant)
    with pytest.raises(ValueError, match=f"another model of this process has '{constant.source}'"):
        load_model(other)
    assert load_model(constant.source) is constant


def test_model_of_ones_own_is_not_moved(constant: ConstantModel) -> None:
    with pytest.raises(ValueError, match="dtype must be auto or that of model .*'bfloat16'.*torch.float32"):
        load_model(constant, dtype="bfloat16")
    constant.denoiser.to("meta")
    with pytest.raises(ValueError, match="device must be auto or meta, where model .* is; got 'cpu'"):
        load_model(constant, "cpu")


def test_a_model_without_images_renders_only_if_it_can(constant: ConstantModel) -> None:
    with pytest.raises(ValueError, match="render_mode must be None with model .*no images"):
        gym.make("DDPO-Points-v0", model=constant, render_mode="rgb_array")


def test_unloading_makes_new_points() -> None:
    first = load_model("points", "cpu")
    loaded = dict(models._loaded)
    try:
        unload_models()
        assert load_model("points", "cpu") is not first
    finally:
        models._loaded.update(loaded)
