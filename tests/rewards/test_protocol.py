"""Rewards: JPEG sizes against Pillow, the check of every answer a reward can give, and how rewards are named."""

import io
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import rewards
from rewards import evaluate_reward, load_reward, per_sample

PROMPTS = ["a cat", "a dog", "an ant", "a fox"]


def pictures(batch, size=32, seed=0):
    """From flat to noisy, so that every picture has another size."""
    generator = np.random.default_rng(seed)
    noise = generator.integers(0, 256, (batch, size, size, 3))
    share = np.linspace(0.1, 1, batch).reshape(-1, 1, 1, 1)
    return (share * noise).astype(np.uint8)


def evaluate(answer, batch=4):
    return evaluate_reward(lambda *_: answer, pictures(batch), PROMPTS[:batch], [{}] * batch)


def kilobytes(image):
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=95)
    return len(buffer.getvalue()) / 1000


@pytest.mark.parametrize(("name", "sign"), [("jpeg_compressibility", -1), ("jpeg_incompressibility", 1)])
@pytest.mark.parametrize("size", [8, 33, 64])
def test_jpeg_reward_is_the_file_size_in_kilobytes(name, sign, size):
    images = pictures(5, size)
    scores, details = evaluate_reward(load_reward(name), images, ["a cat"] * 5, [{}] * 5)
    assert scores.tolist() == [sign * kilobytes(image) for image in images]
    assert scores.dtype == np.float64
    assert details == {}
    assert len(set(scores)) == 5 or size == 8


def test_jpeg_reward_of_a_known_picture():
    grey = np.full((1, 64, 64, 3), 128, np.uint8)
    (size,) = rewards.jpeg_incompressibility(grey, [""], [{}])
    assert 0.5 < size < 1.0, "a flat picture is little more than the JPEG header"
    (noisy,) = rewards.jpeg_incompressibility(pictures(1, 64) * 10, [""], [{}])
    assert noisy > 3 * size


def test_jpeg_reward_does_not_depend_on_the_batch():
    images = pictures(9)
    together = rewards.jpeg_compressibility(images, PROMPTS, [{}] * 9)
    alone = [rewards.jpeg_compressibility(images[index : index + 1], ["a cat"], [{}])[0] for index in range(9)]
    assert together.tolist() == alone
    assert rewards.jpeg_compressibility(images[:0], [], []).shape == (0,)


@pytest.mark.parametrize(
    "answer",
    [
        np.array([1, 2, 3, 4]),
        np.array([1.0, 2.0, 3.0, 4.0], np.float16),
        [1, 2, 3, 4],
        (1.0, 2, np.float32(3), 4),
        torch.tensor([1, 2, 3, 4]),
        torch.tensor([1.0, 2, 3, 4], requires_grad=True),
        torch.tensor([1.0, 2, 3, 4], dtype=torch.bfloat16),
        [torch.tensor(1.0), torch.tensor(2), torch.tensor(3.0, dtype=torch.bfloat16), 4.0],
        ([1, 2, 3, 4], {}),
    ],
)
def test_any_spelling_of_numbers_becomes_float64(answer):
    scores, details = evaluate(answer)
    assert scores.dtype == np.float64
    assert scores.tolist() == [1.0, 2.0, 3.0, 4.0]
    assert details == {}


def test_integers_can_be_normalised():
    scores, _ = evaluate([1, 2, 3, 4])
    scores -= scores.mean()
    assert scores.tolist() == [-1.5, -0.5, 0.5, 1.5]


def test_booleans_count_as_zero_and_one():
    assert evaluate([True, False, True, False])[0].tolist() == [1, 0, 1, 0]


def test_two_numbers_are_two_scores_and_no_details():
    scores, details = evaluate((0.5, 0.25), batch=2)
    assert scores.tolist() == [0.5, 0.25]
    assert details == {}


def test_details_are_lists_by_name():
    answer = (np.zeros(4), {"answer": ("a", "b", "c", "d"), "size": np.arange(4), "cosine": torch.ones(4)})
    _, details = evaluate(answer)
    assert details == {"answer": ["a", "b", "c", "d"], "size": [0, 1, 2, 3], "cosine": [1, 1, 1, 1]}


