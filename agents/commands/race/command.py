"""Race settings against each other: all train under one budget, and the worst leave early (successive halving).

--contenders names a YAML file with settings that compete, by name, such as

    contenders:
      ppo: {learning_rate: [2e-3, 5e-3]}
      nft: {algorithm: nft, learning_rate: 5e-3}

A list of learning rates makes one contender of each. The other options are those of ddpo-train, for all contenders;
a section base of the file may hold them too. --iterations, --seed, --run-dir and --resume are not for races. All start
from the same model, with the same prompts and held-out seeds.

A run may spend --budget, of which the first of K rungs has 1 / reduction^(K-1). After each rung the best contenders,
one in --reduction, rounded up, go on with their runs; they are ranked by the mean reward of the held-out samples, over
all --seeds. The last rung has --final-seeds, by default the same. Contenders differ in the cost of an iteration, so the
budget buys each another number of iterations, rounded down: --dry-run prints them. A contender that fails is out, and
the others go on.

The same command goes on with a race that was stopped. A race ends with race.png and config.yaml, the winner's settings.
With `accelerate launch` or `torchrun`, several processes share the work of each run.
"""

from __future__ import annotations

import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from agents.commands.race.halving import Unit
from agents.config.command_line import CommandLine, parse_settings_line
from agents.output.terminal import (
    BAD_ARGUMENTS,
    EXPECTED,
    INTERRUPTED,
    describe,
    print_error,
    print_line,
    quoted,
    tolerate_encodings,
)
from agents.training.command import FAILED, SIGNALLED, start_of_command

if TYPE_CHECKING:  # imports that take seconds are in `race`, so that --help appears at once
    from agents.commands.race.race import Race
    from agents.distributed import Processes


@dataclass(frozen=True, kw_only=True)
class RaceLine(CommandLine):
    """The settings that all contenders share, and those of the race."""

    contenders: Path | None = None
    """File of the contenders. It must be given."""
    budget: float | None = None
    """What one run of a contender may spend if it stays to the end. It must be given."""
    budget_unit: Unit = "queries"
    """queries: samples that the reward scores; rows: of the denoiser's calls that sample and train; seconds: of
    iterations, timed once for each contender. Evaluations do not count."""
    seeds: tuple[int, ...] = (0,)
    """Every contender trains once with each; held-out seeds follow from them."""
    final_seeds: tuple[int, ...] = ()
    """Seeds of the last rung, which has few contenders. With others than --seeds, those that come out best have not
    been chosen by the luck of these seeds. Default: --seeds."""
    reduction: int = 3
    """One contender in so many goes on to the next rung; if it is the number of contenders, nobody leaves early."""
    output: Path | None = None
    """Folder of the race. Default: races/<name of the file>-<reward>."""


def main() -> int:
    """Parse the command line and run the race: the command `ddpo-race`.

    Returns:
        0 after a race with a winner or a dry run, 1 if no contender is left or something else failed, 2 for arguments
        that are not valid, and 128 plus the signal's number after a signal: 130 for Ctrl-C. The race can go on then.
    """
    tolerate_encodings()
    line = parse_settings_line(RaceLine, description=__doc__)
    try:
        return run_race(line)
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return INTERRUPTED


def run_race(line: RaceLine) -> int:
    """Run the race of a command line; return the exit code of `main`."""
    from agents.commands.race.table import describe_race
    from agents.distributed import Processes
    from agents.training.preparation import start_run_processes

    processes = Processes()
    try:
        processes = start_run_processes(line.config)
        race = prepare_race(line, processes)
    except Exception as error:
        if processes.is_main:
            print_error(describe(error, EXPECTED))
        processes.shutdown(error)
        return BAD_ARGUMENTS
    if processes.is_main:
        print_line("\n".join(describe_race(race)))
    code = 0 if line.dry_run else _train(race)
    processes.shutdown()
    return code


def prepare_race(line: RaceLine, processes: Processes) -> Race:
    """Return the race of a command line, checked; nothing is loaded or written.

    Raises:
        ValueError, TypeError, ImportError: as `read_contenders`, `RaceSettings` and `Race`.
    """
    from agents.commands.race.contenders import read_contenders
    from agents.commands.race.race import Race, RaceSettings

    if line.contenders is None or line.budget is None:
        missing = "contenders" if line.contenders is None else "budget"
        raise ValueError(f"{missing} must be given: --{missing}; --help says what a race needs")
    settings = RaceSettings(
        budget=line.budget,
        budget_unit=line.budget_unit,
        seeds=line.seeds,
        final_seeds=line.final_seeds,
        reduction=line.reduction,
    )
    reward = "".join(letter if letter.isalnum() or letter in "-_" else "-" for letter in line.reward)
    folder = line.output or Path("races") / f"{line.contenders.stem}-{reward}"
    return Race(read_contenders(line.contenders, line.config, folder), settings, folder, processes)


def _train(race: Race) -> int:
    """Train, print how it goes, write the figure and the winner's settings, and return the exit code."""
    from agents.commands.race.table import result_line, table

    processes = race.processes

    def show_table() -> None:
        if race.standings.current is not None:
            print_line(f"\n{table(race)}\n")

    try:
        race.train(on_result=lambda name: print_line(result_line(race, name)), on_rung=show_table)
    except KeyboardInterrupt:
        if processes.is_main:
            print_line("\nStopped; what has been trained is saved. To go on with the race, give the same command:")
            print_line(f"  {quoted(*start_of_command(processes), *sys.argv[1:])}")
        return SIGNALLED + (processes.stopped_by or signal.SIGINT)
    except EXPECTED as error:
        if processes.is_main:
            print_error(describe(error, EXPECTED))
            print_line("What has been trained is saved. To go on with the race, give the same command again.")
        if processes.count > 1 and error is not processes.agreed:
            raise
        return FAILED
    if processes.is_main:
        _conclude(race)
    return 0 if race.standings.winner is not None else FAILED


def _conclude(race: Race) -> None:
    """Write what a race leaves, and say where it is."""
    from agents.commands.doctor.report import write_settings
    from agents.commands.race.figure import race_figure
    from agents.commands.race.table import table
    from agents.config.authority import resume_flags

    print_line(f"\n{table(race)}")
    race_figure(race.folder / "race.png", race)
    print_line(f"\n{race.folder / 'race.png'}    rewards against the budget")
    winner = race.standings.winner
    if winner is None:
        print_error("no contender is left, so there is no winner")
        return
    config = race.winner_config(winner)
    path = write_settings(race.folder, config)
    print_line(f"{race.run_folder(winner, race.settings.final_seeds[0])}    the run of {winner}")
    print_line(f"{path}    its settings; to train with them:")
    print_line(f"  {quoted('ddpo-train', '--config', path, *resume_flags(config.changed(run_dir=race.folder)))}")


if __name__ == "__main__":
    sys.exit(main())
