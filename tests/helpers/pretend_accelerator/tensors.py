"""Tensors of the pretend device, and the rules of every ATen operation on them."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode

from helpers.pretend_accelerator import autocast
from helpers.pretend_accelerator.generators import CpuGenerator, DeviceGenerator
from helpers.pretend_accelerator.memory import Memory
from helpers.pretend_accelerator.waits import Waits

READING = {
    *(
        "_local_scalar_dense",
        "equal",
        "is_nonzero",
        "item",
        "masked_select",
        "nonzero",
        "bincount",
        "repeat_interleave",
    ),
    *("_unique", "_unique2", "unique_dim", "unique_consecutive", "unique_dim_consecutive", "linalg_eig"),
}
"""Operations whose result is on the host, or has a size that depends on values."""
INDEXING = {"index", "_unsafe_index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index_put"}
TAKES_HOST_SCALARS = {"where", "fill", "fill_", "masked_fill", "masked_fill_", "index_fill", "index_fill_", "lerp"}
"""Operations beside the elementwise ones that take a tensor without dimensions from the host."""
MIXED = "Expected all tensors to be on the same device, but found at least two devices, {} and {}!"
_NAME = re.compile(r"cuda(:\d+)?")
_STAND_IN = "lazy"
"""The device that C++ sees: autograd needs one that its build knows, and nothing else uses this one."""


class DeviceTensor(Tensor):
    """A tensor that reports a device of CUDA and computes on the CPU.

    Attributes:
        inner: the tensor of the CPU that holds the values.
    """

    inner: Tensor
    _index: int
    devices: ClassVar[Devices | None] = None

    @staticmethod
    def __new__(cls, inner: Tensor, devices: Devices, index: int) -> DeviceTensor:
        """Wrap a tensor of the CPU."""
        allocation = devices.memory[index].allocation_of(inner)
        wrapper: Any = Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            layout=inner.layout,
            device=torch.device(_STAND_IN, index),
            storage_size=inner.untyped_storage().nbytes(),
        )
        wrapper.inner, wrapper._index, wrapper._allocation, wrapper._devices = inner, index, allocation, devices
        return wrapper

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Cast the arguments inside `torch.autocast("cuda")`."""
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if torch.is_autocast_enabled("cuda"):
                args, kwargs = autocast.cast(func, args, kwargs)
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Compute outside the mode, as the threads of other libraries do."""
        first = next(one for one in tree_leaves((args, kwargs)) if isinstance(one, DeviceTensor))
        return first._devices.dispatch(func, args, kwargs or {})

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        """`cuda:0`, ..."""
        return torch.device("cuda", self._index)

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        """Yes."""
        return True

    @property
    def data(self) -> Tensor:  # type: ignore[override]
        """The tensor without its history."""
        return self.detach()

    @data.setter
    def data(self, other: Tensor) -> None:
        if not isinstance(other, DeviceTensor):
            raise TypeError("the pretend accelerator cannot put the data of the host into a tensor of the device")
        Tensor.data.__set__(self, other)  # type: ignore[attr-defined]
        self.inner, self._index, self._allocation = other.inner, other._index, other._allocation

    def get_device(self) -> int:
        """Return the index of the device."""
        return self._index

    def untyped_storage(self) -> torch.UntypedStorage:
        """Return the storage with the values, which views share."""
        return self.inner.untyped_storage()

    def data_ptr(self) -> int:
        """Return the address of the values."""
        return self.inner.data_ptr()

    def tolist(self) -> Any:
        """Copy the values to the host."""
        return self.cpu().tolist()

    def numpy(self, *, force: bool = False) -> Any:
        """Refuse, as CUDA does; with `force` copy the values to the host."""
        if force:
            return self.detach().cpu().numpy()
        raise TypeError(
            f"can't convert {self.device} device type tensor to numpy. Use Tensor.cpu() to copy the tensor to host "
            "memory first."
        )

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        return self.numpy()

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        with torch.no_grad():
            copied = self.clone()
        copied.requires_grad_(self.requires_grad)
        for name, value in vars(self).items():
            if name not in ("inner", "_index", "_allocation", "_devices"):
                vars(copied)[name] = copy.deepcopy(value, memo)
        memo[id(self)] = copied
        return copied

    def __repr__(self, **kwargs: Any) -> str:  # type: ignore[override]
        return f"tensor({self.inner.tolist()}, device='{self.device}', dtype={self.dtype})"


class Devices:
    """The pretend devices: their memories and generators, and how an operation runs on them."""

    def __init__(self, capacities: Iterable[int]) -> None:
        self.memory = [Memory(index, capacity) for index, capacity in enumerate(capacities)]
        self.generators = tuple(DeviceGenerator(f"cuda:{index}") for index in range(len(self.memory)))
        self.waits = Waits()
        self.current = 0
        self.pinned: dict[int, Tensor] = {}  # alive, so that no other storage gets the address

    def pin(self, host: Tensor) -> Tensor:
        """Note that a tensor of the host is pinned, and return it."""
        self.pinned[host.untyped_storage()._cdata] = host
        return host

    def resolved(self, device: Any) -> torch.device | None:
        """Return a device with its index; the one that C++ sees is translated."""
        if device is None:
            return None
        device = torch.device(device)
        if device.type not in ("cuda", _STAND_IN):
            return device
        index = self.current if device.index is None else device.index
        if index >= len(self.memory):
            raise RuntimeError("CUDA error: invalid device ordinal")
        return torch.device("cuda", index)

    def dispatch(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run one operation of ATen."""
        if torch.is_inference_mode_enabled() and func._can_decompose():  # elsewhere autograd has taken it apart
            with OperationMode(self):
                return func.decompose(*args, **kwargs)
        leaves = tree_leaves((args, kwargs))
        own = [one for one in leaves if isinstance(one, DeviceTensor)]
        asked = self.resolved(kwargs.get("device"))
        name = func.overloadpacket.__name__
        if not own and (asked is None or asked.type != "cuda"):
            if kwargs.get("pin_memory"):
                return self.pin(func(*args, **{**kwargs, "pin_memory": None}))
            if any(DeviceGenerator.of(one) for one in leaves if isinstance(one, CpuGenerator)):
                raise RuntimeError("Expected a 'cpu' device type for generator but found 'cuda'")
            return func(*args, **kwargs)
        if name in ("_to_copy", "copy_", "copy"):
            return self._copy(func, args, kwargs, asked)
        place = self._place(func, name, leaves, args) if own else asked
        if asked is not None and asked.type != "cuda":  # `new_zeros(..., device="cpu")`
            return func(*tree_map(_bare, args), **tree_map(_bare, kwargs))
        place = asked or place
        assert place is not None
        if name in READING or (name in INDEXING and _index_waits(args)):
            self.waits.note()
        return self._run(func, args, kwargs, leaves, place)

    def _run(self, func: Any, args: Any, kwargs: Any, leaves: list[Any], place: torch.device) -> Any:
        generators = [DeviceGenerator.of(one) for one in leaves if isinstance(one, CpuGenerator)]
        if None in generators:
            raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")
        bare_args, bare_kwargs = tree_map(_bare, args), tree_map(_bare, kwargs)
        if bare_kwargs.get("device") is not None:
            bare_kwargs["device"] = torch.device("cpu")
        bare_kwargs.pop("pin_memory", None)
        if torch.Tag.nondeterministic_seeded in func.tags:
            generator: Any = generators[0] if generators else self.generators[place.index]
            with generator.drawing():
                out = func(*bare_args, **bare_kwargs)
        else:
            out = func(*bare_args, **bare_kwargs)
        wrappers = {id(one.inner): one for one in leaves if isinstance(one, DeviceTensor)}
        if torch.Tag.inplace_view in func.tags:  # the wrapper's own shape changes too
            changed = args[0]
            with no_dispatch():
                Tensor.data.__set__(changed, DeviceTensor(changed.inner, self, place.index))  # type: ignore[attr-defined]
        # A view inside `torch.inference_mode` is an inference tensor if its base is one.
        is_view = torch.is_inference_mode_enabled() and any(one.alias_info for one in func._schema.returns)
        with torch.inference_mode(tree_leaves(args)[0].is_inference()) if is_view else nullcontext():
            return tree_map(lambda one: self._wrapped(one, wrappers, place, leaves), out)

    def _wrapped(self, out: Any, wrappers: dict[int, DeviceTensor], place: torch.device, leaves: list[Any]) -> Any:
        if not isinstance(out, Tensor) or isinstance(out, DeviceTensor) or any(out is one for one in leaves):
            return out
        known = wrappers.get(id(out))
        if known is None:
            return DeviceTensor(out, self, place.index)
        if known.size() != out.size():
            raise NotImplementedError("the pretend accelerator cannot resize a tensor in place")
        return known

    def _copy(self, func: Any, args: Any, kwargs: Any, asked: torch.device | None) -> Any:
        """Copy between devices; the host waits unless it is told not to."""
        name = func.overloadpacket.__name__
        source = args[0] if name == "_to_copy" else args[1]
        target = (asked or source.device) if name == "_to_copy" else args[0].device
        positional = args[2] if name != "_to_copy" and len(args) > 2 else False
        non_blocking = bool(kwargs.get("non_blocking", positional))
        bare_args, bare_kwargs = tree_map(_bare, args), tree_map(_bare, kwargs)
        if bare_kwargs.get("device") is not None and target.type == "cuda":
            bare_kwargs["device"] = torch.device("cpu")
        crosses = (source.device.type == "cuda") != (target.type == "cuda")
        if crosses and not non_blocking:
            self.waits.note()
        if name == "_to_copy":
            if target.type == "cuda":
                return DeviceTensor(func(*bare_args, **bare_kwargs), self, target.index)
            copied = func(*bare_args, **bare_kwargs)
            return self.waits.later(torch.empty_like(copied), copied) if non_blocking and crosses else copied
        out = func(*bare_args, **bare_kwargs)
        if isinstance(args[0], DeviceTensor):
            return args[0] if name == "copy_" else DeviceTensor(out, self, target.index)
        if non_blocking:
            self.waits.later(args[0], args[0].clone())
        return args[0]

    def _place(self, func: Any, name: str, leaves: list[Any], args: Any) -> torch.device:
        """Return the device of an operation; refuse tensors of several."""
        own = next(one.device for one in leaves if isinstance(one, DeviceTensor))
        if name in INDEXING:
            if not isinstance(args[0], DeviceTensor):
                if any(isinstance(one, DeviceTensor) for one in tree_leaves(args[1])):
                    raise RuntimeError(
                        "indices should be either on cpu or on the same device as the indexed tensor (cpu)"
                    )
                raise RuntimeError(MIXED.format(own, "cpu"))
            leaves = [args[0], *(one for one in args[2:] if isinstance(one, Tensor) and one.dim())]
        scalars = torch.Tag.pointwise in func.tags or name in TAKES_HOST_SCALARS or name.startswith("_foreach")
        written = tree_leaves(args[:1]) if name.endswith("_") else []
        for one in leaves:
            if not isinstance(one, Tensor) or one.device == own:
                continue
            if scalars and one.device.type == "cpu" and not one.dim() and all(one is not other for other in written):
                continue
            raise RuntimeError(MIXED.format(own, one.device))
        return own


