"""How a reward is called, and the check of every answer that a reward can give."""

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers.images import PROMPTS, random_images

from rewards import evaluate_reward, images_only, jpeg_compressibility, load_reward, per_sample


def evaluate(answer, batch=4):
    return evaluate_reward(lambda *_: answer, random_images(batch), PROMPTS[:batch], [{}] * batch)


@pytest.mark.parametrize(
    "answer",
    [
        np.array([1, 2, 3, 4]),
        np.array([1.0, 2.0, 3.0, 4.0], np.float16),
        [1, 2, 3, 4],
        (1.0, 2, np.float32(3), 4),
        np.array([1.0, 2, np.float32(3), 4], object),
        torch.tensor([1, 2, 3, 4]),
        torch.tensor([1.0, 2, 3, 4], requires_grad=True),
        torch.tensor([1.0, 2, 3, 4], dtype=torch.bfloat16),
        [torch.tensor(1.0), torch.tensor(2), torch.tensor(3.0, dtype=torch.bfloat16), 4.0],
        ([1, 2, 3, 4], {}),
    ],
)
def test_scores_of_any_numeric_type_become_float64(answer):
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


def test_reward_gets_images_prompts_and_metadata():
    images, metadata = random_images(4), [{"index": index} for index in range(4)]

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
        ("high", TypeError, "must return one number per sample; got 'high'"),
        (["a", "b", "c", "d"], TypeError, "must return one number per sample"),
        (np.array([1.0, None, 2.0, 3.0]), TypeError, "must return one number per sample; got array.*dtype=object"),
        (np.array([10**400] * 4), TypeError, "must return one number per sample"),
        ([1.0, None, 2.0, 3.0], TypeError, "must return one number per sample"),
        ([[1.0], [1.0, 2.0], [], []], TypeError, "must return one number per sample"),
        (np.ones(4, complex), TypeError, "must return one number per sample"),
        ({"score": 1}, TypeError, "must return one number per sample"),
        (1.0, ValueError, r"must return shape \(4,\), one score per sample; got \(\)"),
        ([1.0, 2.0, 3.0], ValueError, r"must return shape \(4,\), one score per sample; got \(3,\)"),
        (np.ones((4, 1)), ValueError, r"must return shape \(4,\), one score per sample; got \(4, 1\)"),
        ([], ValueError, r"must return shape .* got \(0,\)"),
        (
            [1, math.nan, 2, 3],
            ValueError,
            r"must be finite; got nan for prompt 'a dog' \(sample 1 of 4, 1 not finite\)",
        ),
        (
            [1, 2, -math.inf, math.nan],
            ValueError,
            r"must be finite; got -inf for prompt 'an ant' \(sample 2 of 4, 2 not finite\)",
        ),
        (([1, 2, 3, 4], {"size": [1, 2]}), ValueError, "must return 4 values of the detail 'size'"),
        (([1, 2, 3, 4], {"answer": "text"}), ValueError, "must return 4 values of the detail 'answer'"),
        (
            ([1, 2, 3, 4], {3: [1, 2, 3, 4]}),
            ValueError,
            "must name its details by text that is not empty; got the name 3",
        ),
        (([1, 2, 3, 4], {"": [1, 2, 3, 4]}), ValueError, "must name its details by text .*; got the name ''"),
        (([1, 2, 3, 4], {"size": 3}), ValueError, "must return 4 values of the detail 'size'"),
    ],
)
def test_bad_answer_is_an_error_that_names_the_reward(answer, error, message):
    def colourfulness(images, prompts, metadata):
        return answer

    with pytest.raises(error, match=f"reward colourfulness {message}"):
        evaluate_reward(colourfulness, random_images(4), PROMPTS, [{}] * 4)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (random_images(4).astype(np.float32), r"got float32 of shape \(4, 16, 16, 3\)"),
        (random_images(4)[0], r"got uint8 of shape \(16, 16, 3\)"),
        (random_images(4).transpose(0, 3, 1, 2), r"got uint8 of shape \(4, 3, 16, 16\)"),
        (np.zeros((4, 2)), r"got float64 of shape \(4, 2\)"),
    ],
)
@pytest.mark.parametrize("spec", ["jpeg_compressibility", "clip_score", "vlm_vqa", "jpeg_compressibility:1:raw"])
def test_rewards_for_images_refuse_other_samples(spec, images, message):
    reward = load_reward(spec)
    expected = r"reward \w+ scores images, uint8 \(batch, height, width, 3\).*; " + message
    with pytest.raises(ValueError, match=expected):
        evaluate_reward(reward, images, PROMPTS, [{}] * 4)


