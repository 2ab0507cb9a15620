"""How often the host waits for the device: a few times a rollout and an update, and never in a denoising step."""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.algorithms import collected
from helpers.micro_agents import micro_env
from helpers.pretend_accelerator import Accelerator

from agents.algorithms.advantages import BatchAdvantage
from agents.algorithms.forward.dpo import DPO
from agents.algorithms.forward.nft import NFT
from agents.algorithms.policy_gradient.ppo import PPO
from agents.algorithms.policy_gradient.reinforce import REINFORCE
from agents.algorithms.rwr import RWR
from agents.policy.diffusion_policy import DiffusionPolicy
from agents.rollout.vec_env import VectorEnvAdapter
from ddpo_env.tensors import read_numbers

IN_A_ROLLOUT = 5
"""Whether the last latents and the images are finite, the images, whether latents changed on the way, the values."""
IN_AN_UPDATE = 2
"""The metrics, and the norm of the gradient; the scaler of float16 adds whether it overflowed."""
IN_TRAINING = 3
"""Once an iteration: the drift from the sampling policy, and two metrics of the optimizer and the critic."""


def algorithm(kind: Any, folder: Path, steps: int = 3, dtype: str = "float32", **arguments: Any) -> Any:
    env = micro_env(
        folder,
        4,
        num_inference_steps=steps,
        samples_per_prompt=2,
        shared_noise=arguments.pop("shared_noise", False),
        prompts=["a cat"],
        device="cuda",
        dtype=dtype,
    )
    policy = {"lora_rank": 2, "guidance_scale": 3.0} | arguments.pop("policy", {})
    settings: dict[str, Any] = {
        "n_steps": steps,
        "gamma": 1.0,
        "gae_lambda": 1.0,
        "advantage": BatchAdvantage(),
        "policy_kwargs": policy,
        "seed": 0,
        "device": "cuda",
    }
    return kind(DiffusionPolicy, VectorEnvAdapter(env), **settings | arguments)


def waits_of_training(accelerator: Accelerator, model: Any) -> Any:
    collected(model).train()
    collected(model)
    with accelerator.counted_waits() as waits:
        model.train()
    return waits


def test_several_numbers_are_read_at_once(accelerator: Accelerator) -> None:
    scalars = {"a": torch.tensor(0.1, device="cuda"), "b": torch.tensor(2.0), "c": torch.tensor(3, device="cuda")}
    with accelerator.counted_waits() as waits:
        numbers = read_numbers(scalars)
    assert numbers == {"a": scalars["a"].item(), "b": 2.0, "c": 3.0}
    assert waits.total() == 1


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_longer_episode_makes_the_host_wait_no_more_often(
    dtype: str, accelerator: Accelerator, micro_pipeline_folder: Path
) -> None:
    for steps in (2, 4):
        model = collected(algorithm(PPO, micro_pipeline_folder, steps, dtype, batch_size=4 * steps, n_epochs=1))
        with accelerator.counted_waits() as waits:
            collected(model)
        assert waits.total() <= IN_A_ROLLOUT, waits


def test_window_of_noise_and_a_shared_prefix_are_read_once_a_rollout(
    accelerator: Accelerator, micro_pipeline_folder: Path
) -> None:
    for steps in (3, 5):
        sizes = {"batch_size": 8, "n_epochs": 1, "noise_window": 2}
        model = collected(algorithm(PPO, micro_pipeline_folder, steps, shared_noise=True, **sizes))
        with accelerator.counted_waits() as waits:
            collected(model)
        assert waits.total() <= IN_A_ROLLOUT + 2, waits


@pytest.mark.parametrize(
    ("options", "in_an_update"),
    [
        pytest.param({}, IN_AN_UPDATE, marks=pytest.mark.slow),
        pytest.param({"kl_coef": 0.1, "ema_decay": 0.9}, IN_AN_UPDATE, marks=pytest.mark.slow),
        ({"policy": {"autocast": "float16"}}, IN_AN_UPDATE + 1),
    ],
    ids=["plain", "reference", "float16"],
)
def test_update_makes_the_host_wait_twice(
    options: dict[str, Any], in_an_update: int, accelerator: Accelerator, micro_pipeline_folder: Path
) -> None:
    for updates in (1, 2):
        model = algorithm(PPO, micro_pipeline_folder, 2, batch_size=8 // updates, n_epochs=1, **options)
        waits = waits_of_training(accelerator, model)
        recomputed = waits.pop("TensorOnPolicyAlgorithm._recompute_log_probs", 0)
        assert recomputed <= 1
        assert waits.total() <= in_an_update * updates + IN_TRAINING, waits


@pytest.mark.slow
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("kind", [PPO, REINFORCE, RWR, NFT, DPO])
def test_more_calls_in_an_update_make_the_host_wait_no_more_often(
    kind: Any, recompute: bool, accelerator: Accelerator, micro_pipeline_folder: Path
) -> None:
    own: dict[Any, dict[str, Any]] = {PPO: {"batch_size": 12, "n_epochs": 1}, RWR: {"n_epochs": 1}}
    epochs = own.get(kind, {})
    counts = [
        waits_of_training(
            accelerator,
            algorithm(kind, micro_pipeline_folder, micro_batch_size=size, recompute_log_probs=recompute, **epochs),
        )
        for size in (12, 3)
    ]
    assert counts[0] == counts[1]
    assert counts[0].total() > 0
