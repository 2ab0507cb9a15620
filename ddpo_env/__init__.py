"""Denoising as a vectorized Gymnasium MDP: importing this package registers ``DDPO-SD-v0`` and ``DDPO-Points-v0``.

In come prompts, a diffusion model and a reward; out come observations, rewards and images, step by step. Nothing heavy
is imported here: torch, diffusers and transformers are imported when an environment is made. So ``import ddpo_env`` is
quick, and ``gym.make("ddpo_env:DDPO-SD-v0")`` needs no import at all.
"""

import warnings
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gymnasium.envs.registration import register, registry

if TYPE_CHECKING:
    from ddpo_env.deferred_reward import DeferredReward
    from ddpo_env.env import DenoisingEnv
    from ddpo_env.models import DiffusionModel, ModelAbilities, load_model, unload_models
    from ddpo_env.sampler.gaussian_sampler import GaussianSampler
    from ddpo_env.spaces import DenoisingObservationSpace
    from ddpo_env.vector_env import DenoisingVectorEnv

__version__ = "0.1.0"

_LAZY_EXPORTS = {
    "DeferredReward": "ddpo_env.deferred_reward",
    "DenoisingEnv": "ddpo_env.env",
    "DenoisingObservationSpace": "ddpo_env.spaces",
    "DenoisingVectorEnv": "ddpo_env.vector_env",
    "DiffusionModel": "ddpo_env.models",
    "GaussianSampler": "ddpo_env.sampler.gaussian_sampler",
    "ModelAbilities": "ddpo_env.models",
    "load_model": "ddpo_env.models",
    "unload_models": "ddpo_env.models",
}

__all__ = [
    "DeferredReward",
    "DenoisingEnv",
    "DenoisingObservationSpace",
    "DenoisingVectorEnv",
    "DiffusionModel",
    "GaussianSampler",
    "ModelAbilities",
    "__version__",
    "load_model",
    "unload_models",
]


def _wrong_package(name: str, public_name: str) -> str | None:
    """Return what is wrong with the package that Python finds under a name of ours, without importing it.

    Args:
        name: `rewards` or `agents`: names that other projects use too.
        public_name: a name that our package's `__init__.py` exports.

    Returns:
        A message that says what to do; `None` if the package is ours.
    """
    folder = Path(__file__).resolve().parent.parent
    spec = find_spec(name)
    found = Path(spec.origin).resolve() if spec is not None and spec.origin is not None else None
    if spec is None or found is None or found.parent != folder / name:
        where = found or list((spec and spec.submodule_search_locations) or ()) or "nothing"
        return (
            f"ddpo-env needs its package {name} in {folder}, but Python finds {where} under that name. Rename or move "
            f'what Python finds, or put our folder in front: PYTHONSAFEPATH=1 PYTHONPATH="{folder}"'
        )
    loader: Any = spec.loader
    source = loader.get_source(name)
    if source is None or public_name in source:
        return None
    return (
        f"{found} is not the package {name} of ddpo-env: another distribution has installed a package of that name "
        "over it. Install ddpo-env in an environment without that distribution"
    )


if message := _wrong_package("rewards", "evaluate_reward"):
    raise ImportError(message)
if find_spec("agents") is not None and (message := _wrong_package("agents", "DiffusionPolicy")):
    warnings.warn(f"The environments work, but `import agents` does not: {message}", RuntimeWarning, stacklevel=2)

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
