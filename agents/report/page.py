"""The report as one HTML page: nothing in it comes from elsewhere, and whatever comes from files is escaped.

The page's content security policy lets only its own script and style run, and forbids every request.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from agents.config.train_config import TrainConfig
from agents.output.files import write_file
from agents.report.charts import charts, sparkline
from agents.report.pictures import MOST_CHARACTERS, Pictures, picture_uri, pictures_of
from agents.report.run_data import ITERATION, RunData, read_run
from agents.report.verdicts import Level, Verdict, headline, number, verdicts

MOST_RUNS = 6
"""Runs in a report; each has a colour of its own."""
_NUMBERS = {
    ITERATION: "iteration",
    "rollout/reward_mean": "training reward",
    "eval/reward_mean": "reward",
    "eval/holdout_reward_mean": "held-out reward",
    "eval/kl_to_pretrained": "KL",
    "eval/output_norm_ratio": "output norm",
    "eval/diversity": "diversity",
    "eval/grid_energy": "grid energy",
}


@dataclass(frozen=True)
class RunView:
    """A run as the template shows it.

    Attributes:
        data: of its folder.
        pictures: of its held-out samples.
        verdicts: of the monitors.
        headline: level and sentence for all of them.
        answers: of the judge, by the name of the log: images as data URIs with what was asked and answered.
    """

    data: RunData
    pictures: Pictures
    verdicts: Sequence[Verdict]
    headline: tuple[Level, str]
    answers: Mapping[str, Sequence[Mapping[str, Any]]]


def write_report(file: Path, paths: Sequence[Path]) -> None:
    """Write the report of run folders to a file.

    Raises:
        ValueError: as `render`.
        OSError: as `render`, or if the file cannot be written.
    """
    write_file(file.resolve(), render(paths))


def render(paths: Sequence[Path], version: str = "") -> str:
    """Return the report of one run, or of several side by side.

    Args:
        paths: of the run folders.
        version: of a page that a server sends, which asks there for a newer one; empty for a file.

    Raises:
        ValueError: for a folder that is not a run's or is damaged, naming the file; for too many runs.
        OSError: if a file cannot be read.
    """
    if not 1 <= len(paths) <= MOST_RUNS:
        raise ValueError(f"runs must be 1 to {MOST_RUNS} folders; got {len(paths)}")
    runs = [_named(read_run(path), path, paths) for path in paths]
    views = [_view(run, MOST_CHARACTERS // len(runs)) for run in runs]
    style, script = _asset("report.css"), _asset("report.js")
    return (
        _environment()
        .get_template("report.html.j2")
        .render(
            views=views,
            charts=charts(runs),
            numbers=_numbers(runs[0]) if len(runs) == 1 else None,
            **_chosen_settings(runs),
            payload={"runs": [_payload(view) for view in views]},
            style=style,
            script=script,
            policy=_policy(style, script, may_ask=bool(version)),
            version=version,
        )
    )


def _view(run: RunData, most_characters: int) -> RunView:
    found = verdicts(run)
    answers = {
        log: [
            {"image": picture_uri(one.image), "prompt": one.prompt, "answers": one.answers, "score": one.score}
            for one in entries
        ]
        for log, entries in run.answers.items()
    }
    return RunView(run, pictures_of(run, most_characters), found, headline(run, found), answers)


def _named(run: RunData, path: Path, paths: Sequence[Path]) -> RunData:
    """Return a run whose name tells it from the others."""
    names = [one.resolve().name for one in paths]
    if names.count(run.name) == 1:
        return run
    return RunData(**{**vars(run), "name": str(path)})


def _payload(view: RunView) -> dict[str, Any]:
    """Return what the script shows of a run, as JSON has it."""
    run, pictures = view.data, view.pictures
    return {
        "name": run.name,
        "iterations": list(pictures.iterations),
        "images": pictures.images,
        "clips": pictures.clips,
        "notes": [_notes(run, iteration, len(pictures.images[0])) for iteration in pictures.iterations],
        "prompts": _prompts(run, len(pictures.images[0]) if pictures.images else 0),
        "kind": next((record.kind for record in run.records.values()), "image"),
    }


def _prompts(run: RunData, count: int) -> list[str]:
    record = next(iter(run.records.values()), None)
    return list(record.prompts[:count]) if record is not None else [f"sample {index + 1}" for index in range(count)]


def _notes(run: RunData, iteration: int, count: int) -> list[list[tuple[str, str]]]:
    """Return what was said about each shown sample at an evaluation: pairs of name and text."""
    record = run.records.get(iteration)
    if record is None:
        return [[] for _ in range(count)]
    notes: list[list[tuple[str, str]]] = []
    for index in range(count):
        said = [("reward", number(float(record.rewards[index]), 3))]
        if record.holdout_rewards is not None:
            said.append(("held-out reward", number(float(record.holdout_rewards[index]), 3)))
        for name, values in record.details.items():
            value = values[index] if index < len(values) else None
            said.append((name, value if isinstance(value, str) else number(value, 3)))
        notes.append(said)
    return notes


def _numbers(run: RunData) -> tuple[list[str], list[list[str]]]:
    """Return the table of the curves: its head and its rows."""
    known = {name for row in run.rows for name in row}
    columns = [name for name in _NUMBERS if name in known]
    rows = [
        [f"{row[name]:.0f}" if name == ITERATION else number(row.get(name)) for name in columns] for row in run.rows
    ]
    return [_NUMBERS[name] for name in columns], rows


def _chosen_settings(runs: Sequence[RunData]) -> dict[str, list[str]]:
    """Return names of settings: all, those that differ between runs, and those that are not the default in any run."""
    names = list(dict.fromkeys(name for run in runs for name in run.settings))
    compared = [name for name in names if name not in ("run_dir", "resume") and not name.endswith("_sha256")]
    references = {"differing": runs[0].settings, "unusual": _defaults()}
    return {"all_settings": names} | {
        key: [name for name in compared if any(run.settings.get(name) != reference.get(name) for run in runs)]
        for key, reference in references.items()
    }


@lru_cache
def _defaults() -> Mapping[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in TrainConfig().resolved().as_dict().items():
        flat |= value if isinstance(value, dict) else {name: value}
    return flat


@lru_cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("agents.report", "data"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "sparkline": sparkline, "setting": _setting, "duration": _duration}
    return environment


@lru_cache
def _asset(name: str) -> str:
    return (Path(__file__).parent / "data" / name).read_text(encoding="utf-8")


def _policy(style: str, script: str, may_ask: bool) -> str:
    """Return the content security policy: this style, this script, data URIs, and nothing else."""
    hashes = {
        name: base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        for name, text in (("style-src", style), ("script-src", script))
    }
    allowed = [f"{name} 'sha256-{value}'" for name, value in hashes.items()]
    allowed += ["img-src data:", "media-src data:", "base-uri 'none'", "form-action 'none'"]
    allowed += ["connect-src 'self'"] if may_ask else []
    return "; ".join(["default-src 'none'", *allowed])


def _setting(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, list | tuple):
        return " ".join(map(str, value)) or "none"
    return str(value)


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
