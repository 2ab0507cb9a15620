"""A race: ordinary runs, one after another, that share a folder, a budget and held-out seeds.

for each rung:
    for each contender that is still in, and each seed of the rung:
        resume its run, or begin it, and train to the iterations that the rung's budget buys
        keep its mean reward on the held-out seeds; a contender that fails is out
    the best contenders go on

<output>/
    race.json                     the results so far
    contenders/<name>/seed-<n>/   the run folders: ddpo-train --resume, ddpo-sample and TensorBoard work on them
    log.txt                       what the runs printed, and the traceback of each that failed
    race.png                      rewards against the budget
    config.yaml                   settings of the winner
    .lock                         held by the process that writes to the folder
"""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from filelock import FileLock, Timeout

from agents.commands.race.contenders import Contender
from agents.commands.race.costs import cost_of, iterations_within
from agents.commands.race.halving import Failure, Result, Rung, Standings, Unit, plan_rungs
from agents.commands.race.runs import Clock, begun_or_resumed, evaluations, train_run
from agents.commands.race.state import RaceState
from agents.config.resolve import resolve
from agents.config.settings import SEED
from agents.config.train_config import TrainConfig
from agents.distributed import Processes
from agents.output.files import refuse_links, remove
from agents.output.terminal import describe
from agents.training.preparation import check_run
from ddpo_env.validation.options import Range, check_fields
from rewards import Reward, is_stateful, reward_name
from rewards.judge.judge_server import JudgeServerError
from rewards.sums.composite import Composite

_TIMED_ITERATIONS = 2
"""The first one warms up, the last one is timed."""
_NOT_A_CONTENDERS_FAULT = (OSError, JudgeServerError)
_NOT_DESCRIBED = ("run_dir", "resume", "iterations", "schedule_iterations", "seed")
"""Settings that the race sets itself."""


@dataclass(frozen=True, kw_only=True)
class RaceSettings:
    """What all contenders of a race have in common beside their base.

    `final_seeds` are those of the last rung, by default `seeds`.

    Raises:
        ValueError: for a value that is not valid, naming the setting.
    """

    budget: Annotated[float, Range(above=0, at_most=1e15)]
    budget_unit: Unit = "queries"
    seeds: tuple[Annotated[int, SEED], ...] = (0,)
    final_seeds: tuple[Annotated[int, SEED], ...] = ()
    reduction: Annotated[int, Range(at_least=2, at_most=1_000_000)] = 3

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.seeds:
            raise ValueError("seeds must be at least one number; got ()")
        object.__setattr__(self, "final_seeds", self.final_seeds or self.seeds)
        for name in ("seeds", "final_seeds"):
            if len(set(seeds := getattr(self, name))) < len(seeds):
                raise ValueError(f"{name} must be different numbers; got {seeds}")