def test_reward_gets_pictures_prompts_and_metadata():
    images, metadata = pictures(4), [{"index": index} for index in range(4)]

    def reward(images, prompts, metadata):
        return [
            len(prompt) + one["index"] + int(image.max())
            for image, prompt, one in zip(images, prompts, metadata, strict=True)
        ]

    expected = [len(PROMPTS[index]) + index + int(images[index].max()) for index in range(4)]
    assert evaluate_reward(reward, images, PROMPTS, metadata)[0].tolist() == expected


@pytest.mark.parametrize(
    ("answer", "error", "message"),
    [
        (None, TypeError, "must return scores; got None: is a return statement missing"),
        ((None, {}), TypeError, "must return scores; got None"),
        ("high", TypeError, "must return one number a picture; got 'high'"),
        (["a", "b", "c", "d"], TypeError, "must return one number a picture"),
        ([1.0, None, 2.0, 3.0], TypeError, "must return one number a picture"),
        ([[1.0], [1.0, 2.0], [], []], TypeError, "must return one number a picture"),
        (np.ones(4, complex), TypeError, "must return one number a picture"),
        ({"score": 1}, TypeError, "must return one number a picture"),
        (1.0, ValueError, r"must return shape \(4,\), one score a picture; got \(\)"),
        ([1.0, 2.0, 3.0], ValueError, r"must return shape \(4,\), one score a picture; got \(3,\)"),
        (np.ones((4, 1)), ValueError, r"must return shape \(4,\), one score a picture; got \(4, 1\)"),
        ([], ValueError, r"must return shape .* got \(0,\)"),
        ([1, math.nan, 2, 3], ValueError, r"must be finite; got nan for prompt 'a dog' \(picture 1 of 4, 1 in all\)"),
        (
            [1, 2, -math.inf, math.nan],
            ValueError,
            r"must be finite; got -inf for prompt 'an ant' \(picture 2 of 4, 2 in all\)",
        ),
        (([1, 2, 3, 4], {"size": [1, 2]}), ValueError, "must return 4 values of the detail 'size'"),
        (([1, 2, 3, 4], {"answer": "text"}), ValueError, "must return 4 values of the detail 'answer'"),
        (([1, 2, 3, 4], {"size": 3}), ValueError, "must return 4 values of the detail 'size'"),
    ],
)
def test_bad_answer_is_an_error_that_names_the_reward(answer, error, message):
    def colourfulness(images, prompts, metadata):
        return answer

    with pytest.raises(error, match=f"reward colourfulness {message}"):
        evaluate_reward(colourfulness, pictures(4), PROMPTS, [{}] * 4)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (pictures(4).astype(np.float32), r"got float32 of shape \(4, 32, 32, 3\)"),
        (pictures(4)[0], r"got uint8 of shape \(32, 32, 3\)"),
        (pictures(4).transpose(0, 3, 1, 2), r"got uint8 of shape \(4, 3, 32, 32\)"),
        (np.zeros((4, 2)), r"got float64 of shape \(4, 2\)"),
    ],
)
@pytest.mark.parametrize("spec", ["jpeg_compressibility", "clip_score", "vlm_vqa", "jpeg_compressibility:1:raw"])
def test_rewards_of_pictures_refuse_everything_else(spec, images, message):
    reward = load_reward(spec)
    expected = r"reward \w+ scores pictures, a uint8 array \(batch, height, width, 3\); " + message
    with pytest.raises(ValueError, match=expected):
        evaluate_reward(reward, images, PROMPTS, [{}] * 4)


@pytest.mark.parametrize("samples", [[[0.0, 1.0]] * 4, torch.zeros(4, 2), np.float32(1)])
def test_samples_must_be_an_array_with_a_batch_axis(samples):
    with pytest.raises(ValueError, match=r"samples must be a NumPy array whose first axis is the batch; got .* of sha"):
        evaluate_reward(lambda samples, prompts, metadata: [0] * 4, samples, PROMPTS, [{}] * 4)


