"""The rollout on the device: what is rebuilt from it is what the policy saw, and each latent is stored once."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from gymnasium import spaces
from helpers.micro_agents import STEPS, micro_env

from agents.algorithms.policy_gradient.ppo import PPO
from agents.policy.diffusion_policy import DiffusionPolicy
from agents.rollout.buffer import TensorRolloutBuffer
from agents.rollout.vec_env import VectorEnvAdapter
from ddpo_env.spaces import DenoisingObservationSpace, latent_box

ENVS = 3


def watched_ppo(folder, n_steps, backend="torch"):
    """PPO over the micro model, and a list that receives every observation that its policy acts on."""
    env = VectorEnvAdapter(micro_env(folder, ENVS, backend=backend))
    model = PPO(
        DiffusionPolicy,
        env,
        n_steps=n_steps,
        batch_size=6,
        n_epochs=1,
        advantage=lambda rollout: torch.as_tensor(rollout.rewards),  # takes parts of episodes too
        policy_kwargs={"lora_rank": 1, "guidance_scale": 1.0},
        seed=0,
        device="cpu",
    )
    seen = []
    model.policy.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model.callback = model._setup_learn(1)[1]
    return model, seen


def collect(model):
    assert model.collect_rollouts(model.env, model.callback, model.rollout_buffer, model.n_steps)


def assert_rebuilt(buffer, seen):
    """Every transition of the buffer has the observation that the policy had, bit for bit, in any order."""
    assert len(seen) == buffer.buffer_size
    indices = np.random.default_rng(0).permutation(buffer.buffer_size * ENVS)
    rebuilt = buffer[indices].observations
    for name in seen[0]:
        expected = torch.stack([observation[name] for observation in seen]).flatten(0, 1)[indices]
        assert torch.equal(rebuilt[name], expected), name


@pytest.mark.parametrize("backend", ["torch", "numpy"])
def test_observations_are_those_the_policy_saw_over_two_episodes(micro_pipeline_folder, backend):
    model, seen = watched_ppo(micro_pipeline_folder, 2 * STEPS, backend)
    for _ in range(2):
        seen.clear()
        collect(model)
        assert_rebuilt(model.rollout_buffer, seen)
    assert len(model.rollout_buffer.contexts) == 2 * ENVS
    assert model.rollout_buffer.complete_segments().all()


def test_observations_are_those_the_policy_saw_in_rollouts_that_cut_episodes(micro_pipeline_folder):
    model, seen = watched_ppo(micro_pipeline_folder, STEPS + 2)
    cut = []
    for _ in range(3):
        seen.clear()
        collect(model)
        assert_rebuilt(model.rollout_buffer, seen)
        cut.append(model.rollout_buffer.complete_segments().reshape(-1, ENVS).all(1).tolist())
    # 7 steps a rollout, 5 an episode: |5|2 then 3|4 then 1|5|1
    assert cut == [[True, False], [False, False], [False, True, False]]


def test_actions_and_scores_are_those_of_their_observations(micro_pipeline_folder):
    model, _ = watched_ppo(micro_pipeline_folder, 2 * STEPS)
    collect(model)
    batch = model.rollout_buffer[np.arange(4, 10)]
    with torch.no_grad():
        _, log_prob, _ = model.policy.evaluate_actions(batch.observations, batch.actions)
    torch.testing.assert_close(log_prob, batch.log_probs, rtol=0, atol=1e-5)


def staggered(buffer, starts):
    """Fill a denoising buffer with numbers that tell step and sub-environment; `starts` says where episodes begin."""
    steps, num_envs = starts.shape
    latents = torch.zeros(num_envs, 1)
    seen = []
    for step in range(steps):
        begins = torch.as_tensor(starts[step])[:, None]
        fresh = 1000.0 + 10 * step + torch.arange(num_envs)[:, None]
        latents = torch.where(begins, fresh, latents)
        conditioning = fresh if step == 0 else torch.where(begins, fresh, seen[-1]["prompt_embeds"])
        seen.append(
            {"latents": latents, "timestep": torch.full((num_envs, 1), float(step)), "prompt_embeds": conditioning}
        )
        latents = 10.0 * step + torch.arange(num_envs)[:, None]
        contexts = [f"{step}/{index}" for index in range(num_envs)]
        zeros = torch.zeros(num_envs)
        buffer.add(seen[-1], latents, np.full(num_envs, step), starts[step], zeros, zeros, contexts)
    buffer.finish(torch.zeros(num_envs), np.array([True, False, True])[:num_envs])
    return seen


def denoising_space(latents=(1,), conditioning=(1,), steps=4):
    model = SimpleNamespace(
        latent_shape=latents,
        conditioning_shapes={"prompt_embeds": conditioning},
        scheduler=SimpleNamespace(config=SimpleNamespace(num_train_timesteps=1000)),
        source="none",
        denoiser=torch.nn.Linear(1, 1),
        encode_prompts=None,
        decode=None,
    )
    return DenoisingObservationSpace(model, steps)


def test_episodes_out_of_step_with_each_other_are_told_apart():
    starts = np.array([[1, 1, 0], [0, 0, 1], [1, 0, 0], [0, 1, 0], [0, 0, 1]], dtype=bool)
    buffer = TensorRolloutBuffer(5, denoising_space(), latent_box((1,)), "cpu", n_envs=3)
    seen = staggered(buffer, starts)
    assert_rebuilt(buffer, seen)
    assert buffer.contexts == ["0/0", "0/1", "0/2", "1/2", "2/0", "3/1", "4/2"]
    assert buffer.segments.T.tolist() == [[0, 0, 4, 4, 4], [1, 1, 1, 5, 5], [2, 3, 3, 3, 6]]
    np.testing.assert_array_equal(buffer.segment_returns(), [1, 3, 0, 6, 9, 7, 4])
    assert buffer.complete_segments().tolist() == [True, True, False, True, True, False, True]
    per_step = buffer.per_step(np.arange(7.0))
    assert torch.equal(per_step, torch.as_tensor(buffer.segments, dtype=torch.float32))


def filled(steps, num_envs, latents, conditioning, device):
    """A denoising buffer after one episode per sub-environment; on the meta device tensors have sizes and no memory."""
    buffer = TensorRolloutBuffer(
        steps, denoising_space(latents, conditioning, steps), latent_box(latents), device, n_envs=num_envs
    )
    observation = {
        "latents": torch.zeros((num_envs, *latents), device=device),
        "timestep": torch.zeros((num_envs, 1), device=device),
        "prompt_embeds": torch.zeros((num_envs, *conditioning), device=device),
    }
    actions, zeros = torch.zeros((num_envs, *latents), device=device), torch.zeros(num_envs, device=device)
    for step in range(steps):
        starts = np.full(num_envs, step == 0)
        buffer.add(observation, actions, np.zeros(num_envs), starts, zeros, zeros, ["a cat"] * num_envs)
    buffer.finish(zeros, np.ones(num_envs, bool))
    return buffer


def tensor_bytes(holder):
    """Bytes of every tensor and array that an object refers to, found without asking the object."""
    if isinstance(holder, torch.Tensor | np.ndarray):
        return holder.nbytes
    if isinstance(holder, dict):
        return sum(tensor_bytes(value) for value in holder.values())
    if isinstance(holder, list):
        return sum(tensor_bytes(value) for value in holder)
    return 0


def test_trajectory_is_stored_as_t_plus_1_latents_and_one_conditioning():
    steps, num_envs, latents, conditioning = 6, 5, (4, 8, 8), (7, 16)
    buffer = filled(steps, num_envs, latents, conditioning, "cpu")
    numbers = num_envs * ((steps + 1) * 256 + 7 * 16)
    # Besides: timestep, value, log-probability, advantage, return and reward (4 bytes each), start flag (1), whether
    # it is scored (1), and the number of the segment (8).
    small = num_envs * steps * (6 * 4 + 1 + 1 + 8)
    assert buffer.nbytes == 4 * numbers + small
    assert tensor_bytes(vars(buffer)) - buffer.nbytes <= num_envs * (4 + 1), "last values and flags alone are uncounted"


def test_stable_diffusion_rollout_of_256_episodes_and_50_steps_is_below_1_gib():
    shapes = (4, 64, 64), (77, 768)
    buffer = filled(50, 256, *shapes, "meta")
    assert buffer.nbytes == filled_bytes(50, 256, *shapes)
    assert filled(3, 2, (4, 8, 8), (7, 16), "cpu").nbytes == filled_bytes(3, 2, (4, 8, 8), (7, 16))
    assert buffer.nbytes <= 2**30
    assert buffer.nbytes / 2**30 == pytest.approx(0.854, abs=0.001)


def filled_bytes(steps, num_envs, latents, conditioning):
    return num_envs * (4 * ((steps + 1) * np.prod(latents) + np.prod(conditioning)) + 34 * steps)


BOX = spaces.Box(-1, 1, (2, 3), np.float32)
PIXELS = spaces.Box(0, 255, (5, 4, 4), np.uint8)


@pytest.mark.parametrize(
    ("observation_space", "dtype"),
    [
        (BOX, torch.float32),
        (spaces.Box(-1, 1, (3,), np.float64), torch.float32),
        (PIXELS, torch.uint8),
        (spaces.Discrete(7), torch.int64),
        (spaces.MultiBinary(4), torch.int8),
        (spaces.MultiDiscrete([3, 4]), torch.int64),
        (spaces.Dict({"box": BOX, "state": spaces.Discrete(5), "pixels": PIXELS}), None),
    ],
)
@pytest.mark.parametrize("action_space", [spaces.Discrete(4), BOX, spaces.MultiDiscrete([2, 3])])
def test_other_spaces_are_stored_as_they_are(observation_space, dtype, action_space):
    steps = 4
    buffer = TensorRolloutBuffer(steps, observation_space, action_space, "cpu", n_envs=ENVS)
    batch = spaces.Dict({"": observation_space}) if dtype else observation_space
    stored: dict[str, list[np.ndarray]] = {name: [] for name in batch.spaces}
    actions = []
    for _ in range(steps):
        samples = [batch.sample() for _ in range(ENVS)]
        observation = {name: np.stack([sample[name] for sample in samples]) for name in batch.spaces}
        action = np.stack([action_space.sample() for _ in range(ENVS)])
        for name, values in observation.items():
            stored[name].append(values)
        actions.append(action)
        tensors = {name: torch.as_tensor(values) for name, values in observation.items()}
        zeros = torch.zeros(ENVS)
        given = tensors[""] if dtype else tensors
        buffer.add(given, torch.as_tensor(action), np.zeros(ENVS), np.zeros(ENVS, bool), zeros, zeros, [None] * ENVS)
    buffer.finish(torch.zeros(ENVS), np.zeros(ENVS, bool))
    chosen = np.array([7, 0, 11])
    result = buffer[chosen]
    parts = {"": result.observations} if dtype else result.observations
    for name, values in stored.items():
        expected = np.concatenate(values)[chosen]
        np.testing.assert_allclose(parts[name].numpy().reshape(expected.shape), expected, rtol=1e-6)
    if dtype:
        assert result.observations.dtype == dtype
    np.testing.assert_array_equal(result.actions.numpy(), np.concatenate(actions)[chosen])


def test_full_buffer_takes_no_more_steps():
    buffer = filled(2, 1, (1,), (1,), "cpu")
    zeros = torch.zeros(1)
    with pytest.raises(ValueError, match=r"buffer_size=2 steps are stored already: call reset\(\) first"):
        buffer.add({}, zeros, np.zeros(1), np.zeros(1, bool), zeros, zeros, [None])
    buffer.reset()
    assert buffer.contexts == []
    assert not buffer.full


def test_nested_dictionaries_are_refused():
    nested = spaces.Dict({"outer": spaces.Dict({"inner": BOX})})
    with pytest.raises(ValueError, match="observation_space must not nest dictionaries"):
        TensorRolloutBuffer(2, nested, BOX, "cpu")
