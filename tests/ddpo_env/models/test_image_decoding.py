"""What a decoder returns is checked before it becomes pixels: no score is made up for a black image."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from helpers.points_models import ConstantModel
from torch import Tensor

from ddpo_env import DenoisingVectorEnv, load_model
from ddpo_env.models.image_decoding import NonFiniteSampleError, to_pixels
from rewards import TwoStageReward


@pytest.fixture
def overflowing(micro_pipeline_folder: Path) -> StableDiffusionPipeline:
    """A pipeline whose decoder overflows for latents above 1, as float16 does on an accelerator."""
    pipeline = StableDiffusionPipeline.from_pretrained(micro_pipeline_folder, safety_checker=None)
    decode = pipeline.vae.decode

    def overflow(latents: Tensor, **arguments: Any) -> Any:
        (images,) = decode(latents, **arguments)
        return (torch.where(latents.amax((1, 2, 3), keepdim=True) > 1, torch.nan, images),)

    pipeline.vae.decode = overflow
    return pipeline


def finished(model: Any, reward: Any, **arguments: Any) -> Any:
    """End three episodes, of which the second one overflows."""
    env = DenoisingVectorEnv(
        3, model=model, reward=reward, prompts=["a cat"], num_inference_steps=1, autoreset_mode="Disabled", **arguments
    )
    env.reset(seed=0)
    actions = np.zeros((3, *env.model.latent_shape), np.float32)
    actions[1] = 4.0
    return env.step(actions)


class Asked:
    """A reward that remembers how many samples it was asked about."""

    def __init__(self) -> None:
        self.samples: list[int] = []

    def __call__(self, images: Any, prompts: Any, metadata: Any) -> Any:
        self.samples.append(len(images))
        return np.ones(len(images)), {"size": [3.0] * len(images)}


class AskedInTwoStages(Asked):
    def measure(self, images: Any, prompts: Any, metadata: Any) -> Any:
        return [1.0] * len(images)

    def combine(self, measurements: Any) -> Any:
        return measurements


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_pixels_must_be_finite(value: float) -> None:
    images = torch.zeros(2, 3, 4, 4)
    images[1, 0, 0, 0] = value
    with pytest.raises(NonFiniteSampleError, match="for 1 of 2") as caught:
        to_pixels(images)
    assert caught.value.finite.tolist() == [True, False]
    assert torch.equal(caught.value.samples[:1], to_pixels(images[:1]))


def test_a_decoder_that_overflows_is_an_error_that_names_model_and_prompt(overflowing: Any) -> None:
    with pytest.raises(ValueError, match=r"samples of model 'pipeline/\d+' .*'a cat' \(sample 1 of 3, 1 not finite\)"):
        finished(overflowing, Asked())


@pytest.mark.parametrize("deferred", [False, True])
def test_such_a_sample_is_kept_as_nan_and_the_reward_is_not_asked(overflowing: Any, deferred: bool) -> None:
    reward = Asked()
    _, rewards, terminations, _, infos = finished(
        overflowing, reward, non_finite_rewards="keep", deferred_rewards=deferred
    )
    assert terminations.all()
    assert np.isnan(rewards).tolist() == [False, True, False]
    scores = [one.result() for one in infos["deferred_reward"][[0, 2]]] if deferred else rewards[[0, 2]].tolist()
    assert scores == [1.0, 1.0]
    assert reward.samples == [2]
    assert infos["reward_details"]["non_finite"][1]


def test_such_a_sample_has_no_measurement_in_a_shared_batch(overflowing: Any) -> None:
    reward = AskedInTwoStages()
    assert isinstance(reward, TwoStageReward)
    _, rewards, _, _, infos = finished(overflowing, reward, non_finite_rewards="keep", part=(0, 2))
    assert np.isnan(rewards).tolist() == [False, True, False]
    assert infos["_deferred_reward"].tolist() == [True, False, True]


def test_samples_of_ones_own_decoder_are_checked_too() -> None:
    model = ConstantModel()
    model.decode = lambda latents: torch.where(latents > 1, torch.inf, latents)  # type: ignore[method-assign]
    with pytest.raises(ValueError, match=rf"samples of model '{model.source}' must be finite"):
        finished(model, Asked())


def test_rendering_does_not_show_what_cannot_be_decoded(overflowing: Any) -> None:
    model = load_model(overflowing)
    with pytest.raises(ValueError, match="images must be finite"):
        model.decode(torch.full((1, *model.latent_shape), 4.0))
