"""Generate images with a base model or a trained LoRA, for prompts and seeds, and write them to one image grid.

Only diffusers generates the images, so everybody who loads the LoRA gets the same ones. A seed gives the same initial
noise with and without the LoRA; `--compare` puts both images into one grid.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from numpy.typing import NDArray

from agents.terminal import print_error, print_line, tolerate_encodings
from ddpo_env.validation.options import Range, check_fields

BAD_ARGUMENTS, INTERRUPTED = 2, 130
_SEEDS_APART = 1000
"""Distance between the seeds of two columns, so that no two images of a usual grid have the same noise."""
_SEED = Range(at_least=0, at_most=10**18)
"""torch takes seeds below 2**63; this leaves room for the columns."""


@dataclass(frozen=True, kw_only=True)
class SampleArguments:
    """Which images to generate, and with which model."""

    model: str = "tiny"
    """Bundled name, a folder in diffusers' layout, a .safetensors file, or a Hub id."""
    resolution: Annotated[int | None, Range(at_least=1, at_most=65_536)] = None
    """Side of the images in pixels. Default: the model's own; use the one that the LoRA was trained with."""
    pipeline_arguments: tuple[str, ...] = ()
    """Arguments of the pipeline's call as key=value, such as height=832 width=1216."""
    lora: Path | None = None
    """Folder or file of a LoRA, such as runs/<name>/lora."""
    compare: bool = False
    """With --lora: also generate the images without it, in a row above."""
    prompts: tuple[str, ...] = ("a cat", "a fox", "a lion", "a penguin", "a fox riding a bike")
    """Prompts, one per column."""
    seeds: tuple[Annotated[int, _SEED], ...] = (0, 1, 2)
    """Seeds of the initial noise, one per row."""
    num_inference_steps: Annotated[int, Range(at_least=1, at_most=1_000_000)] = 20
    """Denoising steps."""
    guidance_scale: Annotated[float, Range(at_least=0, at_most=1000)] = 1.0
    """Scale of classifier-free guidance; 1 is off. Use the one that the LoRA was trained with."""
    eta: Annotated[float, Range(at_least=0, at_most=1)] = 1.0
    """Noise of the DDIM steps; 0 is the deterministic sampler. Flow matching (SD 3, FLUX) always samples without."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, ..."""
    output: Path = Path("samples.png")
    """The image grid, a PNG file."""

    def check(self) -> None:
        """Check the arguments before anything is loaded.

        Raises:
            ValueError: naming the argument, its value and what is valid.
        """
        check_fields(self)
        if not self.prompts:
            raise ValueError("prompts must be at least one; got none")
        if not self.seeds:
            raise ValueError("seeds must be at least one; got none")
        if self.compare and self.lora is None:
            raise ValueError("compare must be used with a LoRA: add --lora")
        if self.lora is not None:
            from ddpo_env.models.lora.lora_file import find_lora

            find_lora(self.lora)
        _check_output(self.output)


def main() -> int:
    """Parse the command line, generate the images and write the grid: the command `ddpo-sample`.

    Returns:
        The exit code: 0, or 2 after an error in the arguments, which is printed.
    """
    tolerate_encodings()
    arguments = tyro.cli(Annotated[SampleArguments, tyro.conf.arg(name="")], description=__doc__)
    try:
        arguments.check()
        check_model(arguments)
        rows, labels = generate(arguments)
        from agents.evaluation.image_grid import image_grid

        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        image_grid(rows, labels, arguments.prompts).save(arguments.output)
    except (ValueError, TypeError, ImportError, OSError, RuntimeError) as error:
        print_error(error)
        return BAD_ARGUMENTS
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return INTERRUPTED
    print_line(f"wrote {arguments.output}")
    return 0


def check_model(arguments: SampleArguments) -> None:
    """Check model, device, resolution, steps and LoRA against each other, without loading any weights.

    Raises:
        ValueError: naming the argument, its value and what is valid.
    """
    from ddpo_env.models import check_source
    from ddpo_env.models.lora.lora_file import check_lora, find_lora
    from ddpo_env.models.outline import outline_model

    check_source(arguments.model, arguments.device)
    model = outline_model(arguments.model, arguments.resolution, _of_pipeline(arguments))
    if model is None:  # a Hub id, whose architecture is not known before it is downloaded
        return
    limit = model.scheduler.config.num_train_timesteps
    if arguments.num_inference_steps > limit:
        raise ValueError(
            f"num_inference_steps must be at most {limit}, the scheduler's num_train_timesteps; "
            f"got {arguments.num_inference_steps}"
        )
    if arguments.lora is not None:
        check_lora(find_lora(arguments.lora), model.denoiser, arguments.model)


