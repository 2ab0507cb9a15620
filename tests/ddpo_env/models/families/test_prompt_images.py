"""Pipelines that get the image of each prompt: parity with their own call, rows of a batch, and what is refused."""

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionImg2ImgPipeline
from diffusers.pipelines.flux2.image_processor import Flux2ImageProcessor
from gymnasium.vector import AutoresetMode
from helpers.micro_agents import STEPS, micro_env, micro_policy
from helpers.micro_families import SCHEDULE, stable_diffusion_2
from helpers.micro_pipeline import micro_pipeline
from helpers.more_families import CASES, build
from helpers.prompt_images import KONTEXT, controlnet, instruct_pix2pix, picture, prompt_file
from torch import Tensor

from ddpo_env import load_model
from ddpo_env.models.families.stand_ins import watched_processor
from ddpo_env.models.outline import outline_model
from ddpo_env.models.protocol import encode

SIZES = {"flux_kontext": 32, "flux_2_klein": 64}
"""Width and height of the prompts' images. FLUX.2 takes none that are smaller."""
ARGUMENTS: dict[str, dict[str, Any]] = {
    "flux_kontext": KONTEXT,
    "flux_2_klein": CASES["flux_2_klein"].arguments | {"height": 32, "width": 32},
}
GUIDANCE = 3.0


