"""Write a Stable Diffusion with random weights, for benchmarks: it draws nothing, and costs what one costs.

    python scripts/benchmarks/random_stable_diffusion.py FOLDER
    python scripts/benchmarks/random_stable_diffusion.py FOLDER --architecture sd14 --dtype bfloat16

`small` has latents 4 × 16 × 16, pictures 64 × 64, a UNet of 1.43 million weights that attends to 77 tokens at 8 × 8,
and `small-sdxl` is of that size. `sd14` and `sdxl` are the published architectures of Stable Diffusion 1.4 (4.3 GB in
float32) and SDXL (14 GB). The folder is in diffusers' layout, for any library that reads it. This needs torch,
diffusers and transformers, and not the package.
"""

import argparse
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import torch
from diffusers import DiffusionPipeline

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def _random_pipelines() -> ModuleType:
    """Return `ddpo_env.models.random_pipelines` by its file: where TRL is, the package is not."""
    file = Path(__file__).resolve().parents[2] / "ddpo_env" / "models" / "random_pipelines.py"
    spec = spec_from_file_location("random_pipelines", file)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


pipelines = _random_pipelines()


def build_random_stable_diffusion(seed: int = 0) -> DiffusionPipeline:
    """Return the small pipeline; its weights are the seed's."""
    return pipelines.build_pipeline("small", seed=seed)


def write(folder: Path, architecture: str = "small", dtype: str = "float32", seed: int = 0) -> None:
    """Write the folder of an architecture's pipeline.

    Args:
        folder: to make.
        architecture: a name in `ddpo_env.models.random_pipelines.ARCHITECTURES`.
        dtype: of the weights.
        seed: of the weights.

    Raises:
        ValueError: for another architecture, or a folder that holds something already.
    """
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"folder must be empty or not there; got {str(folder)!r}")
    pipelines.build_pipeline(architecture, dtype=DTYPES[dtype], seed=seed).save_pretrained(folder)


def main() -> int:
    """Write the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--architecture", default="small", choices=tuple(pipelines.ARCHITECTURES))
    parser.add_argument("--dtype", default="float32", choices=tuple(DTYPES), help="of the weights in the files")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    try:
        write(arguments.folder, arguments.architecture, arguments.dtype, arguments.seed)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
