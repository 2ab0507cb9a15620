"""Every family's decoder has a gradient, and makes the images that `decode` rounds."""

from typing import Any

import pytest
import torch
from helpers.micro_families import FAMILIES, micro_family
from helpers.more_families import CASES, build

from ddpo_env.models import abilities_of, load_model

NAMES = ["tiny", "points", *FAMILIES, *(name for name in CASES if name not in FAMILIES)]
NAMES.remove("stable_audio_3")  # whose micro decoder makes the same sound of all latents


def model_of(name: str) -> Any:
    if name in ("tiny", "points"):
        return load_model(name, "cpu")
    return (
        load_model(micro_family(name), "cpu")
        if name in FAMILIES
        else load_model(build(name), "cpu", "float32", None, CASES[name].arguments)
    )


@pytest.mark.parametrize("name", NAMES)
def test_samples_are_those_of_decode_before_rounding_and_have_a_gradient(name: str) -> None:
    model = model_of(name)
    noise = torch.randn(2, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    latents = (0.3 * noise).requires_grad_()
    samples = abilities_of(model).decode_with_gradient(latents)
    expected = model.decode(latents.detach())
    if expected.dtype == torch.uint8:
        assert samples.dtype == torch.float32
        assert 0 <= samples.min() < samples.max() <= 1
        assert torch.equal((255 * samples.detach()).round().to(torch.uint8).movedim(-3, -1), expected)
    else:
        assert torch.equal(samples.detach(), expected)
    first, second = (torch.autograd.grad(samples[row].sum(), latents, retain_graph=True)[0] for row in (0, 1))
    assert torch.isfinite(first).all()
    assert first[0].any()
    assert second[1].any()
    assert not first[1].any(), "an image depends on its own latent only"
