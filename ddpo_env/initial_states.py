"""The initial states of episodes: noise and prompts, from one random generator per sub-environment."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from gymnasium.utils import seeding
from torch import Tensor

from ddpo_env.models.protocol import DiffusionModel, abilities_of, encode, prepare
from ddpo_env.prompts.distributions import Prompt, PromptDistribution, PromptSet
from ddpo_env.prompts.images import IMAGE, describe_image

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
        shared_noise: whether those that share a prompt start from the same noise, that of the first of them.

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
        shared_noise: bool = False,
    ) -> None:
        """Seed the generators from the operating system, and let the model prepare for a finite set of prompts."""
        self.model = model
        self.prompts = prompts
        self.samples_per_prompt = samples_per_prompt
        self.first_index = first_index
        self.shared_noise = shared_noise
        pairs = [seeding.np_random() for _ in range(num_envs)]
        self.generators = [generator for generator, _ in pairs]
        self.seeds = [seed for _, seed in pairs]
        # If the part begins inside a group, the group's first sub-environment is in the part before. This generator
        # samples the same numbers as that one, so that both parts know the group's prompt.
        self._rank = first_index % samples_per_prompt
        self._leader = np.random.default_rng() if self._rank else None
        if isinstance(prompts, PromptSet):
            prepare(model, list(prompts))

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
            of_first = noise[row - 1] if leader is None else leader.standard_normal(shape, np.float32)
            is_first = (self.first_index + index) % self.samples_per_prompt == 0
            if self.shared_noise and not is_first:
                noise[row] = of_first
            if prompts is not None:
                sampled.append(prompts[index])
            elif is_first:
                sampled.append(self.prompts.sample(self.generators[index]))
            elif leader is not None:
                sampled.append(self.prompts.sample(leader))
            else:  # whole groups are sampled, so the row above belongs to the same group
                sampled.append(sampled[-1])
        initial = torch.as_tensor(noise) if latents is None else latents[torch.as_tensor(indices)]
        conditioning = encode(self.model, sampled) if sampled else {}
        return InitialState(indices, sampled, initial, conditioning)

    def info(self, prompt: Prompt) -> dict[str, Any]:
        """Return what the info of a reset says about an episode: its prompt.

        If the model takes more than the text, `context` tells prompts of the same text from each other.
        """
        text, metadata = prompt
        if not abilities_of(self.model).prompt_fields:
            return {"prompt": text}
        return {"prompt": text, "context": f"{text} [{', '.join(self._fields(text, metadata))}]"}

    def _fields(self, text: str, metadata: Mapping[str, Any]) -> Iterator[str]:
        for name in abilities_of(self.model).prompt_fields:
            value = metadata[name]
            shown = describe_image(value, f"{name} of prompt {text!r}").digest[:16] if name == IMAGE else repr(value)
            yield f"{name} {shown}"

    def encode(self, prompts: Sequence[Prompt | None], device: torch.device) -> dict[str, Tensor]:
        """Return the conditioning of prompts `(batch, ...)` on a device, and zeros for `None`."""
        shapes = self.model.conditioning_shapes
        conditioning = {name: torch.zeros((len(prompts), *shape), device=device) for name, shape in shapes.items()}
        rows = [row for row, prompt in enumerate(prompts) if prompt is not None]
        begun = [prompt for prompt in prompts if prompt is not None]
        for name, value in encode(self.model, begun).items() if rows else ():
            conditioning[name][rows] = value
        return conditioning

    def state(self, prompts: Sequence[Prompt | None]) -> dict[str, list[Any]]:
        """Return the states of the generators and the prompts of the episodes, `None` for one that has not begun."""
        begun = [prompt or (None, {}) for prompt in prompts]
        state: dict[str, list[Any]] = {
            "prompts": [text for text, _ in begun],
            "metadata": [metadata for _, metadata in begun],
            "generators": [dict(generator.bit_generator.state) for generator in self.generators],
        }
        if abilities_of(self.model).prompt_fields:
            state["contexts"] = [None if prompt is None else self.info(prompt)["context"] for prompt in prompts]
        return state

    def load_state(self, state: Mapping[str, list[Any]]) -> list[Prompt | None]:
        """Continue from a state of the whole batch, and return the prompts of this part.

        An image may lie in another folder now, if it is one of a finite set of prompts.

        Raises:
            ValueError: for an image that has changed or is gone.
        """
        states = state["generators"]
        for index, generator in enumerate(self.generators):
            generator.bit_generator.state = states[self.first_index + index]
        if self._leader is not None:
            self._leader = np.random.default_rng()
            self._leader.bit_generator.state = states[self.first_index - self._rank]
        self.seeds = [UNKNOWN_SEED] * len(self.generators)
        own = slice(self.first_index, self.first_index + len(self.generators))
        pairs = zip(state["prompts"][own], state["metadata"][own], strict=True)
        prompts = [None if text is None else (text, metadata) for text, metadata in pairs]
        if not abilities_of(self.model).prompt_fields:
            return prompts
        return [self._found(*one) for one in zip(prompts, state["contexts"][own], strict=True)]

    def _found(self, prompt: Prompt | None, context: str | None) -> Prompt | None:
        """Return a prompt of a state as it is found now."""
        if prompt is None:
            return None
        if isinstance(self.prompts, PromptSet):
            for known in self.prompts:
                if known[0] == prompt[0] and self.info(known)["context"] == context:
                    return known
        if self.info(prompt)["context"] != context:
            raise ValueError(f"state must be of prompts that are the same now; {context!r} has changed")
        return prompt
