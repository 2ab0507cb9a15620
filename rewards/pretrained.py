"""Where a pretrained model comes from, on which device it lives, and that this process holds it only once.

Every reward with a model goes through here. Nothing is loaded before it is used, nothing is unpickled but tensors, and
two rewards that name the same model on the same device share it until both have let it go.
"""

from __future__ import annotations

import gc
import os
import re
import threading
from collections.abc import Callable
from importlib import import_module
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from pickle import UnpicklingError
from types import ModuleType
from typing import Any, TypeVar
from weakref import WeakValueDictionary

import torch
from torch import Tensor

TINY = "tiny"
"""The name of the models that ship inside the package, trained on the bundled Stable Diffusion's vocabulary."""

BUNDLED_MODELS: dict[str, str] = {
    "clip": "data/tiny_clip",
    "judge": "data/tiny_llava",
    "text_encoder": "data/tiny_text_encoder",
}
"""What they are for, to folder below `rewards`."""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_HUB_FILE = re.compile(r"([A-Za-z0-9][\w.-]*/[\w.-]+)/([\w./+-]+)")

_T = TypeVar("_T")
_loaded: WeakValueDictionary[tuple[object, ...], Any] = WeakValueDictionary()
_lock = threading.RLock()


def require(module: str, purpose: str) -> ModuleType:
    """Import an optional dependency.

    Raises:
        ImportError: It is not installed; the message says which extra brings it.
    """
    if find_spec(module.partition(".")[0]) is None:
        raise ImportError(f'{purpose} needs the package {module!r}: pip install "ddpo-env[rewards]"')
    return import_module(module)


def resolve_source(model: str | Path, purpose: str = "") -> str:
    """Turn a bundled name, a folder or a Hub id into what `from_pretrained` takes; nothing is loaded.

    Args:
        model: `"tiny"` where `purpose` is one of `BUNDLED_MODELS`, a folder or a Hub id.
        purpose: What the model is for.

    Raises:
        ValueError: It is none of them.
    """
    name = str(model)
    if name == TINY and purpose in BUNDLED_MODELS:
        return str(files("rewards") / BUNDLED_MODELS[purpose])
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ValueError(f"model folder {name!r} holds no transformers model: it has no config.json")
        return str(folder.resolve())
    if isinstance(model, Path) or name.startswith((".", "/", "~")) or not _HUB_ID.fullmatch(name):
        bundled = f"{TINY!r} for the bundled one, " if purpose in BUNDLED_MODELS else ""
        missing = "" if bundled or name != TINY else ": only clip_score, vlm_alignment and vlm_vqa have a miniature"
        raise ValueError(
            f"model must be {bundled}a folder that exists, or a Hub id such as 'openai/clip-vit-large-patch14'; "
            f"got {name!r}{missing}"
        )
    return name


def resolve_weights(weights: str | Path) -> str:
    """Turn a file, or `owner/repository/file` on the Hub, into what `load_weights` takes; nothing is loaded.

    Raises:
        ValueError: It is neither.
    """
    name = str(weights)
    path = Path(name).expanduser()
    if path.is_file():
        return str(path.resolve())
    if isinstance(weights, Path) or name.startswith((".", "/", "~")) or not _HUB_FILE.fullmatch(name):
        raise ValueError(f"weights must be a file that exists, or 'owner/repository/file' on the Hub; got {name!r}")
    return name


def load_weights(weights: str | Path) -> dict[str, Tensor]:
    """Load a file of named tensors to the CPU: safetensors, or PyTorch's format with `weights_only=True`.

    Args:
        weights: A file, or `owner/repository/file` on the Hub, which is downloaded once. A dictionary under the key
            `state_dict` is taken out.

    Raises:
        ValueError: There is no such file, or it holds anything but tensors by name.
        OSError: It cannot be downloaded.
    """
    path = resolve_weights(weights)
    if not os.path.isfile(path):
        from huggingface_hub import hf_hub_download

        repository, file = _HUB_FILE.fullmatch(path).groups()  # type: ignore[union-attr]
        try:
            path = hf_hub_download(repository, file)
        except OSError as error:
            raise OSError(f"cannot load {str(weights)!r}; give a file if there is no network: {error}") from error
    if path.endswith(".safetensors"):
        from safetensors.torch import load_file

        return load_file(path)
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        raise ValueError(f"weights {str(weights)!r} must be tensors and nothing else; {error}") from error
    tensors = tensors.get("state_dict", tensors) if isinstance(tensors, dict) else tensors
    if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise ValueError(f"weights {str(weights)!r} must be a dictionary of tensors")
    return dict(tensors)


def shared(load: Callable[..., _T], source: str, *arguments: object) -> _T:
    """Return `load(source, *arguments)`, or what that call returned before while anybody still holds it.

    Raises:
        OSError: The source cannot be read or downloaded; the message names it.
    """
    key = (load, source, *arguments)
    with _lock:
        loaded: _T | None = _loaded.get(key)
        if loaded is None:
            try:
                loaded = load(source, *arguments)
            except OSError as error:
                hint = f"without a network give a folder, or {TINY!r} where a miniature is bundled"
                raise OSError(f"cannot load {source!r}; {hint}: {error}") from error
            _loaded[key] = loaded
    return loaded


def free_memory(device: torch.device) -> None:
    """Give the memory of models that nobody holds any more back to the device."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
