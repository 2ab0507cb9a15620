"""The conditioning of a prompt in a fixed shape: how a watched pipeline's encoded prompt is stored and given back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

Encoded = Mapping[str, Any]
"""By argument name of the pipeline's call: a tensor `(1, ...)`, or a list with one tensor `(tokens, ...)`."""

_NOT_CONDITIONING = ("latents", "timesteps", "sigmas", "generator")


@dataclass(frozen=True)
class ConditioningLayout:
    """The tensors of a prompt's conditioning.

    A text whose length varies is padded with zeros. The pipeline's own mask says which tokens count; a pipeline that
    takes a list of texts without padding gets such a list, and `<name>_length` says how many tokens count.

    Attributes:
        shapes: shape of each tensor for one prompt.
        dtypes: dtype with which the pipeline gets each tensor; floating-point ones get the denoiser's.
        masks: mask of each padded tensor, by the name of the tensor.
        lists: names of the tensors that the pipeline takes as a list.
        images: names of those that it prepares of the prompt's image, and takes from nobody: they are put in their
            place while it prepares others.
    """

    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, torch.dtype]
    masks: dict[str, str]
    lists: frozenset[str]
    images: frozenset[str] = frozenset()

    @classmethod
    def of(
        cls, encoded: list[Encoded], parameters: Mapping[str, Any], source: str, images: frozenset[str] = frozenset()
    ) -> ConditioningLayout:
        """Read the layout off two or more encoded prompts, one of them short and one long.

        Args:
            encoded: what the pipeline made of each prompt.
            parameters: of the pipeline's call, by name; `max_sequence_length` is the length after padding.
            source: of the model, for the message.
            images: names of what was prepared of an image.

        Raises:
            ValueError: for texts of different lengths without a mask, or an image that is not one row.
        """
        shapes: dict[str, tuple[int, ...]] = {}
        dtypes: dict[str, torch.dtype] = {}
        masks: dict[str, str] = {}
        names = [
            name for name in dict.fromkeys(name for one in encoded for name in one) if not _is_constant(name, encoded)
        ]
        lists = frozenset(name for name in names if isinstance(encoded[0][name], list))
        for name in names:
            values = [_text(one[name]) for one in encoded if name in one]
            dtypes[name] = values[0].dtype
            if name in images and {len(value) for value in values} != {1}:
                raise ValueError(f"model {source!r} must prepare one row of one image; its {name} has {len(values[0])}")
            if len({value.shape for value in values}) == 1 and name not in lists:
                shapes.setdefault(name, tuple(values[0].shape[1:]))
                continue
            length = parameters.get("max_sequence_length")
            if not isinstance(length, int):
                raise ValueError(
                    f"model {source!r} must encode prompts to a fixed length, or have a max_sequence_length; it made "
                    f"{' and '.join(str(tuple(value.shape)) for value in values)} of {name}"
                )
            shapes[name] = (length, *values[0].shape[2:])
            if name in lists:
                shapes[f"{name}_length"] = ()
            elif "mask" not in name:
                mask = _mask_of(name, parameters, source)
                masks[name] = mask
                shapes[mask] = (length,)
                dtypes.setdefault(mask, torch.bool)
        return cls(shapes, dtypes, masks, lists, images & shapes.keys())

    def pack(self, encoded: Encoded) -> dict[str, Tensor]:
        """Return an encoded prompt as float32 tensors `(1, *shapes[name])`.

        What was prepared of an image may be left out, and it keeps the shape that it has.
        """
        packed: dict[str, Tensor] = {}
        for name, value in encoded.items():
            if name not in self.shapes:
                continue
            text = _text(value)
            length = self.shapes[name][0] if self.shapes[name] else 0
            missing = length - text.shape[1] if text.ndim > 1 and name not in self.images else 0
            if name in self.masks and encoded.get(self.masks[name]) is None:
                ones = torch.ones(1, text.shape[1], device=text.device)
                packed[self.masks[name]] = pad(ones, (0, missing))
            if name in self.lists:
                packed[f"{name}_length"] = torch.full((1,), text.shape[1], dtype=torch.float32, device=text.device)
            packed[name] = pad(text.float(), (0, 0) * (text.ndim - 2) + (0, missing)) if missing else text.float()
        return {name: packed[name] for name in self.shapes if name in packed or name not in self.images}

    def check_images(self, packed: Mapping[str, Tensor], description: str, source: str) -> None:
        """Refuse a prompt whose image was prepared to another shape than the others'.

        Args:
            packed: the encoded prompt.
            description: of the image.
            source: of the model.

        Raises:
            ValueError: naming both shapes.
        """
        for name in sorted(self.images):
            shape, wanted = tuple(packed[name].shape[1:]), self.shapes[name]
            if shape != wanted:
                raise ValueError(
                    f"images of prompts must be of sizes that model {source!r} brings to one shape; it makes {name} of "
                    f"shape {shape} of {description}, and {wanted} of the first one. Bring the images to one size"
                )

    def zeros(self, rows: int, device: torch.device) -> dict[str, Tensor]:
        """Return a conditioning of zeros `(rows, ...)`; lengths are on the host, which reads them."""
        return {
            name: torch.zeros(rows, *shape, device=device if shape else "cpu") for name, shape in self.shapes.items()
        }

    def arguments(self, conditioning: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Any]:
        """Return conditioning `(batch, ...)` as the pipeline's call takes it: without images."""
        given: dict[str, Any] = {}
        for name in [one for one in self.dtypes if one not in self.images]:
            given[name] = self._as_prepared(name, conditioning, dtype)
            if name in self.lists:
                lengths = conditioning[f"{name}_length"].tolist()
                given[name] = [text[: int(length)] for text, length in zip(given[name], lengths, strict=True)]
        return given

    def prepared_images(self, conditioning: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
        """Return what was prepared of the images, `(batch, ...)`, as the pipeline prepares it."""
        return {name: self._as_prepared(name, conditioning, dtype) for name in sorted(self.images)}

    def _as_prepared(self, name: str, conditioning: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        own = self.dtypes[name]
        return conditioning[name].to(dtype if own.is_floating_point else own)


def conditioning_in(variables: Mapping[str, Any], parameters: Mapping[str, Any], given: Mapping[str, Any]) -> Encoded:
    """Return the arguments of a call that were not given, and that the pipeline made of the prompt.

    Args:
        variables: of the call, before the denoiser.
        parameters: of the call, with their defaults.
        given: arguments of the call.
    """
    return {
        name: variables[name]
        for name, default in parameters.items()
        if default is None and given.get(name) is None
        if name not in _NOT_CONDITIONING and not name.startswith("negative_")
        if _is_text(variables.get(name))
    }


def find_images(
    made: Sequence[Mapping[str, Any]], encoded: Sequence[Encoded], source: str
) -> tuple[list[Encoded], frozenset[str], str | None]:
    """Find what a pipeline makes of a prompt's image.

    Args:
        made: what it prepared, by its name in the call; the first and the last are for two images and the same text.
        encoded: arguments of the call that it made of the same prompts.
        source: of the model, for the message.

    Returns:
        The encoded prompts with what was prepared of the image, its names, and why guidance cannot be used, if so.

    Raises:
        ValueError: if nothing that the denoiser gets depends on the image.
    """
    images = frozenset(
        name
        for name, first in made[0].items()
        if name not in encoded[0] and isinstance(first, Tensor) and isinstance(made[-1].get(name), Tensor)
        # Values on the meta device cannot be compared: there it is whatever is no position.
        if (not name.endswith("ids") if first.device.type == "meta" else _differ(first, made[-1][name]))
    )
    both = encoded[0].keys() & encoded[-1].keys()
    texts = [name for name in sorted(both) if _differ(_text(encoded[0][name]), _text(encoded[-1][name]))]
    if not images and not texts:
        raise ValueError(
            f"model {source!r} must make conditioning of the image of a prompt; it makes none, as pipelines that begin "
            "with the noisy image do, and here an episode begins with noise. If the images are only for the reward, "
            "give that entry of the prompts another name"
        )
    whole: list[Encoded] = [
        {**one, **{name: own[name] for name in sorted(images)}} for one, own in zip(encoded, made, strict=True)
    ]
    problem = f"its negative prompt is encoded together with the image ({', '.join(texts)})" if texts else None
    return whole, images, problem


def guidance_in(conditioning: Mapping[str, Tensor], rows: int) -> float:
    """Return the scale that a denoiser takes as an input.

    Raises:
        ValueError: without a scale, or with different ones.
    """
    scales = conditioning.get("guidance")
    if scales is None or len(set(scales.tolist())) != 1:
        given = ", ".join(conditioning) if scales is None else scales.tolist()
        raise ValueError(
            f"conditioning must have guidance, one scale for all of the {rows} latents (3.5 is FLUX.1-dev's "
            f"default), because this denoiser takes it as an input; got {given}"
        )
    return float(scales[0])


def constants_in(made: Sequence[Mapping[str, Any]]) -> frozenset[str]:
    """Return the names of the tensors that a pipeline prepared alike for each of several prompts."""
    found = {name: [value for one in made if isinstance(value := one.get(name), Tensor)] for name in made[0]}
    return frozenset(name for name, values in found.items() if len(values) == len(made) and _are_equal(values))


def _differ(first: Tensor, second: Tensor) -> bool:
    return first.device.type != "meta" and not _are_equal([first, second])


def _is_constant(name: str, encoded: list[Encoded]) -> bool:
    """Return whether something is the same for every prompt, such as an encoded image. Texts and masks always count."""
    if "mask" in name or "prompt" in name or not all(name in one for one in encoded):
        return False
    return _are_equal([_text(one[name]) for one in encoded])


def _are_equal(values: Sequence[Tensor]) -> bool:
    """Return whether tensors are equal; on the meta device nobody knows."""
    first, *others = values
    return first.device.type != "meta" and all(torch.equal(value, first) for value in others)


def _is_text(value: Any) -> bool:
    return isinstance(value, Tensor) or (isinstance(value, list) and len(value) == 1 and isinstance(value[0], Tensor))


def _text(value: Any) -> Tensor:
    """Return a tensor `(1, ...)`."""
    tensor: Tensor = value[0][None] if isinstance(value, list) else value
    return tensor


def _mask_of(name: str, parameters: Mapping[str, Any], source: str) -> str:
    names = (f"{name}_mask", name.replace("embeds", "attention_mask"), "attention_mask")
    found = [mask for mask in names if mask in parameters]
    if not found:
        raise ValueError(
            f"model {source!r} must take a mask for texts of different lengths; its call takes none of "
            f"{', '.join(names)}"
        )
    return found[0]
