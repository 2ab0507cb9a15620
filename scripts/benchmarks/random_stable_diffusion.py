"""Write a Stable Diffusion with random weights, for benchmarks: its images are noise, and its calls cost the same.

    python scripts/benchmarks/random_stable_diffusion.py FOLDER
    python scripts/benchmarks/random_stable_diffusion.py FOLDER --architecture sd14 --dtype bfloat16

`small` has latents 4 × 16 × 16, images 64 × 64, and a UNet of 1.43 million weights that attends to 77 tokens at 8 × 8.
`small-sdxl` is an SDXL of the same size. `sd14` and `sdxl` are the published architectures of Stable Diffusion 1.4
(4.3 GB in float32) and SDXL (14 GB). The folder has diffusers' layout, so any library that uses diffusers can read it.
The script needs torch, diffusers and transformers; ddpo-env does not have to be installed.
"""

import argparse
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import torch

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def _random_pipelines() -> ModuleType:
    """Load `ddpo_env.models.random_pipelines` from its file, because TRL's environment does not have ddpo-env."""
    file = Path(__file__).resolve().parents[2] / "ddpo_env" / "models" / "random_pipelines.py"
    spec = spec_from_file_location("random_pipelines", file)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


pipelines = _random_pipelines()


def write(folder: Path, architecture: str = "small", dtype: str = "float32", seed: int = 0) -> None:
    """Write a pipeline to a folder.

    Args:
        folder: must be empty or not exist yet.
        architecture: a name in `ddpo_env.models.random_pipelines.ARCHITECTURES`.
        dtype: dtype of the weights.
        seed: seed of the weights.

    Raises:
        ValueError: for an unknown architecture, or a folder that is not empty.
    """
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"folder must be empty or not exist yet; got {str(folder)!r}")
    pipelines.build_pipeline(architecture, dtype=DTYPES[dtype], seed=seed).save_pretrained(folder)


def main() -> int:
    """Write the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--architecture", default="small", choices=tuple(pipelines.ARCHITECTURES))
    parser.add_argument("--dtype", default="float32", choices=tuple(DTYPES), help="dtype of the weights in the files")
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
