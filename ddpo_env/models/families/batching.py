"""How many rows one call of a pipeline may have: a batch, rows of one timestep, or one row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from ddpo_env.models.families.parity import differs
from ddpo_env.models.protocol import Conditioning

Batching: TypeAlias = Literal["any", "timestep", "row"]
"""A call takes any rows, rows of one timestep, or one row."""
Call: TypeAlias = Callable[[Tensor, Tensor, Conditioning], Tensor]
"""Latents `(batch, ...)`, timesteps `(batch,)` or one timestep `()`, conditioning → output `(batch, ...)`."""


@torch.no_grad()
def find_batching(call: Call, latents: Tensor, timestep: Tensor, conditioning: Conditioning) -> Batching:
    """Return what a pipeline takes, found by comparing batches with single rows.

    Args:
        call: of the pipeline.
        latents: `(1, ...)`.
        timestep: `()`.
        conditioning: of one row.
    """
    earlier, other = (timestep / 2).to(timestep.dtype), -latents
    first = call(latents, timestep, conditioning)
    second = {"any": call(other, earlier, conditioning), "timestep": call(other, timestep, conditioning)}
    times = {"any": torch.stack([timestep, earlier]), "timestep": timestep}
    two = {name: value.repeat(2, *[1] * (value.ndim - 1)) for name, value in conditioning.items()}
    for batching in ("any", "timestep"):
        try:
            output = call(torch.cat([latents, other]), times[batching], two)
        except torch.OutOfMemoryError:
            raise
        except Exception:  # of any kind: a pipeline refuses in its own words
            continue
        if differs(output, torch.cat([first, second[batching]]), output.dtype) is None:
            return batching
    return "row"


def in_batches(call: Call, batching: Batching, latents: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
    """Return the output for rows of any timesteps, `(batch,)`, in calls that the pipeline takes."""
    if batching == "any":
        return call(latents, timestep, conditioning)
    if batching == "timestep":
        groups = [torch.nonzero(timestep == value)[:, 0] for value in timestep.unique()]
    else:
        groups = list(torch.arange(len(latents), device=latents.device).split(1))
    outputs = [
        call(
            latents[rows],
            timestep[rows[0]],
            {name: value[rows.to(value.device)] for name, value in conditioning.items()},
        )
        for rows in groups
    ]
    return torch.cat(outputs)[torch.cat(groups).argsort()]
