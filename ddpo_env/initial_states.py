"""The initial states of episodes: noise and prompts, from one random generator per sub-environment."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from gymnasium.utils import seeding
from torch import Tensor

from ddpo_env.models.protocol import DiffusionModel, abilities_of
from ddpo_env.prompts.distributions import Prompt, PromptDistribution, PromptSet

UNKNOWN_SEED = -1
"""Gymnasium's mark for a generator whose seed is not known."""


class InitialState(NamedTuple):
    """What the episodes of the sub-environments `indices` start from, one row per sub-environment."""

    indices: npt.NDArray[np.intp]
    prompts: list[Prompt]
    latents: Tensor
    conditioning: dict[str, Tensor]


class InitialStates:
    """The distribution of initial states of a batch, or of one part of a larger batch.

    Args:
        model: gives the latent's shape and the prompts' conditioning.
        prompts: distribution of the prompts.
        num_envs: number of sub-environments in this part.
        samples_per_prompt: number of consecutive sub-environments that share a prompt, counted in the whole batch.
        first_index: index of this part's first sub-environment in the whole batch.

    Attributes:
        generators: one per sub-environment.
        seeds: their seeds, -1 for a seed that is not known.
    """

    def __init__(
        self,
        model: DiffusionModel,
        prompts: PromptDistribution,
        num_envs: int,
        samples_per_prompt: int = 1,
        first_index: int = 0,
    ) -> None:
        """Seed the generators from the operating system, and let the model prepare for a finite set of prompts."""
        self.model = model
        self.prompts = prompts
        self.samples_per_prompt = samples_per_prompt
        self.first_index = first_index
        pairs = [seeding.np_random() for _ in range(num_envs)]
        self.generators = [generator for generator, _ in pairs]
        self.seeds = [seed for _, seed in pairs]
        # If the part begins inside a group, the group's first sub-environment is in the part before. This generator
        # samples the same numbers as that one, so that both parts know the group's prompt.
        self._rank = first_index % samples_per_prompt
        self._leader = np.random.default_rng() if self._rank else None
        if isinstance(prompts, PromptSet):
            abilities_of(model).prepare_prompts(prompts.prompts)

    def seed(self, seeds: Sequence[int | None], mask: npt.NDArray[np.bool_]) -> None:
        """Seed the generators in `mask`; a generator whose seed is `None` goes on as it is."""
        for index, seed in enumerate(seeds):
            if seed is None or not mask[index]:
                continue
            if index == 0 and self._leader is not None:
                self._leader, _ = seeding.np_random(seed - self._rank)
            self.generators[index], self.seeds[index] = seeding.np_random(seed)

    def use_generators(self, generators: Sequence[np.random.Generator]) -> None:
        """Sample from other generators, one per sub-environment, whose seeds are not known."""
        if len(generators) != len(self.generators):
            raise ValueError(
                f"np_random must be one generator per sub-environment ({len(self.generators)}); got {len(generators)}"
            )
        self.generators = list(generators)
        self.seeds = [UNKNOWN_SEED] * len(generators)

    def sample(
        self,
        indices: npt.NDArray[np.intp],
        prompts: list[Prompt] | None = None,
        latents: Tensor | None = None,
    ) -> InitialState:
        """Sample what is not given, for sub-environments of this part: whole groups, except at the part's edges."""
        shape = self.model.latent_shape
        sampled: list[Prompt] = []
        noise = np.empty((len(indices), *shape), np.float32)
        for row, index in enumerate(indices):
            noise[row] = self.generators[index].standard_normal(shape, np.float32)
            leader = self._leader if index == 0 else None
            if leader is not None:
                leader.standard_normal(shape, np.float32)
            if prompts is not None:
                sampled.append(prompts[index])
            elif (self.first_index + index) % self.samples_per_prompt == 0:
                sampled.append(self.prompts.sample(self.generators[index]))
            elif leader is not None:
                sampled.append(self.prompts.sample(leader))
            else:  # whole groups are sampled, so the row above belongs to the same group
                sampled.append(sampled[-1])
        initial = torch.as_tensor(noise) if latents is None else latents[torch.as_tensor(indices)]
        conditioning = self.model.encode_prompts([prompt for prompt, _ in sampled]) if sampled else {}
        return InitialState(indices, sampled, initial, conditioning)

    def state(self) -> list[dict[str, Any]]:
        """Return the states of the generators."""
        return [dict(generator.bit_generator.state) for generator in self.generators]

    def load_state(self, states: Sequence[dict[str, Any]]) -> None:
        """Continue from the states of all generators of the whole batch."""
        for index, generator in enumerate(self.generators):
            generator.bit_generator.state = states[self.first_index + index]
        if self._leader is not None:
            self._leader = np.random.default_rng()
            self._leader.bit_generator.state = states[self.first_index - self._rank]
        self.seeds = [UNKNOWN_SEED] * len(self.generators)
