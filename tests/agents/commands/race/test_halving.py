"""Who trains how far and who goes on, against cases computed by hand; what an iteration costs."""

import pytest
from helpers.micro_agents import micro_config

from agents.commands.race.costs import cost_of, iterations_within
from agents.commands.race.halving import Failure, Result, Standings, plan_rungs


def result(contender, rung, seed, reward):
    return Result(contender=contender, rung=rung, seed=seed, iterations=1, before=0.0, reward=reward)


@pytest.mark.parametrize(
    ("contenders", "reduction", "expected"),
    [
        (20, 3, [(20, 100), (7, 300), (3, 900)]),
        (4, 3, [(4, 300), (2, 900)]),
        (3, 3, [(3, 900)]),
        (1, 2, [(1, 900)]),
        (8, 2, [(8, 225), (4, 450), (2, 900)]),
    ],
)
def test_each_rung_has_a_part_of_the_contenders_and_a_larger_budget(contenders, reduction, expected):
    rungs = plan_rungs(contenders, 900, reduction, (7,), (0, 1))
    assert [(rung.contenders, rung.budget) for rung in rungs] == expected
    assert [rung.seeds for rung in rungs] == [*[(7,)] * (len(expected) - 1), (0, 1)]


def test_the_best_means_go_on_and_failures_are_not_replaced():
    rungs, names = plan_rungs(5, 90, 2, (0, 1), (0, 1)), ["a", "b", "c", "d", "e"]  # 5, 3, 2 contenders
    first = {"a": (1, 3), "b": (4, 0), "c": (9, 9), "d": (0, 1)}  # means 2, 2, 9, 0.5
    results = [result(name, 0, seed, reward) for name, both in first.items() for seed, reward in enumerate(both)]
    failures = [Failure(contender="e", rung=0, reason="NaN")]

    def standings():
        return Standings(names, rungs, results, failures)

    unfinished = Standings(names, rungs, results[:-1], failures)
    assert (unfinished.current, unfinished.winner) == (0, None)
    assert unfinished.order() == ["c", "a", "b", "d", "e"]
    assert standings().current == 1
    assert standings().starters(1) == ["a", "b", "c"]  # d is out
    assert standings().order() == ["c", "a", "b", "d", "e"]
    failures.append(Failure(contender="c", rung=1, reason="NaN"))
    results += [result(name, 1, seed, reward) for name, reward in (("a", 5), ("b", 6)) for seed in (0, 1)]
    assert standings().starters(1) == ["a", "b", "c"]  # d does not come back for c
    assert standings().starters(2) == ["a", "b"]
    results += [result(name, 2, seed, reward) for name, reward in (("a", 8), ("b", 7)) for seed in (0, 1)]
    assert (standings().current, standings().winner) == (None, "a")
    assert standings().order() == ["a", "b", "d", "c", "e"]
    assert [standings().reached(name) for name in names] == [2, 2, 1, 0, 0]


def test_the_last_rung_ends_with_all_of_its_own_seeds():
    rungs = plan_rungs(3, 10, 2, (7,), (0, 1))
    results = [result(name, 0, 7, reward) for name, reward in (("a", 1), ("b", 2), ("c", 3))]
    results += [result(name, 1, seed, reward) for name, reward in (("b", 9), ("c", 5)) for seed in (7, 0)]
    assert Standings(["a", "b", "c"], rungs, results, []).current == 1  # seed 7 does not stand for seed 1
    results += [result(name, 1, 1, reward) for name, reward in (("b", 1), ("c", 6))]
    standings = Standings(["a", "b", "c"], rungs, results, [])
    assert (standings.winner, standings.mean_reward("c", 1)) == ("c", 5.5)
    assert standings.order() == ["c", "b", "a"]


def test_a_race_without_survivors_has_no_winner():
    failures = [Failure(contender=name, rung=0, reason="NaN") for name in "ab"]
    standings = Standings(["a", "b"], plan_rungs(2, 10, 3, (0,), (0,)), [], failures)
    assert (standings.current, standings.winner) == (None, None)


def test_costs_are_those_of_a_count_by_hand():
    """8 samples of 3 steps: 24 rows to sample; 2 of 3 steps train: 16 rows, and as many again for a KL penalty."""
    config = micro_config("points", None).resolved()
    penalised = micro_config("points", None, kl_coef=0.1).resolved()
    guided = micro_config("tiny", None, guidance_scale=2.0).resolved()
    assert [cost_of(one, 3, "rows") for one in (config, penalised, guided)] == [3 * 40, 3 * 56, 2 * 3 * 40]
    assert [iterations_within(config, budget, "rows") for budget in (39, 40, 119.9, 120)] == [0, 1, 2, 3]
    assert [iterations_within(config, budget, "queries") for budget in (7, 8, 24, 31)] == [0, 1, 3, 3]
    assert [iterations_within(config, budget, "seconds", 0.5) for budget in (0.4, 1.0, 2.2)] == [0, 2, 4]


def test_rows_of_shared_noise_follow_the_window():
    """Two samples share a prompt: one call of three in iteration 1, whose window is step 0, and two in iteration 2."""
    settings = {"shared_noise": True, "noise_window": 1, "noise_window_iterations": 1, "timestep_window": (0.0, 1.0)}
    config = micro_config("points", None, **settings).resolved()
    training = 8  # one step of each sample
    assert cost_of(config, 1, "rows") == 4 * 1 + 8 * 2 + training
    assert cost_of(config, 2, "rows") == cost_of(config, 1, "rows") + 4 * 2 + 8 * 1 + training
