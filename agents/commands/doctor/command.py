"""Examine a run before it is paid for: model, sampler, reward, gradients, LoRA, speed and machine, in minutes.

The settings are those of `ddpo-train`. The doctor builds the run with few samples and compares it with the pipeline's
own call. Each check is green, amber or red, and says what its number means and what to do. No weights are kept.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path

import tyro

from agents.config.command_line import SettingsLine, parse_settings_line
from agents.output.files import check_writable
from agents.output.terminal import (
    BAD_ARGUMENTS,
    EXPECTED,
    INTERRUPTED,
    describe,
    print_error,
    print_line,
    tolerate_encodings,
)

HEALTHY, RED = 0, 1


@dataclass(frozen=True, kw_only=True)
class DoctorLine(SettingsLine):
    """The settings of the run, and what the doctor writes."""

    output: Path | None = None
    """Folder for doctor.json and images. Default: doctor/<date>-<time>."""
    fix_up: tyro.conf.FlagCreatePairsOff[bool] = False
    """Also write config.yaml with the settings that the doctor recommends, and print the command to train with them."""


def main() -> int:
    """Parse the command line, examine the run and print the findings: the command `ddpo-doctor`.

    Returns:
        0 without a red finding, 1 with one, 2 for settings with which no run can start, 130 after Ctrl-C.
    """
    tolerate_encodings()
    line = parse_settings_line(DoctorLine, description=__doc__)
    try:
        return doctor(line)
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return INTERRUPTED


def doctor(line: DoctorLine) -> int:
    """Examine the run of a command line; return the exit code of `main`."""
    from agents.commands.doctor.checks import examine_checked
    from agents.commands.doctor.report import (
        print_summary,
        recommended,
        show,
        train_command,
        write_json,
        write_settings,
    )
    from agents.distributed import Processes
    from agents.training.preparation import check_run

    try:
        if line.resume is not None:
            raise ValueError(
                f"resume must not be given to the doctor, which examines new runs; got {str(line.resume)!r}"
            )
        folder = line.output or Path("doctor") / time.strftime("%Y%m%d-%H%M%S")
        check_writable("output", folder, "folder")
        checked = check_run(line.config, Processes())
        folder.mkdir(parents=True, exist_ok=True)
    except Exception as error:
        print_error(describe(error, EXPECTED))
        return BAD_ARGUMENTS
    config = checked.config
    print_line(f"model {config.model}, reward {config.reward}, {config.algorithm}\n")
    findings = examine_checked(checked, folder, show)
    written = [write_json(folder.resolve(), config, findings)]
    if line.fix_up:
        fixed, changes = recommended(config, findings)
        written.append(write_settings(folder.resolve(), fixed))
        print_line(
            f"\nTo train with the recommended settings ({len(changes)} changed, each found alone: examine them again):"
        )
        print_line(f"  {train_command(line.config, changes)}")
    print_summary(findings, [folder / file.name for file in written])
    return RED if any(finding.level == "red" for finding in findings) else HEALTHY


if __name__ == "__main__":
    sys.exit(main())
