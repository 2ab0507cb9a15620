"""The levers on memory: text encoders that leave the accelerator, a decoder in tiles, activations that are recomputed.

There is no accelerator here: one is pretended, and what is moved to it is written down (`tests/test_cuda.py` has one).
"""

import weakref
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.algorithms import collected, denoising_ppo, logged
from helpers.micro_agents import brightness, micro_config, micro_env, micro_policy, stir
from helpers.micro_families import micro_family
from helpers.micro_pipeline import micro_pipeline
from torch import Tensor, nn

from agents.config.command_line import parse_command_line
from agents.training.preparation import prepare_run
from ddpo_env.initial_states import InitialStates
from ddpo_env.models import loading as models
from ddpo_env.models.families.pipeline_model import PipelineModel
from ddpo_env.models.files.pipelines import TEXT_ENCODERS, place_pipeline
from ddpo_env.models.loading import load_model
from ddpo_env.prompts.distributions import load_prompts

ENCODERS = {
    "stable_diffusion_2": 1,
    "stable_diffusion_xl": 2,
    "stable_diffusion_3": 3,
    "stable_diffusion_3.5": 2,
    "flux_dev": 2,
}
ACCELERATOR = torch.device("cuda", 0)
BROUGHT_AND_SENT_AWAY = [ACCELERATOR, torch.device("cpu")]


@pytest.fixture(autouse=True)
def _nothing_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "_loaded", {})
    monkeypatch.setattr(models, "_changed", {})


