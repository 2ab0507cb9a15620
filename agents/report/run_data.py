"""Reads a run folder for the report; nothing in it is executed, and no link in it is followed.

A folder may come from anybody, may be of a run that goes on, or of an older version that stored less.
"""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from agents.config.config_file import read_plain_yaml
from agents.config.reproduction import reproducing_command
from agents.config.train_config import TrainConfig
from agents.report.evaluation_files import EvaluationRecord, evaluation_name, read_evaluation

ITERATION = "time/iterations"
"""Column of `progress.csv` that numbers the rows, as Stable-Baselines3 calls it."""
Curve = list[tuple[int, float]]
"""(iteration, value), in order."""
_ANSWERS = 12
_TAIL_BYTES = 200_000
_MOST_BYTES = 20_000_000


@dataclass(frozen=True)
class LoggedAnswer:
    """One image that a judge saw, with its answers.

    Attributes:
        image: of the log.
        prompt: of the image.
        answers: pairs of question and answer.
        score: `None`: the judge gave none.
    """

    image: Path
    prompt: str
    answers: Sequence[tuple[str, str]]
    score: float | None


@dataclass(frozen=True)
class RunData:
    """What a run folder says about its run.

    Attributes:
        path: of the folder.
        name: of the folder, by which the report calls the run.
        settings: every setting by its name.
        rows: of `progress.csv`, values that are numbers.
        summary: `summary.json`; empty for a run that has not finished.
        error: why the run stopped, if an error stopped it; else empty.
        findings: of `doctor.json`, each with `level`, `name`, `meaning` and `advice`; empty if there is none.
        records: what each evaluation scored, by iteration; none for a run of an older version.
        answers: the last ones of each log of a judge, by the log's folder.
    """

    path: Path
    name: str
    settings: Mapping[str, Any]
    rows: Sequence[Mapping[str, float]]
    summary: Mapping[str, Any]
    error: str
    findings: Sequence[Mapping[str, str]]
    records: Mapping[int, EvaluationRecord]
    answers: Mapping[str, Sequence[LoggedAnswer]]

    def curve(self, column: str) -> Curve:
        """Return the finite values of a column of `progress.csv`; empty if there is no such column."""
        return [(int(row[ITERATION]), row[column]) for row in self.rows if math.isfinite(row.get(column, math.nan))]

    def count(self, name: str) -> int:
        """Return a setting that is a number of samples or iterations; 0 if it is open.

        Raises:
            ValueError: if it is something else.
        """
        value = self.settings.get(name)
        if not isinstance(value, int | None):
            raise ValueError(f"{name} must be a whole number in {str(self.path / 'config.yaml')!r}; got {value!r}")
        return value or 0

    @property
    def iterations(self) -> int:
        """Number of finished iterations."""
        return int(self.rows[-1][ITERATION]) if self.rows else 0

    @property
    def total_iterations(self) -> int:
        """Number of planned iterations."""
        return self.count("iterations") or self.iterations

    @property
    def seconds(self) -> float | None:
        """Wall-clock time; of a run that has not finished, from its start to its last iteration."""
        if "wall_clock_seconds" in self.summary:
            return float(self.summary["wall_clock_seconds"])
        elapsed = self.curve("time/time_elapsed")
        return elapsed[-1][1] if elapsed else None

    @property
    def training_queries(self) -> int:
        """Number of samples that the reward has scored for training."""
        return self.iterations * self.count("samples_per_iteration")

    @property
    def evaluation_queries(self) -> int:
        """Number of held-out samples that the reward has scored."""
        return len(self.curve("eval/reward_mean")) * self.count("eval_samples")

    @property
    def versions(self) -> Mapping[str, str]:
        """Versions of libraries, and the machine; empty for a run that has not finished."""
        parts = (self.summary.get(part) for part in ("versions", "machine"))
        return {str(name): str(value) for part in parts if isinstance(part, dict) for name, value in part.items()}

    @property
    def status(self) -> tuple[str, str]:
        """The state of the run, as a word for its style (`done`, `failed` or `open`) and a short text."""
        if self.summary:
            return "done", "stopped early" if self.summary.get("stopped_early") else "finished"
        if self.error:
            return "failed", f"stopped by an error after iteration {self.iterations}"
        return "open", f"iteration {self.iterations} of {self.total_iterations}"

    @property
    def command(self) -> tuple[str, str]:
        """The command that does the run again, or empty; and why there is none, or empty."""
        changed = (self.path / "config.yaml").stat().st_mtime_ns
        return _command(self.path, int(self.summary.get("processes") or 1), changed)


