"""Abilities of a model: declared by deriving from `ModelAbilities`, and defaults for every other model."""

from typing import Any

import numpy as np
import pytest
import torch
from helpers.points_models import ConstantModel

import ddpo_env
from ddpo_env.models import DiffusionModel, ModelAbilities, abilities_of, load_model
from ddpo_env.models.protocol import MEMBERS


class PlainModel:
    """The nine members, and nothing else."""

    def __init__(self) -> None:
        inner = ConstantModel()
        for name in MEMBERS:
            setattr(self, name, getattr(inner, name))


def test_protocol_has_nine_members() -> None:
    assert len(MEMBERS) == 9
    assert isinstance(PlainModel(), DiffusionModel)


def test_model_that_derives_is_its_own_abilities() -> None:
    model = ConstantModel()
    assert abilities_of(model) is model
    assert abilities_of(model).sample_kind == "other"


def test_plain_model_has_the_defaults() -> None:
    model = PlainModel()
    abilities = abilities_of(load_model(model))
    assert abilities.sample_kind == "image"
    assert abilities.can_render
    assert (abilities.guidance_embeds, abilities.resolution) == (False, None)
    assert abilities.negative_conditioning() == {}
    assert abilities.sampler_options(5) == {}
    latents = torch.zeros(2, 2)
    assert abilities.render(latents) is latents, "which this model's decode returns"
    abilities.prepare_prompts(["a point"])
    abilities.save_memory(False, None)


@pytest.mark.parametrize("name", ["sample_kind", "guidance_embeds", "resolution", "sampler_options", "render"])
def test_ability_without_deriving_is_an_error(name: str) -> None:
    model = PlainModel()
    setattr(model, name, None)
    with pytest.raises(ValueError, match=rf"has {name}, so its class PlainModel must derive from .*ModelAbilities"):
        load_model(model)


def test_what_a_model_cannot_do_is_refused() -> None:
    model = PlainModel()
    with pytest.raises(ValueError, match=r"resolution must be None with model 'constant-\d+', .*got 64"):
        load_model(model, resolution=64)
    for name in ("offload_text_encoder", "vae_tiling"):
        with pytest.raises(ValueError, match=rf"{name} must be False with model 'constant-\d+', which has no"):
            load_model(model, **{name: True})  # type: ignore[arg-type]


class Resizable(ConstantModel):
    """A model of one's own with two resolutions, and images of its latents."""

    def at_resolution(self, resolution: int) -> "Resizable":
        other = Resizable()
        other.source, other.denoiser, other.resolution = self.source, self.denoiser, resolution
        return other

    def render(self, latents: torch.Tensor) -> torch.Tensor:
        return torch.zeros(len(latents), 4, 4, 3, dtype=torch.uint8)


def test_own_abilities_are_used() -> None:
    model = Resizable()
    other = load_model(model, resolution=8)
    assert load_model(model, resolution=8) is other is load_model(other)
    assert other.denoiser is model.denoiser
    settings = {"reward": "points_ring", "prompts": ["a point"], "num_inference_steps": 1}
    env = ddpo_env.DenoisingVectorEnv(2, model=model, render_mode="rgb_array", **settings)  # type: ignore[arg-type]
    env.reset(seed=0)
    assert np.stack(env.render() or ()).shape == (2, 4, 4, 3)
    assert ModelAbilities().can_render


class ToGoals(ConstantModel):
    """A model of one's own whose conditioning is a field of the prompt."""

    conditioning_shapes = {"goal": (2,)}  # noqa: RUF012
    prompt_fields = ("goal",)

    def encode_prompts(self, prompts: Any, fields: Any = None) -> dict[str, torch.Tensor]:
        return {"goal": torch.tensor([one["goal"] for one in fields]).float()}


def test_model_gets_the_fields_of_prompts_that_it_names() -> None:
    prompts = [("go", {"goal": [1, 2], "answer": "yes"}), ("go", {"goal": [3, 4]})]
    env = ddpo_env.DenoisingVectorEnv(
        4, model=ToGoals(), prompts=prompts, reward=lambda samples, *_: [0.0] * len(samples), num_inference_steps=1
    )
    observation, infos = env.reset(options={"prompts": [*prompts, *prompts[::-1]]})
    assert observation["goal"].tolist() == [[1, 2], [3, 4], [3, 4], [1, 2]]
    assert infos["prompt"].tolist() == ["go"] * 4
    assert infos["context"].tolist() == [f"go [goal [{numbers}]]" for numbers in ("1, 2", "3, 4", "3, 4", "1, 2")]
    tensors, state = env.state_dict()
    env.reset(seed=0)
    env.load_state_dict(tensors, state)
    assert np.array_equal(env.observe()["goal"], observation["goal"])
    with pytest.raises(ValueError, match=r"prompts must have goal with model 'constant-\d+', .* got 'go' with answer"):
        env.reset(options={"prompts": [("go", {"answer": "no"})] * 4})