@pytest.fixture(params=SIZES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def with_images(name: str) -> Any:
    size = SIZES[name]
    return load_model(build(name), "cpu", "float32", None, ARGUMENTS[name] | {"image": f"prompt:{size}x{size}"})


def edits(name: str) -> list[tuple[str, dict[str, Any]]]:
    """Two texts and two images, in all four pairs but one."""
    first, second = (picture(seed, (SIZES[name], SIZES[name])) for seed in (0, 1))
    return [("make it red", {"image": first}), ("a dog", {"image": second}), ("make it red", {"image": second})]


def conditioning_of(model: Any, prompts: list[tuple[str, dict[str, Any]]]) -> dict[str, Tensor]:
    embedded = {"guidance": torch.full((len(prompts),), 3.5)} if model.guidance_embeds else {}
    return encode(model, prompts) | embedded


class Inputs:
    """What a denoiser is called with."""

    def __init__(self, denoiser: torch.nn.Module) -> None:
        self.seen: list[dict[str, Any]] = []
        denoiser.register_forward_pre_hook(lambda _, __, given: self.seen.append(dict(given)), with_kwargs=True)

    def row(self, call: int, row: int) -> dict[str, Tensor]:
        """What concerns one row; positions without a batch axis concern all."""
        tensors = {key: value for key, value in self.seen[call].items() if isinstance(value, Tensor)}
        return {
            key: value if key.endswith("ids") and value.ndim == 2 else value[row : row + 1]
            for key, value in tensors.items()
        }


@torch.no_grad()
def test_every_row_is_called_as_the_pipeline_calls_with_that_prompt_and_image_alone(name: str) -> None:
    model, stock = with_images(name), build(name)
    prompts = edits(name)
    conditioning = conditioning_of(model, prompts)
    mine, theirs = Inputs(model.denoiser), Inputs(stock.transformer)
    latents = torch.randn(3, *model.latent_shape, generator=torch.Generator().manual_seed(3))
    model.predict(model.denoiser, latents, torch.full((3,), 1000.0), conditioning)
    for row, (text, metadata) in enumerate(prompts):
        given = ARGUMENTS[name] | metadata | {"latents": unpacked(latents[row : row + 1], name)}
        given["guidance_scale"] = 3.5 if name == "flux_kontext" else 1.0
        stock(prompt=text, num_inference_steps=1, output_type="latent", **given)
        inputs, expected = mine.row(0, row), theirs.row(row, 0)
        assert inputs.keys() == expected.keys() > {"img_ids", "txt_ids"}
        for key, value in expected.items():
            assert torch.equal(inputs[key], value), key


def unpacked(latents: Tensor, name: str) -> Tensor:
    """The latents as an argument of the pipeline's call: FLUX.2 packs them itself."""
    if name == "flux_kontext":
        return latents
    side = round(latents.shape[1] ** 0.5)
    return latents.transpose(1, 2).unflatten(2, (side, side))


@pytest.mark.parametrize("scale", [None, GUIDANCE])
@torch.no_grad()
def test_deterministic_path_of_a_batch_ends_in_the_pipelines_own_latents(name: str, scale: float | None) -> None:
    model, prompts = with_images(name), edits(name)
    latents = torch.randn(3, *model.latent_shape, generator=torch.Generator().manual_seed(3))
    ends = []
    for row, (text, metadata) in enumerate(prompts):
        given: dict[str, Any] = {"prompt": text, **metadata, **ARGUMENTS[name], "num_inference_steps": 3}
        given |= {"guidance_scale": 3.5} if name == "flux_kontext" else {"guidance_scale": scale or 1.0}
        given |= {"true_cfg_scale": scale, "negative_prompt": ""} if scale and name == "flux_kontext" else {}
        stock: Any = build(name)
        given["latents"] = unpacked(latents[row : row + 1], name)
        final: list[Tensor] = []
        step = stock.scheduler.step

        def note(*args: Any, step: Any = step, final: list[Tensor] = final, **options: Any) -> Any:
            final.append(step(*args, **options)[0])
            return (final[-1],)

        stock.scheduler.step = note
        stock(**given, output_type="latent")
        ends.append(final[-1])
    assert (denoise(model, prompts, latents, scale) - torch.cat(ends)).abs().max() <= 2e-6


def denoise(model: Any, prompts: list[tuple[str, dict[str, Any]]], latents: Tensor, scale: float | None) -> Tensor:
    """Sample with our parts and the pipeline's deterministic scheduler, all rows in one batch."""
    scheduler = copy.deepcopy(model.scheduler)
    scheduler.set_timesteps(**model.sampler_options(3))
    conditioning = conditioning_of(model, prompts)
    for timestep in scheduler.timesteps:
        rows = timestep.float().expand(len(latents))
        output = model.predict(model.denoiser, latents, rows, conditioning)
        if scale is not None:
            negative = {
                key: value.expand(len(latents), *value.shape[1:])
                for key, value in model.negative_conditioning().items()
            }
            output = model.guide(model.predict(model.denoiser, latents, rows, conditioning | negative), output, scale)
        latents = scheduler.step(output, timestep, latents, return_dict=False)[0]
    return latents


@pytest.mark.parametrize(("pipeline", "shape"), [(instruct_pix2pix, (4, 8, 8)), (controlnet, (3, 32, 32))])
@torch.no_grad()
def test_pipelines_that_no_row_of_a_table_knows_get_the_images_of_the_rows(
    pipeline: Any, shape: tuple[int, ...]
) -> None:
    stock: Any = pipeline()
    stock.set_progress_bar_config(disable=True)
    model: Any = load_model(stock, "cpu", "float32", None, {"image": "prompt:32x32"})
    assert [one for name, one in model.conditioning_shapes.items() if "image" in name] == [shape]
    assert (model.guidance_problem is not None) == (pipeline is instruct_pix2pix), "its guidance has three terms"
    prompts = [("make it red", {"image": picture(seed)}) for seed in (0, 1)]
    latents = torch.randn(1, *model.latent_shape, generator=torch.Generator().manual_seed(3)).repeat(2, 1, 1, 1)
    outputs: list[Tensor] = []

    def note(output: Tensor, timestep: Tensor, sample: Tensor, **_: Any) -> tuple[Tensor]:
        outputs.append(output)
        return (sample,)

    stock.scheduler = copy.deepcopy(stock.scheduler)
    stock.scheduler.step = note
    for text, metadata in prompts:
        given = metadata | {"latents": latents[:1], "guidance_scale": 1.0, "output_type": "latent"}
        stock(text, num_inference_steps=1, **given)
    timestep = stock.scheduler.timesteps.float().expand(2)
    mine = model.predict(model.denoiser, latents, timestep, encode(model, prompts))
    torch.testing.assert_close(mine, torch.cat(outputs), rtol=0, atol=2e-6)
    assert (outputs[0] - outputs[1]).abs().max() > 1e-3


@torch.no_grad()
def test_order_of_rows_does_not_matter_and_the_image_does(name: str) -> None:
    model, prompts = with_images(name), edits(name)
    latents = torch.randn(1, *model.latent_shape, generator=torch.Generator().manual_seed(3)).repeat(3, 1, 1)
    timestep = torch.tensor([900.0, 500.0, 900.0])
    output = model.predict(model.denoiser, latents, timestep, conditioning_of(model, prompts))
    moved = model.predict(model.denoiser, latents, timestep.flip(0), conditioning_of(model, prompts[::-1]))
    torch.testing.assert_close(moved.flip(0), output, rtol=0, atol=1e-6)
    assert (output[0] - output[2]).abs().max() > 1e-3, "the same text and noise, another image"


@torch.no_grad()
def test_policy_guides_with_the_image_of_each_row() -> None:
    """The negative prompt has the image of the prompt, as in the pipeline."""
    model, prompts = with_images("flux_2_klein"), edits("flux_2_klein")
    env = micro_env(model, 3, prompts=prompts, autoreset_mode=AutoresetMode.DISABLED)
    policy = micro_policy(env, lora_targets="attention", guidance_scale=GUIDANCE)
    observation, _ = env.reset(seed=0, options={"prompts": prompts})
    conditioning = encode(model, prompts)
    assert all(torch.equal(observation[key], value) for key, value in conditioning.items())
    latents, timestep = observation["latents"], observation["timestep"][:, 0]
    negative = {key: value.expand(3, *value.shape[1:]) for key, value in model.negative_conditioning().items()}
    assert negative.keys() == conditioning.keys() - {"image_latents"}
    outputs = [model.predict(model.denoiser, latents, timestep, one) for one in (conditioning | negative, conditioning)]
    mine = policy.predict_output(latents, timestep, {key: observation[key] for key in conditioning})
    torch.testing.assert_close(mine, model.guide(*outputs, GUIDANCE), rtol=0, atol=1e-5)


def test_image_is_encoded_once_for_each_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = with_images("flux_kontext")
    picture(0).save(tmp_path / "a.png")
    picture(0).save(tmp_path / "b.png")
    encoded: list[Any] = []
    call = model.watched.before_denoiser
    monkeypatch.setattr(
        model.watched, "before_denoiser", lambda **given: encoded.append(given["prompt"]) or call(**given)
    )
    same = [("a cat", {"image": path}) for path in (str(tmp_path / "a.png"), tmp_path / "b.png")]
    first = encode(model, same)
    assert encoded == ["a cat"]
    assert torch.equal(first["image_latents"][0], first["image_latents"][1])
    picture(1).save(tmp_path / "b.png")
    second = encode(model, same)
    assert encoded == ["a cat"] * 2
    assert torch.equal(second["image_latents"][0], first["image_latents"][0])
    assert not torch.equal(second["image_latents"][1], first["image_latents"][1])


@pytest.mark.parametrize("image", ["prompt:64x64", picture(0, (64, 64))], ids=["of each prompt", "of all prompts"])
@torch.no_grad()
def test_nothing_of_an_image_is_computed_at_a_denoiser_call(image: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the call needs of an image is prepared once, however often the denoiser is called."""
    model: Any = load_model(build("flux_2_klein"), "cpu", "float32", None, ARGUMENTS["flux_2_klein"] | {"image": image})
    conditioning = encode(model, edits("flux_2_klein"))
    latents, timestep = torch.randn(3, *model.latent_shape), torch.full((3,), 500.0)
    first = model.predict(model.denoiser, latents, timestep, conditioning)
    for owner, method in ((type(model.pipeline.image_processor), "preprocess"), (model.pipeline.vae, "encode")):
        monkeypatch.setattr(owner, method, None)
    assert torch.equal(model.predict(model.denoiser, latents, timestep, conditioning), first)


def test_image_above_the_area_that_a_pipeline_takes_is_made_smaller_once() -> None:
    processor: Any = watched_processor(Flux2ImageProcessor)()
    processor.known = {}
    image = picture(0, (64, 64))
    smaller = processor._resize_to_target_area(image, 32 * 32)
    assert smaller.size == (32, 32)
    assert processor._resize_to_target_area(image, 32 * 32) is smaller


def test_environment_gives_prompts_and_images_to_the_pipeline_and_fields_to_the_reward(tmp_path: Path) -> None:
    told: list[dict[str, Any]] = []

    def note(samples: np.ndarray, prompts: list[str], metadata: list[dict[str, Any]]) -> np.ndarray:
        told.extend({"prompt": prompt, **one} for prompt, one in zip(prompts, metadata, strict=True))
        return samples.mean((1, 2, 3))

    path = prompt_file(tmp_path, [("make it red", 0), ("make it red", 1)], answer="yes")
    env = micro_env(
        build("flux_kontext"), 8, prompts=path, reward=note, num_inference_steps=1, pipeline_arguments=KONTEXT
    )
    assert env.model.arguments["image"] == "prompt:32x32"  # type: ignore[attr-defined]
    observation, infos = env.reset(seed=0)
    expected = {str(seed): encode(env.model, [("make it red", {"image": picture(seed)})]) for seed in (0, 1)}
    env.step(observation["latents"])
    seeds = [Path(one["image"]).stem for one in told]
    assert set(seeds) == {"0", "1"}
    assert told == [
        {"prompt": "make it red", "answer": "yes", "image": str(tmp_path / f"pictures/{one}.png")} for one in seeds
    ]
    for row, seed in enumerate(seeds):
        assert torch.equal(observation["image_latents"][row], expected[seed]["image_latents"][0])
    contexts = dict(zip(seeds, infos["context"], strict=True))
    assert contexts["0"] != contexts["1"], "two images are two contexts"
    assert [contexts[seed] for seed in seeds] == infos["context"].tolist()


def test_function_may_sample_prompts_with_images_of_a_size_that_is_said() -> None:
    def sample(rng: np.random.Generator) -> tuple[str, dict[str, Any]]:
        return "make it red", {"image": picture(int(rng.integers(1000)))}

    arguments = KONTEXT | {"image": "prompt:32x32"}
    env = micro_env(build("flux_kontext"), 4, prompts=sample, pipeline_arguments=arguments)
    images = env.reset(seed=0)[0]["image_latents"]
    assert len({tuple(row.flatten().tolist()) for row in images}) == 4
    assert torch.equal(env.reset(seed=0)[0]["image_latents"], images)
    env = micro_env(build("flux_kontext"), 1, prompts=lambda rng: "a cat", pipeline_arguments=arguments)
    with pytest.raises(ValueError, match="prompts must have image with model .*; got 'a cat' with no metadata"):
        env.reset(seed=0)


def states(env: Any) -> Iterator[dict[str, Tensor]]:
    for _ in range(2 * STEPS):
        observation, *_ = env.step(0.9 * env.observe()["latents"])
        yield observation


def test_restored_environment_gives_the_same_bits_from_another_folder(tmp_path: Path) -> None:
    prompts = [("make it red", 0), ("make it red", 1), ("a cat", 1)]
    paths = [prompt_file(tmp_path / folder, prompts) for folder in ("here", "there")]
    arguments: dict[str, Any] = {"pipeline_arguments": KONTEXT}
    env = micro_env(build("flux_kontext"), 4, prompts=paths[0], **arguments)
    env.reset(seed=1)
    env.step(env.observe()["latents"])
    tensors, state = env.state_dict()
    state = json.loads(json.dumps(state))
    other = micro_env(build("flux_kontext"), 4, prompts=paths[1], **arguments)
    other.load_state_dict(tensors, state)
    assert all(Path(one["image"]).is_relative_to(tmp_path / "there") for one in other.state_dict()[1]["metadata"])
    for name, value in env.observe().items():
        assert torch.equal(other.observe()[name], value), name
    assert other.reset_infos() == env.reset_infos()
    for mine, theirs in zip(states(env), states(other), strict=True):
        assert all(torch.equal(theirs[name], value) for name, value in mine.items())

    for folder, seed in (("here", 7), ("there", 8)):
        for path in (tmp_path / folder / "pictures").iterdir():
            picture(seed).save(path)
    with pytest.raises(ValueError, match=r"state must be of prompts that are the same now; .* has changed"):
        other.load_state_dict(tensors, state)


def test_same_text_with_two_images_must_be_given_with_its_image(tmp_path: Path) -> None:
    path = prompt_file(tmp_path, [("make it red", 0), ("make it red", 1), ("a cat", 1)])
    env = micro_env(build("flux_kontext"), 1, prompts=path, pipeline_arguments=KONTEXT)
    with pytest.raises(ValueError, match="several prompts are 'make it red': say which image it has"):
        env.reset(options={"prompts": "make it red"})
    env.reset(options={"prompts": "a cat"})
    with pytest.raises(ValueError, match="prompts must have image with model .*; got 'a dog' with no metadata"):
        env.reset(options={"prompts": "a dog"})
    with pytest.raises(ValueError, match="image of prompt 'a dog' must be the path of an image file; got 5"):
        env.reset(options={"prompts": [("a dog", {"image": 5})]})
    env.reset(options={"prompts": [("make it red", {"image": picture(4)})]})


def test_image_that_the_pipeline_does_not_take_is_the_rewards(tmp_path: Path) -> None:
    path = prompt_file(tmp_path, [("a cat", 0)])
    told: list[Any] = []

    def note(samples: Any, prompts: list[str], metadata: list[dict[str, Any]]) -> np.ndarray:
        told.extend(metadata)
        return samples.mean((1, 2, 3))

    env = micro_env(micro_pipeline(), 1, prompts=path, reward=note, num_inference_steps=1)
    assert env.model.arguments == {}  # type: ignore[attr-defined]
    env.reset(seed=0)
    env.step(env.observe()["latents"])
    assert told == [{"image": str(tmp_path / "pictures/0.png")}]


def test_images_that_the_pipeline_brings_to_different_shapes_are_refused_before_the_first_episode(
    tmp_path: Path,
) -> None:
    path = prompt_file(tmp_path, [("a cat", 0), ("a dog", 1)])
    picture(1, (64, 32)).save(tmp_path / "pictures/1.png")
    with pytest.raises(
        ValueError, match=r"must be of sizes that model .* of the image of 'a dog' \(64x32 pixels, .*1.png'\)"
    ):
        micro_env(build("flux_kontext"), 1, prompts=path, pipeline_arguments=KONTEXT)
    picture(1, (35, 33)).save(tmp_path / "pictures/1.png")  # Kontext rounds to 16 pixels here
    env = micro_env(build("flux_kontext"), 1, prompts=path, pipeline_arguments=KONTEXT)
    assert env.model.conditioning_shapes["image_latents"] == (16, 16)


def test_one_image_for_all_prompts_and_one_for_each_exclude_each_other(tmp_path: Path) -> None:
    path = prompt_file(tmp_path, [("a cat", 0)])
    with pytest.raises(ValueError, match="pipeline_arguments must not have an image if every prompt has one"):
        micro_env(build("flux_kontext"), 1, prompts=path, pipeline_arguments=KONTEXT | {"image": picture(3)})
    some = [("a cat", {"image": picture(0)}), "a dog"]
    with pytest.raises(ValueError, match="prompts must all have an image, or none of them, .* got 'a dog' without"):
        micro_env(build("flux_kontext"), 1, prompts=some, pipeline_arguments=KONTEXT)
    gone = [("a cat", {"image": "gone.png"})]
    with pytest.raises(ValueError, match=r"image of prompt 'a cat' must be an image file .*: there is no such file"):
        micro_env(build("flux_kontext"), 1, prompts=gone, pipeline_arguments=KONTEXT)


def test_pipeline_that_begins_with_the_noisy_image_is_refused(tmp_path: Path) -> None:
    """An episode begins with noise, so the image would have no effect."""
    pipeline = StableDiffusionImg2ImgPipeline(
        **{**stable_diffusion_2().components, "scheduler": DDIMScheduler(**SCHEDULE, clip_sample=False)},
        requires_safety_checker=False,
    )
    with pytest.raises(
        ValueError, match="must make conditioning of the image of a prompt; it makes none, as pipelines"
    ):
        micro_env(pipeline, 1, prompts=prompt_file(tmp_path, [("a cat", 0)]))


def test_outline_knows_the_shapes_of_encoded_images(tmp_path: Path) -> None:
    build("flux_kontext").save_pretrained(tmp_path / "model")
    outlined = outline_model(tmp_path / "model", None, KONTEXT | {"image": "prompt:32x32"})
    assert outlined is not None
    assert outlined.conditioning_shapes == with_images("flux_kontext").conditioning_shapes
