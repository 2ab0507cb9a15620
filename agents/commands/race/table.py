"""What a race prints: its plan, and the table of its contenders."""

from __future__ import annotations

import statistics
from collections.abc import Iterator

from agents.commands.race.halving import Result, Standings
from agents.commands.race.race import Race


def describe_race(race: Race) -> list[str]:
    """Return the plan of a race: its rungs, and the iterations that the budget buys each contender."""
    settings, unit = race.settings, race.settings.budget_unit
    lines = [f"race    at most {amount(settings.budget)} {unit} for a run"]
    for number, rung in enumerate(race.rungs, 1):
        count = f"{rung.contenders} contender{'s' if rung.contenders > 1 else ''}"
        seeds = f"seed{'s' if len(rung.seeds) > 1 else ''} {', '.join(map(str, rung.seeds))}"
        lines.append(f"rung {number}  {count} with {seeds}, to {amount(rung.budget)} {unit} of a run")
    if unit == "seconds":
        return [*lines, "The iterations are known when those of each contender have been timed."]
    lines.append("Iterations of a run to the end of each rung, rounded down:")
    width = max(map(len, race.contenders))
    for name in race.contenders:
        counts = race.iterations(name)
        spent = ", ".join(amount(race.cost(name, count)) for count in counts)
        lines.append(f"  {name:{width}}  {', '.join(f'{count:,}' for count in counts)}  ({spent} {unit})")
    return lines


def table(race: Race) -> str:
    """Return the table of a race, from the first to the last.

    The rewards are means over the held-out samples and over the seeds, at the end of the last rung that a contender has
    ended. With several seeds the range is that of their means.
    """
    standings, has_range = race.standings, max(len(rung.seeds) for rung in race.rungs) > 1
    titles = ["iterations", race.settings.budget_unit, "before", "reward", *(["range"] if has_range else [])]
    titles += [*_second(race), "KL"]
    rows = [["", "contender", *titles, "state"]]
    for place, name in enumerate(standings.order(), 1):
        rung, results = last_results(standings, name)
        numbers = [""] * len(titles)
        if results:
            iterations = max(one.iterations for one in results)
            rewards = [one.reward for one in results]
            numbers = [f"{iterations:,}", amount(race.cost(name, iterations))]
            numbers += [_mean(one.before for one in results), f"{standings.mean_reward(name, rung):.4f}"]
            numbers += [f"{min(rewards):.4f} to {max(rewards):.4f}" if len(rewards) > 1 else ""] if has_range else []
            numbers += [_mean(one.holdout_reward for one in results)] if _second(race) else []
            numbers += [_mean((one.kl for one in results), ".3g")]
        failed = name in standings.failures
        rows.append(["-" if failed else str(place), name, *numbers, _state(standings, name)])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    left = {1, len(widths) - 1}
    return "\n".join(
        "  ".join(
            text.ljust(width) if column in left else text.rjust(width)
            for column, (text, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def result_line(race: Race, name: str) -> str:
    """Return one line about the run of a contender that has just ended a rung, or that failed.

    After its last seed the line has the place of the contender among those that have ended the rung so far.
    """
    if (failure := race.standings.failures.get(name)) is not None:
        return f"rung {failure.rung + 1}  {name}: failed: {failure.reason}"
    last = race.state.results[-1]
    count = f"{last.iterations:,} iteration{'s' if last.iterations != 1 else ''}"
    spent = f"{count}, {amount(race.cost(name, last.iterations))} {race.settings.budget_unit}"
    ranked = race.standings.ranked(last.rung)
    place = f", place {ranked.index(name) + 1} of {len(ranked)} so far" if name in ranked else ""
    return (
        f"rung {last.rung + 1}  {name}, seed {last.seed}: {spent}, reward {last.before:.4f} → {last.reward:.4f}{place}"
    )


def last_results(standings: Standings, name: str) -> tuple[int, list[Result]]:
    """Return the last rung that a contender has ended with every seed, and its results there, or 0 and none."""
    for rung in reversed(range(len(standings.rungs))):
        if results := standings.results(name, rung):
            return rung, results
    return 0, []


def amount(value: float) -> str:
    """Return an amount of a budget: a whole number, or one digit after the point."""
    return f"{value:,.0f}" if value == round(value) else f"{value:,.1f}"


def _state(standings: Standings, name: str) -> str:
    if (failure := standings.failures.get(name)) is not None:
        return f"failed in rung {failure.rung + 1}: {failure.reason}"
    if name == standings.winner:
        return "winner"
    reached, last = standings.reached(name), len(standings.rungs) - 1
    if standings.current is None or reached < standings.current:
        return "finalist" if reached == last else f"out after rung {reached + 1}"
    return f"in rung {reached + 1}"


def _second(race: Race) -> list[str]:
    """Return the title of the second reward, if there is one."""
    name = race.shared.run.holdout_reward
    return [name] if name is not None else []


def _mean(values: Iterator[float | None], form: str = ".4f") -> str:
    """Return the mean of the values; nothing if one is missing."""
    found = list(values)
    known = [value for value in found if value is not None]
    return f"{statistics.fmean(known):{form}}" if len(known) == len(found) else ""