class PretendedAccelerator:
    """Says that models are on an accelerator, and writes down where the text encoders of one would be moved.

    Encoding works while they are there, and nowhere else.
    """

    def __init__(self, pipeline: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.moves: dict[str, list[torch.device]] = {}
        self.encoded: list[str] = []
        self._encode = pipeline.encode_prompt
        monkeypatch.setattr(PipelineModel, "device", ACCELERATOR)
        monkeypatch.setattr(pipeline, "encode_prompt", self.encode)
        for name in TEXT_ENCODERS:
            if (part := getattr(pipeline, name, None)) is not None:
                self.moves[name] = [ACCELERATOR]
                monkeypatch.setattr(part, "to", self.moves[name].append)

    def encode(self, prompt: str, *args: Any, **arguments: Any) -> Any:
        assert {moves[-1] for moves in self.moves.values()} == {ACCELERATOR}
        self.encoded.append(prompt)
        on_cpu = [torch.device("cpu") if value == ACCELERATOR else value for value in args]
        if arguments.get("device") == ACCELERATOR:
            arguments["device"] = torch.device("cpu")
        return self._encode(prompt, *on_cpu, **arguments)

    def forget(self) -> None:
        for moves in self.moves.values():
            del moves[:-1]
        self.encoded.clear()

    def moved(self) -> list[list[torch.device]]:
        """Where each encoder went since the last `forget`, consecutive places once."""
        return [[place for before, place in pairwise(moves) if place != before] for moves in self.moves.values()]


@pytest.mark.parametrize(("family", "encoders"), ENCODERS.items())
def test_text_encoders_come_to_encode_what_is_new_and_leave(
    family: str, encoders: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = load_model(micro_family(family), "cpu").encode_prompts(["a cat", "a dog", "a fox"])
    model: Any = load_model(micro_family(family), "cpu")
    pretended = PretendedAccelerator(model.pipeline, monkeypatch)
    model.save_memory(offload_text_encoder=True)
    assert [moves[-1].type for moves in pretended.moves.values()] == ["cpu"] * encoders

    pretended.forget()
    first = model.encode_prompts(["a cat", "a dog", "a cat"])
    assert pretended.moved() == [BROUGHT_AND_SENT_AWAY] * encoders, "once for all prompts that are new"
    pretended.forget()
    assert all(
        torch.equal(value[2], first[name][0]) for name, value in model.encode_prompts(["a dog"] * 3).items()
    ) is (False)
    assert pretended.moved() == [[]] * encoders, "known prompts need no encoder"
    second = model.encode_prompts(["a dog", "a fox"])
    assert pretended.moved() == [BROUGHT_AND_SENT_AWAY] * encoders
    assert pretended.encoded == ["a fox"]
    for name, value in expected.items():
        assert torch.equal(torch.cat([first[name][:2], second[name][1:]]), value)


def test_negative_prompt_that_the_pipeline_encodes_itself_brings_the_encoders_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pipeline = micro_family("stable_diffusion_xl", force_zeros_for_empty_prompt=False)
    model: Any = load_model(pipeline, "cpu")
    expected = model.negative_conditioning()
    pretended = PretendedAccelerator(model.pipeline, monkeypatch)
    model.save_memory(offload_text_encoder=True)
    pretended.forget()
    assert torch.equal(model.negative_conditioning()["prompt_embeds"], expected["prompt_embeds"])
    assert pretended.moved() == [BROUGHT_AND_SENT_AWAY] * 2


def test_text_encoder_leaves_an_accelerator_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = micro_pipeline()
    pretended = PretendedAccelerator(pipeline, monkeypatch)
    model: Any = load_model(pipeline, "cpu")
    assert model.offload_text_encoder
    assert pretended.moves["text_encoder"][-1].type == "cpu"
    assert load_model(pipeline, "cpu", offload_text_encoder=False) is model
    assert pretended.moves["text_encoder"][-1] == ACCELERATOR
    pretended.forget()
    model.encode_prompts(["a cat"])
    assert pretended.moved() == [[]]
    assert load_model(model.source, "cpu") is model
    assert not model.offload_text_encoder, "what is not said again stays as it is"


def test_text_encoder_leaves_when_encoding_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = micro_pipeline()
    pretended = PretendedAccelerator(pipeline, monkeypatch)
    model: Any = load_model(pipeline, "cpu")
    monkeypatch.setattr(model.pipeline, "encode_prompt", None)
    with pytest.raises(TypeError):
        model.encode_prompts(["a cat"])
    assert pretended.moves["text_encoder"][-1].type == "cpu"


def test_finite_set_of_prompts_is_encoded_in_one_visit(monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = micro_pipeline()
    pretended = PretendedAccelerator(pipeline, monkeypatch)
    model: Any = load_model(pipeline, "cpu")
    pretended.forget()
    prompts = load_prompts("simple_animals")
    starts = InitialStates(model, prompts, 8)
    assert pretended.moved() == [BROUGHT_AND_SENT_AWAY]
    assert sorted(pretended.encoded) == sorted(set(prompts.prompts))  # type: ignore[attr-defined]
    pretended.forget()
    for _ in range(5):
        starts.sample(np.arange(8))
    assert pretended.moved() == [[]]
    monkeypatch.setattr(
        "ddpo_env.models.families.encoded_prompts.CACHED_BYTES", (len(model._encoded) + 3) * 4 * 12 * 16
    )
    InitialStates(model, load_prompts([f"animal {number}" for number in range(9)]), 1)
    assert len(pretended.encoded) == 3, "no more than what is kept"
    InitialStates(model, load_prompts(lambda rng: "never the same"), 1)


def test_on_a_cpu_nothing_moves_and_nothing_is_encoded_beforehand(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = load_model(micro_pipeline(), "cpu", offload_text_encoder=True)
    monkeypatch.setattr(model.pipeline.text_encoder, "to", lambda device: moves.append(device))
    moves: list[torch.device] = []
    known = dict(model._encoded)
    InitialStates(model, load_prompts("simple_animals"), 1)
    assert model._encoded.keys() == known.keys()
    model.encode_prompts(["a cat"])
    assert {device.type for device in moves} == {"cpu"}
    assert not model.offload_text_encoder


def test_pipeline_is_not_moved_because_of_its_text_encoder_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = micro_pipeline()
    pipeline.text_encoder.to("meta")
    monkeypatch.setattr(pipeline, "to", None)
    place_pipeline(pipeline, torch.device("cpu"), torch.float32)
    pipeline.unet.to("meta")
    with pytest.raises(TypeError):
        place_pipeline(pipeline, torch.device("cpu"), torch.float32)


def largest_tensor(decoder: nn.Module, decode: Callable[[], Tensor]) -> tuple[Tensor, int]:
    """The images, and the elements of the largest tensor that a layer of the decoder gave meanwhile."""
    sizes = []
    hooks = [
        layer.register_forward_hook(lambda *call: sizes.append(call[-1].numel()))
        for layer in decoder.modules()
        if not list(layer.children())
    ]
    try:
        return decode(), max(sizes)
    finally:
        for hook in hooks:
            hook.remove()


def test_tiles_give_about_the_same_image_with_smaller_tensors() -> None:
    model: Any = load_model("tiny", "cpu", resolution=128)
    assert load_model("tiny", "cpu", resolution=128, vae_tiling=True) is model
    vae = model.pipeline.vae
    latents = torch.randn(2, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    image, small = largest_tensor(vae.decoder, lambda: model.decode(latents))
    load_model("tiny", "cpu", vae_tiling=False)
    expected, large = largest_tensor(vae.decoder, lambda: model.decode(latents))
    assert image.shape == expected.shape == (2, 128, 128, 3)
    assert small == large // 4, "tiles of 16 × 16 of latents of 32 × 32"
    difference = (image.int() - expected.int()).abs().float()
    assert 0 < difference.mean() < 0.15 * expected.float().std(), "a tile's layers normalise by what is in the tile"


def test_image_of_the_models_own_size_is_one_tile() -> None:
    images = []
    for tiling in (False, True):
        model = load_model("tiny", "cpu", vae_tiling=tiling)
        latents = torch.randn(1, *model.latent_shape, generator=torch.Generator().manual_seed(0))
        images.append(model.decode(latents))
    assert torch.equal(*images)


def test_with_tiles_images_are_decoded_one_at_a_time_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = load_model(micro_pipeline(), "cpu")
    vae = model.pipeline.vae
    monkeypatch.setattr(PipelineModel, "_is_accelerated", lambda _: True)
    rows: list[int] = []

    def decode(latents: Tensor, **_: Any) -> tuple[Tensor]:
        rows.append(len(latents))
        return (torch.zeros(len(latents), 3, 32, 32),)

    monkeypatch.setattr(vae, "decode", decode)
    for tiling, expected in ((False, [5]), (True, [1] * 5)):
        rows.clear()
        load_model(model.source, "cpu", vae_tiling=tiling)
        model.decode(torch.zeros(5, 4, 8, 8))
        assert rows == expected


@pytest.mark.parametrize("name", ["vae_tiling", "offload_text_encoder"])
def test_model_without_the_part_refuses(name: str) -> None:
    for model in (micro_family("ddpm"), "points"):
        load_model(model, "cpu", **{name: False})
        with pytest.raises(ValueError, match=rf"{name} must be False with model '(pipeline|points).*; got True"):
            load_model(model, "cpu", **{name: True})


def test_vae_without_tiles_and_values_that_are_no_bool_are_refused() -> None:
    pipeline = micro_pipeline()
    with pytest.raises(ValueError, match="vae_tiling must be True, False or None; got 'yes'"):
        load_model(pipeline, "cpu", vae_tiling="yes")  # type: ignore[arg-type]
    del pipeline.vae.use_tiling
    load_model(pipeline, "cpu", vae_tiling=False)
    with pytest.raises(ValueError, match=r"vae_tiling must be False with model .*AutoencoderKL has none; got True"):
        load_model(pipeline, "cpu", vae_tiling=True)


def test_settings_of_a_run_reach_the_model_of_its_policy(
    micro_pipeline_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[Any, ...]] = []
    save_memory = PipelineModel.save_memory
    monkeypatch.setattr(
        PipelineModel, "save_memory", lambda model, *choices: asked.append(choices) or save_memory(model, *choices)
    )
    parsed = parse_command_line(["--vae-tiling", "--offload-text-encoder", "False", "--resolution", "64"]).run
    settings = {name: getattr(parsed, name) for name in ("vae_tiling", "offload_text_encoder", "resolution")}
    assert list(settings.values()) == [True, False, 64]
    run = prepare_run(micro_config(micro_pipeline_folder, tmp_path / "run", **settings))
    policy: Any = run.algorithm.policy
    assert policy.model.pipeline.vae.use_tiling
    assert policy.model is run.listeners[0].env.model
    assert (False, True) in asked
    untiled = prepare_run(micro_config(micro_pipeline_folder, tmp_path / "other"))
    assert not untiled.algorithm.policy.model.pipeline.vae.use_tiling  # type: ignore[attr-defined,union-attr]


@pytest.fixture(params=["stable_diffusion_2", "stable_diffusion_3", "flux_dev"])
def env(request: pytest.FixtureRequest) -> Any:
    return micro_env(micro_family(request.param), num_envs=3, reward=brightness)


def test_gradient_checkpointing_keeps_less_and_gives_the_same_gradients(env: Any) -> None:
    observation, _ = env.reset(seed=0)
    actions = torch.randn(observation["latents"].shape, generator=torch.Generator().manual_seed(0))
    kept, gradients = [], []
    for checkpointing in (False, True):
        policy = stir(micro_policy(env, gradient_checkpointing=checkpointing))
        policy.set_training_mode(True)
        sizes: dict[int, int] = {}

        def note(tensor: Tensor, sizes: dict[int, int] = sizes) -> Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            _, log_prob, _ = policy.evaluate_actions(observation, actions)
        weights = {parameter.untyped_storage().data_ptr() for parameter in policy.parameters()}
        kept.append(sum(size for place, size in sizes.items() if place not in weights))
        log_prob.sum().backward()
        gradients.append([parameter.grad for parameter in policy.trainable_parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, plain, rtol=1e-6, atol=1e-6)
    assert sum(gradient.abs().sum() for gradient in gradients[0]) > 0
    assert kept[1] < 0.6 * kept[0]


@pytest.mark.parametrize("recompute", [False, True])
def test_no_call_in_training_has_more_rows_than_a_micro_batch(micro_pipeline_folder: Path, recompute: bool) -> None:
    model = collected(
        denoising_ppo(micro_pipeline_folder, num_envs=6, micro_batch_size=2, recompute_log_probs=recompute)
    )
    rows: list[int] = []
    for denoiser in (model.policy.denoiser, model.policy.model.denoiser):
        denoiser.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    model.train()
    assert max(rows) == 4, "two pairs, doubled by guidance; measuring the drift must not need more memory"
    assert logged(model)["train/kl_to_pretrained"] > 0


def test_the_graph_of_a_micro_batch_is_gone_before_the_next_one(
    micro_pipeline_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Held until the next loss replaces it, a graph costs memory, and on a CPU a tenth of the time in new pages."""
    model = collected(denoising_ppo(micro_pipeline_folder, num_envs=6, micro_batch_size=2))
    losses: list[weakref.ref[Any]] = []
    alive: list[bool] = []
    compute = model.loss

    def watched(batch: Any) -> Any:
        alive.extend(one() is not None for one in losses[-1:])
        loss, metrics = compute(batch)
        losses.append(weakref.ref(loss))
        return loss, metrics

    monkeypatch.setattr(model, "loss", watched)
    model.train()
    assert len(alive) > 3
    assert not any(alive)
