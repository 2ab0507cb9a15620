"""Diversity and grid energy against closed forms and NumPy's Fourier transform."""

import itertools

import numpy as np
import pytest

from agents.evaluation.sample_measures import grid_energy, grid_period, prompt_diversity

RNG = np.random.default_rng(0)


def test_grid_energy_is_the_fraction_of_the_spectrum_at_the_grid_and_its_harmonics():
    images = RNG.integers(0, 256, (3, 24, 16, 3), dtype=np.uint8)
    images[1] = images[1] // 8 + 100  # another contrast, so that the images count differently
    images[2, ::4] //= 2
    power = np.abs(np.fft.fft2(images.mean(-1))) ** 2
    power[:, 0, 0] = 0
    on_grid = power[:, :: 24 // 4, :: 16 // 4]
    assert grid_energy(images, 4) == pytest.approx(on_grid.sum() / power.sum(), rel=1e-9)


def test_grid_energy_of_a_pattern_of_the_grid_is_1_and_of_noise_almost_0():
    tile = RNG.integers(0, 256, (8, 8, 3), dtype=np.uint8)
    repeated = np.tile(tile, (1, 8, 8, 1))
    assert grid_energy(repeated, 8) == pytest.approx(1)
    noise = RNG.integers(0, 256, (20, 64, 64, 3), dtype=np.uint8)
    assert grid_energy(noise, 8) == pytest.approx(8**2 / 64**2, rel=0.2)
    assert grid_energy(np.full((2, 16, 16, 3), 7, np.uint8), 8) == 0
    faint = (noise[:1] // 2 + np.tile(tile // 32, (8, 8, 1))).astype(np.uint8)
    assert grid_energy(faint, 8) > grid_energy(noise[:1] // 2, 8)


@pytest.mark.parametrize(
    ("sample", "latent", "period"),
    [
        ((512, 512, 3), (4, 64, 64), 8),  # Stable Diffusion
        ((1024, 768, 3), (3072, 64), 16),  # FLUX, packed: a token is 16 pixels
        ((64, 64, 3), (4, 16, 16), 4),  # the bundled model
        ((32, 32, 3), (3, 32, 32), None),  # pixels are the latents
        ((30, 32, 3), (4, 15, 4), None),  # no square grid
        ((2,), (2,), None),
        ((2, 800), (64, 25), None),  # a sound
        ((5, 64, 64, 3), (4, 2, 8, 8), None),  # a video
    ],
)
def test_period_of_the_grid_is_the_pixels_of_one_place_of_the_latent(sample, latent, period):
    assert grid_period(sample, latent) == period


def test_diversity_is_the_mean_root_mean_square_difference_within_prompts():
    points = RNG.normal(size=(6, 2)).astype(np.float32)
    prompts = ["a", "b", "a", "a", "b", "c"]
    of_a = np.mean([np.sqrt(((points[i] - points[j]) ** 2).mean()) for i, j in itertools.combinations([0, 2, 3], 2)])
    of_b = np.sqrt(((points[1] - points[4]) ** 2).mean())
    assert prompt_diversity(points, prompts) == pytest.approx((of_a + of_b) / 2, rel=1e-5)


def test_diversity_of_images_is_between_black_and_white_and_does_not_see_grain():
    black, white = np.zeros((64, 64, 3), np.uint8), np.full((64, 64, 3), 255, np.uint8)
    assert prompt_diversity(np.stack([black, white]), ["x", "x"]) == pytest.approx(1)
    assert prompt_diversity(np.stack([black, white]), ["x", "y"]) is None
    assert prompt_diversity(np.stack([black, black, white]), ["x", "x", "y"]) == 0
    grain = np.indices((64, 64)).sum(0) % 2 * np.uint8(255)
    board = np.repeat(grain[..., None], 3, axis=-1).astype(np.uint8)
    assert prompt_diversity(np.stack([board, 255 - board]), ["x", "x"]) == pytest.approx(0, abs=1e-6)
    video = np.stack([np.stack([black, black]), np.stack([black, white])])
    assert prompt_diversity(video, ["x", "x"]) == pytest.approx(np.sqrt(0.5))