def read_run(path: Path) -> RunData:
    """Read a run folder.

    Raises:
        ValueError: for a folder that is not a run's, that has a link in it, or a file that is damaged, naming it.
        OSError: if it cannot be read.
    """
    path = path.resolve()
    if not own_file(path / "config.yaml"):
        raise ValueError(f"run must be the folder of a run, with a config.yaml; got {str(path)!r}")
    rows = _rows(path / "progress.csv")
    evaluated = [int(row[ITERATION]) for row in rows if "eval/reward_mean" in row]
    files = {iteration: path / "samples" / "images" / f"{evaluation_name(iteration)}.json" for iteration in evaluated}
    return RunData(
        path=path,
        name=path.name,
        settings=_settings(path / "config.yaml"),
        rows=rows,
        summary=_summary(path / "summary.json"),
        error=_last_line(path / "error.txt"),
        findings=_findings(path / "doctor.json"),
        records={iteration: read_evaluation(file) for iteration, file in files.items() if own_file(file)},
        answers={
            log.parent.relative_to(path).as_posix(): _answers(log)
            for log in sorted((path / "judge").rglob("answers.jsonl"))
            if own_file(log)
        },
    )


@lru_cache(maxsize=8)
def _command(path: Path, processes: int, changed: int) -> tuple[str, str]:
    """Return the command of a run folder and why there is none; `changed` tells versions of its settings apart."""
    try:
        return reproducing_command(TrainConfig.read(path), processes), ""
    except ValueError as error:
        return "", str(error)


def own_file(path: Path) -> bool:
    """Return whether there is a file at an absolute path in a run folder.

    Raises:
        ValueError: if it is a link, or in a folder that is one: it may lead out of the run folder.
    """
    if path.resolve() != path:
        raise ValueError(f"run must not contain links, which may lead out of its folder; {str(path)!r} is one")
    return path.is_file()


def _text(path: Path) -> str:
    """Return the text of a file of a reasonable size; empty if there is none."""
    if not own_file(path):
        return ""
    if path.stat().st_size > _MOST_BYTES:
        raise ValueError(f"{str(path)!r} must have at most {_MOST_BYTES:,} bytes; got {path.stat().st_size:,}")
    return path.read_text(encoding="utf-8", errors="replace")


def _json(path: Path) -> Mapping[str, Any]:
    text = _text(path)
    try:
        content = json.loads(text) if text else {}
    except ValueError as error:
        raise ValueError(f"{str(path)!r} must be JSON; {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{str(path)!r} must hold an object; got {type(content).__name__}")
    return content


def _summary(path: Path) -> Mapping[str, Any]:
    summary = _json(path)
    for name, kinds in (("wall_clock_seconds", int | float), ("processes", int), ("stopped_early", str | None)):
        if name in summary and not isinstance(summary[name], kinds):
            raise ValueError(f"{name} in {str(path)!r} is not what a run writes; got {summary[name]!r}")
    return summary


def _findings(path: Path) -> Sequence[Mapping[str, str]]:
    findings = _json(path).get("findings", [])
    if not isinstance(findings, list) or not all(isinstance(one, dict) for one in findings):
        raise ValueError(f"findings in {str(path)!r} must be a list of objects")
    return [{name: str(one.get(name) or "") for name in ("level", "name", "meaning", "advice")} for one in findings]


def _settings(path: Path) -> Mapping[str, Any]:
    try:
        values = read_plain_yaml(path)
    except ValueError as error:
        raise ValueError(f"{str(path)!r} does not hold settings: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{str(path)!r} must hold settings by name; got {type(values).__name__}")
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= value if isinstance(value, dict) else {name: value}
    return flat


def _rows(path: Path) -> Sequence[Mapping[str, float]]:
    try:
        table = csv.DictReader(io.StringIO(_text(path)), strict=True)
        rows = [{name: float(value) for name, value in row.items() if value} for row in table]
        return sorted((row for row in rows if ITERATION in row), key=lambda row: row[ITERATION])
    except (ValueError, TypeError, csv.Error) as error:
        raise ValueError(f"{str(path)!r} must be the table of metrics that the run wrote; {error}") from None


def _last_line(path: Path) -> str:
    lines = _text(path).strip().splitlines()
    return lines[-1] if lines else ""


def _answers(log: Path) -> Sequence[LoggedAnswer]:
    """Return the last answers of a log; a line that is not whole yet, or damaged, is left out."""
    with log.open("rb") as file:
        start = max(0, log.stat().st_size - _TAIL_BYTES)
        file.seek(start)
        lines = file.read().decode("utf-8", errors="replace").splitlines()
    answers: list[LoggedAnswer] = []
    for line in lines[1 if start else 0 :][-_ANSWERS:]:
        try:
            entry = json.loads(line)
            image, score = str(entry["image"]), entry["score"]
            if not re.fullmatch(r"[0-9]+\.jpg", image):
                continue
            pairs = [(str(question), str(answer)) for question, answer in zip(*_texts(entry), strict=True)]
            number = None if score is None else float(score)
            answers.append(LoggedAnswer(log.parent / image, str(entry["prompt"]), pairs, number))
        except (ValueError, TypeError, KeyError):
            continue
    return [one for one in answers if own_file(one.image)]


def _texts(entry: Mapping[str, Any]) -> tuple[list[Any], list[Any]]:
    return list(entry["questions"]), list(entry["answers"])
