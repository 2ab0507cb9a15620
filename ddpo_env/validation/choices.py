"""What settings can choose, for the parts whose modules import torch or diffusers: a command line is read without them.

So `--help`, and the error of a setting that is not valid, appear at once.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

Quantization: TypeAlias = Literal["int8", "nf4"]
"""`int8`: 8 bits, one scale per output channel. `nf4`: 4 bits in blocks of 64 weights, with quantized scales (QLoRA,
Dettmers et al. 2023, arXiv 2305.14314)."""

Reduction: TypeAlias = Literal["mean", "sum"]
"""How the log-densities of a latent's dimensions become one number."""

SamplerName: TypeAlias = Literal["ddim", "ddpm", "flow-sde", "dance", "cps", "ode"]
"""Names of the samplers; `ode` is the deterministic one of every family."""

SMALLEST_STD = 1e-5
"""Below this standard deviation, float32 rounding of the latent itself dominates the density."""
