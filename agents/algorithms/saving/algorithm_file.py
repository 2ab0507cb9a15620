"""An algorithm in one file that nothing is executed from: JSON and safetensors in a zip that is not compressed.

The JSON holds the constructor's arguments, and classes by name. A name is looked up in fixed tables, so a file cannot
import anything. What has no plain form (a function as schedule, a class of one's own) is not in the file; loading asks
for it. Stable-Baselines3's own zips hold pickles, which execute code when they are read, and are refused.
"""

from __future__ import annotations

import inspect
import io
import json
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from gymnasium import spaces
from safetensors import SafetensorError
from safetensors.torch import load, save
from stable_baselines3.common import torch_layers
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.save_util import open_path
from stable_baselines3.common.type_aliases import GymEnv
from torch import Tensor, nn

from agents.algorithms import advantages
from agents.algorithms.saving.state import algorithm_state, below, load_algorithm_state, optimizer_state, to_store
from agents.policy.diffusion_policy import DiffusionPolicy
from ddpo_env.models import load_model
from ddpo_env.models.loading import plain_arguments
from ddpo_env.spaces import DenoisingObservationSpace

SavePath = str | Path | io.BufferedIOBase

_DATA, _TENSORS = "algorithm.json", "tensors.safetensors"
_UNREADABLE = (KeyError, TypeError, AttributeError, IndexError)
"""What reading a file with other content raises."""
_LEFT_OUT = {"self", "policy", "env", "device", "processes", "tensorboard_log", "_init_setup_model"}
"""Arguments that a file does not decide: what is there when it is loaded, and where logs are written."""
_SPACES: dict[str, Callable[..., spaces.Space[Any]]] = {
    "Box": lambda low, high, shape, dtype: spaces.Box(np.reshape(low, shape), np.reshape(high, shape), dtype=dtype),
    "Discrete": lambda n, start: spaces.Discrete(n, start=start),
    "MultiDiscrete": spaces.MultiDiscrete,
    "MultiBinary": spaces.MultiBinary,
}


def _classes(module: Any, base: type) -> dict[str, type]:
    return {name: one for name, one in vars(module).items() if isinstance(one, type) and issubclass(one, base)}


_CLASSES = {
    **_classes(nn.modules.activation, nn.Module),
    **_classes(torch.optim, torch.optim.Optimizer),
    **_classes(torch_layers, torch_layers.BaseFeaturesExtractor),
}
_ESTIMATORS = {name: one for name, one in vars(advantages).items() if isinstance(one, type) and is_dataclass(one)}


class SavableAlgorithm(OnPolicyAlgorithm):
    """`save`, `load` and `set_parameters` of Stable-Baselines3, with a file that cannot execute code."""

    _constructed_with: tuple[tuple[Any, ...], dict[str, Any]]

    def __new__(cls, *arguments: Any, **named: Any) -> Self:
        """Keep the constructor's arguments, which `save` writes."""
        algorithm = super().__new__(cls)
        algorithm._constructed_with = arguments, named
        return algorithm

    def save(self, path: SavePath) -> None:  # type: ignore[override]
        """Write weights, optimizer, counters, random generators and the constructor's arguments to a file.

        The environment, its state, the rollout and the logger are not in it.

        Args:
            path: file, or an open one; a path without a suffix gets `.zip`.
        """
        save_algorithm(self, path)

    @classmethod
    def load(  # type: ignore[override]
        cls,
        path: SavePath,
        env: GymEnv | None = None,
        device: torch.device | str = "auto",
        custom_objects: dict[str, Any] | None = None,
        **arguments: Any,
    ) -> Self:
        """Read an algorithm that `save` wrote; nothing in the file is executed.

        Args:
            path: file, or an open one.
            env: to go on training with. Without one the algorithm can only predict.
            device: where the policy is.
            custom_objects: what replaces values of the file, or stands for those that a file without code cannot hold:
                `policy_class`, `observation_space`, `action_space`, or a constructor's argument by name.
            **arguments: the same, for constructor's arguments.

        Raises:
            ValueError: for a file of Stable-Baselines3, whose pickles could execute code; for one that is damaged or
                of another class; for an environment with other spaces; if an argument is neither given nor in the file.
        """
        given = {**(custom_objects or {}), **arguments}
        if "policy_class" in given:
            given["policy"] = given.pop("policy_class")
        return load_algorithm(cls, path, env, device, given)

    def set_parameters(
        self, load_path_or_dict: Any, exact_match: bool = True, device: torch.device | str = "auto"
    ) -> None:
        """Load weights and the optimizer's state out of a file that `save` wrote, or out of a dictionary."""
        is_file = not isinstance(load_path_or_dict, dict)
        super().set_parameters(
            read_parameters(load_path_or_dict) if is_file else load_path_or_dict, exact_match, device
        )


