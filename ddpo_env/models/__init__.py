"""Diffusion models as the environment and the policy see them, whichever library or family they come from.

In comes the name of a model, a diffusers pipeline or an object of your own; out goes one `DiffusionModel`, which
encodes prompts, calls the denoiser, decodes latents and saves a LoRA.
"""

from ddpo_env.models.loading import check_source, load_model, unload_models
from ddpo_env.models.protocol import Conditioning, DiffusionModel, ModelAbilities, abilities_of
from ddpo_env.models.sources import ADAPTERS, BUNDLED_MODELS, resolve_source

__all__ = [
    "ADAPTERS",
    "BUNDLED_MODELS",
    "Conditioning",
    "DiffusionModel",
    "ModelAbilities",
    "abilities_of",
    "check_source",
    "load_model",
    "resolve_source",
    "unload_models",
]
