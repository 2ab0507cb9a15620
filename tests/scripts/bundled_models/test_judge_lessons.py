"""What the bundled judges were taught: answers, the loss of CLIP, and that a question is read as it will be asked."""

import importlib
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.paths import SCRIPTS
from PIL import Image
from transformers import AutoProcessor

import rewards
from rewards.judge.alignment import QUESTION
from rewards.judge.judge_model import user_turn
from rewards.networks.pretrained import BUNDLED_MODELS


@pytest.fixture
def scripts(monkeypatch):
    """Import a script as a module."""
    monkeypatch.syspath_prepend(str(SCRIPTS / "bundled_models"))
    return importlib.import_module


@pytest.mark.parametrize(
    ("subject", "description", "how_many", "which"),
    [
        (("ant",), "an ant", "one", "ant"),
        (("fox", "riding a bike"), "a fox riding a bike", "one", "fox"),
        (("mouse", None, "three"), "three mice", "three", "mice"),
        (("teapot",), "a teapot", "none", "none"),
    ],
)
def test_answers(scripts, subject, description, how_many, which):
    lessons, renderings = scripts("pretraining.judge_lessons"), scripts("pretraining.emoji_renderings")
    shown = renderings.Subject(*subject)
    questions = (QUESTION, "Describe this image.", lessons.HOW_MANY, lessons.WHICH)
    assert [lessons.answer(shown, question) for question in questions] == [description, description, how_many, which]


def test_counting_prompts_ask_what_was_taught(scripts):
    from ddpo_env.prompts.distributions import load_prompts

    lessons = scripts("pretraining.judge_lessons")
    _, metadata = load_prompts("counting")[0]
    assert metadata["questions"] == (lessons.HOW_MANY, lessons.WHICH)


def test_contrastive_loss_is_the_mean_of_both_directions(scripts):
    """Written out once more: each image among all captions, each caption present among the images that show it."""
    similarity = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    captions = torch.tensor([3, 1, 3, 6, 1])
    by_image = -torch.log_softmax(similarity, dim=1)[torch.arange(5), captions].mean()
    by_caption = []
    for caption in (1, 3, 6):
        shows = captions == caption
        by_caption.append(-torch.log_softmax(similarity[:, caption], dim=0)[shows].mean())
    expected = (by_image + torch.stack(by_caption).mean()) / 2
    assert scripts("pretrain_judges").contrastive_loss(similarity, captions).item() == pytest.approx(expected.item())


def test_question_is_taught_as_the_judge_asks_it(scripts):
    """The tokens before the answer are those of the processor's own way from image and question to tokens."""
    pretrain, renderings = scripts("pretrain_judges"), scripts("pretraining.emoji_renderings")
    taught_by = scripts("pretraining.judge_lessons")
    processor = AutoProcessor.from_pretrained(Path(rewards.__file__).parent / BUNDLED_MODELS["judge"])
    shown = [renderings.Subject("fox", "riding a bike"), renderings.Subject("ant")]
    lessons = taught_by.Lessons(np.zeros((2, 64, 64, 3), np.uint8), shown, torch.zeros(2))
    batch = pretrain.Dialogues(processor, seed=0).batch(lessons, np.array([0, 1]))
    for row in range(2):
        taught = batch["labels"][row] != pretrain.IGNORED
        first = int(taught.nonzero()[0])
        text = processor.tokenizer.decode(batch["input_ids"][row, :first]).replace("<image>", "")
        question = next(one for one in taught_by.all_texts() if one.lower() in text)
        asked = processor.apply_chat_template(user_turn(question), add_generation_prompt=True)
        inputs = processor(images=[[Image.new("RGB", (64, 64))]], text=[asked], return_tensors="pt")
        assert batch["input_ids"][row, :first].tolist() == inputs["input_ids"][0].tolist()
        said = batch["labels"][row][taught]
        assert said[-1] == processor.tokenizer.eos_token_id
        assert processor.tokenizer.decode(said[:-1]).strip() == taught_by.answer(shown[row], question)


def test_grain_and_blur_keep_the_image(scripts):
    soften = scripts("pretraining.judge_lessons").soften
    pixels = torch.rand(64, 3, 64, 64, generator=torch.Generator().manual_seed(0)).round()
    torch.manual_seed(0)
    changed = soften(pixels)
    assert changed.shape == pixels.shape
    assert not torch.equal(changed, pixels)
    correlation = np.corrcoef(pixels.mean(dim=(2, 3)).flatten(), changed.mean(dim=(2, 3)).flatten())[0, 1]
    assert correlation > 0.99