@pytest.mark.parametrize(
    ("samples", "given"),
    [([[0.0, 1.0]] * 4, "list"), (torch.zeros(4, 2), "Tensor"), (np.array(1.0), "one without axes")],
)
def test_samples_must_be_an_array_with_a_batch_axis(samples, given):
    with pytest.raises(ValueError, match=f"samples must be a NumPy array whose first axis is the batch; got {given}"):
        evaluate_reward(lambda samples, prompts, metadata: [0] * 4, samples, PROMPTS, [{}] * 4)


def test_reward_without_the_mark_takes_any_array():
    points = np.arange(8.0).reshape(4, 2)
    scores, _ = evaluate_reward(lambda samples, prompts, metadata: samples.sum(1), points, PROMPTS, [{}] * 4)
    assert scores.tolist() == [1, 5, 9, 13]
    marked = images_only(lambda samples, prompts, metadata: samples.sum(1))
    with pytest.raises(ValueError, match="scores images"):
        evaluate_reward(marked, points, PROMPTS, [{}] * 4)


def test_prompts_and_metadata_must_match_the_samples():
    with pytest.raises(ValueError, match="each of 4 samples; got 3 prompts and 4 dictionaries"):
        evaluate_reward(jpeg_compressibility, random_images(4), PROMPTS[:3], [{}] * 4)


def test_exception_inside_a_reward_is_not_hidden():
    def broken(images, prompts, metadata):
        raise KeyError("questions")

    with pytest.raises(KeyError, match="questions"):
        evaluate_reward(broken, random_images(4), PROMPTS, [{}] * 4)


def test_per_sample_function_becomes_a_batched_reward():
    @per_sample
    def brightness(image, prompt, metadata):
        assert image.shape == (16, 16, 3)
        return image.mean() + len(prompt), {"prompt": prompt}

    images = random_images(4)
    scores, details = evaluate_reward(load_reward(brightness), images, PROMPTS, [{}] * 4)
    np.testing.assert_allclose(scores, images.mean(axis=(1, 2, 3)) + np.array([5, 5, 6, 5]))
    assert details == {"prompt": PROMPTS}
    with pytest.raises(ValueError, match="reward brightness must be finite"):
        evaluate_reward(per_sample(named_brightness), images, PROMPTS, [{}] * 4)


def named_brightness(image, prompt, metadata):
    return math.nan


named_brightness.__name__ = "brightness"


def test_per_sample_without_details_and_without_images():
    constant = per_sample(lambda image, prompt, metadata: 1)
    assert evaluate_reward(constant, random_images(4), PROMPTS, [{}] * 4) == (pytest.approx([1, 1, 1, 1]), {})
    scores, details = evaluate_reward(constant, random_images(4)[:0], [], [])
    assert scores.shape == (0,)
    assert details == {}


def test_per_sample_details_must_agree():
    uneven = per_sample(lambda image, prompt, metadata: (1, {prompt: 1}))
    with pytest.raises(ValueError, match="must return the same details for every image"):
        evaluate_reward(uneven, random_images(4), PROMPTS, [{}] * 4)


def test_package_imports_neither_torch_nor_the_environment():
    code = "import sys, rewards; print(sorted({'torch', 'transformers', 'ddpo_env', 'gymnasium'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
