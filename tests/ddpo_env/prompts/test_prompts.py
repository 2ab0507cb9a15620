"""Prompt sets, files, lists and functions: what is sampled, how often, and which mistakes are named."""

import itertools
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest

from ddpo_env.prompts import vocabulary
from ddpo_env.prompts.distributions import PROMPT_SETS, PromptDistribution, PromptSet, load_prompts


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.mark.parametrize(
    ("name", "count", "members"),
    [
        ("simple_animals", 45, ["a cat", "an ant", "a hedgehog"]),
        ("animal_activities", 135, ["a cat riding a bike", "an ant playing chess", "a fox washing the dishes"]),
        ("counting", 45 * len(vocabulary.COUNTS), ["two dogs", "three mice", "two geese", "three wolves", "two sheep"]),
        ("held_out_animals", len(vocabulary.HELD_OUT_ANIMALS), ["a penguin", "an owl", "an octopus"]),
        ("everyday_objects", len(vocabulary.EVERYDAY_OBJECTS), ["a car", "an umbrella"]),
        ("activities_of_held_out_animals", 60, ["a penguin riding a bike", "an owl playing chess"]),
        ("held_out_activities", 45, ["a cat reading a book", "an ant reading a book"]),
        ("held_out_activities_of_held_out_animals", 20, ["an owl reading a book"]),
        ("imagenet_animals", 398, ["a tench", "a European fire salamander", "an axolotl", "an ox", "a puffer"]),
    ],
)
def test_named_set_has_its_prompts(name, count, members):
    prompts = load_prompts(name).prompts
    assert len(prompts) == len(set(prompts)) == count
    assert set(members) <= set(prompts)
    assert all(prompt == " ".join(prompt.split()) for prompt in prompts)


def test_imagenet_animals_are_in_class_order():
    prompts = load_prompts("imagenet_animals").prompts
    known = {0: "a tench", 100: "a black swan", 151: "a Chihuahua", 207: "a golden retriever", 281: "a tabby"}
    known |= {291: "a lion", 340: "a zebra", 388: "a giant panda", 397: "a puffer"}
    assert {index: prompts[index] for index in known} == known


def test_held_out_words_are_in_no_set_that_is_trained_on():
    trained = {
        word
        for name in ("simple_animals", "animal_activities")
        for prompt in load_prompts(name).prompts
        for word in prompt.split()
    }
    assert not trained & {*vocabulary.HELD_OUT_ANIMALS, *vocabulary.EVERYDAY_OBJECTS}


def test_counting_carries_questions_and_answers():
    metadata = dict(load_prompts("counting"))["two geese"]
    assert len(metadata["questions"]) == 2
    assert metadata["answers"] == ("two", "geese")


def test_all_prompts_of_a_set_are_sampled_equally_often(rng):
    prompts = load_prompts(["a cat", "a dog", "an ant"])
    counts = Counter(prompts.sample(rng)[0] for _ in range(3000))
    assert set(counts) == {"a cat", "a dog", "an ant"}
    assert all(900 < count < 1100 for count in counts.values())


def test_same_seed_gives_the_same_prompts():
    prompts = load_prompts("simple_animals")
    first, second, other = (
        [prompts.sample(generator)[0] for _ in range(20)] for generator in map(np.random.default_rng, (7, 7, 8))
    )
    assert first == second != other


def test_list_may_carry_metadata(rng):
    prompts = load_prompts(["a cat", ("two dogs", {"answers": ["two"]})])
    assert len(prompts) == 2
    assert list(prompts) == [("a cat", {}), ("two dogs", {"answers": ["two"]})]
    assert prompts.sample(rng) in list(prompts)


def test_sampled_metadata_is_a_copy(rng):
    prompts = load_prompts([("two dogs", {"count": 2})])
    prompts.sample(rng)[1]["count"] = 3
    assert prompts.sample(rng)[1] == {"count": 2}


