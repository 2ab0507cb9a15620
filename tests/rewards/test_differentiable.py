"""Rewards with a gradient: the same scores as without, the right slope, and who is refused."""

from pkgutil import resolve_name

import numpy as np
import pytest
import torch
from helpers.images import random_images
from helpers.micro_agents import Pair
from PIL import Image
from transformers import CLIPImageProcessorPil

from rewards import (
    BUILTIN_REWARDS,
    DIFFERENTIABLE_REWARDS,
    check_differentiable,
    check_differentiable_names,
    load_reward,
    score_with_gradient,
)
from rewards.clip.pixels import letterbox, preprocess
from rewards.clip.preference import _letterboxed

PROMPTS = ["a cat", "a dog", "a fox", "a cat"]
SIDE = 24
LEVEL = 1 / 255


def as_tensor(images):
    """What a decoder returns before rounding, (batch, 3, height, width) in [0, 1]."""
    return (torch.as_tensor(images).movedim(-1, 1) / 255).requires_grad_()


def smooth_images(batch, height, width):
    """Photographs have few edges; noise, enlarged eight times."""
    small = random_images(batch, 0, height // 8 + 1, width // 8 + 1)
    return np.stack(
        [np.asarray(Image.fromarray(one).resize((width, height), Image.Resampling.BICUBIC)) for one in small]
    )


@pytest.mark.parametrize("size", [(SIDE, SIDE), (40, 40), (37, 91), (130, 50), (7, 9)])
@pytest.mark.parametrize("fits", ["crop", "letterbox"])
def test_pixels_are_those_of_pillow_to_a_level(size, fits):
    images = smooth_images(3, *size)
    processor = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    pictures = [Image.fromarray(image) for image in images]
    pixels = as_tensor(images)
    if fits == "letterbox":
        pictures, pixels = [_letterboxed(one, SIDE) for one in pictures], letterbox(pixels, SIDE)
    expected = processor(images=pictures, input_data_format="channels_last", return_tensors="pt")["pixel_values"]
    levels = (preprocess(pixels, processor) - expected).abs() * torch.tensor(processor.image_std).view(-1, 1, 1) / LEVEL
    assert levels.shape == (3, 3, SIDE, SIDE)
    most = 1e-3 if size == (SIDE, SIDE) else 2  # Pillow rounds after each of its two passes
    assert levels.max() < most
    assert levels.mean() < 0.35


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"resample": 1}, "resample of the image processor must be bilinear or bicubic"),
        ({"size": {"longest_edge": 9, "shortest_edge": 8}}, "size of the image processor"),
    ],
)
def test_other_preprocessing_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        preprocess(torch.zeros(1, 3, 16, 16), CLIPImageProcessorPil(**settings))


@pytest.mark.parametrize("spec", ["aesthetic", "clip_score", "aesthetic:2:raw,clip_score:-1"])
def test_scores_and_slope_are_those_of_the_reward(spec):
    options = {name: {"model": "tiny"} for name in ("aesthetic", "clip_score") if name in spec}
    reward = load_reward(spec, **({"options": options} if ":" in spec else {"model": "tiny"}))
    images = smooth_images(4, 64, 64)
    plain = np.asarray(
        (lambda answer: answer[0] if isinstance(answer, tuple) else answer)(reward(images, PROMPTS, [{}] * 4))
    )
    pixels = as_tensor(images)
    scores = score_with_gradient(check_differentiable(reward), pixels, PROMPTS)
    np.testing.assert_allclose(scores.detach().numpy(), plain, atol=2e-5)
    (gradient,) = torch.autograd.grad(scores.sum(), pixels)
    towards = gradient / gradient.norm()
    ahead, behind = (score_with_gradient(reward, pixels + step * towards, PROMPTS).sum() for step in (0.02, -0.02))
    assert float((ahead - behind).detach() / 0.04) == pytest.approx(float(gradient.norm()), rel=0.05)


