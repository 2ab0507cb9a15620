"""The memory of a denoiser's call in training, counted before there is a model: every tensor's bytes, and no number.

The denoiser's shapes come from `ddpo_env.models.outline`, and its tensors are torch's fake ones, which have a device, a dtype
and a size and no contents. A forward and a backward pass run on them as they would on real ones: with the adapters'
layers, with autocast, with gradient checkpointing, and with the attention's kernel that torch takes on that device. (On
the meta device torch takes the attention that writes all scores down, which no device does: 512 MB a layer instead of
20 in Stable Diffusion's largest.) What is counted is the most bytes that were alive at once: what autograd keeps for
the backward pass, and what forward and backward themselves hold besides at the worst moment. Not counted is what a
kernel takes inside, and what an allocator wastes.
"""

from __future__ import annotations

import weakref
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from agents.policy.lora import LoraTargets, add_lora, copy_for_full_training
from ddpo_env.models.loading import DiffusionModel
from ddpo_env.models.outline import outline_model


class Denoiser(NamedTuple):
    """Which network is trained, and how: all that the memory of its calls depends on, but for their rows.

    Attributes:
        model: bundled name, folder or Hub id.
        resolution: side of the pictures in pixels; `None`: the model's own.
        lora_rank: of the adapters; 0: every weight learns.
        lora_targets: which layers get an adapter.
        gradient_checkpointing: whether activations are recomputed.
        autocast: dtype of the arithmetic, if it is not the weights'.
        dtype: of the frozen weights.
        device: `cpu` or `cuda`, whose kernels are counted; a `cuda` needs a torch that was built for it.
    """

    model: str
    resolution: int | None
    lora_rank: int
    lora_targets: LoraTargets
    gradient_checkpointing: bool
    autocast: torch.dtype | None
    dtype: torch.dtype
    device: str


class Outline(NamedTuple):
    """A model without numbers.

    Attributes:
        model: on the meta device.
        network: what is trained, with its adapters, on fake weights.
        mode: that its fake weights belong to.
    """

    model: DiffusionModel
    network: nn.Module
    mode: FakeTensorMode


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the storages that operations make, as long as they are alive.

    Attributes:
        now: bytes that are alive.
        peak: the most that were.

    Args:
        known: tensors whose storages are not counted, such as weights and inputs.
    """

    def __init__(self, known: list[Tensor]) -> None:
        """Count nothing yet."""
        super().__init__()
        self.now = 0
        self.peak = 0
        self._alive = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and count what it made."""
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return made

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._alive:
            return
        self._alive.add(key)
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, key, storage.nbytes()).atexit = False

    def _forget(self, key: int, size: int) -> None:
        self._alive.discard(key)
        self.now -= size


@lru_cache(maxsize=64)
def call_bytes(denoiser: Denoiser, rows: int) -> int | None:
    """Return the most bytes that a training call of `rows` rows holds at once, beyond weights and inputs.

    Takes a second or two for Stable Diffusion, whatever the rows.

    Returns:
        The bytes, with those of the gradients; `None` for a Hub id whose architecture is not known here.

    Raises:
        ValueError: for a model or a resolution that is not valid.
    """
    outline = outline_denoiser(denoiser)
    if outline is None:
        return None
    with outline.mode:
        inputs = training_inputs(outline.model, rows, denoiser.device)
        counter = LiveBytes([*outline.network.parameters(), *outline.network.buffers(), *inputs.values()])
        with counter:
            training_call(outline.model, outline.network, inputs, denoiser.autocast)
    outline.network.zero_grad()
    return counter.peak


def training_inputs(model: DiffusionModel, rows: int, device: str) -> dict[str, Tensor]:
    """Return `latents`, `timestep` and the conditioning of a call of `rows` rows, without contents, on `device`."""
    shapes: dict[str, tuple[int, ...]] = {"latents": model.latent_shape, "timestep": ()}
    shapes |= model.conditioning_shapes
    if getattr(model, "guidance_embeds", False):
        shapes["guidance"] = ()
    return {name: torch.empty(rows, *shape, device=device) for name, shape in shapes.items()}


def training_call(
    model: DiffusionModel, network: nn.Module, inputs: dict[str, Tensor], autocast: torch.dtype | None = None
) -> None:
    """Call a denoiser as a policy does, and differentiate.

    Args:
        model: whose network it is.
        network: with what learns.
        inputs: as `training_inputs` makes them.
        autocast: dtype of the arithmetic, if it is not the weights'.
    """
    conditioning = {name: value for name, value in inputs.items() if name not in ("latents", "timestep")}
    latents = inputs["latents"]
    with torch.autocast(latents.device.type, autocast or torch.bfloat16, enabled=autocast is not None):
        output = model.predict(network, latents, inputs["timestep"], conditioning).float()
    output.square().mean().backward()


@lru_cache(maxsize=1)
def outline_denoiser(denoiser: Denoiser) -> Outline | None:
    """Return a model with its network as it is trained, on fake weights; `None` where its architecture is not known.

    Raises:
        ValueError: for a model or a resolution that is not valid.
    """
    model = outline_model(denoiser.model, denoiser.resolution)
    if model is None:
        return None
    with torch.device("meta"):
        network: nn.Module = (
            add_lora(model.denoiser, denoiser.lora_rank, denoiser.lora_targets)
            if denoiser.lora_rank
            else copy_for_full_training(model.denoiser)
        )
    if denoiser.gradient_checkpointing:
        network.enable_gradient_checkpointing()  # type: ignore[operator]
    mode = FakeTensorMode(allow_non_fake_inputs=True)  # models have constants of their own, on the meta device
    with mode:
        _make_fake(network, denoiser)
    return Outline(model, network.train(), mode)


def _make_fake(network: nn.Module, denoiser: Denoiser) -> None:
    """Give a network on the meta device fake weights on the device, in their dtype; what learns is float32."""
    made: dict[int, Tensor] = {}

    def fake(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:
            is_frozen = tensor.is_floating_point() and not tensor.requires_grad
            empty = torch.empty(
                tensor.shape, dtype=denoiser.dtype if is_frozen else tensor.dtype, device=denoiser.device
            )
            is_weight = isinstance(tensor, nn.Parameter)
            made[id(tensor)] = nn.Parameter(empty, requires_grad=tensor.requires_grad) if is_weight else empty
        return made[id(tensor)]

    for module in network.modules():
        held: list[dict[str, Any]] = [module._parameters, module._buffers]
        for tensors in held:
            tensors.update({name: fake(tensor) for name, tensor in tensors.items() if tensor is not None})
