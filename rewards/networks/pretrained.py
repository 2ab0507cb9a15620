"""Where the files of a pretrained model are, how they are read, and a cache that loads each model once per process.

Every reward with a model loads it through this module. Files are data that somebody else may have written: no code of a
model's repository runs, only tensors are unpickled, and no weight may be missing. Two rewards that use the same model
on the same device share it until both have released it.
"""

from __future__ import annotations

import functools
import gc
import os
import re
import threading
from collections.abc import Callable, Iterable, Mapping
from importlib import import_module
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, Generic, TypeVar
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from rewards.networks.devices import resolve_device, resolve_dtype
from rewards.registry import check_number

TINY = "tiny"
"""The name of the models inside this package, which know the vocabulary of the bundled Stable Diffusion."""

BUNDLED_MODELS: dict[str, str] = {
    "clip": "data/tiny_clip",
    "judge": "data/tiny_llava",
    "text_encoder": "data/tiny_text_encoder",
    "reader": "data/tiny_reader",
}
"""Purpose to folder inside `rewards`."""

_NOT_FOLLOWED = (
    "quantization_config",
    "transformers_weights",
    "kernel_config",
    "use_kernels",
    "base_model_name_or_path",
)
"""Settings of a `config.json` that make a library import further packages, fetch code, or read other files."""
_ATTENTIONS = (None, "eager", "sdpa")
"""Other attention implementations may be code on the Hub."""

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_HUB_FILE = re.compile(r"([A-Za-z0-9][\w.-]*/[\w.-]+)/([\w./+-]+)")

_T = TypeVar("_T")
_loaded: WeakValueDictionary[tuple[object, ...], Any] = WeakValueDictionary()
_lock = threading.RLock()


def require(module: str, purpose: str) -> ModuleType:
    """Import an optional dependency.

    Raises:
        ImportError: It is not installed; the message names the extra that installs it.
    """
    if find_spec(module.partition(".")[0]) is None:
        raise ImportError(f'{purpose} needs the package {module!r}: pip install "ddpo-env[rewards]"')
    return import_module(module)


def resolve_source(model: str | Path, purpose: str = "") -> str:
    """Turn a bundled model's name, a folder or a Hub id into what `from_pretrained` takes. Nothing is loaded.

    Args:
        model: A folder, a Hub id, or `"tiny"` if `purpose` is one of `BUNDLED_MODELS`.
        purpose: What the model is used for.

    Raises:
        ValueError: `model` is none of these.
    """
    name = str(model)
    if name == TINY and purpose in BUNDLED_MODELS:
        return str(files("rewards") / BUNDLED_MODELS[purpose])
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ValueError(f"model folder {name!r} contains no transformers model: it has no config.json")
        return str(folder.resolve())
    if isinstance(model, Path) or name.startswith((".", "/", "~")) or not HUB_ID.fullmatch(name):
        bundled = f"{TINY!r} for the bundled one, " if purpose in BUNDLED_MODELS else ""
        with_bundled = "aesthetic, clip_score, votes, vlm_alignment and vlm_vqa"
        missing = "" if bundled or name != TINY else f": only {with_bundled} have a bundled model"
        raise ValueError(
            f"model must be {bundled}a folder that exists, or a Hub id such as 'openai/clip-vit-large-patch14'; "
            f"got {name!r}{missing}"
        )
    return name


