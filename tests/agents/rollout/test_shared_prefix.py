"""Samples of a prompt from the same noise: what they share is computed once, with the bits of the plain way."""

from itertools import chain

import pytest
import torch
from helpers.algorithms import denoising_ppo
from helpers.micro_agents import STEPS, micro_env
from helpers.micro_families import micro_family

from agents.policy.diffusion_policy import DiffusionPolicy

ENVS, GROUP = 8, 4
WINDOW = {"noise_window": 2, "noise_window_iterations": 1, "timestep_window": (0.0, 1.0)}
PROMPTS = ["a cat", "a dog", "a fox"]


def ppo(model, policy=None, **arguments):
    env = micro_env(model, ENVS, samples_per_prompt=GROUP, shared_noise=True, prompts=PROMPTS)
    return denoising_ppo(env, ENVS, policy=policy, **arguments)


def rollouts(algorithm, count):
    """Latents, log-probabilities and random states of some rollouts, without updates."""
    for _ in range(count):
        _, callback = algorithm._setup_learn(1, reset_num_timesteps=False)
        assert algorithm.collect_rollouts(algorithm.env, callback, algorithm.rollout_buffer, algorithm.n_steps)
        rollout = algorithm.rollout_buffer
        yield rollout.actions.clone(), rollout.log_probs.clone(), algorithm.generator_state()


def counted_rows(algorithm):
    rows = []
    algorithm.policy.denoiser.conv_out.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    return rows


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_samples_of_a_prompt_start_from_the_noise_of_the_first(micro_pipeline_folder, parts):
    """Also where a part begins inside a group, and in later episodes; prompts are drawn as ever."""
    arguments = {"samples_per_prompt": GROUP, "prompts": "imagenet_animals"}
    plain = [micro_env(micro_pipeline_folder, ENVS, **arguments)]
    shared = [
        micro_env(micro_pipeline_folder, ENVS // parts, part=(i, parts), shared_noise=True, **arguments)
        for i in range(parts)
    ]
    starts = []
    for envs in (plain, shared):
        states = [env.reset(seed=3) for env in envs]
        for _ in range(2):
            latents = torch.cat([observation["latents"] for observation, _ in states])
            starts.append((latents, list(chain.from_iterable(info["prompt"] for _, info in states))))
            for _ in range(STEPS):
                states = [
                    (observation, info)
                    for env in envs
                    for observation, _, _, _, info in [env.step(env.observe()["latents"] * 0.9)]
                ]
    for (expected, prompts), (latents, told) in zip(starts[:2], starts[2:], strict=True):
        assert told == prompts
        for start in range(0, ENVS, GROUP):
            assert torch.equal(latents[start], expected[start])
            assert all(torch.equal(latents[start], latents[start + row]) for row in range(GROUP))
        assert not torch.equal(latents[0], latents[GROUP])


FAMILIES = {
    "stable_diffusion_2": {"guidance_scale": 3.0},
    "stable_diffusion_3": {"guidance_scale": 3.0, "lora_targets": "attention"},
    "flux_dev": {"guidance_scale": 3.5, "lora_targets": "attention"},
    "ddpm": {"guidance_scale": 1.0},
}


def shared_and_plain(name, monkeypatch):
    """Rollouts with the window in its first and in its last place, with and without what is shared."""
    model = micro_family(name)
    shared, plain = (ppo(model, FAMILIES[name], noise_window_stride=3, **WINDOW) for _ in range(2))
    monkeypatch.setattr(plain, "shared_prefix", lambda env: None)
    return zip(rollouts(shared, 2), rollouts(plain, 2), strict=True)


@pytest.mark.parametrize("name", FAMILIES)
def test_rollouts_have_the_bits_of_the_plain_way(name, monkeypatch):
    """Where the bits of a row do not depend on the number of rows: here each row is computed alone."""
    together = DiffusionPolicy.predict_output

    def one_by_one(policy, latents, timestep, conditioning, denoiser=None):
        outputs = []
        for row in range(len(latents)):
            own = slice(row, row + 1)
            alone = {key: values[own] for key, values in conditioning.items()}
            outputs.append(together(policy, latents[own], timestep[own], alone, denoiser))
        return torch.cat(outputs)

    monkeypatch.setattr(DiffusionPolicy, "predict_output", one_by_one)
    for mine, expected in shared_and_plain(name, monkeypatch):
        assert torch.equal(mine[0], expected[0])
        assert torch.equal(mine[1], expected[1])
        assert mine[2] == expected[2], "the same random numbers are drawn"


def test_rollouts_differ_by_the_rounding_of_kernels_for_fewer_rows(monkeypatch):
    """On a CPU, 2 and 8 rows of so small a UNet have other last bits; a few steps later this is still rounding."""
    for mine, expected in shared_and_plain("stable_diffusion_2", monkeypatch):
        torch.testing.assert_close(mine[0], expected[0], rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(mine[1], expected[1], rtol=1e-3, atol=1e-4)
        assert mine[2] == expected[2]


def test_denoiser_computes_a_row_for_each_prompt_until_samples_branch(micro_pipeline_folder):
    algorithm = ppo(micro_pipeline_folder, **WINDOW)
    rows = counted_rows(algorithm)
    groups, everything = 2 * ENVS // GROUP, 2 * ENVS  # doubled by guidance
    for first, _ in enumerate(rollouts(algorithm, 4)):
        assert rows == [groups] * (first + 1) + [everything] * (STEPS - first - 1)
        rows.clear()


def test_first_call_is_shared_without_a_window_in_every_batch(micro_pipeline_folder):
    algorithm = ppo(micro_pipeline_folder, n_steps=2 * STEPS)
    rows = counted_rows(algorithm)
    ((latents, _, _),) = rollouts(algorithm, 1)
    assert rows == 2 * ([2 * ENVS // GROUP] + [2 * ENVS] * (STEPS - 1))
    assert all(not torch.equal(latents[0, 0], latents[0, row]) for row in range(1, GROUP)), "they have branched"


def test_noise_that_is_not_shared_is_computed_row_by_row(micro_pipeline_folder):
    algorithm = denoising_ppo(micro_env(micro_pipeline_folder, ENVS, samples_per_prompt=GROUP), ENVS)
    rows = counted_rows(algorithm)
    list(rollouts(algorithm, 1))
    assert rows == [2 * ENVS] * STEPS


def test_samples_that_differ_although_they_must_not_are_an_error(micro_pipeline_folder):
    env = micro_env(micro_pipeline_folder, ENVS, samples_per_prompt=GROUP)
    algorithm = denoising_ppo(env, ENVS)
    env.shared_noise = True  # as if a wrapper had changed the latents
    with pytest.raises(ValueError, match="env must keep samples of a prompt the same until the first step with noise"):
        list(rollouts(algorithm, 1))


def test_noise_is_shared_by_samples_of_a_prompt_that_then_differ(micro_pipeline_folder):
    with pytest.raises(ValueError, match="samples_per_prompt must be at least 2 with shared_noise"):
        micro_env(micro_pipeline_folder, 2, shared_noise=True)
    with pytest.raises(ValueError, match="shared_noise must be True or False; got 1"):
        micro_env(micro_pipeline_folder, 2, samples_per_prompt=2, shared_noise=1)
