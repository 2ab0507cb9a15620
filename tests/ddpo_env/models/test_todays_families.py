"""Today's families, which have no adapter of their own: watched, each through the whole loop, against its pipeline."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import WanPipeline
from helpers.algorithms import denoising_ppo, fraction_changed_by_an_update, logged
from helpers.micro_agents import STEPS, micro_config, micro_env, stir
from helpers.micro_families import lora_tensors
from helpers.more_families import CASES, build
from helpers.paths import LORA_FILE
from peft import PeftModel
from torch import Tensor

from agents import DiffusionPolicy
from agents.evaluation.sample import SampleArguments, generate
from agents.policy.guidance import check_guidance
from agents.training.preparation import run_training
from ddpo_env import load_model
from ddpo_env.models import abilities_of
from ddpo_env.models.families.watching import WatchedPipeline
from ddpo_env.models.loading import check_source
from ddpo_env.spaces import ModelHandle

PROMPT = "a cat"
GUIDANCE = 3.0
DISTILLED = 3.5
"""The guidance that a denoiser takes as an input."""
GUIDED = [name for name, case in CASES.items() if case.scale]
DIFFERENCE = {
    "qwen_image": 2e-6,  # the prompt is padded here
    "sana": 2e-6,  # where one call has the rows of both halves of guidance, its last bits are others
    "z_image": 4e-6,
    "pixart_sigma": 2e-5,
    "ltx": 2e-6,
    "stable_audio_3": 2e-6,
}
"""Largest difference of a latent from the pipeline's own after three steps; 0 if it is not here."""


def level(samples: np.ndarray, prompts: list[str], metadata: list[dict[str, Any]]) -> np.ndarray:
    """Mean value of images, videos or sounds."""
    return samples.reshape(len(samples), -1).astype(float).mean(1) / 255


