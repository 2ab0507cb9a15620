"""Export the LoRA of a finished run as a folder for the Hugging Face Hub: weights, model card, curve and samples.

diffusers reads `pytorch_lora_weights.safetensors`. Where the model has a UNet, a second file is for ComfyUI and
AUTOMATIC1111. Nothing is downloaded or uploaded, and no model is loaded.
"""

from __future__ import annotations

import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Literal

import tyro

from agents.output.files import check_writable
from agents.output.terminal import print_line, quoted, run_command, tolerate_encodings

_REPO_ID = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}", re.ASCII)
_LICENCE = re.compile(r"[a-z0-9][a-z0-9.+-]{0,60}")


@dataclass(frozen=True, kw_only=True)
class ExportArguments:
    """Which run to export, and what its model card cannot know by itself."""

    run: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="RUN")]]
    """Folder of a finished run, such as runs/first."""
    output: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="FOLDER")]]
    """Folder for the export; it must not exist yet."""
    weights: Literal["last", "best"] | None = None
    """The LoRA after the last iteration, or that of the best evaluation. Default: the one that the run advised when it
    ended, the best by the held-out reward if there is one, and else the last."""
    evaluation: Path | None = None
    """Folder that ddpo-evaluate wrote for this LoRA: its tables and the best strength come into the card."""
    base_model: str | None = None
    """Hub id of the base model, or its folder. Needed if the run names a model by a path that others do not have."""
    license: str | None = None
    """The Hub's identifier of the LoRA's licence, such as apache-2.0 or openrail++. Default: unknown."""
    prompt: str | None = None
    """Prompt of the card's example. Default: the first of the run's prompt set; needed for a prompt file."""
    repo_id: str | None = None
    """Where the folder goes on the Hub, as user/name: the card's example loads the LoRA from there."""

    def check(self) -> None:
        """Check the arguments before anything is read.

        Raises:
            ValueError: naming the argument, its value and what is valid.
        """
        if self.output.exists() or self.output.is_symlink():
            raise ValueError(f"output must be a folder that does not exist yet; got {str(self.output)!r}")
        check_writable("output", self.output, "folder")
        if self.license is not None and not _LICENCE.fullmatch(self.license):
            raise ValueError(f"license must be an identifier of the Hub such as apache-2.0; got {self.license!r}")
        if self.repo_id is not None and not _REPO_ID.fullmatch(self.repo_id):
            raise ValueError(f"repo_id must be user/name; got {self.repo_id!r}")
        if self.prompt is not None and (not self.prompt.strip() or "`" in self.prompt or not self.prompt.isprintable()):
            raise ValueError(f"prompt must be one line of text without backticks; got {self.prompt!r}")


def main() -> int:
    """Parse the command line and export the run: the command `ddpo-export`.

    Returns:
        The exit code: 0, or 2 after an error, which is printed.
    """
    tolerate_encodings()
    arguments = tyro.cli(Annotated[ExportArguments, tyro.conf.arg(name="")], description=__doc__)
    return run_command(lambda: export(arguments), arguments.output)


def export(arguments: ExportArguments) -> None:
    """Check everything, write the folder `output`, and print what it holds.

    Raises:
        ValueError: for an argument that is not valid, a run that cannot be exported, or a LoRA that does not fit the
            base model; nothing is written then.
        OSError: for a folder that cannot be written.
    """
    from PIL import Image

    from agents.commands.export.base_model import base_model
    from agents.commands.export.kohya import KOHYA_FILE, write_kohya
    from agents.commands.export.measured import read_evaluation
    from agents.commands.export.model_card import CURVE, SAMPLES, Exported, model_card
    from agents.commands.finished_run import read_run
    from agents.evaluation.image_grid import write_image
    from agents.evaluation.plots import reward_curve
    from agents.output.files import write_file, write_new_folder
    from ddpo_env.models.lora.adapters import read_adapters
    from ddpo_env.models.lora.lora_file import DIFFUSERS_FILE

    arguments.check()
    run = read_run(arguments.run)
    iteration, lora = run.lora(arguments.weights)
    measured = None if arguments.evaluation is None else read_evaluation(arguments.evaluation, lora, arguments.run)
    base = base_model(run.config, arguments.base_model)
    read_adapters(base.model.pipeline, base.model.watched.denoiser_name, lora, base.name)
    with TemporaryDirectory() as scratch:
        kohya = Path(scratch) / KOHYA_FILE
        exported = Exported(
            run=run,
            iteration=iteration,
            base=base,
            measured=measured,
            licence=arguments.license,
            prompt=arguments.prompt,
            repo_id=arguments.repo_id,
            has_samples=run.images is not None,
            without_kohya=write_kohya(lora, kohya, base),
        )
        card = str(model_card(exported))

        def write(folder: Path) -> None:
            shutil.copyfile(lora, folder / DIFFUSERS_FILE)
            if exported.without_kohya is None:
                shutil.copyfile(kohya, folder / KOHYA_FILE)
            if run.images is not None:
                write_image(folder / SAMPLES, Image.open(run.images).convert("RGB"))
            reward_curve(folder / CURVE, [mean for _, mean in run.training], run.evaluations, run.config.reward)
            write_file(folder / "README.md", card)

        write_new_folder(arguments.output.parent.resolve() / arguments.output.name, write)
    print_line(f"LoRA of {arguments.run} after iteration {iteration}, licence {exported.licence_id}")
    if exported.without_kohya is not None:
        print_line(f"no file for ComfyUI or AUTOMATIC1111: {exported.without_kohya}")
    if measured is None:
        print_line("no strength other than 1 was measured: ddpo-evaluate --strengths, then --evaluation")
    elif measured.strength is None:
        print_line("no strength above 0 is the best in every measurement: the card says which is best where")
    else:
        print_line(f"strength {measured.strength:g} has the highest mean")
    print_line("To publish it:")
    print_line(f"  {quoted('hf', 'upload', arguments.repo_id or 'USER/NAME', arguments.output, '.')}")


if __name__ == "__main__":
    sys.exit(main())