class OperationMode(TorchDispatchMode):
    """Sends every operation of a thread through the devices; factories need it, for they have no tensor to go by."""

    def __init__(self, devices: Devices) -> None:
        super().__init__()
        self.devices = devices

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.devices.dispatch(func, args, kwargs or {})


class NameMode(TorchFunctionMode):
    """Gives C++ the stand-in where Python names a device of CUDA, which this build of torch does not know."""

    def __init__(self, devices: Devices) -> None:
        super().__init__()
        self.devices = devices

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.device:
            return func(*args, **kwargs)
        if func in (torch.tensor, torch.as_tensor, Tensor.new_tensor) and not (args and isinstance(args[-1], Tensor)):
            return self._from_values(func, *args, **kwargs)
        if func in (Tensor.__getitem__, Tensor.__setitem__) and isinstance(args[0], DeviceTensor):
            args = (args[0], self._indices(args[1], args[0].device), *args[2:])
        if func is Tensor.cuda:
            device, rest = (args[1], args[2:]) if len(args) > 1 else (kwargs.pop("device", None), ())
            place = "cuda" if device is None else torch.device("cuda", device) if isinstance(device, int) else device
            func, args = Tensor.to, (args[0], place, *rest)
        return func(*map(self._named, args), **{name: self._named(value) for name, value in kwargs.items()})

    def _from_values(
        self, func: Any, *args: Any, device: Any = None, requires_grad: bool = False, **kwargs: Any
    ) -> Any:
        """Make the tensor on the host and copy it, as torch does for CUDA; C++ would leave it out for its stand-in."""
        if func is Tensor.new_tensor:
            like, *args = args  # type: ignore[assignment]
            kwargs.setdefault("dtype", like.dtype)
            func, device = torch.tensor, like.device if device is None else device
        with torch.device("cpu") if device is not None else nullcontext():
            values = func(*args, **kwargs)
        values = values if device is None else values.to(self._named(device))
        return values.requires_grad_() if requires_grad else values

    def _indices(self, index: Any, device: torch.device) -> Any:
        """Copy lists and arrays of indices to the device, as torch does for CUDA."""
        if isinstance(index, tuple):
            return tuple(self._indices(one, device) for one in index)
        return self._from_values(torch.tensor, index, device=device) if isinstance(index, list | np.ndarray) else index

    def _named(self, value: Any) -> Any:
        is_name = isinstance(value, torch.device) or (isinstance(value, str) and _NAME.fullmatch(value))
        place = self.devices.resolved(value) if is_name else None
        return torch.device(_STAND_IN, place.index) if place is not None and place.type == "cuda" else value


