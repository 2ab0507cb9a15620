"""What tests of sampler tables start from: Stable Diffusion's schedule, and random latents."""

import torch

STABLE_DIFFUSION = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
    "set_alpha_to_one": False,
    "clip_sample": False,
}
SHAPE = (4, 8, 8)


def normals(seed, count, batch=1, shape=SHAPE):
    """`count` tensors `(batch, *shape)` of standard normal numbers."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, *shape, generator=generator) for _ in range(count)]
