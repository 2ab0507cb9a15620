"""Whether a model's pipeline gets the image of each prompt: prompts have images, and the pipeline's call takes one.

The arguments of the pipeline's call say so: `image` is then `prompt:64x48` instead of one image for all prompts, with
the width and the height in pixels of the prompts' images, on which the shape of the conditioning depends.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
from diffusers import DiffusionPipeline

from ddpo_env.models.families.encoded_prompts import size_of_prompt_images
from ddpo_env.models.families.pipeline_model import PipelineModel
from ddpo_env.models.loading import find_object
from ddpo_env.models.protocol import DiffusionModel, abilities_of
from ddpo_env.models.sources import BUNDLED_MODELS, family_in, resolve_source
from ddpo_env.prompts.distributions import PromptDistribution, PromptSet
from ddpo_env.prompts.images import IMAGE, describe_image


def have_images(prompts: PromptDistribution) -> bool:
    """Return whether prompts of a finite set have images."""
    return isinstance(prompts, PromptSet) and any(IMAGE in metadata for metadata in prompts.metadata)


def with_prompt_images(
    model: str | Path | DiffusionPipeline | DiffusionModel,
    prompts: PromptDistribution,
    arguments: Mapping[str, Any] | None,
    download: bool = True,
) -> Mapping[str, Any] | None:
    """Return the arguments of a pipeline's call, with the image of each prompt if there is one and the call takes it.

    Args:
        model: as `load_model` takes it.
        prompts: of which a finite set may have images.
        arguments: of the call; `None`: those that `load_model` takes then.
        download: whether the index of a pipeline on the Hub is downloaded; without, nothing is known of such a
            pipeline, and the arguments are returned as they are.

    Raises:
        ValueError: for a set of which only some prompts have an image, or one that cannot be read; or if the arguments
            have one image for all prompts.
    """
    if not have_images(prompts) or not takes_image(model, download):
        return arguments
    assert isinstance(prompts, PromptSet)
    known = find_object(model)
    own = abilities_of(known).arguments if arguments is None and isinstance(known, DiffusionModel) else arguments or {}
    sizes = []
    for text, metadata in prompts:
        if IMAGE not in metadata:
            raise ValueError(
                f"prompts must all have an {IMAGE}, or none of them, because the pipeline's call takes it; "
                f"got {text!r} without"
            )
        sizes.append(describe_image(metadata[IMAGE], f"{IMAGE} of prompt {text!r}").size)
    if size_of_prompt_images(own.get(IMAGE)) is not None:
        return arguments
    if own.get(IMAGE) is not None:
        raise ValueError(
            f"pipeline_arguments must not have an {IMAGE} if every prompt has one; if those are only for the reward, "
            "give that entry of the prompts another name"
        )
    return {**own, IMAGE: "prompt:{}x{}".format(*sizes[0])}


def takes_image(model: str | Path | DiffusionPipeline | DiffusionModel, download: bool = True) -> bool | None:
    """Return whether a model has a pipeline whose call takes an image; `None` if that is not known without a download.

    The arguments are those of `with_prompt_images`.
    """
    known = find_object(model)
    if isinstance(known, PipelineModel):
        return IMAGE in known.watched.parameters
    pipeline_class: Any = type(known)
    if isinstance(known, str | Path):
        location = resolve_source(known)
        if location in BUNDLED_MODELS:
            return False
        if not (download or Path(location).exists()):
            return None
        pipeline_class = getattr(diffusers, family_in(location, with_weights=False)[1].class_name)
    elif not isinstance(known, DiffusionPipeline):
        return False
    return IMAGE in inspect.signature(pipeline_class.__call__).parameters
