"""What the learned judge learns, and what it asks next."""

from itertools import combinations

import numpy as np

from rewards.votes.learned_judge import LearnedJudge


def test_it_learns_the_direction_that_wins():
    generator = np.random.default_rng(0)
    truth, judge = np.array([2.0, 0.0, -1.0, 0.0]), LearnedJudge(1.0, 1.0)
    first, second = generator.standard_normal((2, 200, 4))
    judge.choose_pairs(first, [(0, 1)], 1)  # the first batch sets the scale
    wins = (first - second) @ truth > 0
    judge.learn(np.where(wins[:, None], first, second), np.where(wins[:, None], second, first))
    new = generator.standard_normal((100, 4))
    assert np.corrcoef(judge.scores(new), new @ truth)[0, 1] > 0.95


def test_it_asks_about_what_it_does_not_know():
    """The pair after the most different one is of the other feature, and votes on a feature make it less of a question.

    The scores have almost nothing beyond the judge's.
    """
    embeddings = np.array([[0, 0], [1.1, 0], [0, 1], [1.0, 0]])
    judge = LearnedJudge(5.0, 1e6)
    assert judge.choose_pairs(embeddings, [(0, 1), (0, 2), (0, 3)], 2) == [(0, 1), (0, 2)]
    judge.learn(embeddings[[2, 0] * 20], embeddings[[0, 2] * 20])  # equal votes: it stays a close call
    assert judge.choose_pairs(embeddings, [(0, 2), (0, 3)], 1) == [(0, 3)]
    assert judge.choose_pairs(embeddings, [(0, 1), (0, 2)], 9) == [(0, 1), (0, 2)]


def test_it_asks_about_every_image_before_it_asks_again():
    """Images that look alike to the judge differ only in what is their own."""
    judge = LearnedJudge(1.0, 1.0)
    chosen = judge.choose_pairs(np.zeros((6, 2)), list(combinations(range(6), 2)), 3)
    assert sorted(row for pair in chosen for row in pair) == [0, 1, 2, 3, 4, 5]


def test_state_carries_all_that_was_learned():
    judge, other = LearnedJudge(1.0, 1.0), LearnedJudge(1.0, 1.0)
    embeddings = np.random.default_rng(1).standard_normal((4, 3))
    judge.choose_pairs(embeddings, [(0, 1)], 1)
    judge.learn(embeddings[:2], embeddings[2:])
    other.load_state_dict(judge.state_dict())
    np.testing.assert_array_equal(judge.scores(embeddings), other.scores(embeddings))
