"""States of components as JSON and tensors: what JSON cannot hold, such as arrays, goes among the tensors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

_MARK = "__stored__"


def store(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """Return `value` as plain values for JSON; its arrays and tensors are added to `tensors` under names of their own.

    Args:
        value: numbers, strings, booleans, `None`, NumPy arrays and scalars, torch tensors, and lists, tuples and
            dictionaries of them. A tuple becomes a list.
        name: of the value, such as `component.reward`.
        tensors: what is stored beside the JSON.

    Raises:
        TypeError: naming a value that cannot be stored.
    """
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str) or key == _MARK:
                raise TypeError(f"a state can be stored if its keys are text other than {_MARK}; {name} has {key!r}")
        return {str(key): store(one, f"{name}.{key}", tensors) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [store(one, f"{name}.{index}", tensors) for index, one in enumerate(value)]
    if isinstance(value, Tensor):
        tensors[name] = value
        return {_MARK: "torch", "name": name}
    if value is None or isinstance(value, bool | str | int) or type(value) is float:
        return value
    if isinstance(value, np.ndarray | np.generic) and value.dtype.kind in "biufc":
        tensors[name] = torch.from_numpy(np.array(value))
        return {_MARK: "array" if isinstance(value, np.ndarray) else "scalar", "name": name}
    if isinstance(value, np.ndarray) and value.dtype.kind == "U":
        return {_MARK: "text", "values": value.tolist()}
    raise TypeError(
        "a state can hold numbers, text, None, arrays, tensors, and lists and dictionaries of them; "
        f"{name} is a {type(value).__name__}"
    )


def restore(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Return the value that `store` has taken apart."""
    if isinstance(value, list):
        return [restore(one, tensors) for one in value]
    if not isinstance(value, dict):
        return value
    kind = value.get(_MARK)
    if kind is None:
        return {key: restore(one, tensors) for key, one in value.items()}
    if kind == "text":
        return np.array(value["values"], dtype=str)
    tensor = tensors[value["name"]]
    if kind == "torch":
        return tensor
    return tensor.numpy() if kind == "array" else tensor.numpy()[()]


def read_json(text: str) -> dict[str, Any]:
    """Return the object that a text holds.

    Raises:
        ValueError: if the text is not JSON, too deep, or not an object.
    """
    try:
        value = json.loads(text)
    except RecursionError as error:
        raise ValueError("the JSON is nested too deeply") from error
    if not isinstance(value, dict):
        raise ValueError(f"the JSON must be an object; it is a {type(value).__name__}")
    return value


def check_like(value: Any, like: Any, name: str) -> None:
    """Check that a value read from JSON has the keys and types of another one; what is in a list is free.

    A tuple, which JSON holds as a list, has a fixed length and types.

    Raises:
        ValueError: naming what differs.
    """
    if isinstance(like, dict):
        if not isinstance(value, dict) or value.keys() != like.keys():
            got = ", ".join(map(str, value)) if isinstance(value, dict) else type(value).__name__
            raise ValueError(f"{name} must have the keys {', '.join(like)}; got {got}")
        for key in like:
            check_like(value[key], like[key], f"{name}.{key}")
        return
    if isinstance(like, tuple) and isinstance(value, list):
        if len(value) != len(like):
            raise ValueError(f"{name} must have {len(like)} values; got {len(value)}")
        for index, one in enumerate(like):
            check_like(value[index], one, f"{name}.{index}")
        return
    number = isinstance(like, int | float) and not isinstance(like, bool)
    matches = (
        isinstance(value, int | float) and not isinstance(value, bool)
        if number
        else isinstance(value, list)
        if isinstance(like, list | tuple)
        else like is None or isinstance(value, type(like))
    )
    if not matches:
        raise ValueError(f"{name} must be a {type(like).__name__}; got a {type(value).__name__}")
    if isinstance(like, int) and number and not isinstance(value, int):
        raise ValueError(f"{name} must be an int; got {value!r}")
