"""What the learned judge learns, and what it asks next."""

import numpy as np

from rewards.votes.learned_judge import LearnedJudge


def test_it_learns_the_direction_that_wins():
    generator = np.random.default_rng(0)
    truth, judge = np.array([2.0, 0.0, -1.0, 0.0]), LearnedJudge(1.0)
    first, second = generator.standard_normal((2, 200, 4))
    judge.choose_pairs(first, [(0, 1)], 1)  # the first batch sets the scale
    wins = (first - second) @ truth > 0
    judge.learn(np.where(wins[:, None], first, second), np.where(wins[:, None], second, first))
    new = generator.standard_normal((100, 4))
    assert np.corrcoef(judge.scores(new), new @ truth)[0, 1] > 0.95


def test_it_asks_about_what_it_does_not_know():
    """Two pairs differ in one feature and one in another; after a pair of the first kind, the other kind comes."""
    embeddings = np.array([[0, 0], [1.1, 0], [0, 1], [1.0, 0]])
    judge = LearnedJudge(5.0)
    assert judge.choose_pairs(embeddings, [(0, 1), (0, 2), (0, 3)], 2) == [(0, 1), (0, 2)]
    judge.learn(embeddings[[2] * 20], embeddings[[0] * 20])
    assert judge.choose_pairs(embeddings, [(0, 1), (0, 2)], 1) == [(0, 1)]
    assert judge.choose_pairs(embeddings, [(0, 1), (0, 2)], 9) == [(0, 1), (0, 2)]


def test_state_carries_all_that_was_learned():
    judge, other = LearnedJudge(1.0), LearnedJudge(1.0)
    embeddings = np.random.default_rng(1).standard_normal((4, 3))
    judge.choose_pairs(embeddings, [(0, 1)], 1)
    judge.learn(embeddings[:2], embeddings[2:])
    other.load_state_dict(judge.state_dict())
    np.testing.assert_array_equal(judge.scores(embeddings), other.scores(embeddings))
