"""Denoising as a vectorized Gymnasium MDP: importing this package registers ``DDPO-SD-v0`` and ``DDPO-Points-v0``.

Nothing heavy is imported here. torch, diffusers and transformers come in when an environment is made, so
``import ddpo_env`` is quick and ``gym.make("ddpo_env:DDPO-SD-v0")`` needs no import at all.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from gymnasium.envs.registration import register, registry

from ddpo_env.version import __version__

if TYPE_CHECKING:
    from ddpo_env.deferred_reward import DeferredReward
    from ddpo_env.env import DenoisingEnv
    from ddpo_env.models.loading import DiffusionModel, load_model
    from ddpo_env.sampler.gaussian_sampler import GaussianSampler
    from ddpo_env.spaces import DenoisingObservationSpace
    from ddpo_env.vector_env import DenoisingVectorEnv

_LAZY_EXPORTS = {
    "DeferredReward": "ddpo_env.deferred_reward",
    "DenoisingEnv": "ddpo_env.env",
    "DenoisingObservationSpace": "ddpo_env.spaces",
    "DenoisingVectorEnv": "ddpo_env.vector_env",
    "DiffusionModel": "ddpo_env.models.loading",
    "GaussianSampler": "ddpo_env.sampler.gaussian_sampler",
    "load_model": "ddpo_env.models.loading",
}

__all__ = [
    "DeferredReward",
    "DenoisingEnv",
    "DenoisingObservationSpace",
    "DenoisingVectorEnv",
    "DiffusionModel",
    "GaussianSampler",
    "__version__",
    "load_model",
]

if "DDPO-SD-v0" not in registry:
    register(
        id="DDPO-SD-v0",
        entry_point="ddpo_env.env:DenoisingEnv",
        vector_entry_point="ddpo_env.vector_env:DenoisingVectorEnv",
    )

if "DDPO-Points-v0" not in registry:
    register(
        id="DDPO-Points-v0",
        entry_point="ddpo_env.env:DenoisingEnv",
        vector_entry_point="ddpo_env.vector_env:DenoisingVectorEnv",
        kwargs={"model": "points", "reward": "points_ring", "prompts": ["a point"], "num_inference_steps": 10},
    )


def __getattr__(name: str) -> Any:
    """Import a public name on first use (PEP 562)."""
    if name in _LAZY_EXPORTS:
        return getattr(import_module(_LAZY_EXPORTS[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