def save_algorithm(algorithm: Any, path: SavePath) -> None:
    """Write an algorithm; a path without a suffix gets `.zip`."""
    tensors, state = algorithm_state(algorithm)
    data = {
        "class": type(algorithm).__name__,
        "policy": _policy_name(algorithm),
        "arguments": {name: _encoded(value) for name, value in _constructor_arguments(algorithm).items()},
        "observation_space": _encoded_space(algorithm.observation_space),
        "action_space": _encoded_space(algorithm.action_space),
        "n_envs": algorithm.n_envs,
        **state,
    }
    stored = save(to_store(tensors))
    file = open_path(path, "w", suffix="zip")
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr(_DATA, json.dumps(data))
        archive.writestr(_TENSORS, stored)
    if isinstance(path, str | Path):
        file.close()


def load_algorithm(kind: Any, path: SavePath, env: Any, device: Any, given: dict[str, Any]) -> Any:
    """Build an algorithm from a file that `save_algorithm` wrote; see `RolloutAlgorithm.load`."""
    data, tensors = _read(path)
    if data.get("class") != kind.__name__:
        raise ValueError(f"path must hold a {kind.__name__}; {str(path)!r} holds a {data.get('class')!r}")
    given = dict(given)
    with _reading(path, *_UNREADABLE):
        policy = given.pop("policy", None) or _policy_class(kind, data["policy"])
        decided = {"observation_space": None, "action_space": None} | given
        saved_spaces = {name: decided.pop(name) or data[name] for name in ("observation_space", "action_space")}
        arguments = {name: value for name, value in data["arguments"].items() if name not in decided}
        arguments = {name: _decoded(name, value) for name, value in arguments.items()} | decided
        if "advantage" in given and not _are_of_one_class(given["advantage"], data["arguments"].get("advantage")):
            data["advantage"] = None  # the state of another estimator
        known = {"n_envs": data["n_envs"]} if env is None else {}
        known |= {name: _decoded_space(one, device) for name, one in saved_spaces.items() if env is None}
    if env is not None:
        env = kind._wrap_env(env, arguments.get("verbose", 0))
        _check_spaces(saved_spaces, env)
    with _reading(path, TypeError):
        algorithm = kind(policy, env, device=device, _init_setup_model=False, **arguments)
    vars(algorithm).update(known)
    algorithm._setup_model()
    with _reading(path, *_UNREADABLE, RuntimeError):
        load_algorithm_state(algorithm, tensors, data)
    return algorithm


@contextmanager
def _reading(path: SavePath, *kinds: type[Exception]) -> Iterator[None]:
    """Say of errors of some kinds that the file is the cause."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except kinds as error:
        raise ValueError(f"path must hold what save wrote; {str(path)!r} does not fit: {error!r}") from error


def read_parameters(path: SavePath) -> dict[str, Any]:
    """Return the weights and the optimizer's state out of a file, as `set_parameters` takes them."""
    data, tensors = _read(path)
    return {"policy": below("policy.", tensors), "policy.optimizer": optimizer_state(tensors, data)}


def _read(path: SavePath) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if isinstance(path, str | Path) and Path(path).is_dir():
        raise ValueError(
            f"path must be a file that an algorithm's save wrote; {str(path)!r} is a folder. A policy's folder, as in "
            "a run, is read by agents.DiffusionPolicy.load"
        )
    file = open_path(path, "r", suffix="zip")
    try:
        with zipfile.ZipFile(file) as archive:
            names = archive.namelist()
            if "data" in names and _DATA not in names:
                raise ValueError(
                    f"path must hold what agents' save wrote; {str(path)!r} is a zip of Stable-Baselines3, whose "
                    "pickles could execute code. If you trust it, load it with stable_baselines3 and give "
                    "its policy.state_dict() to policy.load_state_dict here"
                )
            compressed = any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist())
            if sorted(names) != [_DATA, _TENSORS] or compressed:
                raise ValueError(f"path must hold what agents' save wrote; {str(path)!r} holds {names[:5]}")
            data, tensors = json.loads(archive.read(_DATA)), load(archive.read(_TENSORS))
    except (zipfile.BadZipFile, json.JSONDecodeError, UnicodeDecodeError, RecursionError, SafetensorError) as error:
        raise ValueError(f"path must hold what agents' save wrote; {str(path)!r} is damaged: {error!r}") from error
    finally:
        if isinstance(path, str | Path):
            file.close()
    if not isinstance(data, dict):
        raise ValueError(f"path must hold what agents' save wrote; {str(path)!r} has no settings")
    return data, tensors


def _constructor_arguments(algorithm: Any) -> dict[str, Any]:
    """Return the arguments that the algorithm was constructed with, by name."""
    signature = inspect.signature(type(algorithm).__init__)
    positional, named = algorithm._constructed_with
    bound = signature.bind(algorithm, *positional, **named).arguments
    for parameter in signature.parameters.values():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            bound |= bound.pop(parameter.name, {})
    return {name: value for name, value in bound.items() if name not in _LEFT_OUT}


