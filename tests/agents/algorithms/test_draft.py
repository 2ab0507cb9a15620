"""DRaFT: the gradient through K steps of a linear denoiser, by diffusers' own steps; and who is refused."""

import itertools

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from helpers.algorithms import brightness_rise, collected, denoising_draft, logged
from helpers.micro_agents import STEPS, contrast, micro_env, stir, weights
from torch import nn

from agents import DiffusionPolicy, DRaFT, VectorEnvAdapter, run_training, train_config
from agents.algorithms.advantages import BatchAdvantage
from ddpo_env import DenoisingVectorEnv
from ddpo_env.models import ModelAbilities

LENGTH, SAMPLES, TARGET = 5, 3, torch.tensor([1.0, -0.5])


class Linear(ModelAbilities):
    """A denoiser that predicts the clean point by a matrix, and a decoder that scales it."""

    sample_kind = "other"
    latent_shape = (2,)
    conditioning_shapes = {}  # noqa: RUF012
    _numbers = itertools.count()

    def __init__(self):
        self.source = f"linear-{next(self._numbers)}"
        self.scheduler = DDIMScheduler(
            num_train_timesteps=50,
            beta_start=0.01,
            beta_end=0.1,
            prediction_type="sample",
            clip_sample=False,
            set_alpha_to_one=False,
            timestep_spacing="trailing",
        )
        self.denoiser = nn.Linear(2, 2)
        with torch.no_grad():
            self.denoiser.weight.copy_(torch.tensor([[0.6, 0.2], [-0.1, 0.5]]))
            self.denoiser.bias.copy_(torch.tensor([0.1, 0.3]))

    def encode_prompts(self, prompts):
        return {}

    def decode(self, latents):
        return 2 * latents

    def decode_with_gradient(self, latents):
        return 2 * latents

    def predict(self, denoiser, latents, timestep, conditioning):
        return denoiser(latents)

    def save_lora(self, denoiser, folder):
        raise ValueError("no LoRA")


class Near:
    """Minus the squared distance from a target."""

    def __call__(self, samples, prompts, metadata):
        return -((samples - TARGET.numpy()) ** 2).sum(1)

    def differentiable_score(self, samples, prompts):
        return -(samples - TARGET).square().sum(1)


def on_the_plane(**arguments):
    """DRaFT with every weight of the linear denoiser, and the noise that its rollout is going to draw."""
    policy = {"lora_rank": 0, "guidance_scale": 1.0, "eta": arguments.pop("eta", 1.0)}
    env = DenoisingVectorEnv(
        SAMPLES,
        model=Linear(),
        reward=arguments.pop("reward", Near()),
        num_inference_steps=LENGTH,
        backend="torch",
        autoreset_mode="SameStep",
        device="cpu",
    )
    model = DRaFT(
        DiffusionPolicy, VectorEnvAdapter(env), n_steps=LENGTH, policy_kwargs=policy, seed=3, device="cpu", **arguments
    )
    generator = torch.Generator()
    generator.set_state(model.generators.noise.get_state())
    return model, [torch.randn(SAMPLES, 2, generator=generator) for _ in range(LENGTH)]


def simulated(model, start, noise, eta, weight, bias, last_steps):
    """Final latents of diffusers' own steps from noise or from a later state, and what each of the last steps saw."""
    scheduler = DDIMScheduler.from_config(model.policy.model.scheduler.config)
    scheduler.set_timesteps(LENGTH)
    latents, seen = start, []
    for timestep, own in zip(scheduler.timesteps[-len(noise) :], noise, strict=True):
        if len(seen) == len(noise) - last_steps:
            latents = latents.detach()
        output = latents @ weight.T + bias
        seen.append((latents, output))
        latents = scheduler.step(output, timestep, latents, eta=eta, variance_noise=own).prev_sample
    return latents, seen[-last_steps:]


@pytest.mark.parametrize(("last_steps", "eta", "kl_coef"), [(1, 1.0, 0.0), (2, 1.0, 0.7), (LENGTH, 0.0, 0.0)])
def test_gradient_is_that_of_the_reward_through_the_last_steps(last_steps, eta, kl_coef):
    model, noise = on_the_plane(last_steps=last_steps, eta=eta, kl_coef=kl_coef)
    stir(model.policy, 0.05)
    collected(model)
    first = model.rollout_buffer[np.arange(SAMPLES)].observations["latents"]
    weight, bias = (one.detach().clone().requires_grad_() for one in model.policy.denoiser.parameters())
    latents, seen = simulated(model, first, noise, eta, weight, bias, last_steps)
    expected = (2 * latents - TARGET).square().sum(1).mean()
    pretrained = model.policy.model.denoiser
    for before, output in seen if kl_coef else ():
        expected = expected + kl_coef * (output - pretrained(before)).square().mean() / last_steps
    batch = model.transitions(model.select_steps())
    loss, metrics = model.loss(batch)
    torch.testing.assert_close(loss, expected)
    mine = torch.autograd.grad(loss, list(model.policy.denoiser.parameters()))
    torch.testing.assert_close(mine, torch.autograd.grad(expected, [weight, bias]), rtol=1e-4, atol=1e-5)
    assert metrics["reward_difference"] < 1e-5
    assert ("kl_penalty" in metrics) == (kl_coef > 0)


