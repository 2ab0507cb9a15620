"""The verdicts: what a person would say who looks at the same numbers."""

import numpy as np
import pytest
from helpers.run_folders import write_run

from agents.report.charts import charts, sparkline, ticks
from agents.report.run_data import read_run
from agents.report.verdicts import headline, verdicts

RISING = [[0.0, 1.0, 2.0, 3.0], [1.0, 2.1, 3.0, 4.1], [2.0, 3.0, 4.1, 5.0], [3.1, 4.0, 5.0, 6.0]]
FLAT = [[0.0, 1.0, 2.0, 3.0]] * 4


def judged(tmp_path, **arguments):
    """The verdicts by name, and the headline, of a run."""
    run = read_run(write_run(tmp_path / "run", **arguments))
    found = verdicts(run)
    return {one.name: one for one in found}, headline(run, found)


@pytest.mark.parametrize(
    ("holdout", "level", "words"),
    [
        (RISING, "good", "at its best now: 4.525 after iteration 6"),
        (RISING[::-1], "bad", "Use the pretrained model"),
        ([RISING[0], RISING[3], RISING[2], RISING[1]], "bad", "twice in a row. Use the policy in best/"),
        ([RISING[0], RISING[1], RISING[3], RISING[1]], "watch", "once, which can be chance"),
        ([RISING[0], RISING[1], [3.1, 4, 5, 6], [6, 5, 4, 3]], "good", "within two standard errors"),
        (None, "unknown", "--holdout-reward"),
    ],
)
def test_held_out_reward(tmp_path, holdout, level, words):
    found, _ = judged(tmp_path, rewards=RISING, holdout=holdout)
    assert found["Held-out reward"].level == level
    assert words in found["Held-out reward"].words


def test_run_of_an_older_version_is_judged_by_its_means(tmp_path):
    """Without the scores of the samples the difference must be larger than the spread between them."""
    for name, level in (("far", "bad"), ("near", "good")):
        lower = [[value - (9 if name == "far" else 1) for value in RISING[0]]] * 2
        folder = write_run(tmp_path / name, rewards=RISING[:3], holdout=[RISING[0], *lower])
        for record in (folder / "samples" / "images").glob("*.json"):
            record.unlink()
        assert {one.name: one.level for one in verdicts(read_run(folder))}["Held-out reward"] == level


def test_reward_that_rises_while_the_held_out_reward_falls_is_over_optimisation(tmp_path):
    _, (level, sentence) = judged(tmp_path, rewards=RISING, holdout=RISING[::-1])
    assert (level, sentence[:14]) == ("bad", "Over-optimised")


def test_run_without_a_sign_of_over_optimisation_is_told_so_only_with_a_second_reward(tmp_path):
    assert judged(tmp_path / "a", rewards=RISING, holdout=RISING)[1] == ("good", "No sign of over-optimisation.")
    assert judged(tmp_path / "b", rewards=RISING)[1][0] == "unknown"


def test_change_of_the_reward_is_compared_with_its_error_sample_by_sample(tmp_path):
    """Seeds differ by far more than the policies do, so only pairs show the change; samples without a score are out."""
    first, last = np.array([0.0, 10, 20, 30, np.nan]), np.array([1.0, 11, 21.5, 30.5, 99])
    found, _ = judged(tmp_path / "a", rewards=[first, last], prompts=list("abcde"))
    difference = (last - first)[:4]
    error = np.std(difference, ddof=1) / 2
    assert found["Reward"].level == "good"
    assert f"+1 ± {2 * error:.2g}" in found["Reward"].words
    found, _ = judged(tmp_path / "b", rewards=[first, first[[1, 0, 2, 3, 4]]], prompts=list("abcde"))
    assert found["Reward"].level == "watch"
    assert "not measurably changed" in found["Reward"].words


def test_distance_that_grows_without_reward_is_told(tmp_path):
    kl = {"kl_to_pretrained": [0.0, 0.1, 0.2, 0.4]}
    found, _ = judged(tmp_path / "a", rewards=FLAT, measures=kl)
    assert found["Distance from the pretrained model"].level == "watch"
    found, _ = judged(tmp_path / "b", rewards=RISING, measures=kl)
    assert found["Distance from the pretrained model"].level == "good"


@pytest.mark.parametrize(
    ("values", "levels"),
    [((1.05, 0.15, 0.001), "good"), ((0.8, 0.11, 0.0025), "watch"), ((1.4, 0.05, 0.01), "bad")],
)
def test_other_monitors_are_graded_by_their_change(tmp_path, values, levels):
    names = ("output_norm_ratio", "diversity", "grid_energy")
    measures = {name: [first, now] for name, first, now in zip(names, (1.0, 0.16, 0.001), values, strict=True)}
    found, _ = judged(tmp_path, rewards=RISING[:2], measures=measures)
    assert [found[name].level for name in ("Output norm", "Diversity", "Grid pattern")] == [levels] * 3


def test_nothing_is_said_before_the_second_evaluation(tmp_path):
    found, (level, sentence) = judged(tmp_path, rewards=RISING[:1], is_finished=False)
    assert (found, level) == ({}, "unknown")
    assert "second evaluation" in sentence


def test_points_of_a_chart_lie_where_their_values_are(tmp_path):
    run = read_run(write_run(tmp_path / "run", rewards=RISING))
    chart = charts([run])[0]
    heights = {float(text): y for y, text in chart.y_ticks}
    dots = {float(text.split(": ")[1]): y for _, y, text in chart.series[-1].dots}
    low, high = min(heights), max(heights)
    for value, y in dots.items():
        share = (value - low) / (high - low)
        assert y == pytest.approx(heights[low] + share * (heights[high] - heights[low]), abs=0.2)
    left, _, right, _ = chart.box
    assert [x for x, _, _ in chart.series[-1].dots] == pytest.approx(np.linspace(left, right, 4), abs=0.1)


@pytest.mark.parametrize("ends", [(0, 1), (0, 20), (-2.1, -1.35), (0, 0.0136), (-3e6, 1e6), (0.99, 1.01)])
def test_ticks_are_few_and_round(ends):
    found = ticks(*ends)
    assert 2 <= len(found) <= 5
    assert ends[0] - 1e-9 <= found[0] < found[-1] <= ends[1] + 1e-9
    step = found[1] - found[0]
    assert np.allclose(np.diff(found), step)
    assert f"{step:.1e}"[:3] in ("1.0", "2.0", "5.0")


def test_curve_that_does_not_change_has_a_line(tmp_path):
    assert sparkline([(0, 1.0), (5, 1.0)]) == "3.0,14.0 117.0,14.0"
    assert charts([read_run(write_run(tmp_path / "run", rewards=FLAT))])[0].series[-1].line