def resolve_weights(weights: str | Path) -> str:
    """Turn a file, or `owner/repository/file` on the Hub, into what `load_weights` takes. Nothing is loaded.

    Raises:
        ValueError: `weights` is neither.
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
        weights: A file, or `owner/repository/file` on the Hub, which is downloaded once. If the file has the key
            `state_dict`, the tensors under this key are returned.

    Raises:
        ValueError: There is no such file, or it contains something other than named tensors.
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

        read: Callable[[str], Any] = load_file
    else:
        read = functools.partial(torch.load, map_location="cpu", weights_only=True)
    try:
        tensors = read(path)
    except OSError:
        raise
    except Exception as error:  # the formats raise errors of every kind for files that are damaged
        raise ValueError(f"weights {str(weights)!r} must be tensors and nothing else; {error}") from error
    tensors = tensors.get("state_dict", tensors) if isinstance(tensors, dict) else tensors
    if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise ValueError(f"weights {str(weights)!r} must be a dictionary of tensors")
    return dict(tensors)


def check_settings(settings: object, label: str) -> None:
    """Refuse settings of a network, at any depth, that lead to code or to other files.

    Args:
        settings: What its `config.json` holds.
        label: The network's name, for the message.

    Raises:
        ValueError: Naming the setting and its value.
    """
    if isinstance(settings, Mapping):
        for name, value in settings.items():
            is_attention = "attn_implementation" in str(name)
            if (is_attention and value not in _ATTENTIONS) or (name in _NOT_FOLLOWED and value):
                raise ValueError(
                    f"{label} must not have {name} in its config.json, which is not followed; got {value!r}"
                )
            check_settings(value, label)
    elif isinstance(settings, list):
        for value in settings:
            check_settings(value, label)


def check_network(network: nn.Module, report: Mapping[str, Any], label: str) -> None:
    """Refuse a network that was loaded from files which lack weights: a library leaves those random.

    Args:
        network: As `from_pretrained` returned it.
        report: What `from_pretrained(output_loading_info=True)` said.
        label: The network's name, for the message.

    Raises:
        ValueError: Weights are missing, of another shape, NaN or infinite; the message names some of them.
    """
    for problem in ("missing_keys", "mismatched_keys"):
        if keys := sorted(str(key) for key in report.get(problem) or ()):
            raise ValueError(
                f"{label} must hold every weight of a {type(network).__name__}; {len(keys)} "
                f"{problem.replace('_', ' ')}: {shortened(keys)}. Do the weights belong to another part?"
            )
    check_finite(network, label)


def check_finite(network: nn.Module, label: str) -> None:
    """Refuse a network with weights that are NaN or infinite, which a cast to half precision can make too.

    Raises:
        ValueError: Naming the network and the weights.
    """
    weights = [
        (key, part)
        for key, value in network.state_dict().items()
        for part in stored_tensors(value)
        if part.is_floating_point()
    ]
    bounds = [torch.stack(torch.aminmax(value)).float().sum() for _, value in weights if value.numel()]
    if not bounds or bool(torch.stack(bounds).isfinite().all()):
        return
    keys = [key for key, value in weights if not bool(value.isfinite().all())]
    if keys:
        raise ValueError(
            f"{label} must have finite weights; in {weights[0][1].dtype} there are NaN or infinite values in "
            f"{len(keys)} of {len(weights)}: {shortened(keys)}"
        )


def stored_tensors(weight: Tensor) -> list[Tensor]:
    """Return the plain tensors that a weight consists of: itself, or the numbers and scales of a quantized one."""
    if not is_traceable_wrapper_subclass(weight):
        return [weight]
    names, _ = weight.__tensor_flatten__()
    return [part for name in names for part in stored_tensors(getattr(weight, name))]


def load_network(loader: Any, source: str, dtype: torch.dtype, **options: Any) -> Any:
    """Load a network of transformers from a folder or the Hub, without any code of its repository.

    Args:
        loader: A class of transformers with `from_pretrained`.
        source: What `resolve_source` returned.
        dtype: Of the weights.
        **options: Further arguments of `from_pretrained`.

    Raises:
        ValueError: Its settings lead elsewhere, or weights are missing or not finite.
        OSError: It cannot be read or downloaded.
    """
    from transformers import PretrainedConfig

    label = f"model {source!r}"
    if (Path(source) / "adapter_config.json").is_file():
        raise ValueError(f"{label} must be a plain network; adapter_config.json names an adapter: merge it first")
    check_settings(PretrainedConfig.get_config_dict(source)[0], label)
    network, report = loader.from_pretrained(
        source, dtype=dtype, trust_remote_code=False, output_loading_info=True, **options
    )
    check_network(network, report, label)
    return network


def load_processor(loader: Any, source: str, **options: Any) -> Any:
    """Load a tokenizer or a processor of transformers, without any code of its repository."""
    return loader.from_pretrained(source, trust_remote_code=False, **options)


def shortened(names: Iterable[str]) -> str:
    """Return the first three names, for a message."""
    first = list(names)
    return ", ".join(first[:3]) + (", ..." if len(first) > 3 else "")


def load_cached(load: Callable[..., _T], source: str, *arguments: object) -> _T:
    """Return `load(source, *arguments)`, or the earlier result of this call while something still refers to it."""
    key = (load, source, *arguments)
    with _lock:
        loaded: _T | None = _loaded.get(key)
        if loaded is None:
            loaded = _loaded[key] = load(source, *arguments)
    return loaded


class ModelHolder(Generic[_T]):
    """Base of the classes that compute with one pretrained model.

    The model is loaded by its first use or by `load`, and holders of the same model share it. `unload` releases it; the
    next use loads it again.

    Attributes:
        purpose: The purpose in `BUNDLED_MODELS` of the model that `"tiny"` names; empty if there is none.
        option: The reward's option that names the model.
        source: Folder or Hub id of the model.
        device: The device of the model.
        dtype: The dtype of its weights.
        batch_size: Inputs per call of the model.
    """

    purpose: ClassVar[str] = ""
    option: ClassVar[str] = "model"

    def __init__(
        self,
        loader: Callable[..., _T],
        model: str | Path,
        *arguments: object,
        device: str | torch.device,
        dtype: str | torch.dtype,
        batch_size: int,
    ) -> None:
        """Check the arguments. `loader(source, device, dtype, *arguments)` will load the model.

        Raises:
            ValueError: The model, the device, the dtype or the batch size is not valid.
        """
        self.source = resolve_source(model, self.purpose)
        check_number("batch_size", batch_size, 1, 1_000_000)
        self.device = resolve_device(device)
        self.dtype = resolve_dtype(dtype, self.device)
        self.batch_size = batch_size
        self._loader = loader
        self._arguments = arguments
        self._loaded: _T | None = None

    @property
    def loaded(self) -> _T:
        """The model, which is loaded at its first use.

        Raises:
            OSError: It cannot be read or downloaded; the message says what works without a network.
        """
        if self._loaded is None:
            try:
                self._loaded = load_cached(self._loader, self.source, self.device, self.dtype, *self._arguments)
            except OSError as error:
                hint = "without a network give a folder"
                if self.purpose:
                    setting = f"{self.option}={TINY}"
                    hint += f" or the bundled model, with --reward-options {setting}; in a weighted sum TERM.{setting}"
                raise OSError(f"cannot load {self.source!r}; {hint}: {error}") from error
        return self._loaded

    def load(self) -> None:
        """Load the model now, so that errors appear early."""
        _ = self.loaded

    def unload(self) -> None:
        """Release the model. Its memory is free when no other holder uses it."""
        self._loaded = None
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