@pytest.mark.parametrize("last_steps", [1, 2, LENGTH])
def test_gradient_of_the_kl_penalty_is_that_of_its_value(last_steps):
    """Central differences of the formula in float64, where earlier weights change the latents of later steps."""
    model, noise = on_the_plane(last_steps=last_steps, kl_coef=0.7)
    stir(model.policy, 0.05)
    collected(model)
    first = SAMPLES * (LENGTH - last_steps)
    start = model.rollout_buffer[np.arange(first, first + SAMPLES)].observations["latents"].double()
    last_noise = [one.double() for one in noise[-last_steps:]]
    learning = list(model.policy.denoiser.parameters())
    numbers = torch.cat([one.detach().double().flatten() for one in learning])
    before = [one.detach().double() for one in model.policy.model.denoiser.parameters()]

    def penalty(numbers):
        weight, bias = numbers[:4].view(2, 2), numbers[4:]
        _, seen = simulated(model, start, last_noise, 1.0, weight, bias, last_steps)
        distances = [(output - latents @ before[0].T - before[1]).square().mean() for latents, output in seen]
        return 0.7 * sum(distances) / last_steps

    steps = 1e-5 * torch.eye(len(numbers), dtype=torch.float64)
    expected = torch.stack([penalty(numbers + step) - penalty(numbers - step) for step in steps]) / 2e-5
    _, mine = model._denoise_again(model.transitions(model.select_steps()))
    gradient = torch.cat([one.flatten() for one in torch.autograd.grad(mine, learning)])
    torch.testing.assert_close(mine.double(), penalty(numbers), rtol=1e-4, atol=0)
    torch.testing.assert_close(gradient.double(), expected, rtol=1e-3, atol=1e-6)


def test_gradient_of_the_last_step_in_closed_form():
    """x_0 = a x_1 + b (W x_1 + v) + σε, so that ∂L/∂v = 4 b (2 x_0 − target), mean over the samples."""
    model, _ = on_the_plane()
    collected(model)
    batch = model.transitions(model.select_steps())
    loss, _ = model.loss(batch)
    loss.backward()
    b = model.policy.sampler.output_to_mean[-1]
    slope = 4 * b * (2 * batch.actions - TARGET)
    torch.testing.assert_close(model.policy.denoiser.bias.grad, slope.mean(0))
    torch.testing.assert_close(model.policy.denoiser.weight.grad, slope.T @ batch.observations["latents"] / SAMPLES)


@pytest.mark.parametrize("last_steps", [1, 3])
def test_later_updates_take_the_same_noise_with_the_new_weights(last_steps):
    model, noise = on_the_plane(last_steps=last_steps, n_epochs=2, learning_rate=0.1)
    seen, loss = [], model.loss

    def noted(batch):
        seen.append((weights(model.policy), loss(batch)))
        return seen[-1][1]

    model.loss = noted
    collected(model).train()
    later, (mine, _) = seen[1]
    assert not torch.equal(later["denoiser.bias"], seen[0][0]["denoiser.bias"])
    first_step = SAMPLES * (LENGTH - last_steps)
    start = model.rollout_buffer[np.arange(first_step, first_step + SAMPLES)].observations["latents"]
    latents, _ = simulated(
        model, start, noise[-last_steps:], 1.0, later["denoiser.weight"], later["denoiser.bias"], last_steps
    )
    torch.testing.assert_close(mine.detach(), (2 * latents - TARGET).square().sum(1).mean(), rtol=1e-4, atol=1e-5)


def test_micro_batches_and_two_steps_give_another_and_the_same_gradient(micro_pipeline_folder):
    gradients = {}
    for last_steps, micro_batch_size in [(1, 6), (2, 6), (2, 1)]:
        model = denoising_draft(micro_pipeline_folder, last_steps=last_steps, micro_batch_size=micro_batch_size)
        collected(model)
        model._accumulate(model.select_steps())
        gradients[last_steps, micro_batch_size] = torch.cat(
            [one.grad.flatten() for one in model._learning_parameters()]
        )
    torch.testing.assert_close(gradients[2, 1], gradients[2, 6], rtol=1e-3, atol=1e-6)
    assert (gradients[1, 6] - gradients[2, 6]).norm() > 1e-2 * gradients[2, 6].norm()


def test_reward_of_rounded_images_is_logged_beside_the_differentiable_one(micro_pipeline_folder):
    model = denoising_draft(micro_pipeline_folder)
    collected(model).train()
    assert logged(model)["train/reward"] == pytest.approx(logged(model)["rollout/reward_mean"], abs=1e-3)
    assert 0 < logged(model)["train/reward_difference"] < 0.5 / 255


class Cornered(Near):
    """Its score is finite everywhere, and its gradient is not where the root is of 0."""

    def differentiable_score(self, samples, prompts):
        return super().differentiable_score(samples, prompts) + (0 * samples).sum(1).sqrt()


