"""The bundled model's words."""

import pytest

from ddpo_env.prompts import vocabulary
from ddpo_env.prompts.distributions import load_prompts
from ddpo_env.prompts.vocabulary import (
    ACTIVE_ANIMALS,
    ACTIVITIES,
    COUNTS,
    EVERYDAY_OBJECTS,
    HELD_OUT_ACTIVITIES,
    HELD_OUT_ANIMALS,
    SIMPLE_ANIMALS,
)


def test_simple_animals_are_the_45_of_the_paper() -> None:
    assert len(SIMPLE_ANIMALS) == 45
    assert SIMPLE_ANIMALS[:3] == ("cat", "dog", "horse")
    assert SIMPLE_ANIMALS[-3:] == ("gorilla", "hedgehog", "kangaroo")


def test_generalisation_sets_are_large_enough() -> None:
    assert len(HELD_OUT_ANIMALS) >= 15
    assert len(EVERYDAY_OBJECTS) >= 15


def test_no_word_is_in_two_sets_or_twice_in_one() -> None:
    words = (*SIMPLE_ANIMALS, *HELD_OUT_ANIMALS, *EVERYDAY_OBJECTS)
    assert len(set(words)) == len(words)


def test_activities_and_counts_are_the_papers() -> None:
    assert set(ACTIVITIES) == {"washing the dishes", "riding a bike", "playing chess"}
    assert COUNTS == ("two", "three", "four")


def test_a_third_of_the_animals_is_pretrained_with_activities() -> None:
    assert len(set(ACTIVE_ANIMALS)) == 15
    assert set(ACTIVE_ANIMALS) < set(SIMPLE_ANIMALS)


def test_training_prompts_never_have_the_held_out_activity() -> None:
    assert not set(HELD_OUT_ACTIVITIES) & set(ACTIVITIES)
    prompts = [prompt for prompt, _ in load_prompts("animal_activities")]
    assert len(prompts) == 45 * 3
    assert not any(activity in prompt for prompt in prompts for activity in HELD_OUT_ACTIVITIES)


@pytest.mark.parametrize(
    "name",
    [
        "SIMPLE_ANIMALS",
        "HELD_OUT_ANIMALS",
        "EVERYDAY_OBJECTS",
        "ACTIVITIES",
        "HELD_OUT_ACTIVITIES",
        "ACTIVE_ANIMALS",
        "COUNTS",
    ],
)
def test_sets_are_tuples_of_lower_case_words(name: str) -> None:
    words = getattr(vocabulary, name)
    assert isinstance(words, tuple)
    assert all(word == word.lower().strip() and word for word in words)
