"""Generate images with a base model or a trained LoRA, for prompts and seeds, and write them to one image grid.

Only diffusers generates the images, so everybody who loads the LoRA gets the same ones. A seed gives the same initial
noise with and without the LoRA; `--compare` puts both images into one grid, and `--film` shows how they come about.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

from agents.commands.generation_line import GenerationLine, parse_generation_line
from agents.evaluation.sample import SampleArguments, write_grid
from agents.output.terminal import run_command, tolerate_encodings


@dataclass(frozen=True, kw_only=True)
class SampleLine(SampleArguments, GenerationLine):
    """The command line of `ddpo-sample`."""


def main() -> int:
    """Parse the command line, generate the images and write the grid: the command `ddpo-sample`.

    Returns:
        The exit code: 0, or 2 after an error in the arguments, which is printed.
    """
    tolerate_encodings()
    line = parse_generation_line(SampleLine, __doc__)
    return run_command(lambda: write_grid(line), line.output)


if __name__ == "__main__":
    sys.exit(main())