@pytest.fixture(params=CASES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def watched(name: str) -> Any:
    return load_model(build(name), "cpu", "float32", None, CASES[name].arguments)


def conditioning_of(model: Any, prompts: list[str]) -> dict[str, Tensor]:
    conditioning: dict[str, Tensor] = model.encode_prompts(prompts)
    return conditioning | ({"guidance": torch.full((len(prompts),), DISTILLED)} if model.guidance_embeds else {})


def denoise(model: Any, latents: Tensor, scale: float | None, steps: int) -> Tensor:
    """Sample with our parts and the pipeline's deterministic scheduler."""
    scheduler, options = copy.deepcopy(model.scheduler), model.sampler_options(steps)
    scheduler.set_timesteps(**options if "sigmas" in options else {"num_inference_steps": steps, **options})
    conditioning = conditioning_of(model, [PROMPT])
    negative = model.negative_conditioning() | {k: v for k, v in conditioning.items() if k == "guidance"}
    for timestep in scheduler.timesteps:
        rows = timestep.float()[None]
        output = model.predict(model.denoiser, latents, rows, conditioning)
        if scale is not None:
            output = model.guide(model.predict(model.denoiser, latents, rows, negative), output, scale)
        latents = scheduler.step(output, timestep, latents, return_dict=False)[0]
    return latents


def call(pipeline: Any, name: str, model: Any, scale: float | None, **arguments: Any) -> Any:
    """Call the pipeline as its users do; its first noise is that of a generator with seed 0."""
    parameters = model.watched.parameters
    case = CASES[name]
    given: dict[str, Any] = {"prompt": PROMPT, "generator": torch.Generator().manual_seed(0), **case.arguments}
    if case.scale:
        given[case.scale] = scale if scale is not None else (0.0 if name == "z_image" else 1.0)
    if model.guidance_embeds:
        given["guidance_scale"] = DISTILLED
    if scale is not None and "true_cfg_scale" in parameters:
        given["negative_prompt"] = ""
    if "use_resolution_binning" in parameters:
        given["use_resolution_binning"] = False
    if "height" in parameters:
        given = {"height": model.size[0], "width": model.size[1]} | given
    return pipeline(return_dict=False, **given | arguments)[0]


@pytest.mark.parametrize("scale", [None, GUIDANCE])
def test_deterministic_path_is_the_pipelines_own(name: str, scale: float | None) -> None:
    if scale is not None and not CASES[name].scale:
        pytest.skip("its guidance is an input of the denoiser")
    pipeline, model = build(name), watched(name)
    seen: list[Tensor] = []
    noise: list[Tensor] = []

    step = pipeline.scheduler.step

    def note(output: Tensor, timestep: Tensor, sample: Tensor, **options: Any) -> Any:
        noise.append(sample)
        result = step(output, timestep, sample, **options)
        seen.append(result[0])
        return result

    pipeline.scheduler.step = note
    images = call(pipeline, name, model, scale, num_inference_steps=3, output_type="pt")
    with torch.no_grad():
        mine = denoise(model, noise[0], scale, 3)
    assert mine.shape == seen[-1].shape == (1, *model.latent_shape)
    assert (mine - seen[-1]).abs().max() <= DIFFERENCE.get(name, 0.0)
    decoded = model.decode(mine)
    if model.sample_kind == "audio":
        torch.testing.assert_close(decoded, images, atol=1e-5, rtol=1e-4)
    else:
        expected = (images.movedim(-3, -1) * 255).round()
        assert decoded.dtype == torch.uint8
        assert decoded.shape == expected.shape
        assert (decoded - expected).abs().max() <= 1


def test_row_has_its_own_timestep_and_does_not_depend_on_the_batch(name: str) -> None:
    model = watched(name)
    latents = torch.randn(3, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    timestep = model.scheduler.config.num_train_timesteps * torch.tensor([0.9, 0.5, 0.1])
    prompts = ["", "a cat", "a much longer prompt about two cats"]
    together = model.predict(model.denoiser, latents, timestep, conditioning_of(model, prompts))
    for row in range(3):
        alone = model.predict(
            model.denoiser, latents[row : row + 1], timestep[row : row + 1], conditioning_of(model, [prompts[row]])
        )
        torch.testing.assert_close(together[row : row + 1], alone, atol=1e-5, rtol=1e-4)
    moved = model.predict(model.denoiser, latents, timestep.flip(0), conditioning_of(model, prompts))
    assert not torch.allclose(moved[0], together[0], atol=1e-4), "the timestep matters"


def test_update_trains_the_policy_and_stock_diffusers_reads_it(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    env = micro_env(build(name), 4, samples_per_prompt=2, reward=level, pipeline_arguments=case.arguments)
    scale = GUIDANCE if case.scale else DISTILLED
    policy = {"lora_rank": 2, "lora_targets": "attention", "guidance_scale": scale, "min_std": 0.02}
    model = denoising_ppo(env, policy=policy, batch_size=2 * STEPS)
    assert fraction_changed_by_an_update(model) > 1 / 3
    assert logged(model)["train/ratio_deviation"] <= 1e-4

    trained = stir(model.policy)
    trained.save_lora(tmp_path)
    stock: Any = build(name)
    denoiser_name = env.model.watched.denoiser_name  # type: ignore[attr-defined]
    if hasattr(stock, "load_lora_weights"):
        stock.load_lora_weights(tmp_path, weight_name=LORA_FILE)
    else:
        setattr(stock, denoiser_name, PeftModel.from_pretrained(getattr(stock, denoiser_name), tmp_path))
    loaded = getattr(stock, denoiser_name)
    mine, theirs = lora_tensors(trained.denoiser), lora_tensors(loaded)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[key]) for key, value in mine.items())
    latents = torch.randn(2, *env.model.latent_shape, generator=torch.Generator().manual_seed(0))
    inputs = (latents, torch.full((2,), 0.5 * env.model.scheduler.config.num_train_timesteps))
    conditioning = conditioning_of(env.model, ["a cat", "a dog"])
    with torch.no_grad():
        outputs = [env.model.predict(one, *inputs, conditioning) for one in (trained.denoiser, loaded)]
        base = env.model.predict(env.model.denoiser, *inputs, conditioning)
    torch.testing.assert_close(*outputs, atol=1e-5, rtol=1e-5)
    assert (outputs[0] - base).abs().max() > 1e-3


@pytest.mark.parametrize("name", CASES)
def test_pipeline_that_nobody_has_tested_is_compared_on_the_spot(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ddpo_env.models.families.pipeline_model.TESTED", frozenset())
    assert watched(name).guidance_problem is None


def test_guidance_of_an_unknown_form_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for place in ("TESTED", "GUIDES"):
        monkeypatch.setattr(f"ddpo_env.models.families.pipeline_model.{place}", {})
    model = watched("z_image")
    check_guidance(model, 1.0)
    with pytest.raises(ValueError, match=r"guidance_scale must be 1 with model .*guidance of its own: they differ by"):
        check_guidance(model, 3.0)


def test_call_that_is_watched_wrongly_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ddpo_env.models.families.pipeline_model.TESTED", frozenset())
    output = WatchedPipeline.output
    monkeypatch.setattr(
        WatchedPipeline,
        "output",
        lambda self, one, latents, t, *rest, **given: output(self, one, latents, 0.9 * t, *rest, **given),
    )
    with pytest.raises(
        ValueError, match=r"must give the outputs of its LTXPipeline when it is watched; they differ by"
    ):
        watched("ltx")


def test_two_denoisers_are_refused_by_name() -> None:
    pipeline: Any = build("wan")
    both = {**pipeline.components, "transformer_2": pipeline.transformer}
    with pytest.raises(ValueError, match="must have one denoiser; it has a transformer_2 too"):
        load_model(type(pipeline)(**both, boundary_ratio=0.5), "cpu")


def test_arguments_that_the_pipeline_does_not_take_are_refused() -> None:
    with pytest.raises(ValueError, match=r"pipeline_arguments must be among .*num_frames.*; got frames"):
        load_model(build("wan"), "cpu", pipeline_arguments={"frames": 5})
    with pytest.raises(ValueError, match=r"pipeline_arguments must be among .*; got latents"):
        load_model(build("wan"), "cpu", pipeline_arguments={"latents": 5})
    with pytest.raises(ValueError, match=r"pipeline_arguments must be empty with model 'points'.*; got {'a': 1}"):
        load_model("points", "cpu", pipeline_arguments={"a": 1})
    with pytest.raises(ValueError, match="resolution must be None if height or width is in pipeline_arguments; got 32"):
        load_model(build("wan"), "cpu", resolution=32, pipeline_arguments={"height": 16, "width": 16, "num_frames": 5})


@pytest.mark.parametrize(
    ("argument", "instead"),
    [
        ({"guidance_rescale": 0.9}, "guidance_scale alone; got guidance_rescale=0.9"),
        ({"eta": 0.3}, "its setting eta is the amount; got eta=0.3"),
        ({"num_images_per_prompt": 2}, "samples_per_prompt is the number of samples for a prompt"),
    ],
)
def test_arguments_that_training_would_not_see_are_refused_with_what_decides_instead(
    micro_pipeline_folder: Path, argument: dict[str, Any], instead: str
) -> None:
    (name,) = argument
    for checking in (check_source, load_model):
        with pytest.raises(ValueError, match=f"pipeline_arguments must not have {name} with model .*{instead}"):
            checking(micro_pipeline_folder, "cpu", pipeline_arguments=argument)
    with pytest.raises(ValueError, match="pipeline_arguments must be among ") as error:
        load_model(micro_pipeline_folder, "cpu", pipeline_arguments={"frames": 1})
    assert name not in str(error.value)


def test_height_without_width_is_refused_as_a_pipeline_may_ignore_it(micro_pipeline_folder: Path) -> None:
    with pytest.raises(ValueError, match=r"must have height and width, or neither: .*resolution.*; got height alone"):
        load_model(micro_pipeline_folder, "cpu", pipeline_arguments={"height": 48})
    both: Any = load_model(micro_pipeline_folder, "cpu", pipeline_arguments={"height": 48, "width": 32})
    assert both.latent_shape == (4, 12, 8)


def test_error_of_the_call_names_the_arguments_it_was_given(micro_pipeline_folder: Path) -> None:
    with pytest.raises(ValueError, match=r"its call with pipeline_arguments cross_attention_kwargs=3 ended with \w+"):
        load_model(micro_pipeline_folder, "cpu", pipeline_arguments={"cross_attention_kwargs": 3})


def test_run_trains_a_video_model_and_shows_three_frames(tmp_path: Path) -> None:
    build("wan").save_pretrained(tmp_path / "wan")
    config = micro_config(
        tmp_path / "wan", tmp_path / "run", iterations=1, eval_samples=2, guidance_scale=2.0,
        reward="temporal_consistency:1,jpeg_compressibility:0.1",
        pipeline_arguments=("height=16", "width=16", "num_frames=5", "max_sequence_length=24"),
    )  # fmt: skip
    assert run_training(config).iterations == 1
    assert (tmp_path / "run" / "samples" / "before_after.png").is_file()
    films = [path.name for path in sorted((tmp_path / "run" / "samples" / "images").glob("*.webp"))]
    assert films == [f"iteration_000{iteration}_0{sample}.webp" for iteration in (0, 1) for sample in (0, 1)]
    assert (tmp_path / "run" / "report.html").read_text("utf-8").count("data:image/webp;base64,") == 4
    policy = DiffusionPolicy.load(tmp_path / "run" / "policy", device="cpu")
    assert policy.model.arguments["num_frames"] == 5  # type: ignore[attr-defined]
    latents = torch.randn(2, *policy.model.latent_shape)
    frames = policy.model.decode(latents)
    shown = abilities_of(policy.model).render(latents)
    assert frames.shape == (2, 5, 16, 16, 3)
    assert torch.equal(shown[:, :, 16:32], frames[:, 2])
    with pytest.raises(ValueError, match=r"clip_score scores images, .*generates videos, uint8"):
        micro_env(policy.model, reward="clip_score")


@pytest.mark.parametrize("is_object", [False, True], ids=["folder", "object"])
@torch.no_grad()
def test_weights_that_diffusers_keeps_in_float32_stay_and_the_model_has_one_dtype(
    is_object: bool, tmp_path: Path
) -> None:
    build("wan").save_pretrained(tmp_path)
    given: Any = WanPipeline.from_pretrained(tmp_path, torch_dtype=torch.bfloat16) if is_object else tmp_path
    model: Any = load_model(given, "cpu", "bfloat16", None, CASES["wan"].arguments)
    kept = [name for name, weight in model.denoiser.named_parameters() if weight.dtype == torch.float32]
    assert "scale_shift_table" in kept
    assert load_model(model) is model
    assert ModelHandle.of(model, 2).dtype == "bfloat16"
    inputs: list[torch.dtype] = []
    model.denoiser.register_forward_pre_hook(
        lambda _, __, given: inputs.extend(given[name].dtype for name in ("hidden_states", "encoder_hidden_states")),
        with_kwargs=True,
    )
    latents = torch.zeros(1, *model.latent_shape)
    model.predict(model.denoiser, latents, torch.tensor([500.0]), conditioning_of(model, [PROMPT]))
    assert set(inputs) == {torch.bfloat16}


def test_sounds_of_a_model_in_half_precision_are_float32() -> None:
    """NumPy, and so a reward, has no bfloat16."""
    arguments = CASES["stable_audio_3"].arguments
    model = load_model(build("stable_audio_3"), "cpu", "bfloat16", pipeline_arguments=arguments)
    sounds = model.decode(torch.zeros(1, *model.latent_shape))
    assert sounds.dtype == torch.float32
    assert sounds.isfinite().all()


def test_rewards_of_sounds_know_the_rate_and_a_waveform_is_shown() -> None:
    told: list[Any] = []

    def loudness(sounds: np.ndarray, prompts: list[str], metadata: list[dict[str, Any]]) -> np.ndarray:
        told.append((sounds.shape, metadata))
        return np.abs(sounds).mean(axis=(1, 2))

    env = micro_env(build("stable_audio_3"), 2, num_inference_steps=1, reward=loudness, render_mode="rgb_array",
                    pipeline_arguments=CASES["stable_audio_3"].arguments)  # fmt: skip
    env.reset(seed=0)
    pictures = env.render()
    env.step(torch.randn(2, *env.model.latent_shape))
    assert told == [((2, 2, 16), [{"sampling_rate": 16}] * 2)]
    assert pictures is not None
    assert np.stack(pictures).shape == (2, 128, 384, 3)
    assert set(np.unique(pictures)) == {40, 255}


def test_pipeline_whose_call_cannot_be_watched_is_refused_with_its_own_words(monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline: Any = build("ltx")
    call = type(pipeline).__call__

    def refuses(self: Any, prompt: Any = None, latents: Any = None, **_: Any) -> None:
        raise KeyError("no such thing")

    monkeypatch.setattr(type(pipeline), "__call__", refuses)
    with pytest.raises(ValueError, match=r"must be a pipeline that can be watched; .* KeyError: 'no such thing'"):
        load_model(pipeline, "cpu")

    def skips(self: Any, prompt: Any = None, latents: Any = None, **_: Any) -> None:
        return None

    monkeypatch.setattr(type(pipeline), "__call__", skips)
    with pytest.raises(ValueError, match="it must call its transformer with latents; it had ended before"):
        load_model(pipeline, "cpu")
    monkeypatch.setattr(type(pipeline), "__call__", call)
    assert load_model(pipeline, "cpu", pipeline_arguments=CASES["ltx"].arguments)


def test_sample_command_takes_the_arguments_of_the_pipeline(tmp_path: Path) -> None:
    build("z_image").save_pretrained(tmp_path / "model")
    arguments = SampleArguments(
        model=str(tmp_path / "model"), prompts=("a cat",), seeds=(0,), num_inference_steps=1, device="cpu",
        pipeline_arguments=("height=32", "width=48", "max_sequence_length=48"),
    )  # fmt: skip
    assert generate(arguments)[0][0].shape == (1, 32, 48, 3)
