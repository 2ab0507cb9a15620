"""Show what training did: an HTML file with curves, images, monitors and settings of a run, or of several side by side.

The file holds everything that it shows and needs no network. A run writes its own, `runs/<name>/report.html`, at every
evaluation and when it ends; this command writes it again, compares runs, or serves the report while a run goes on.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from agents.output.files import check_writable
from agents.output.terminal import BAD_ARGUMENTS, print_error, print_line, run_command, tolerate_encodings

DEFAULT_PORT, MOST_PORT = 8631, 65_535


@dataclass(frozen=True, kw_only=True)
class ReportArguments:
    """Which runs to show, and where."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Folders of runs, such as runs/first."""
    output: Path | None = None
    """The file. Default: report.html in the run's folder; of several runs, report.html in the working directory."""
    serve: tyro.conf.FlagCreatePairsOff[bool] = False
    """Write no file, but serve the report to browsers on this machine; an open page renews itself while a run goes
    on. Ctrl-C ends it."""
    port: int | None = None
    """With --serve: the port; 0 for any free one. Default: 8631."""

    def check(self) -> None:
        """Check the arguments before anything is read.

        Raises:
            ValueError: naming the argument, its value and what is valid.
        """
        if not self.runs:
            raise ValueError("runs must be at least one folder of a run, such as runs/first; got none")
        if self.port is not None and not self.serve:
            raise ValueError(f"port must not be given without --serve, as nothing is served; got {self.port}")
        if self.port is not None and not 0 <= self.port <= MOST_PORT:
            raise ValueError(f"port must be between 0 and {MOST_PORT}; got {self.port}")
        if self.serve and self.output is not None:
            raise ValueError(f"output must not be given with --serve, which writes no file; got {str(self.output)!r}")

    def check_places(self) -> None:
        """Refuse what is no folder of a run, and a folder as the file.

        Raises:
            ValueError: naming the argument, its value and what is valid.
        """
        for path in self.runs:
            if not path.is_dir():
                raise ValueError(f"runs must be folders of runs, such as runs/first; got {str(path)!r}")
            if (path / "race.json").exists():
                raise ValueError(
                    f"runs must be folders of runs; {str(path)!r} is that of a race, whose runs are in "
                    "contenders/<name>/seed-<number>"
                )
        if self.output is not None and self.output.is_dir():
            raise ValueError(f"output must be a file; got the folder {str(self.output)!r}")
        if not self.serve:
            check_writable("output", self.file, "file")

    @property
    def file(self) -> Path:
        """Where the report is written."""
        if self.output is not None:
            return self.output
        return (self.runs[0] if len(self.runs) == 1 else Path()) / "report.html"


def main() -> int:
    """Parse the command line, and write or serve the report: the command `ddpo-report`.

    Returns:
        The exit code: 0, or 2 after an error, which is printed.
    """
    tolerate_encodings()
    arguments = tyro.cli(Annotated[ReportArguments, tyro.conf.arg(name="")], description=__doc__)
    if arguments.serve:
        return serve(arguments)
    return run_command(lambda: write(arguments), arguments.file)


def write(arguments: ReportArguments) -> None:
    """Write the report.

    Raises:
        ValueError: for an argument that is not valid, or a folder that is not a run's.
        OSError: if a file cannot be read or written.
    """
    arguments.check()
    arguments.check_places()
    from agents.report.page import write_report

    arguments.file.parent.mkdir(parents=True, exist_ok=True)
    write_report(arguments.file, arguments.runs)


def serve(arguments: ReportArguments) -> int:
    """Serve the report until Ctrl-C; return the exit code of `main`."""
    try:
        arguments.check()
        arguments.check_places()
        from agents.report.server import ReportServer

        server = ReportServer(arguments.runs, DEFAULT_PORT if arguments.port is None else arguments.port)
    except (ValueError, OSError) as error:
        print_error(error)
        return BAD_ARGUMENTS
    with server:
        print_line(f"the report is at {server.address} until Ctrl-C")
        sys.stdout.flush()
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print_line()
    return 0


if __name__ == "__main__":
    sys.exit(main())
