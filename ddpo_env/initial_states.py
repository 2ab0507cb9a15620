"""What new episodes of a batch start from: noise and prompts, drawn by the slots' own generators."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ddpo_env.models.loading import DiffusionModel
from ddpo_env.prompts.distributions import Prompt, PromptDistribution, PromptSet


class Start(NamedTuple):
    """What the episodes of `slots` start from, one row a slot."""

    slots: npt.NDArray[np.intp]
    prompts: list[Prompt]
    latents: Tensor
    conditioning: dict[str, Tensor]


@dataclass
class Starts:
    """Draws starts for the slots of a batch, or of a part of one.

    Attributes:
        model: for the latent's shape and the prompts' conditioning.
        prompts: the distribution.
        samples_per_prompt: how many slots in a row share a prompt, counted in the whole batch.
        first_slot: of this part in the whole batch.
        leader: where the part begins in the middle of a group, a twin of the generator of the group's first slot, which
            is in the part before: it draws what that one draws, so that both know the prompt. Else `None`.
    """

    model: DiffusionModel
    prompts: PromptDistribution
    samples_per_prompt: int
    first_slot: int
    leader: np.random.Generator | None = None

    def __post_init__(self) -> None:
        if isinstance(self.prompts, PromptSet) and hasattr(self.model, "prepare_prompts"):
            self.model.prepare_prompts(self.prompts.prompts)
        if self.rank:
            self.leader = np.random.default_rng()

    @property
    def rank(self) -> int:
        """Which of its group the part's first slot is."""
        return self.first_slot % self.samples_per_prompt

    def draw(
        self,
        slots: npt.NDArray[np.intp],
        generators: list[np.random.Generator],
        prompts: list[Prompt] | None = None,
        latents: Tensor | None = None,
    ) -> Start:
        """Draw what is not given, for `slots` of this part: whole groups, save at its edges."""
        shape = self.model.latent_shape
        drawn: list[Prompt] = []
        noise = np.empty((len(slots), *shape), np.float32)
        for row, slot in enumerate(slots):
            noise[row] = generators[slot].standard_normal(shape, np.float32)
            if slot == 0 and self.leader is not None:
                self.leader.standard_normal(shape, np.float32)
            if prompts is not None:
                drawn.append(prompts[slot])
            elif (self.first_slot + slot) % self.samples_per_prompt == 0:
                drawn.append(self.prompts.sample(generators[slot]))
            elif slot == 0 and self.leader is not None:
                drawn.append(self.prompts.sample(self.leader))
            else:  # groups begin together, so the row above is of the same group
                drawn.append(drawn[-1])
        initial = torch.as_tensor(noise) if latents is None else latents[torch.as_tensor(slots)]
        return Start(slots, drawn, initial, self.model.encode_prompts([p for p, _ in drawn]) if drawn else {})
