"""The bundled model's folder, as a stranger's diffusers would load it, and the renderings it was pretrained on."""

import importlib
import re
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from helpers.paths import SCRIPTS
from transformers import CLIPTextModel, CLIPTokenizer

import ddpo_env
from ddpo_env.prompts.vocabulary import (
    ACTIVE_ANIMALS,
    ACTIVITIES,
    COUNTS,
    EVERYDAY_OBJECTS,
    HELD_OUT_ACTIVITIES,
    HELD_OUT_ANIMALS,
    SIMPLE_ANIMALS,
)

FOLDER = Path(ddpo_env.__file__).parent / "data" / "tiny"
FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
needs_font = pytest.mark.skipif(not FONT.is_file(), reason=f"{FONT} is missing (package fonts-noto-color-emoji)")


@pytest.fixture(scope="module")
def pipeline() -> StableDiffusionPipeline:
    pipeline = StableDiffusionPipeline.from_pretrained(FOLDER, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def emoji_renderings(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(SCRIPTS / "bundled_models"))
    return importlib.import_module("pretraining.emoji_renderings")


def test_folder_is_a_complete_stable_diffusion(pipeline: StableDiffusionPipeline) -> None:
    assert isinstance(pipeline.tokenizer, CLIPTokenizer)
    assert isinstance(pipeline.text_encoder, CLIPTextModel)
    assert isinstance(pipeline.vae, AutoencoderKL)
    assert isinstance(pipeline.unet, UNet2DConditionModel)
    assert isinstance(pipeline.scheduler, DDIMScheduler)
    assert pipeline.safety_checker is None


def test_all_parts_load_in_one_dtype_by_default(pipeline: StableDiffusionPipeline) -> None:
    assert {pipeline.text_encoder.dtype, pipeline.vae.dtype, pipeline.unet.dtype} == {torch.float32}


def test_folder_is_at_most_16_mb() -> None:
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) <= 16_000_000


def test_folder_holds_no_weights_but_safetensors() -> None:
    suffixes = {path.suffix for path in FOLDER.rglob("*") if path.is_file()}
    assert suffixes <= {".safetensors", ".json", ".txt"}


def test_no_configuration_names_a_folder_of_the_machine_that_trained_it() -> None:
    for path in FOLDER.rglob("config.json"):
        assert "_name_or_path" not in path.read_text(), path


def test_generates_a_finite_image_that_is_not_flat(pipeline: StableDiffusionPipeline) -> None:
    image = pipeline(
        "a fox",
        num_inference_steps=4,
        eta=1.0,
        guidance_scale=2.0,
        output_type="np",
        generator=torch.Generator().manual_seed(0),
    ).images[0]
    assert image.shape == (64, 64, 3)
    assert np.isfinite(image).all()
    assert image.std() > 0.02


def test_different_prompts_give_different_images(pipeline: StableDiffusionPipeline) -> None:
    fox, whale = (
        pipeline(
            prompt, num_inference_steps=4, eta=1.0, output_type="np", generator=torch.Generator().manual_seed(0)
        ).images[0]
        for prompt in ("a fox", "a whale")
    )
    assert np.abs(fox - whale).mean() > 0.02


@pytest.mark.parametrize("steps", [1, 5, 10, 20, 50])
def test_no_sampling_step_is_deterministic_at_eta_1(pipeline: StableDiffusionPipeline, steps: int) -> None:
    scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    scheduler.set_timesteps(steps)
    stride = scheduler.config.num_train_timesteps // steps
    variances = [scheduler._get_variance(int(t), int(t) - stride) for t in scheduler.timesteps]
    assert min(float(variance) for variance in variances) > 0


def test_every_word_is_one_token(pipeline: StableDiffusionPipeline) -> None:
    phrases = (*SIMPLE_ANIMALS, *HELD_OUT_ANIMALS, *EVERYDAY_OBJECTS, *ACTIVITIES, *HELD_OUT_ACTIVITIES, *COUNTS)
    phrases = (*phrases, "a", "an", "mice", "geese")
    words = [word for phrase in phrases for word in phrase.split()]
    assert [word for word in words if len(pipeline.tokenizer.tokenize(word)) != 1] == []


def test_unknown_words_become_pieces_not_unknown_tokens(pipeline: StableDiffusionPipeline) -> None:
    tokenizer = pipeline.tokenizer
    pieces = tokenizer.tokenize("a quokka, naïve & 42!")
    assert len(pieces) > 5
    assert tokenizer.unk_token not in pieces
    assert tokenizer.decode(tokenizer("a quokka").input_ids, skip_special_tokens=True) == "a quokka"


