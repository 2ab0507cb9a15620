"""Where the host waits for the device: once a rollout and once an update, and not at every step or call.

On a CPU nobody waits, but the operations that would make an accelerator's host wait are the same: reading a tensor's
values, and copying an array from the host. They are counted here; `training/test_cuda.py` asks the device itself.
"""

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.algorithms import collected
from helpers.micro_agents import micro_env
from helpers.paths import ROOT
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from agents.algorithms.advantages import BatchAdvantage
from agents.algorithms.ppo import PPO
from agents.algorithms.reinforce import REINFORCE
from agents.algorithms.rwr import RWR
from agents.policy.diffusion_policy import DiffusionPolicy
from agents.rollout.buffer import TensorRolloutBuffer
from agents.rollout.vec_env import VectorEnvAdapter

READING = {"_local_scalar_dense", "equal", "is_nonzero", "item", "masked_select", "nonzero", "_unique2", "unique_dim"}
"""Operations of ATen whose result is on the host, or has a size that depends on values."""
PACKAGES = tuple(ROOT / name for name in ("agents", "ddpo_env", "rewards"))
ONLY_ON_A_CPU = {"GaussianSampler.step_index_of", "DenoisingVectorEnv._check_actions"}
"""They look at values where that costs nothing, and say so in their code."""


class HostWaits(TorchDispatchMode):
    """Counts, by the function of this project, what would make the host wait for an accelerator."""

    def __init__(self) -> None:
        super().__init__()
        self.places: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        by_mask = name.startswith("index") and any(
            isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8)
            for indices in args[1:]
            if isinstance(indices, list | tuple)
            for index in indices
        )
        if name in READING or by_mask:
            self.note()
        return func(*args, **(kwargs or {}))

    def note(self) -> None:
        frame: Any = sys._getframe(1)
        while frame is not None:
            code = frame.f_code
            if any(package in Path(code.co_filename).parents for package in PACKAGES):
                if code.co_qualname not in ONLY_ON_A_CPU:
                    self.places[code.co_qualname] += 1
                return
            frame = frame.f_back


def copies_and_waits(data: Any, *args: Any, device: Any = None, **kwargs: Any) -> bool:
    """A copy from the host without a word: the host waits until the device has done all that came before."""
    return not isinstance(data, Tensor) and device is not None


def moves_and_waits(tensor: Tensor, *args: Any, device: Any = None, non_blocking: bool = False, **kwargs: Any) -> bool:
    place = device if device is not None else next((one for one in args if isinstance(one, torch.device | str)), None)
    return getattr(tensor, "is_on_host", False) and place is not None and not non_blocking


@contextmanager
def counting_waits() -> Iterator[Counter[str]]:
    waits = HostWaits()

    def counted(function: Any, waiting: Any) -> Any:
        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            if waiting(*args, **kwargs):
                waits.note()
            result = function(*args, **kwargs)
            if isinstance(args[0], np.ndarray) and isinstance(result, Tensor):
                result.is_on_host = kwargs.get("device") is None  # type: ignore[attr-defined]
            return result

        return call

    with pytest.MonkeyPatch.context() as patch, waits:
        for name in ("cpu", "numpy", "tolist"):
            patch.setattr(Tensor, name, counted(getattr(Tensor, name), lambda *args, **kwargs: True))
        for name in ("as_tensor", "tensor"):
            patch.setattr(torch, name, counted(getattr(torch, name), copies_and_waits))
        patch.setattr(Tensor, "to", counted(Tensor.to, moves_and_waits))
        yield waits.places


def algorithm(kind: Any, folder: Path, steps: int, **arguments: Any) -> Any:
    env = micro_env(folder, 4, num_inference_steps=steps, samples_per_prompt=2, prompts=["a cat"])
    settings: dict[str, Any] = {
        "n_steps": steps,
        "gamma": 1.0,
        "gae_lambda": 1.0,
        "advantage": BatchAdvantage(),
        "policy_kwargs": {"lora_rank": 2, "guidance_scale": 3.0},
        "seed": 0,
        "device": "cpu",
    }
    return kind(DiffusionPolicy, VectorEnvAdapter(env), **settings | arguments)


def test_reading_a_value_is_counted() -> None:
    buffer = TensorRolloutBuffer.__new__(TensorRolloutBuffer)
    buffer.last_dones, buffer.last_values = np.zeros(2, np.bool_), torch.zeros(2)
    buffer.rewards = buffer.episode_starts = np.zeros((1, 2), np.float32)
    buffer.buffer_size, buffer.gamma, buffer.device = 1, 1.0, torch.device("cpu")
    with counting_waits() as places:
        buffer.set_monte_carlo_returns()
    name = "TensorRolloutBuffer.set_monte_carlo_returns"
    assert places == {name: 3}, "the values come to the host, as an array, and the returns go to the device"
    waits = HostWaits()
    waits.note = lambda: waits.places.update(["counted"])  # type: ignore[method-assign]
    values = torch.arange(4.0)
    with waits:
        for reading in (
            lambda: bool(values.any()),
            lambda: float(values[0]),
            lambda: values[values > 1],
            lambda: torch.where(values > 1),
            lambda: values.unique(),
            lambda: torch.equal(values, values),
            lambda: values.__setitem__(values > 1, torch.ones(2)),
        ):
            before = waits.places["counted"]
            reading()
            assert waits.places["counted"] > before
        before = waits.places["counted"]
        _ = values[torch.tensor([0, 1])] + values.sum() * torch.where(values > 1, values, 0.0).max()
        assert waits.places["counted"] == before


def test_a_longer_episode_makes_the_host_wait_no_more_often(micro_pipeline_folder: Path) -> None:
    counts = []
    for steps in (3, 8):
        model = collected(algorithm(PPO, micro_pipeline_folder, steps, batch_size=4 * steps, n_epochs=1))
        with counting_waits() as places:
            collected(model)
        counts.append(places)
    assert counts[0] == counts[1]
    assert 0 < counts[0].total() < 25


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("kind", [PPO, REINFORCE, RWR])
def test_more_calls_in_an_update_make_the_host_wait_no_more_often(
    kind: Any, recompute: bool, micro_pipeline_folder: Path
) -> None:
    counts = []
    for size in (12, 2):
        arguments = {"batch_size": 12, "n_epochs": 1} if kind is PPO else {"n_epochs": 1} if kind is RWR else {}
        model = algorithm(
            kind, micro_pipeline_folder, 3, micro_batch_size=size, recompute_log_probs=recompute, **arguments
        )
        collected(model).train()
        collected(model)
        with counting_waits() as places:
            model.train()
        counts.append(places)
    assert counts[0] == counts[1]
    assert counts[0].total() > 0