def generate(arguments: SampleArguments) -> tuple[list[NDArray[np.uint8]], list[str]]:
    """Generate the images.

    Returns:
        The rows of the grid, each `(prompts, height, width, 3)` uint8, and the label of each row.

    Raises:
        ValueError: for a model that is no text-to-image pipeline, or a resolution that it cannot have.
        OSError: for a model that cannot be downloaded.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler

    from ddpo_env.models import load_model
    from ddpo_env.models.families.pipeline_model import PipelineModel
    from ddpo_env.sampler.scheduler_table import ddim_of

    model = load_model(
        arguments.model,
        arguments.device,
        resolution=arguments.resolution,
        pipeline_arguments=_of_pipeline(arguments),
        offload_text_encoder=False,  # the pipeline encodes by itself, on its device
    )
    if not isinstance(model, PipelineModel) or model.sample_kind != "image":
        raise ValueError(f"model must be a text-to-image pipeline; got {arguments.model!r}, a {type(model).__name__}")
    pipeline: Any = model.pipeline
    options = model.pipeline_call(arguments.guidance_scale) | {"num_inference_steps": arguments.num_inference_steps}
    if "negative_prompt" in options:
        options["negative_prompt"] = [options["negative_prompt"]] * len(arguments.prompts)
    scheduler = pipeline.scheduler
    if not isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        scheduler, options["eta"] = ddim_of(scheduler), arguments.eta
    options |= dict(zip(("height", "width"), model.size, strict=True))
    before = pipeline.scheduler
    pipeline.set_progress_bar_config(disable=True)
    try:
        pipeline.scheduler = scheduler
        if arguments.lora is not None:
            _load_lora(pipeline, arguments.lora)
        return _rows(pipeline, arguments, options)
    finally:  # the model stays loaded in this process, so it is left as it was
        if arguments.lora is not None:
            pipeline.unload_lora_weights()
        pipeline.scheduler = before


def _of_pipeline(arguments: SampleArguments) -> dict[str, Any]:
    from rewards import parse_options

    return parse_options(arguments.pipeline_arguments, "pipeline_arguments")


def _rows(
    pipeline: Any, arguments: SampleArguments, options: dict[str, Any]
) -> tuple[list[NDArray[np.uint8]], list[str]]:
    import torch

    rows, labels = [], []
    variants = ["base", "trained"] if arguments.compare else ["trained" if arguments.lora else "base"]
    for seed in arguments.seeds:
        for variant in variants:
            if arguments.lora is not None:
                (pipeline.enable_lora if variant == "trained" else pipeline.disable_lora)()
            seeds = range(seed, seed + _SEEDS_APART * len(arguments.prompts), _SEEDS_APART)
            generators = [torch.Generator(pipeline.device).manual_seed(one) for one in seeds]
            images = pipeline(list(arguments.prompts), generator=generators, output_type="np", **options).images
            rows.append((images * 255).round().astype(np.uint8))
            labels.append(f"{variant}\nseed {seed}")
    return rows, labels


def _load_lora(pipeline: Any, lora: Path) -> None:
    """Load a LoRA; diffusers skips weights that it does not know with no more than a warning."""
    from ddpo_env.models.lora.lora_file import find_lora, lora_tensors

    tensors = lora_tensors(find_lora(lora))
    try:
        pipeline.load_lora_weights(tensors)
    except Exception as error:  # of many kinds, as the file is anybody's
        raise ValueError(f"lora {str(lora)!r} does not fit the model: {error}") from error
    if not pipeline.get_list_adapters():
        raise ValueError(f"lora {str(lora)!r} holds no weights for a {type(pipeline).__name__}")


def _check_output(output: Path) -> None:
    """Refuse a file that cannot be written, or whose ending names no image format; nothing is written."""
    from PIL import Image

    endings = Image.registered_extensions()
    if output.suffix.lower() not in endings or endings[output.suffix.lower()] not in Image.SAVE:
        raise ValueError(f"output must end in .png, or another image format's ending; got {str(output)!r}")
    nearest = next(path for path in (output, *output.absolute().parents) if path.exists())
    if (nearest == output and not output.is_file()) or (nearest != output and not nearest.is_dir()):
        raise ValueError(
            f"output must be a file in a folder; {str(nearest)!r} is not what it needs; got {str(output)!r}"
        )
    if not os.access(nearest, os.W_OK):
        raise ValueError(f"output must be a file that can be written; {str(nearest)!r} cannot; got {str(output)!r}")


if __name__ == "__main__":
    sys.exit(main())