@contextmanager
def modes(devices: Devices) -> Iterator[None]:
    """Use the devices in this thread."""
    with NameMode(devices), OperationMode(devices):
        yield


def tree_leaves(value: Any) -> list[Any]:
    """Return what the lists, tuples and dictionaries of an operation's arguments hold."""
    if not isinstance(value, list | tuple | dict):
        return [value]
    values = value.values() if isinstance(value, dict) else value
    return [leaf for one in values for leaf in (tree_leaves(one) if isinstance(one, list | tuple | dict) else (one,))]


def tree_map(change: Callable[[Any], Any], value: Any) -> Any:
    """Return the arguments or results of an operation with every leaf changed."""
    if isinstance(value, list | tuple):
        return type(value)([tree_map(change, one) for one in value])
    if isinstance(value, dict):
        return {name: tree_map(change, one) for name, one in value.items()}
    return change(value)


def _bare(value: Any) -> Any:
    """Return what the CPU computes with: no wrapper, no generator of the device, no device that C++ only sees."""
    if isinstance(value, DeviceTensor):
        return value.inner
    return None if isinstance(value, CpuGenerator) and DeviceGenerator.of(value) else value


def _index_waits(args: Any) -> bool:
    """A mask is counted on the device, and an index of the host is copied."""
    indices = [one for one in tree_leaves(args[1]) if isinstance(one, Tensor)]
    return any(one.dtype in (torch.bool, torch.uint8) or not isinstance(one, DeviceTensor) for one in indices)
