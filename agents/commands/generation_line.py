"""Command lines that generate images: with a model and a LoRA that they name, or as a finished run did."""

from __future__ import annotations

import sys
from collections.abc import Collection
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro

from agents.config.command_line import flags_in
from agents.evaluation.generation import GenerationArguments
from agents.output.terminal import print_error, quoted


@dataclass(frozen=True, kw_only=True)
class GenerationLine(GenerationArguments):
    """What such a command line says beside the arguments."""

    run: Path | None = None
    """Folder of a finished run. What is not named is as the run had it: model, LoRA (the one that it advised when it
    ended), resolution, pipeline arguments, quantization, steps, guidance and noise."""


_Line = TypeVar("_Line", bound=GenerationLine)


def parse_generation_line(kind: type[_Line], description: str | None) -> _Line:
    """Parse the program's arguments; those that are not given come from `--run`, if that is given.

    Args:
        kind: what is parsed.
        description: text of `--help`.

    Raises:
        SystemExit: after `--help`, and after an error, which is printed.
    """
    named: Any = Annotated[kind, tyro.conf.arg(name="")]
    line: _Line = tyro.cli(named, description=description)
    if line.run is None:
        return line
    try:
        default = replace(line, **_settings_of(line.run, line, flags_in(sys.argv[1:])))
    except ValueError as error:
        print_error(error)
        raise SystemExit(2) from error
    parsed: _Line = tyro.cli(named, description=description, default=default)
    return parsed


def _settings_of(folder: Path, line: GenerationArguments, given: Collection[str]) -> dict[str, Any]:
    """Return the arguments with which a finished run would generate.

    Args:
        folder: of the run, which may be anybody's: a model outside it is used only if the line names it.
        line: as it was parsed without them.
        given: names of the arguments on the line.

    Raises:
        ValueError: for a run that is not finished, has no LoRA to use or generated no images, naming what is valid.
    """
    from agents.commands.export.base_model import configurations
    from agents.commands.finished_run import read_run
    from agents.config.authority import reaching_out, setting_flags
    from agents.training.command import generation_arguments
    from ddpo_env.models.families.pipeline_model import PipelineModel
    from ddpo_env.models.outline import outline_model

    run = read_run(folder)
    if "model" not in given and "model" in reaching_out(run.config, folder.resolve()):
        raise ValueError(
            f"run: {str(folder)!r} has a model outside its folder, which a run folder alone must not choose. If you "
            f"trust it, name it again by adding: {quoted(*setting_flags(run.config, ['model']))}"
        )
    config = run.config.changed(model=line.model) if "model" in given else run.config
    lora = line.lora if line.lora is not None else run.lora(None)[1].parent
    place = configurations(config.model)
    if place is None:
        raise ValueError(
            f"run: the model {config.model!r} of {str(folder)!r} is not on this machine; download it, or name a folder "
            "with it by adding --model"
        )
    model = outline_model(place, *config.run.size)
    if not isinstance(model, PipelineModel) or model.sample_kind != "image":
        raise ValueError(f"run must have trained a text-to-image pipeline; {str(folder)!r} has {config.model!r}")
    arguments = generation_arguments(config, model, lora)
    return {one.name: getattr(arguments, one.name) for one in fields(GenerationArguments) if one.name != "device"}
