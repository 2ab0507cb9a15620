"""The random generators of one algorithm: rewards, callbacks and other algorithms cannot draw from them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor


class Generators:
    """Every random number of an algorithm: transitions and timesteps from NumPy, a policy's noise from torch.

    A Stable-Baselines3 policy samples from torch's global generators, as does dropout. So the algorithm has states of
    its own for these too, and `as_global` puts them in place while it calls the policy.

    Args:
        seed: of all of them; `None`: the operating system's entropy.
        device: of the policy.

    Attributes:
        numpy: chooses transitions and timesteps.
        noise: the noise of a policy that declares its `PolicyAbilities`, on the policy's device.
    """

    def __init__(self, seed: int | None, device: torch.device) -> None:
        self.device = device
        self.seed(seed)

    def seed(self, seed: int | None) -> None:
        """Begin anew, from a seed or from the operating system's entropy."""
        order, noise, other = np.random.SeedSequence(seed, spawn_key=(1,)).spawn(3)
        self.numpy = np.random.default_rng(order)
        self.noise = torch.Generator(self.device).manual_seed(_integer(noise))
        self._global = [
            torch.Generator(one).manual_seed(_integer(other) if seed is None else seed).get_state()
            for one in self._devices()
        ]

    @contextmanager
    def as_global(self) -> Iterator[None]:
        """Put this algorithm's states in the place of torch's global generators inside the block."""
        outside = self._global_states()
        self._set_global_states(self._global)
        try:
            yield
        finally:
            self._global = self._global_states()
            self._set_global_states(outside)

    def state(self) -> dict[str, Any]:
        """Return the states as plain values, for a checkpoint."""
        return {
            "device": self.device.type,
            "numpy": dict(self.numpy.bit_generator.state),
            "noise": _as_text(self.noise.get_state()),
            "global": [_as_text(state) for state in self._global],
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore what `state` returned; on another type of device, torch's generators are seeded anew from NumPy's."""
        self.numpy.bit_generator.state = state["numpy"]
        if state["device"] == self.device.type:
            self.noise.set_state(_as_tensor(state["noise"]))
            self._global = [_as_tensor(one) for one in state["global"]]
            return
        seeds = self.numpy.integers(2**63, size=2).tolist()
        self.noise.manual_seed(seeds[0])
        self._global = [torch.Generator(one).manual_seed(seeds[1]).get_state() for one in self._devices()]

    def _devices(self) -> list[torch.device]:
        cpu = torch.device("cpu")
        return [cpu] if self.device.type == "cpu" else [cpu, self.device]

    def _global_states(self) -> list[Tensor]:
        states = [torch.get_rng_state()]
        if self.device.type != "cpu":
            states.append(torch.get_device_module(self.device).get_rng_state(self.device))
        return states

    def _set_global_states(self, states: list[Tensor]) -> None:
        torch.set_rng_state(states[0])
        if self.device.type != "cpu":
            torch.get_device_module(self.device).set_rng_state(states[1], self.device)


def _integer(sequence: np.random.SeedSequence) -> int:
    return int(sequence.generate_state(1, np.uint64)[0] >> np.uint64(1))


def _as_text(state: Tensor) -> str:
    return state.numpy().tobytes().hex()


def _as_tensor(text: str) -> Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)
