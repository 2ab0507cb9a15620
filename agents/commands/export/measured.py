"""What `ddpo-evaluate` measured of the LoRA that is exported: its scores, and the best strength."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from agents.algorithms.saving.stored_values import read_json
from agents.evaluation.comparison import BASE, Estimate, Result, best_strengths
from agents.output.terminal import quoted
from ddpo_env.models.files.pipelines import file_fingerprint
from ddpo_env.validation.options import NOT_NEGATIVE, Range, check_value

_COUNT = Annotated[int, Range(at_least=1)]
_RESULT: Mapping[str, Any] = {
    "reward": str,
    "prompt_set": str,
    "strength": Annotated[float, NOT_NEGATIVE],
    "prompts": _COUNT,
    "images": _COUNT,
    "is_share": bool,
}


@dataclass(frozen=True)
class Measured:
    """An evaluation of the LoRA that is exported."""

    results: Sequence[Result]

    @property
    def strengths(self) -> list[float]:
        """The strengths that were compared, the base model's 0 among them."""
        return sorted({one.strength for one in self.results})

    @property
    def best(self) -> dict[str, dict[str, float]]:
        """The strength with the highest mean, by reward and prompt set."""
        return best_strengths(self.results)

    @property
    def strength(self) -> float | None:
        """The strength that is best for every reward and prompt set; `None` if they disagree, or it is the base's."""
        found = {strength for sets in self.best.values() for strength in sets.values()}
        (agreed,) = found if len(found) == 1 else (BASE,)
        return None if agreed == BASE else agreed


def read_evaluation(folder: Path, lora: Path, run: Path) -> Measured:
    """Read the folder that `ddpo-evaluate` wrote.

    Args:
        folder: with `evaluation.json`.
        lora: file of the LoRA that was evaluated.
        run: folder of its run, for the error.

    Raises:
        ValueError: for a folder without an evaluation, a damaged one, or one of another LoRA.
    """
    path = folder / "evaluation.json"
    if not path.is_file():
        raise ValueError(f"evaluation must be the folder that ddpo-evaluate wrote; {str(folder)!r} has no {path.name}")
    try:
        report = read_json(path.read_text(encoding="utf-8"))
        results = [_result(one) for one in report["results"]]
        if not results:
            raise ValueError("it has no results")
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"evaluation {str(path)!r} is damaged: {error!r}") from error
    if report.get("lora_sha256") != file_fingerprint(lora):
        raise ValueError(
            f"evaluation must be of the LoRA that is exported, {str(lora)!r}; {str(folder)!r} is of another one: "
            f"evaluate again with {quoted('ddpo-evaluate', '--run', run, '--lora', lora.parent)}"
        )
    return Measured(results)


def _result(values: Mapping[str, Any]) -> Result:
    for name, hint in _RESULT.items():
        check_value(name, values[name], hint)
    change = None if values["change"] is None else _estimate(values["change"])
    return Result(**{name: values[name] for name in _RESULT}, score=_estimate(values["score"]), change=change)


def _estimate(values: Mapping[str, Any]) -> Estimate:
    interval: Any = None if values["interval"] is None else tuple(values["interval"])
    check_value("mean", values["mean"], float)
    check_value("interval", interval, tuple[float, float] | None)
    return Estimate(values["mean"], interval)