def test_a_reward_of_ones_own_takes_whatever_the_model_draws():
    points = np.arange(8.0).reshape(4, 2)
    scores, _ = evaluate_reward(lambda samples, prompts, metadata: samples.sum(1), points, PROMPTS, [{}] * 4)
    assert scores.tolist() == [1, 5, 9, 13]
    marked = rewards.images_only(lambda samples, prompts, metadata: samples.sum(1))
    with pytest.raises(ValueError, match="scores pictures"):
        evaluate_reward(marked, points, PROMPTS, [{}] * 4)


def test_prompts_and_metadata_must_match_the_pictures():
    with pytest.raises(ValueError, match="each of 4 samples; got 3 prompts and 4 dictionaries"):
        evaluate_reward(rewards.jpeg_compressibility, pictures(4), PROMPTS[:3], [{}] * 4)


def test_exception_inside_a_reward_is_not_hidden():
    def broken(images, prompts, metadata):
        raise KeyError("questions")

    with pytest.raises(KeyError, match="questions"):
        evaluate_reward(broken, pictures(4), PROMPTS, [{}] * 4)


def test_per_sample_function_becomes_a_batched_reward():
    @per_sample
    def brightness(image, prompt, metadata):
        assert image.shape == (32, 32, 3)
        return image.mean() + len(prompt), {"prompt": prompt}

    images = pictures(4)
    scores, details = evaluate_reward(load_reward(brightness), images, PROMPTS, [{}] * 4)
    np.testing.assert_allclose(scores, images.mean(axis=(1, 2, 3)) + np.array([5, 5, 6, 5]))
    assert details == {"prompt": PROMPTS}
    with pytest.raises(ValueError, match="reward brightness must be finite"):
        evaluate_reward(per_sample(named_brightness), images, PROMPTS, [{}] * 4)


def named_brightness(image, prompt, metadata):
    return math.nan


named_brightness.__name__ = "brightness"


def test_per_sample_without_details_and_without_pictures():
    constant = per_sample(lambda image, prompt, metadata: 1)
    assert evaluate_reward(constant, pictures(4), PROMPTS, [{}] * 4) == (pytest.approx([1, 1, 1, 1]), {})
    scores, details = evaluate_reward(constant, pictures(4)[:0], [], [])
    assert scores.shape == (0,)
    assert details == {}


def test_per_sample_details_must_agree():
    uneven = per_sample(lambda image, prompt, metadata: (1, {prompt: 1}))
    with pytest.raises(ValueError, match="must return the same details for every picture"):
        evaluate_reward(uneven, pictures(4), PROMPTS, [{}] * 4)


def test_every_built_in_reward_loads():
    for name in rewards.BUILTIN_REWARDS:
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
    scores, _ = evaluate_reward(load_reward("my_rewards:score"), pictures(4), PROMPTS, [{}] * 4)
    assert scores.tolist() == [5, 5, 6, 5]


def test_reward_class_is_instantiated_with_its_options(user_module):
    for options, expected in (({}, 2.0), ({"factor": 3.0}, 3.0)):
        reward = load_reward("my_rewards:Scaled", **options)
        assert evaluate_reward(reward, pictures(4), PROMPTS, [{}] * 4)[0].tolist() == [expected] * 4
    with pytest.raises(TypeError, match=r"reward my_rewards:Scaled: .*unexpected.*'colour'"):
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
    with pytest.raises(ValueError, match="takes no options; got device"):
        load_reward(reward, device="cpu")
    with pytest.raises(ValueError, match="jpeg_compressibility takes no options; got device"):
        load_reward("jpeg_compressibility", device="cpu")
    with pytest.raises(TypeError, match=r"must be callable as .*; got 3"):
        load_reward(3)


def test_package_imports_neither_torch_nor_the_environment():
    code = "import sys, rewards; print(sorted({'torch', 'transformers', 'ddpo_env', 'gymnasium'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
