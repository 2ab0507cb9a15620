"""From a name, `module:function` or a callable to a reward, and the errors for wrong names."""

import sys

import pytest
from helpers.images import PROMPTS, random_images

from rewards import BUILTIN_REWARDS, evaluate_reward, kinds_of, load_reward, parse_options
from rewards.kinds import KINDS


def test_every_built_in_reward_loads():
    for name in BUILTIN_REWARDS:
        assert callable(load_reward(name))


@pytest.mark.parametrize("name", BUILTIN_REWARDS)
def test_built_in_reward_says_which_samples_it_takes(name):
    assert set(kinds_of(load_reward(name))) < set(KINDS), "it would be found out after a whole episode"


@pytest.mark.parametrize("spec", ["jpg", "", "jpeg compressibility", ":score", "module:", ".module:score"])
def test_unknown_reward_lists_the_valid_ones(spec):
    message = (
        "reward must be one of jpeg_compressibility, .*, points_mixture; or module:function; or a weighted sum such as "
    )
    with pytest.raises(ValueError, match=message) as caught:
        load_reward(spec)
    assert f"; got {spec!r}" in str(caught.value)


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
    with pytest.raises(ValueError, match="reward_options of my_rewards:Scaled must be among factor; got colour"):
        load_reward("my_rewards:Scaled", colour="red")


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        ("no_such_module:score", ValueError, "there is no module 'no_such_module'; it must be .* on PYTHONPATH"),
        ("my_rewards.py:score", ValueError, r"on PYTHONPATH; did you mean my_rewards:score\?"),
        ("./my_rewards.py:score", ValueError, r"got '\./my_rewards\.py:score'; did you mean my_rewards:score\?"),
        ("folder/my_rewards.py:score", ValueError, r"did you mean folder\.my_rewards:score\?"),
        ("my_rewards.inner:score", ValueError, "there is no module 'my_rewards.inner'"),
        ("my_rewards:scor", ValueError, "module 'my_rewards' of .*my_rewards.py has no 'scor'; it has .*score"),
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


@pytest.mark.parametrize(
    ("spec", "options", "message"),
    [
        ("vlm_vqa", {"nope": 1}, "reward_options of vlm_vqa must be among model, .*log_per_call; got nope"),
        ("vlm_alignment", {"nope": 1}, "vlm_alignment must be among .*template, .*log_folder.*; got nope"),
        ("vlm_vqa", {"judge_options": 5}, "judge_options must be a dictionary; got 5"),
        ("vlm_vqa", {"judge_options": {"nope": 1}}, "judge_options must be among .*max_new_tokens; got nope"),
        ("vlm_vqa", {"judge_options": {"batch_size": "x"}}, "batch_size must be an integer in .*; got 'x'"),
        ("vlm_vqa", {"judge_options": {"max_new_tokens": 10**9}}, "max_new_tokens must be an integer in .*; got 10+"),
        ("vlm_vqa", {"log_per_call": "4"}, "log_per_call must be an integer in .*; got '4'"),
        ("vlm_vqa", {"log_folder": 5}, "log_folder must be a folder or None; got 5"),
        ("vlm_alignment", {"question": 5}, "question must be a text that is not empty; got 5"),
        ("vlm_alignment", {"template": 5}, "template must be a text that is not empty; got 5"),
        ("vlm_alignment", {"text_layer": "3"}, "layer must be an integer in .*; got '3'"),
        ("clip_score", {"batch_size": 1.5}, "batch_size must be an integer in .*; got 1.5"),
        ("clip_score", parse_options([".".join(["deep"] * 5000) + "=1"]), "clip_score must be among .*; got deep"),
    ],
)
def test_options_are_checked_before_anything_is_loaded(spec, options, message):
    with pytest.raises(ValueError, match=message):
        load_reward(spec, **({"model": "tiny"} | options))
