"""Draw pictures with a base model or a trained LoRA, by prompt and seed, into one grid file.

Uses nothing but stock diffusers, so the pictures are what anybody gets who loads the LoRA. The same seeds with and
without `--lora` start from the same noise: `--compare` puts both into one grid.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from rich.console import Console


@dataclass(kw_only=True)
class Arguments:
    """What to draw, and with what."""

    model: str = "tiny"
    """Bundled name, a folder in diffusers' layout, or a Hub id."""
    resolution: int | None = None
    """Side of the pictures in pixels. Default: the model's own; use what the LoRA was trained with."""
    lora: Path | None = None
    """Folder of a trained LoRA, such as runs/<name>/lora."""
    compare: bool = False
    """With --lora: also draw the same prompts and seeds without it, in a row above."""
    prompts: tuple[str, ...] = ("a cat", "a fox", "a lion", "a penguin", "a fox riding a bike")
    """What to draw; one column each."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Of the initial noise; one row each."""
    num_inference_steps: int = 20
    """Denoising steps."""
    guidance_scale: float = 1.0
    """Of classifier-free guidance; 1 is off. Use what the LoRA was trained with."""
    eta: float = 1.0
    """Noise of the DDIM steps; 0 is the deterministic sampler. Flow matching (SD 3, FLUX) is always drawn without."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, ..."""
    output: Path = Path("samples.png")
    """The grid, a PNG file."""

    def check(self) -> None:
        """Refuse what cannot be drawn, before anything is loaded.

        Raises:
            ValueError: naming the argument, its value and what is valid.
        """
        if not self.prompts or not all(prompt.strip() for prompt in self.prompts):
            raise ValueError(f"prompts must be at least one, none empty; got {self.prompts}")
        if not self.seeds:
            raise ValueError("seeds must be at least one; got none")
        if self.num_inference_steps < 1:
            raise ValueError(f"num_inference_steps must be at least 1; got {self.num_inference_steps}")
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta must be between 0 and 1; got {self.eta}")
        if self.compare and self.lora is None:
            raise ValueError("compare needs a LoRA to compare with: give --lora")
        if self.lora is not None and not (self.lora / "pytorch_lora_weights.safetensors").is_file():
            raise ValueError(f"lora must be a folder with pytorch_lora_weights.safetensors; got {str(self.lora)!r}")


def draw(arguments: Arguments) -> tuple[list[np.ndarray], list[str]]:
    """Return a row of pictures `(prompts, height, width, 3)` uint8 for every seed, and the rows' labels."""
    from ddpo_env.models.loading import load_model

    model = load_model(arguments.model, arguments.device, resolution=arguments.resolution)
    pipe = getattr(model, "pipeline", None)
    if not hasattr(pipe, "load_lora_weights"):
        raise ValueError(f"model must be a text-to-image pipeline; got {arguments.model!r}, a {type(model).__name__}")
    options = _options(pipe, model.latent_shape, arguments)
    pipe.set_progress_bar_config(disable=True)
    if arguments.lora is not None:
        pipe.load_lora_weights(arguments.lora)
    try:
        return _rows(pipe, arguments, options)
    finally:  # the process may go on to use the model, which is shared
        if arguments.lora is not None:
            pipe.unload_lora_weights()


def _options(pipe: Any, latent_shape: tuple[int, ...], arguments: Arguments) -> dict[str, Any]:
    """Return what this pipeline is called with; DDIM takes the place of every scheduler but flow matching's."""
    from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

    height, width = (side * pipe.vae_scale_factor for side in latent_shape[-2:])
    options: dict[str, Any] = {
        "height": height,
        "width": width,
        "num_inference_steps": arguments.num_inference_steps,
        "guidance_scale": arguments.guidance_scale,
        "output_type": "np",
    }
    if not isinstance(pipe.scheduler, FlowMatchEulerDiscreteScheduler):
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
        return options | {"eta": arguments.eta}
    distilled = getattr(pipe.transformer.config, "guidance_embeds", None)
    if distilled is False and arguments.guidance_scale != 1:  # FLUX.1-schnell has another name for it
        empty = [""] * len(arguments.prompts)
        return options | {"true_cfg_scale": arguments.guidance_scale, "negative_prompt": empty}
    return options


def _rows(pipe: Any, arguments: Arguments, options: dict[str, Any]) -> tuple[list[np.ndarray], list[str]]:
    import torch

    rows, labels = [], []
    variants = ["base", "trained"] if arguments.compare else ["trained" if arguments.lora else "base"]
    for seed in arguments.seeds:
        for variant in variants:
            if arguments.lora is not None:
                (pipe.enable_lora if variant == "trained" else pipe.disable_lora)()
            columns = range(len(arguments.prompts))
            generators = [torch.Generator(pipe.device).manual_seed(seed + 1000 * column) for column in columns]
            pictures = pipe(list(arguments.prompts), generator=generators, **options).images
            rows.append((pictures * 255).round().astype(np.uint8))
            labels.append(f"{variant}\nseed {seed}")
    return rows, labels


def main() -> int:
    """Parse the command line, draw, and write the grid."""
    arguments = tyro.cli(Annotated[Arguments, tyro.conf.arg(name="")], description=__doc__)
    console = Console()
    try:
        arguments.check()
        rows, labels = draw(arguments)
    except (ValueError, OSError) as error:
        Console(stderr=True).print(f"[red]error:[/red] {error}", highlight=False, soft_wrap=True)
        return 2
    from agents.evaluation.image_grid import picture_grid

    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    picture_grid(rows, labels, arguments.prompts).save(arguments.output)
    console.print(f"wrote {arguments.output}", highlight=False, soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
