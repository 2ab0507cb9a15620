"""JPEG rewards against the file sizes that Pillow writes."""

import io

import numpy as np
import pytest
from helpers.images import PROMPTS, random_images
from PIL import Image

from rewards import evaluate_reward, jpeg_compressibility, jpeg_incompressibility, load_reward


def kilobytes(image):
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=95)
    return len(buffer.getvalue()) / 1000


@pytest.mark.parametrize(("name", "sign"), [("jpeg_compressibility", -1), ("jpeg_incompressibility", 1)])
@pytest.mark.parametrize("size", [8, 33, 64])
def test_jpeg_reward_is_the_file_size_in_kilobytes(name, sign, size):
    images = random_images(5, height=size, width=size)
    scores, details = evaluate_reward(load_reward(name), images, ["a cat"] * 5, [{}] * 5)
    assert scores.tolist() == [sign * kilobytes(image) for image in images]
    assert scores.dtype == np.float64
    assert details == {}
    assert len(set(scores)) == 5 or size == 8


def test_jpeg_reward_of_a_known_image():
    grey = np.full((1, 64, 64, 3), 128, np.uint8)
    (size,) = jpeg_incompressibility(grey, [""], [{}])
    assert 0.5 < size < 1.0, "a flat image is little more than the JPEG header"
    (noisy,) = jpeg_incompressibility(random_images(1, height=64, width=64) * 10, [""], [{}])
    assert noisy > 3 * size


def test_jpeg_reward_does_not_depend_on_the_batch():
    images = random_images(9)
    together = jpeg_compressibility(images, PROMPTS, [{}] * 9)
    alone = [jpeg_compressibility(images[index : index + 1], ["a cat"], [{}])[0] for index in range(9)]
    assert together.tolist() == alone
    assert jpeg_compressibility(images[:0], [], []).shape == (0,)
