"""The value network stays small, and sees all of the latent, whatever the latent's form is."""

import pytest
import torch

from agents.policy.critic import DenoisingCritic

SHAPES = {
    "image": (16, 128, 128),
    "packed tokens": (4096, 64),
    "video": (16, 21, 60, 104),
    "sound": (64, 1024),
    "few tokens": (9, 16),
    "point": (2,),
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_network_is_small_and_its_values_depend_on_both_ends_of_the_latent(shape):
    critic = DenoisingCritic(shape, {"prompt_embeds": (7, 32)})
    assert sum(parameter.numel() for parameter in critic.parameters()) < 2e6
    latents = torch.zeros(3, *shape)
    latents.flatten(1)[1, 0] = latents.flatten(1)[2, -1] = 1e4
    values = critic(latents, torch.full((3,), 500), {"prompt_embeds": torch.zeros(3, 7, 32)})
    assert values.shape == (3, 1)
    assert len(values.unique()) == 3