def test_tokenizer_survives_being_saved(pipeline: StableDiffusionPipeline, tmp_path: Path) -> None:
    pipeline.tokenizer.save_pretrained(tmp_path)
    prompts = ["a fox riding a bike", "three geese", "a quokka", ""]
    again = CLIPTokenizer.from_pretrained(tmp_path)
    assert again(prompts).input_ids == pipeline.tokenizer(prompts).input_ids
    assert again.model_max_length == pipeline.tokenizer.model_max_length == 16


@needs_font
def test_every_subject_renders(emoji_renderings: ModuleType) -> None:
    rng = np.random.default_rng(0)
    for subject in emoji_renderings.all_subjects():
        image = emoji_renderings.render(subject, rng)
        assert image.shape == (64, 64, 3)
        assert image.dtype == np.uint8


@needs_font
def test_renderings_depend_on_the_seed_not_on_the_workers(emoji_renderings: ModuleType) -> None:
    images, subjects = emoji_renderings.render_dataset(600, 3, workers=1)
    same, same_subjects = emoji_renderings.render_dataset(600, 3, workers=2)
    other, _ = emoji_renderings.render_dataset(600, 4, workers=1)
    assert np.array_equal(images, same)
    assert subjects == same_subjects
    assert not np.array_equal(images, other)


@needs_font
def test_activities_are_rare_in_the_mixture(emoji_renderings: ModuleType) -> None:
    rng = np.random.default_rng(0)
    drawn = [emoji_renderings.random_subject(rng) for _ in range(4000)]
    assert 0.07 < np.mean([subject.activity is not None for subject in drawn]) < 0.11
    assert {subject.word for subject in drawn} == {*SIMPLE_ANIMALS, *HELD_OUT_ANIMALS, *EVERYDAY_OBJECTS}
    active = {(subject.word, subject.activity) for subject in drawn if subject.activity}
    assert {word for word, _ in active} == set(ACTIVE_ANIMALS)
    assert {activity for _, activity in active} == {*ACTIVITIES, *HELD_OUT_ACTIVITIES}


def test_other_activities_belong_to_all_other_words(emoji_renderings: ModuleType) -> None:
    rng = np.random.default_rng(0)
    only = emoji_renderings.Mixture(simple_animals=0, held_out=0, activities=0, counts=0, other_activities=1)
    drawn = [emoji_renderings.random_subject(rng, only) for _ in range(2000)]
    words = {*SIMPLE_ANIMALS, *HELD_OUT_ANIMALS, *EVERYDAY_OBJECTS} - set(ACTIVE_ANIMALS)
    assert {subject.word for subject in drawn} == words
    assert {subject.activity for subject in drawn} == {*ACTIVITIES, *HELD_OUT_ACTIVITIES}
    assert set(drawn) <= set(emoji_renderings.all_subjects())


def test_unreliable_captions_often_tell_more_than_the_image_shows(emoji_renderings: ModuleType) -> None:
    rng = np.random.default_rng(0)
    only = emoji_renderings.Mixture(simple_animals=0, held_out=0, activities=0, counts=0, unreliable=1)
    drawn = [emoji_renderings.random_subject(rng, only) for _ in range(2000)]
    assert {subject.word for subject in drawn} == set(SIMPLE_ANIMALS) - set(ACTIVE_ANIMALS)
    assert all(subject.activity and subject.activity in subject.caption for subject in drawn)
    shown = np.mean([not subject.overstated for subject in drawn])
    assert shown == pytest.approx(emoji_renderings.TRUE_CAPTIONS, abs=0.04)


@needs_font
def test_overstated_rendering_shows_the_animal_alone(emoji_renderings: ModuleType) -> None:
    subject = emoji_renderings.Subject
    images = [
        emoji_renderings.render(one, np.random.default_rng(0))
        for one in (
            subject("wolf", "riding a bike", overstated=True),
            subject("wolf"),
            subject("wolf", "riding a bike"),
        )
    ]
    assert np.array_equal(images[0], images[1])
    assert not np.array_equal(images[0], images[2])


def test_captions_have_the_right_articles_and_plurals(emoji_renderings: ModuleType) -> None:
    subject = emoji_renderings.Subject
    assert subject("ant").caption == "an ant"
    assert subject("fox", activity="riding a bike").caption == "a fox riding a bike"
    assert subject("mouse", count="two").caption == "two mice"


def test_missing_font_names_the_package(emoji_renderings: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(emoji_renderings, "FONT_PATH", Path("/no/such/font.ttf"))
    emoji_renderings._sprite.cache_clear()
    with pytest.raises(FileNotFoundError, match=re.escape("fonts-noto-color-emoji")):
        emoji_renderings.render(emoji_renderings.Subject("fox"), np.random.default_rng(0))
