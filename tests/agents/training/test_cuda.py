"""What only a GPU can show: how often the host waits for it, how much of its memory is used, and that training works.

    pytest -m gpu tests/agents/training/test_cuda.py

The tests of `agents/accelerator` run the same paths on a pretend device, on every machine.
"""

import gc
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.algorithms import collected, logged
from helpers.micro_agents import STEPS, micro_env, micro_policy, weights

from agents.algorithms.advantages import BatchAdvantage
from agents.algorithms.policy_gradient.ppo import PPO
from agents.distributed import Maximum
from agents.policy.diffusion_policy import DiffusionPolicy
from agents.rollout.vec_env import VectorEnvAdapter
from ddpo_env.models.loading import load_model, unload_models
from ddpo_env.tensors import copied_to

DEVICE = "cuda"
TEXT_ENCODER_WEIGHTS = 123_060_480
"""Of Stable Diffusion 1.4."""

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and torch finds none"),
]


@contextmanager
def waiting_is_an_error() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def waits_of(work: Callable[[], Any]) -> Counter[str]:
    """Count, by the line of Python, how often the host waits for the device meanwhile."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            work()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    messages = [one for one in caught if "called a synchronizing CUDA operation" in str(one.message)]
    return Counter(f"{Path(one.filename).name}:{one.lineno}" for one in messages)


def cuda_ppo(model: Any, steps: int = STEPS, num_envs: int = 4, dtype: str = "auto", **arguments: Any) -> PPO:
    env = micro_env(model, num_envs, num_inference_steps=steps, device=DEVICE, dtype=dtype, prompts=["a cat"])
    settings: dict[str, Any] = {
        "n_steps": steps,
        "batch_size": num_envs * steps,
        "n_epochs": 1,
        "gamma": 1.0,
        "gae_lambda": 1.0,
        "clip_range": 1e-2,
        "learning_rate": 1e-3,
        "advantage": BatchAdvantage(),
        "policy_kwargs": {"lora_rank": 4, "lora_targets": "attention", "guidance_scale": 5.0},
        "seed": 0,
        "device": DEVICE,
    }
    return PPO(DiffusionPolicy, VectorEnvAdapter(env), **settings | arguments)


def test_waiting_is_seen() -> None:
    value = torch.ones((), device=DEVICE)
    assert waits_of(lambda: float(value)).total() == 1
    assert waits_of(lambda: torch.as_tensor(np.ones(3), device=DEVICE)).total() == 1
    assert waits_of(lambda: copied_to(np.ones(3), DEVICE) * value).total() == 0
    with waiting_is_an_error(), pytest.raises(RuntimeError, match="synchronizing"):
        value.item()


def test_copy_that_does_not_wait_has_taken_the_array_over() -> None:
    values = np.arange(1_000_000, dtype=np.float64)
    expected = values.copy()
    torch.cuda._sleep(100_000_000)  # cycles: the device is busy while the array is changed
    copied = copied_to(values, DEVICE)
    values[:] = -1
    np.testing.assert_array_equal(copied.cpu().numpy(), expected)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_step_within_an_episode_never_waits(micro_pipeline_folder: Path, dtype: str) -> None:
    env = micro_env(micro_pipeline_folder, 4, device=DEVICE, dtype=dtype)
    policy = micro_policy(env)
    observation, _ = env.reset(seed=0)
    with torch.no_grad(), policy.sampling_weights():
        observation, *_ = env.step(policy(observation)[0])  # the sampler's table moves to the device
        with waiting_is_an_error():
            for _ in range(STEPS - 2):
                observation, *_ = env.step(policy(observation)[0])
        *_, infos = env.step(policy(observation)[0])
    assert "final_info" in infos, "the last step, which decodes, was outside"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_are_added_up_without_waiting(micro_pipeline_folder: Path, dtype: str) -> None:
    model = cuda_ppo(micro_pipeline_folder, dtype=dtype, micro_batch_size=3)
    collected(model).train()
    collected(model)
    indices = model.select_steps()
    model.policy.set_training_mode(True)
    model.policy.optimizer.zero_grad()
    with waiting_is_an_error():
        metrics = model._accumulate(indices)
    gradients = [parameter.grad for parameter in model.policy.parameters() if parameter.requires_grad]
    assert all(gradient is not None and bool(torch.isfinite(gradient).all()) for gradient in gradients)
    values = [one.value if isinstance(one, Maximum) else one for one in metrics.values()]
    assert np.isfinite([float(value) for value in values]).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_iteration_waits_as_often_whatever_its_length(micro_pipeline_folder: Path, dtype: str) -> None:
    counts = []
    for steps, micro_batch_size in ((4, 16), (8, 4)):
        model = cuda_ppo(micro_pipeline_folder, steps, dtype=dtype, micro_batch_size=micro_batch_size)
        for _ in range(2):
            collected(model).train()
        counts.append(waits_of(lambda model=model: collected(model).train()))  # type: ignore[misc]
    assert counts[0] == counts[1]
    assert 0 < counts[0].total() <= 60, counts[0]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_training_is_on_policy_at_first_and_finite(micro_pipeline_folder: Path, dtype: str) -> None:
    model = cuda_ppo(micro_pipeline_folder, dtype=dtype, micro_batch_size=7)
    before = weights(model.policy)  # type: ignore[arg-type]
    for _ in range(3):
        collected(model).train()
        assert 0 <= logged(model)["train/ratio_deviation"] < 1e-3
        assert logged(model)["train/grad_norm"] > 0
    after = weights(model.policy)  # type: ignore[arg-type]
    assert {value.device.type for value in after.values()} == {torch.device(DEVICE).type}
    assert all(bool(torch.isfinite(value).all()) for value in after.values())
    assert sum(not torch.equal(after[name], before[name]) for name in after) > len(after) / 2


def free_memory() -> None:
    unload_models()
    gc.collect()
    torch.cuda.empty_cache()


@pytest.fixture
def nothing_else_in_memory() -> Iterator[None]:
    free_memory()
    yield
    free_memory()


@pytest.mark.usefixtures("nothing_else_in_memory")
def test_text_encoder_is_in_memory_while_it_encodes_alone() -> None:
    model = load_model("sd14-random", DEVICE, "bfloat16")
    away = torch.cuda.memory_allocated()
    load_model("sd14-random", DEVICE, "bfloat16", offload_text_encoder=False)
    assert torch.cuda.memory_allocated() - away == pytest.approx(2 * TEXT_ENCODER_WEIGHTS, rel=0.02)
    expected = model.encode_prompts(["a cat"])["prompt_embeds"]
    load_model("sd14-random", DEVICE, "bfloat16", offload_text_encoder=True)
    assert torch.cuda.memory_allocated() - away == pytest.approx(0, abs=10e6)
    torch.cuda.reset_peak_memory_stats()
    model._encoded.clear()  # type: ignore[attr-defined]
    torch.testing.assert_close(model.encode_prompts(["a cat"])["prompt_embeds"], expected, rtol=0, atol=1e-2)
    assert torch.cuda.max_memory_allocated() - away > 2 * TEXT_ENCODER_WEIGHTS * 0.98
    assert torch.cuda.memory_allocated() - away == pytest.approx(0, abs=10e6)


@pytest.mark.usefixtures("nothing_else_in_memory")
@pytest.mark.timeout(900)
def test_iteration_of_stable_diffusion_1_4_at_512_pixels_needs_less_than_6_gb() -> None:
    peaks = []
    for checkpointing in (False, True):
        policy = {"lora_rank": 4, "lora_targets": "attention", "guidance_scale": 5.0}
        policy["gradient_checkpointing"] = checkpointing
        model = cuda_ppo(
            "sd14-random", 3, num_envs=1, dtype="bfloat16", n_steps=6, batch_size=6, micro_batch_size=1,
            policy_kwargs=policy,
        )  # fmt: skip
        assert model.policy.model.latent_shape == (4, 64, 64)  # type: ignore[union-attr]
        gc.collect()
        torch.cuda.reset_peak_memory_stats()
        collected(model).train()
        peaks.append(torch.cuda.max_memory_allocated())
        assert logged(model)["train/ratio_deviation"] < 1e-3
        del model
    print(f"peaks: {peaks[0] / 1e9:.2f} GB, with gradient checkpointing {peaks[1] / 1e9:.2f} GB")
    assert peaks[0] < 6e9
    assert peaks[1] < peaks[0]