def _policy_name(algorithm: Any) -> str | None:
    known = {**type(algorithm).policy_aliases, "DiffusionPolicy": DiffusionPolicy}
    return next((name for name, one in known.items() if one is algorithm.policy_class), None)


def _policy_class(kind: Any, name: Any) -> Any:
    known = {**kind.policy_aliases, "DiffusionPolicy": DiffusionPolicy}
    if name not in known:
        raise ValueError('policy must be given as custom_objects={"policy_class": ...}: the file names no known class')
    return known[name]


def _encoded(value: Any) -> Any:
    """Return the plain form of an argument: lists, dictionaries and tuples of numbers and names."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, list):
        return [_encoded(one) for one in value]
    if isinstance(value, tuple):
        return {"tuple": [_encoded(one) for one in value]}
    if isinstance(value, dict) and all(isinstance(name, str) for name in value):
        return {"dict": {name: _encoded(one) for name, one in value.items()}}
    if isinstance(value, type) and _CLASSES.get(value.__name__) is value:
        return {"class": value.__name__}
    if _ESTIMATORS.get(type(value).__name__) is type(value):
        settings = {field.name: _encoded(getattr(value, field.name)) for field in fields(value) if field.repr}
        return {"estimator": type(value).__name__, "settings": settings}
    return {"not_saved": f"{type(value).__module__}.{type(value).__qualname__}"}


def _are_of_one_class(value: Any, encoded: Any) -> bool:
    """Return whether an argument is of the class that `_encoded` named."""
    one, other = ({**(form or {}), "settings": None} for form in (_encoded(value), encoded))
    return one == other


def _decoded(name: str, value: Any) -> Any:
    """Return the argument `name` that `_encoded` gave a plain form."""
    if isinstance(value, list):
        return [_decoded(name, one) for one in value]
    if not isinstance(value, dict):
        return value
    if "tuple" in value:
        return tuple(_decoded(name, one) for one in value["tuple"])
    if "dict" in value:
        return {key: _decoded(f"{name}[{key!r}]", one) for key, one in value["dict"].items()}
    if "class" in value:
        return _CLASSES[value["class"]]
    if "estimator" in value:
        settings = {key: _decoded(key, one) for key, one in value["settings"].items()}
        return _ESTIMATORS[value["estimator"]](**settings)
    raise ValueError(
        f"{name.partition('[')[0]} must be given to load: {name} was of type {value.get('not_saved')!r}, "
        "which a file without code cannot hold"
    )


def _encoded_space(space: spaces.Space[Any]) -> Any:
    if isinstance(space, DenoisingObservationSpace):
        handle = space.handle
        return {
            "kind": "denoising",
            "model": handle.source,
            "resolution": handle.resolution,
            "pipeline_arguments": plain_arguments(handle.model),
            "quantization": handle.quantization,
            "num_inference_steps": handle.num_inference_steps,
        }
    if isinstance(space, spaces.Dict):
        return {"kind": "Dict", "spaces": {name: _encoded_space(one) for name, one in space.spaces.items()}}
    settings: dict[str, Any]
    if isinstance(space, spaces.Box):
        settings = {"low": space.low.ravel().tolist(), "high": space.high.ravel().tolist()}
        settings |= {"shape": list(space.shape), "dtype": str(space.dtype)}
    elif isinstance(space, spaces.Discrete):
        settings = {"n": int(space.n), "start": int(space.start)}
    elif isinstance(space, spaces.MultiDiscrete):
        settings = {"nvec": space.nvec.tolist()}
    elif isinstance(space, spaces.MultiBinary):
        settings = {"n": space.n if isinstance(space.n, int) else [int(one) for one in space.n]}
    else:
        return None
    return {"kind": type(space).__name__, **settings}


def _decoded_space(space: Any, device: Any) -> spaces.Space[Any]:
    if isinstance(space, spaces.Space):
        return space
    if space is None:
        raise ValueError("env must be given to load: the file does not hold the environment's spaces")
    settings = dict(space)
    kind = settings.pop("kind")
    if kind == "denoising":
        model = load_model(
            settings["model"],
            device,
            "auto",
            settings["resolution"],
            settings.get("pipeline_arguments"),
            settings.get("quantization"),
        )
        return DenoisingObservationSpace(model, settings["num_inference_steps"])
    if kind == "Dict":
        return spaces.Dict({name: _decoded_space(one, device) for name, one in settings["spaces"].items()})
    return _SPACES[kind](**settings)


def _check_spaces(saved: dict[str, Any], env: Any) -> None:
    for name, space in saved.items():
        wanted = _encoded_space(space) if isinstance(space, spaces.Space) else space
        found = _encoded_space(getattr(env, name))
        if wanted is not None and found != wanted:
            raise ValueError(
                f"env must have the {name} that the algorithm was saved with, {wanted}; got {found}. If that is meant, "
                f'as for a model that was moved, give custom_objects={{"{name}": env.{name}}}'
            )