def test_file_is_read_line_by_line_without_comments(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("\ufeff# two prompts\na café\n  a cat, painted \n# end\n\n", encoding="utf-8")
    for source in (path, str(path)):
        assert load_prompts(source).prompts == ("a café", "a cat, painted")


def test_set_goes_before_a_file_of_the_same_name(tmp_path, monkeypatch):
    (tmp_path / "simple_animals").write_text("a unicorn\n")
    monkeypatch.chdir(tmp_path)
    assert len(load_prompts("simple_animals")) == 45
    assert load_prompts("./simple_animals").prompts == ("a unicorn",)


def test_function_samples_from_the_generator_it_is_given(rng):
    def numbered(generator):
        return f"cat {generator.integers(1000)}"

    drawn = [load_prompts(numbered).sample(np.random.default_rng(3)) for _ in range(2)]
    assert drawn[0] == drawn[1] == (f"cat {np.random.default_rng(3).integers(1000)}", {})
    assert load_prompts(lambda _: ("a cat", {"legs": 4})).sample(rng) == ("a cat", {"legs": 4})


def test_distribution_passes_through(rng):
    class Alternating:
        def __init__(self):
            self.prompts = itertools.cycle([("a cat", {}), ("a dog", {})])

        def sample(self, rng):
            return next(self.prompts)

    alternating = Alternating()
    assert isinstance(alternating, PromptDistribution)
    assert load_prompts(alternating) is alternating
    assert load_prompts(load_prompts("simple_animals")).sample(rng)[0] in load_prompts("simple_animals").prompts


def test_unknown_name_lists_the_valid_ones(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="or an existing text file; got 'simple_animal'") as caught:
        load_prompts("simple_animal")
    assert all(name in str(caught.value) for name in PROMPT_SETS)
    with pytest.raises(ValueError, match=r"existing text file; got '.*missing\.txt'"):
        load_prompts(tmp_path / "missing.txt")
    with pytest.raises(ValueError, match="existing text file"):
        load_prompts(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"bad\.txt' must hold at least one prompt"),
        (b"\n  \n", r"bad\.txt' must hold at least one prompt"),
        (b"# only a comment\n", r"bad\.txt' must hold at least one prompt"),
        (b"a cat\n\na dog\n", r"bad\.txt', line 2: a prompt must not be empty"),
        (b"# animals\na cat\n \t\na dog\n", r"bad\.txt', line 3: a prompt must not be empty"),
        (b"a cat\n\xff\xfe\n", r"bad\.txt' must be UTF-8 text"),
    ],
)
def test_bad_file_is_named_with_its_line(tmp_path, content, message):
    path = tmp_path / "bad.txt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_prompts(path)


@pytest.mark.parametrize(
    ("prompts", "error", "message"),
    [
        ([], ValueError, "prompts must hold at least one prompt"),
        (["a cat", ""], ValueError, r"prompts\[1\] must not be empty"),
        (["a cat", " \n"], ValueError, r"prompts\[1\] must not be empty"),
        ([("", {"a": 1})], ValueError, r"prompts\[0\] must not be empty"),
        (["a cat", 3], TypeError, r"prompts\[1\] must be a string or a pair"),
        ([("a cat", "a dog")], TypeError, r"prompts\[0\] must be a string or a pair"),
        (5, TypeError, "prompts must be the name of a set, a path, prompts in one dimension, .*; got int 5"),
        (None, TypeError, "got None"),
        ("", ValueError, "prompts must be one of simple_animals"),
    ],
)
def test_bad_prompts_are_named(prompts, error, message):
    with pytest.raises(error, match=message):
        load_prompts(prompts)


def test_result_of_a_function_is_checked(rng):
    def nothing(generator):
        return None

    def empty(generator):
        return "  "

    with pytest.raises(TypeError, match="prompt function nothing must be a string"):
        load_prompts(nothing).sample(rng)
    with pytest.raises(ValueError, match="prompt function empty must not be empty"):
        load_prompts(empty).sample(rng)


def test_metadata_must_fit_the_prompts():
    with pytest.raises(ValueError, match="metadata must hold 2 dictionaries; got 1"):
        PromptSet(("a cat", "a dog"), ({},))


def test_module_imports_neither_torch_nor_inflect():
    code = "import sys, ddpo_env.prompts; print(sorted({'torch', 'inflect', 'diffusers'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
