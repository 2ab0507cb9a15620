"""Score a base model and a trained LoRA on the same prompts and seeds, with 95 % intervals, for several prompt sets.

Only diffusers generates the images, as in ddpo-sample: the same model, prompts and seeds give the same images. Without
--lora and --run only the base model is scored. The folder --output gets the tables (Markdown and JSON), a CSV file with
every image's scores, a figure, and a grid of images per prompt set.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

from agents.commands.generation_line import GenerationLine, parse_generation_line
from agents.evaluation.compare import EvaluateArguments, evaluate_models
from agents.output.terminal import print_line, run_command, tolerate_encodings


@dataclass(frozen=True, kw_only=True)
class EvaluateLine(EvaluateArguments, GenerationLine):
    """The command line of `ddpo-evaluate`."""


def main() -> int:
    """Parse the command line, evaluate and write the results: the command `ddpo-evaluate`.

    Returns:
        The exit code: 0, or 2 after an error, which is printed.
    """
    tolerate_encodings()
    line = parse_generation_line(EvaluateLine, __doc__)
    return run_command(lambda: print_line(evaluate_models(line)), line.output)


if __name__ == "__main__":
    sys.exit(main())