class Race:
    """A race that can begin, or go on.

    With several processes each has a `Race`; together they train one run at a time.

    Args:
        contenders: in the order of their file.
        settings: of the race.
        folder: of the race.
        processes: that train together.

    Attributes:
        rungs: of the race.
        state: the results so far.

    Raises:
        ValueError, TypeError, ImportError: if a contender cannot run, see `check_run`; if the budget is too small for
            an iteration of a contender in the first rung, naming it; if the reward's scores have no fixed scale; if the
            folder holds another race.
    """

    def __init__(
        self, contenders: list[Contender], settings: RaceSettings, folder: Path, processes: Processes | None = None
    ) -> None:
        """Check every contender; nothing is loaded or written."""
        self.settings = settings
        self.folder = folder.resolve()
        self.processes = processes or Processes()
        self._log = self.folder / "log.txt"
        self.contenders = {contender.name: contender for contender in contenders}
        self.rungs: list[Rung] = plan_rungs(
            len(contenders), settings.budget, settings.reduction, settings.seeds, settings.final_seeds
        )
        self._resolved = self._checked()
        if settings.budget_unit != "seconds":
            for name in self.contenders:
                self._check_iterations(name)
        self.state = self.processes.from_main(self._read)

    @property
    def standings(self) -> Standings:
        """Who is in which rung, and who is ahead."""
        return Standings(list(self.contenders), self.rungs, self.state.results, self.state.failures)

    def run_folder(self, name: str, seed: int) -> Path:
        """Return the folder of a contender's run."""
        return self.folder / "contenders" / name / f"seed-{seed}"

    def iterations(self, name: str) -> list[int]:
        """Return the iterations that each rung's budget buys a contender, rounded down.

        Raises:
            ValueError: if the first rung's budget does not buy one, naming the contender.
        """
        unit, config, seconds = self.settings.budget_unit, self._resolved[name], self._seconds(name)
        counts = [iterations_within(config, rung.budget, unit, seconds) for rung in self.rungs]
        if counts[0] == 0:
            one, first, whole = self.cost(name, 1), self.rungs[0].budget, self.settings.budget
            least = one * whole / first
            raise ValueError(
                f"budget must be at least {least:,.6g} for contender {name!r}, an iteration of which takes {one:,.6g} "
                f"{unit}: rung 1 of {len(self.rungs)} has {first:,.6g}; got {whole:,.6g}"
            )
        return counts

    def cost(self, name: str, iterations: int) -> float:
        """Return what iterations of a contender cost, in the unit of the budget."""
        return cost_of(self._resolved[name], iterations, self.settings.budget_unit, self._seconds(name))

    def config(self, name: str, seed: int) -> TrainConfig:
        """Return the settings of a contender's run with the whole budget; its learning rate falls over all of it."""
        config, iterations = self.contenders[name].config, self.iterations(name)[-1]
        schedule = config.optimizer.schedule_iterations or iterations
        full = config.changed(seed=seed, iterations=iterations, schedule_iterations=schedule)
        return full.with_given(config._given)  # the schedule is no wish of the user, where it has no effect

    @property
    def shared(self) -> TrainConfig:
        """Resolved settings of the first contender, of which all contenders share the model and the rewards."""
        return next(iter(self._resolved.values()))

    def winner_config(self, name: str) -> TrainConfig:
        """Return complete settings of a contender, with the whole budget and the first seed, for a run of its own."""
        config = self.config(name, self.settings.final_seeds[0]).changed(run_dir=self.folder)
        return resolve(config, self.processes.count).changed(run_dir=None)

    def train(self, on_result: Callable[[str], None], on_rung: Callable[[], None]) -> None:
        """Train until the race is over.

        Args:
            on_result: called in the main process with a contender's name, each time one of its runs ends a rung.
            on_rung: called in the main process each time a rung ends.

        Raises:
            KeyboardInterrupt: after Ctrl-C, SIGTERM or SIGHUP; the race can go on.
            OSError, JudgeServerError: if the machine or a server fails, which is no contender's fault; it can go on.
            ValueError: if another process writes to the folder.
        """
        with self._locked(), self.processes.stop_signals():
            self.state = self.processes.from_main(self._read)  # only now nobody else writes
            self._write()  # from the first run on, the folder belongs to this race
            while (rung := self.standings.current) is not None:
                for name in self.standings.starters(rung):
                    for seed in self.rungs[rung].seeds:
                        if self._advance(name, rung, seed) and self.processes.is_main:
                            on_result(name)
                if self.processes.is_main:
                    on_rung()

    def _advance(self, name: str, rung: int, seed: int) -> bool:
        """Train one run to the end of a rung, unless it is there or its contender is out; return whether it trained."""
        done = {(one.contender, one.rung, one.seed) for one in self.state.results}
        if (name, rung, seed) in done or name in self.standings.failures:
            return False
        try:
            if self.settings.budget_unit == "seconds" and name not in self.state.seconds:
                self.state.seconds[name] = self._measure(name)
                with self.processes.fail_together():
                    self._check_iterations(name)
            self.state.results.append(self._train(name, rung, seed))
        except _NOT_A_CONTENDERS_FAULT:
            raise
        except Exception as error:
            if self.processes.count > 1 and error is not self.processes.agreed:
                raise  # the other processes do not know of it
            reason = self.processes.from_main(
                partial(self._log_failure, error, f"rung {rung + 1}, {name}, seed {seed}")
            )
            self.state.failures.append(Failure(contender=name, rung=rung, reason=reason))
        self._write()
        return True

    def _log_failure(self, error: Exception, label: str) -> str:
        """Append the traceback of an error, with its causes, to the log, and return the error in one line."""
        with self._log.open("a", encoding="utf-8") as file:
            file.write(f"{label} failed:\n{''.join(traceback.format_exception(error))}")
        return describe(error)

    def _train(self, name: str, rung: int, seed: int) -> Result:
        """Train a run to the end of a rung, from its checkpoint if it has one."""
        iterations = self.iterations(name)[rung]
        config, folder = self.config(name, seed).changed(iterations=iterations), self.run_folder(name, seed)
        clock = Clock(f"rung {rung + 1} of {len(self.rungs)}, {name}, seed {seed}")
        config = begun_or_resumed(config, folder, self.processes)
        train_run(config, clock, self._log, self.processes)
        curve = self.processes.from_main(lambda: evaluations(folder, iterations))
        return Result(contender=name, rung=rung, seed=seed, before=curve[0].reward, **curve[-1]._asdict())

    def _measure(self, name: str) -> float:
        """Return the seconds of an iteration of a contender, from a short run whose folder is deleted."""
        folder, clock = self.folder / "timing", Clock(f"timing {name}")
        config = self.contenders[name].config.changed(iterations=_TIMED_ITERATIONS, eval_interval=0, run_dir=folder)
        self.processes.from_main(lambda: remove(folder))
        train_run(config, clock, self._log, self.processes)
        self.processes.from_main(lambda: remove(folder))
        return self.processes.from_main(lambda: clock.times[-1] - clock.times[-2])

    def _checked(self) -> dict[str, TrainConfig]:
        """Return the resolved settings of every contender, by name, if all of them can run."""
        resolved: dict[str, TrainConfig] = {}
        models = set()
        for name, contender in self.contenders.items():
            config = contender.config.changed(run_dir=self.run_folder(name, self.settings.seeds[0]))
            try:
                _refuse_brake(config)
                resolved[name] = self.processes.from_main(partial(resolve, config, self.processes.count))
                if (model := (config.policy, config.run)) not in models:  # a check takes half a second
                    self._check_model(config)
                models.add(model)
            except Exception as error:
                error.add_note(f"of contender {name!r}")
                raise
        return resolved

    def _check_iterations(self, name: str) -> None:
        """Refuse what a run of a contender would refuse with the iterations of any rung.

        Raises:
            ValueError: naming the setting and the contender; also if the first rung's budget does not buy an iteration.
        """
        for count in self.iterations(name):
            try:
                self._resolved[name].changed(iterations=count).resolved(self.processes.count)
            except ValueError as error:
                error.add_note(f"of contender {name!r}")
                raise

    def _check_model(self, config: TrainConfig) -> None:
        """Refuse what a run of these settings would refuse before it loads anything, and rewards without a scale."""
        reward = check_run(config.changed(run_dir=self.folder / "new"), self.processes).reward
        if name := _without_scale(reward, reward_name(reward)):
            raise ValueError(
                f"reward {name} has a state that follows the samples of a run, so scores of two runs have no common "
                "scale; write the terms of a weighted sum as name:weight:raw"
            )

    def _read(self) -> RaceState:
        """Return the state in the folder, if it is this race's or empty."""
        path = self.folder / "race.json"
        if self.folder.exists() and not path.exists() and (found := sorted(set(os.listdir(self.folder)) - {".lock"})):
            raise ValueError(f"output must be a new folder, or that of a race; {str(self.folder)!r} has {found[0]!r}")
        return RaceState.read(path, self._description())

    def _write(self) -> None:
        self.processes.from_main(lambda: self.state.write(self.folder / "race.json"))

    def _seconds(self, name: str) -> float | None:
        return self.state.seconds.get(name) if self.settings.budget_unit == "seconds" else None

    def _description(self) -> dict[str, Any]:
        contenders: dict[str, dict[str, Any]] = {}
        for name, config in self._resolved.items():
            flat: dict[str, Any] = {}
            for one, value in config.as_dict().items():
                flat |= value if isinstance(value, dict) else {one: value}
            contenders[name] = {one: value for one, value in flat.items() if one not in _NOT_DESCRIBED}
        return {**vars(self.settings), "contenders": contenders}

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Be the only process, or group of processes, that writes to the folder."""
        lock = FileLock(self.folder / ".lock", blocking=False, thread_local=False)

        def acquire() -> None:
            self.folder.mkdir(parents=True, exist_ok=True)
            refuse_links(self.folder)
            try:
                lock.acquire()
            except Timeout as error:
                raise ValueError(
                    f"output {str(self.folder)!r} is in use by another process: wait until it ends, or choose another"
                ) from error

        self.processes.from_main(acquire)
        try:
            yield
        finally:
            lock.release()


def _refuse_brake(config: TrainConfig) -> None:
    if config.run.stop_at_overoptimisation:
        raise ValueError(
            "stop_at_overoptimisation must be False in a race, because a run that it ends has not spent the budget of "
            "the others; got True"
        )


def _without_scale(reward: Reward, name: str) -> str | None:
    """Return the name of a reward, or of a term of a sum, whose scores depend on the samples before."""
    if not isinstance(reward, Composite):
        return name if is_stateful(reward) else None
    moving = [*reward.statistics, *(key for key, term in reward.rewards.items() if _without_scale(term, key))]
    return moving[0] if moving else None
