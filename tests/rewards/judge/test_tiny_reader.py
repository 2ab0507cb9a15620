"""The reward `tiny_reader`, on renderings that it was not trained on: what it reads, scores and refuses."""

import numpy as np
import pytest
from helpers.held_out_renderings import load_renderings
from helpers.images import random_images

from ddpo_env.prompts.distributions import PROMPT_SETS, load_prompts
from ddpo_env.prompts.vocabulary import (
    ACTIVITIES,
    COUNTS,
    EVERYDAY_OBJECTS,
    HELD_OUT_ACTIVITIES,
    HELD_OUT_ANIMALS,
    SIMPLE_ANIMALS,
)
from rewards import evaluate_reward, load_reward


@pytest.fixture(scope="module")
def reader():
    return load_reward("tiny_reader", device="cpu")


@pytest.fixture(scope="module")
def renderings():
    return load_renderings()


def scored(reader, images, prompts):
    """Scores, and the details word, activity and count, (images, 3)."""
    scores, details = evaluate_reward(reader, images, prompts, [{}] * len(prompts))
    return scores, np.stack([details[name] for name in ("word", "activity", "count")], axis=1)


def test_what_a_rendering_shows_scores_one(reader, renderings):
    """Of animals alone, with activities and in numbers, and of held-out animals and objects with activities."""
    scores, details = scored(reader, *renderings)
    assert scores.mean() >= 0.98
    np.testing.assert_array_equal(scores, details.min(axis=1))
    assert set(np.unique(details)) <= {0, 1}


@pytest.mark.parametrize(
    ("rows", "wrong_prompt", "expected"),
    [
        (slice(0, 45), lambda caption: "a penguin", [0, 1, 1]),
        (slice(0, 45), lambda caption: f"{caption} riding a bike", [1, 0, 1]),
        (slice(60, 75), lambda caption: caption.replace("riding a bike", "reading a book"), [1, 0, 1]),
        (slice(60, 75), lambda caption: caption.replace(" riding a bike", ""), [1, 0, 1]),
        (
            slice(90, 96),
            lambda caption: f"{COUNTS[COUNTS.index(caption.split()[0]) - 1]} {caption.split()[1]}",
            [1, 1, 0],
        ),
    ],
    ids=["another animal", "no activity shown", "another activity", "no activity asked for", "another count"],
)
def test_what_is_wrong_is_in_the_details(reader, renderings, rows, wrong_prompt, expected):
    images, captions = renderings[0][rows], renderings[1][rows]
    scores, details = scored(reader, images, [wrong_prompt(caption) for caption in captions])
    assert scores.mean() <= 0.03
    assert np.abs(details.mean(axis=0) - expected).max() <= 0.1


def test_images_of_nothing_show_no_word(reader, renderings):
    """Grey images, and renderings whose tiles of 8 pixels are in random order."""
    grey = np.full((20, 64, 64, 3), np.arange(100, 220, 6)[:, None, None, None], np.uint8)
    assert np.mean([one.word is None for one in reader.read(grey)]) >= 0.9
    tiles = renderings[0][:45].reshape(45, 8, 8, 8, 8, 3).swapaxes(2, 3).reshape(45, 64, 8, 8, 3)
    tiles = tiles[:, np.random.default_rng(0).permutation(64)]
    shuffled = tiles.reshape(45, 8, 8, 8, 8, 3).swapaxes(2, 3).reshape(45, 64, 64, 3)
    assert np.mean([one.word is None for one in reader.read(shuffled)]) >= 0.9


def test_answers_do_not_depend_on_the_batch(reader, renderings):
    images = renderings[0][::5]
    small = load_reward("tiny_reader", device="cpu", batch_size=3)
    assert small.read(images) == reader.read(images) == [reader.read(image[None])[0] for image in images]


def test_every_prompt_of_the_bundled_words_is_known(reader):
    sets = PROMPT_SETS.keys() - {"imagenet_animals"}
    for prompt, _ in (one for name in sets for one in load_prompts(name)):
        assert reader.asked(prompt).word in (*SIMPLE_ANIMALS, *HELD_OUT_ANIMALS, *EVERYDAY_OBJECTS)
    asked = {(one.word, one.activity) for one in reader.prompts.values()}
    words = (*SIMPLE_ANIMALS, *HELD_OUT_ANIMALS, *EVERYDAY_OBJECTS)
    assert {(word, activity) for word in words for activity in (*ACTIVITIES, *HELD_OUT_ACTIVITIES)} <= asked


@pytest.mark.parametrize("prompt", ["a quokka", "fox", "a fox climbing a tree", "five foxes", ""])
def test_prompts_of_other_words_are_refused(reader, prompt):
    with pytest.raises(ValueError, match="tiny_reader knows only prompts of the bundled model's words.*got"):
        reader(random_images(1, height=64, width=64), [prompt], [{}])


def test_images_of_another_size_are_refused(reader):
    with pytest.raises(ValueError, match=r"\(batch, 64, 64, 3\); got \(2, 32, 64, 3\)"):
        reader(random_images(2, height=32, width=64), ["a fox"] * 2, [{}] * 2)
