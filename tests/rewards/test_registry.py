"""From a name, `module:function` or a callable to a reward, and the errors for wrong names."""

import sys

import pytest
from helpers.images import PROMPTS, random_images

from rewards import BUILTIN_REWARDS, evaluate_reward, load_reward


def test_every_built_in_reward_loads():
    for name in BUILTIN_REWARDS:
        assert callable(load_reward(name))


@pytest.mark.parametrize("spec", ["jpg", "", "jpeg compressibility", ":score", "module:", ".module:score"])
def test_unknown_reward_lists_the_valid_ones(spec):
    message = (
        "reward must be one of jpeg_compressibility, .*, points_mixture; or module:function; or a weighted sum such as "
    )
    with pytest.raises(ValueError, match=message) as caught:
        load_reward(spec)
    assert str(caught.value).endswith(f"got {spec!r}")


@pytest.fixture
def user_module(tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text(
        "from dataclasses import dataclass\n"
        "LIMIT = 3\n"
        "def score(images, prompts, metadata):\n    return [len(prompt) for prompt in prompts]\n"
        "def one_argument(images):\n    return 0\n"
        "@dataclass\n"
        "class Scaled:\n"
        "    factor: float = 2.0\n"
        "    def __call__(self, images, prompts, metadata):\n        return [self.factor] * len(images)\n"
    )
    (tmp_path / "needs_more.py").write_text("import a_library_that_is_not_there\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield "my_rewards"
    sys.modules.pop("my_rewards", None)


def test_reward_of_a_module_in_the_current_folder(user_module):
    scores, _ = evaluate_reward(load_reward("my_rewards:score"), random_images(4), PROMPTS, [{}] * 4)
    assert scores.tolist() == [5, 5, 6, 5]


def test_reward_class_is_instantiated_with_its_options(user_module):
    for options, expected in (({}, 2.0), ({"factor": 3.0}, 3.0)):
        reward = load_reward("my_rewards:Scaled", **options)
        assert evaluate_reward(reward, random_images(4), PROMPTS, [{}] * 4)[0].tolist() == [expected] * 4
    with pytest.raises(
        TypeError, match=r"reward my_rewards:Scaled must be a class that takes its options: .*unexpected.*'colour'"
    ):
        load_reward("my_rewards:Scaled", colour="red")


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        ("no_such_module:score", ValueError, "there is no module 'no_such_module'; it must be .* on PYTHONPATH"),
        ("my_rewards.inner:score", ValueError, "there is no module 'my_rewards.inner'"),
        ("my_rewards:scor", ValueError, "module 'my_rewards' has no 'scor'; it has .*score"),
        ("my_rewards:LIMIT", TypeError, r"my_rewards:LIMIT must be callable as \(images, prompts, metadata\); got 3"),
        ("my_rewards:one_argument", TypeError, r"must be callable as \(images, prompts, metadata\): too many"),
        ("needs_more:score", ModuleNotFoundError, "a_library_that_is_not_there"),
    ],
)
def test_mistakes_in_module_and_function_are_named(user_module, spec, error, message):
    with pytest.raises(error, match=message):
        load_reward(spec)


def test_callable_passes_through_unchanged():
    def reward(images, prompts, metadata):
        return [0] * len(images)

    assert load_reward(reward) is reward
    with pytest.raises(ValueError, match="takes no options .*; got device"):
        load_reward(reward, device="cpu")
    with pytest.raises(ValueError, match="jpeg_compressibility takes no options .*; got device"):
        load_reward("jpeg_compressibility", device="cpu")
    with pytest.raises(TypeError, match=r"must be callable as .*; got 3"):
        load_reward(3)