@pytest.mark.parametrize("size", [(64, 64), (96, 80)])
def test_scores_of_rounded_and_resized_images_are_close(size):
    """A decoder's images are not rounded; the image of 64 × 64 is not resized either."""
    exact = smooth_images(16, *size) + np.random.default_rng(0).uniform(-0.5, 0.5, (16, *size, 3))
    images = exact.clip(0, 255).round().astype(np.uint8)
    prompts = ["a cat"] * 16
    for name, most in {"aesthetic": 5e-3, "clip_score": 5e-4}.items():
        reward = load_reward(name, model="tiny")
        plain = reward(images, prompts, [{}] * 16)
        mine = score_with_gradient(reward, as_tensor(exact.clip(0, 255).astype(np.float32)), prompts)
        assert 0 < np.abs(mine.detach().numpy() - plain).max() < most, name


def test_weighted_sum_uses_its_statistics_and_does_not_change_them():
    reward = load_reward(
        "aesthetic:1,clip_score:0.5", options={name: {"model": "tiny"} for name in ("aesthetic", "clip_score")}
    )
    images = smooth_images(4, 64, 64)
    total, _ = reward(images, PROMPTS, [{}] * 4)
    before = reward.state_dict()
    scores = score_with_gradient(check_differentiable(reward), as_tensor(images), PROMPTS)
    np.testing.assert_allclose(scores.detach().numpy(), total, atol=1e-3)
    assert reward.state_dict() == before


def test_names_of_differentiable_rewards_are_those_whose_class_declares_it():
    declared = [name for name, path in BUILTIN_REWARDS.items() if hasattr(resolve_name(path), "differentiable_score")]
    assert declared == list(DIFFERENTIABLE_REWARDS)


VALID = "take aesthetic, clip_score, pickscore, hps_v2, a weighted sum of these, or one of your own"


@pytest.mark.parametrize(
    ("spec", "named"),
    [
        ("jpeg_compressibility", "jpeg_compressibility is not"),
        ("vlm_vqa", "vlm_vqa is not"),
        ("aesthetic:1,jpeg_compressibility:0.5,tiny_reader:1", "jpeg_compressibility, tiny_reader is not"),
    ],
)
def test_builtin_without_a_gradient_is_refused_by_its_name(spec, named):
    with pytest.raises(ValueError, match=f"reward must be differentiable, and {named}: {VALID}"):
        check_differentiable_names(spec)
    with pytest.raises(ValueError, match=f"reward must be differentiable, and {named}: {VALID}"):
        check_differentiable(load_reward(spec))


def test_terms_of_ones_own_are_named_however_deep():
    check_differentiable_names("helpers.micro_agents:Pair")
    with pytest.raises(ValueError, match="and helpers.micro_agents:contrast is not"):
        check_differentiable(Pair())


def test_answer_of_another_form_is_named():
    class Detached:
        def differentiable_score(self, samples, prompts):
            return samples.detach().mean((1, 2, 3))

    class OneNumber(Detached):
        def differentiable_score(self, samples, prompts):
            return samples.mean()

    samples = torch.zeros(2, 3, 4, 4, requires_grad=True)
    with pytest.raises(
        ValueError, match=r"reward Detached: .* must return shape \(2,\) with a gradient; got \(2,\) with no"
    ):
        score_with_gradient(Detached(), samples, PROMPTS[:2])
    with pytest.raises(ValueError, match=r"reward OneNumber: .* got \(\) with a gradient"):
        score_with_gradient(OneNumber(), samples, PROMPTS[:2])


def test_scores_that_are_not_finite_are_named_unless_the_samples_are_the_cause():
    class Logarithm:
        def differentiable_score(self, samples, prompts):
            return samples.mean((1, 2, 3)).log()

    samples = torch.ones(2, 3, 4, 4)
    samples[1] = 0
    with pytest.raises(
        ValueError,
        match=r"reward Logarithm: differentiable_score must be finite; got -inf for prompt 'b' \(sample 1 of 2",
    ):
        score_with_gradient(Logarithm(), samples.requires_grad_(), ["a", "b"])
    broken = torch.full((2, 3, 4, 4), torch.nan, requires_grad=True)
    assert score_with_gradient(Logarithm(), broken, ["a", "b"]).isnan().all()