class Unknown(Near):
    def differentiable_score(self, samples, prompts):
        return super().differentiable_score(samples, prompts) * torch.nan


@pytest.mark.parametrize(
    ("reward", "fault"),
    [
        (Cornered(), rf"reward Cornered: the gradient of differentiable_score must be finite; got {2 * SAMPLES} of "),
        (Unknown(), "reward Unknown: differentiable_score must be finite; got nan for prompt"),
    ],
)
def test_reward_whose_score_or_gradient_is_not_finite_is_named(reward, fault):
    model, _ = on_the_plane(reward=reward)
    before = [weight.clone() for weight in model.policy.trainable_parameters()]
    with pytest.raises(ValueError, match=fault):
        model.learn(1)
    assert all(torch.equal(*pair) for pair in zip(before, model.policy.trainable_parameters(), strict=True))


def test_brightness_of_sampled_images_rises(micro_pipeline_folder):
    policy = {"lora_rank": 4, "guidance_scale": 1.0}
    model = denoising_draft(micro_pipeline_folder, num_envs=16, learning_rate=2e-2, policy=policy, seed=2)
    before, rise = brightness_rise(model, micro_pipeline_folder, 5 * 16 * STEPS)
    assert rise.mean() > before.std(), (rise.mean(), before.std())


@pytest.mark.slow
def test_aesthetic_score_of_the_bundled_model_rises(tmp_path):
    result = run_training(
        train_config(
            algorithm="draft",
            reward="aesthetic",
            reward_options=("model=tiny",),
            iterations=2,
            samples_per_iteration=24,
            eval_samples=24,
            eval_interval=0,
            run_dir=tmp_path,
            device="cpu",
        )
    )
    assert result.reward_after > result.reward_before + 0.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"last_steps": 0}, r"last_steps must be in \[1, 1000000\]; got 0"),
        ({"last_steps": 6}, "last_steps must be at most 5, the length of an episode, with DRaFT; got 6"),
        ({"n_steps": 7}, "n_steps must be a multiple of 5, the length of an episode, with DRaFT; got 7"),
        ({"ent_coef": 0.1}, "ent_coef must be 0, .* with DRaFT; got 0.1"),
        ({"policy": {"critic": True}}, "critic must be None, .* with DRaFT; got DenoisingCritic"),
        ({"noise_window": 2}, "noise_window must be None: .* with DRaFT; got 2"),
        ({"context_key": "context"}, "context_key must be 'prompt', .* with DRaFT; got 'context'"),
        ({"advantage": BatchAdvantage()}, "advantage must be None with DRaFT, which has none; got BatchAdvantage"),
    ],
)
def test_option_without_an_effect_is_refused(micro_pipeline_folder, arguments, message):
    with pytest.raises(ValueError, match=message):
        denoising_draft(micro_pipeline_folder, **arguments)


def test_whatever_cannot_be_differentiated_is_refused_by_name(micro_pipeline_folder):
    with pytest.raises(ValueError, match="policy must be one of a sampler's steps .*; got a ActorCriticPolicy"):
        DRaFT("MlpPolicy", "CartPole-v1", device="cpu")
    env = VectorEnvAdapter(micro_env(micro_pipeline_folder, reward=contrast))
    with pytest.raises(ValueError, match="reward must be differentiable, and contrast is not: take aesthetic, "):
        DRaFT(DiffusionPolicy, env, n_steps=STEPS, device="cpu")

    class Closed(Linear):
        decode_with_gradient = ModelAbilities.decode_with_gradient

    class Detached(Linear):
        def decode_with_gradient(self, latents):
            return latents.detach()

    for kind, message in ((Closed, "its class does not override"), (Detached, "returned samples without one")):
        env = DenoisingVectorEnv(
            SAMPLES, model=kind(), reward=Near(), num_inference_steps=LENGTH, autoreset_mode="SameStep"
        )
        with pytest.raises(ValueError, match=f"model 'linear-.*' must have a decoder with a gradient .*{message}"):
            DRaFT(
                DiffusionPolicy,
                VectorEnvAdapter(env),
                n_steps=LENGTH,
                policy_kwargs={"lora_rank": 0, "guidance_scale": 1.0},
                device="cpu",
            )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"reward": "jpeg_compressibility"},
            "reward must be differentiable, and jpeg_compressibility is not: take aesth",
        ),
        ({"critic": True}, "critic must be False with draft, .*; got True"),
        ({"noise_window": 2}, "noise_window must be None, .* with algorithm draft; got 2"),
        ({"draft_steps": 11}, "draft_steps must be at most num_inference_steps=10, with algorithm draft; got 11"),
        ({"train_batch_size": 0}, "train_batch_size must be at least 1, .* with algorithm draft; got 0"),
    ],
)
def test_setting_that_does_not_fit_is_refused_before_anything_is_loaded(settings, message):
    with pytest.raises(ValueError, match=message):
        train_config(**{"algorithm": "draft", "reward": "aesthetic"} | settings).resolved()
