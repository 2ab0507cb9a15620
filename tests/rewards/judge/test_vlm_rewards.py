"""The judge rewards: BERTScore and matching answers by definition, a tiny LLaVA in process, and the answer log."""

import json
import math
import warnings

import numpy as np
import pytest
import torch
from helpers.images import random_images
from helpers.random_judges import SPECIAL, WORDS, save_random_bert, save_random_llava
from PIL import Image
from transformers import BertModel, BertTokenizer, CLIPImageProcessorPil, LlavaForConditionalGeneration

from rewards import evaluate_reward, load_reward
from rewards.judge.bert_score import BertScoreRecall
from rewards.judge.judge_model import JudgeModel
from rewards.judge.vqa import answers_match
from rewards.networks import pretrained

COUNTING = {"questions": ("How many animals?", "What animals?"), "answers": ("two", "dogs")}


class Scripted:
    """A judge with given answers that remembers the questions."""

    def __init__(self, answers):
        self.answers = answers
        self.questions = []
        self.calls = []

    def ask(self, images, questions):
        assert len(images) == len(questions)
        self.questions += questions
        return [self.answers[index % len(self.answers)] for index in range(len(questions))]

    def load(self):
        self.calls.append("load")

    def unload(self):
        self.calls.append("unload")


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "bert"
    save_random_bert(folder)
    return folder


def recall_by_definition(folder, candidate, reference, layer):
    """Mean over the reference's tokens of the best cosine among the candidate's, without special tokens."""
    tokenizer, model = BertTokenizer.from_pretrained(folder), BertModel.from_pretrained(folder).eval()
    states = []
    for sentence in (candidate, reference):
        with torch.no_grad():
            output = model(**tokenizer(sentence, return_tensors="pt"), output_hidden_states=True)
        vectors = output.hidden_states[layer][0, 1:-1].double().numpy()
        states.append(vectors / np.linalg.norm(vectors, axis=1, keepdims=True))
    return (states[1] @ states[0].T).max(axis=1).mean()


CANDIDATES = ["a fox", "a fox riding a bike", "the dog is washing dishes on the bike", "cat", "a fox"]
REFERENCES = ["the image contains a fox", "a dog", "fox", "the image contains a cat riding", "a bike"]


@pytest.mark.parametrize("layer", [None, 1])
def test_bert_score_equals_its_definition_pair_by_pair(text_folder, layer):
    recall = BertScoreRecall(text_folder, layer, device="cpu")
    scores = recall(CANDIDATES, REFERENCES)
    expected = [
        recall_by_definition(text_folder, *pair, -1 if layer is None else layer)
        for pair in zip(CANDIDATES, REFERENCES, strict=True)
    ]
    np.testing.assert_allclose(scores, expected, atol=1e-5)
    np.testing.assert_allclose(recall(REFERENCES, REFERENCES), 1, atol=1e-5)


def test_bert_score_does_not_depend_on_the_batch(text_folder):
    together = BertScoreRecall(text_folder, device="cpu")(CANDIDATES, REFERENCES)
    small = BertScoreRecall(text_folder, device="cpu", batch_size=2)(CANDIDATES, REFERENCES)
    recall = BertScoreRecall(text_folder, device="cpu")
    alone = [recall([one], [other])[0] for one, other in zip(CANDIDATES, REFERENCES, strict=True)]
    np.testing.assert_allclose(small, together, atol=1e-6)
    np.testing.assert_allclose(alone, together, atol=1e-6)
    assert recall([], []).shape == (0,)


def test_a_score_warns_of_nothing(text_folder):
    recall = BertScoreRecall(text_folder, device="cpu")
    recall.load()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.isfinite(recall(["a fox"], ["a fox"])).all()


def test_nothing_to_compare_is_nan(text_folder):
    scores = BertScoreRecall(text_folder, device="cpu")(["", "a fox", " \n", "a fox"], ["a fox"] * 4)
    assert np.isnan(scores).tolist() == [True, False, True, False]


def test_long_answers_and_tokenizers_without_a_length_are_cut(text_folder):
    recall = BertScoreRecall(text_folder, device="cpu")
    recall.load()
    assert recall.loaded.tokenizer.model_max_length == 24
    assert 0 < recall(["a fox " * 5000], ["a fox"])[0] <= 1.00001


def test_wrong_arguments_of_bert_score_are_named(text_folder):
    with pytest.raises(ValueError, match=r"layer must be at most 3 in .*; got 4"):
        BertScoreRecall(text_folder, 4, device="cpu").load()
    with pytest.raises(ValueError, match="each candidate needs a reference; got 1 and 2"):
        BertScoreRecall(text_folder, device="cpu")(["a"], ["a", "b"])
    assert BertScoreRecall().layer == 40


def test_missing_dependency_names_the_extra(monkeypatch, text_folder):
    monkeypatch.setattr(pretrained, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r'BERTScore needs the package .torchmetrics.: pip install "ddpo-env\[rew'):
        load_reward("vlm_alignment", text_model=text_folder)
    with pytest.raises(ImportError, match=r'a judge server needs the package .httpx2.: pip install "ddpo-env\[rew'):
        load_reward("vlm_vqa", server="http://localhost:8000")


def test_alignment_compares_the_answer_with_the_papers_sentence(text_folder):
    judge = Scripted(["a fox riding a bike", "two dogs"])
    reward = load_reward("vlm_alignment", model=judge, text_model=text_folder, device="cpu")
    scores, details = evaluate_reward(reward, random_images(2), ["a fox", "a cat"], [{}] * 2)
    expected = [
        recall_by_definition(text_folder, "a fox riding a bike", "The image contains a fox", -1),
        recall_by_definition(text_folder, "two dogs", "The image contains a cat", -1),
    ]
    np.testing.assert_allclose(scores, expected, atol=1e-5)
    assert details == {"answer": ["a fox riding a bike", "two dogs"]}
    assert judge.questions == ["Answer concisely: what is going on in this image?"] * 2
    reward.load()
    reward.unload()
    assert judge.calls == ["load", "unload"]
    with pytest.raises(ValueError, match=r"template must contain \{prompt\}; got 'an image'"):
        load_reward("vlm_alignment", model=judge, text_model=text_folder, template="an image")


def test_missing_answer_is_an_error_or_a_flag(text_folder):
    reward = load_reward("vlm_alignment", model=Scripted(["a fox", ""]), text_model=text_folder, device="cpu")
    with pytest.raises(ValueError, match="reward vlm_alignment must be finite; got nan for prompt 'a cat'"):
        evaluate_reward(reward, random_images(2), ["a fox", "a cat"], [{}] * 2)
    _, details = evaluate_reward(reward, random_images(2), ["a fox", "a cat"], [{}] * 2, non_finite="keep")
    assert details["non_finite"] == [False, True]


@pytest.mark.parametrize(
    ("expected", "answer", "right"),
    [
        ("two", "There are two dogs.", True),
        ("two", "2", True),
        ("two", "TWO!", True),
        ("2", "two", True),
        ("two", "Twenty-two", True),
        ("two", "12", False),
        ("two", "twofold", False),
        ("one", "None", False),
        ("dogs", "a dog", True),
        ("dogs", "Two dogs", True),
        ("dogs", "hotdogs", False),
        ("mice", "a mouse", True),
        ("geese", "Geese and foxes", True),
        ("deer", "deer", True),
        ("a red fox", "The red foxes", True),
        ("red fox", "a fox that is red", False),
        ("dogs", "", False),
        ("", "anything", False),
        ("dogs", "两只狗", False),
    ],
)
def test_which_answers_match(expected, answer, right):
    assert answers_match(expected, answer) is right


def test_vqa_is_the_fraction_of_correct_answers():
    judge = Scripted(["two", "a dog", "three", "a dog", "three", "cats"])
    reward = load_reward("vlm_vqa", model=judge)
    scores, details = evaluate_reward(reward, random_images(3), ["two dogs"] * 3, [COUNTING] * 3)
    assert scores.tolist() == [1, 0.5, 0]
    assert details["answers"] == [("two", "a dog"), ("three", "a dog"), ("three", "cats")]
    assert judge.questions == ["How many animals?", "What animals?"] * 3
    uneven = [COUNTING, {"questions": ["What?"], "answers": ["dog"]}]
    assert evaluate_reward(reward, random_images(2), ["a", "b"], uneven)[0].tolist() == [1, 0]


def test_prompts_without_questions_are_named():
    reward = load_reward("vlm_vqa", model=Scripted(["two"]))
    for metadata in ({}, {"questions": ("a?", "b?"), "answers": ("a",)}, {"questions": "a?", "answers": "a"}):
        with pytest.raises(
            ValueError, match=r"needs metadata with questions and as many answers, .* prompt 'a fox' has"
        ):
            evaluate_reward(reward, random_images(1), ["a fox"], [metadata])


def test_empty_answer_to_a_question_is_an_error():
    reward = load_reward("vlm_vqa", model=Scripted(["two", ""]))
    with pytest.raises(ValueError, match="reward vlm_vqa must be finite; got nan for prompt 'two dogs'"):
        evaluate_reward(reward, random_images(1), ["two dogs"], [COUNTING])


def test_images_and_answers_are_logged(tmp_path):
    folder = tmp_path / "judge"
    for _ in range(2):  # the second log continues the first one
        reward = load_reward("vlm_vqa", model=Scripted(["zwei", "狗"]), log_folder=folder, log_per_call=3)
        evaluate_reward(reward, random_images(10), [f"prompt {index}" for index in range(10)], [COUNTING] * 10)
    lines = [json.loads(line) for line in (folder / "answers.jsonl").read_text("utf-8").splitlines()]
    assert [line["image"] for line in lines] == [f"{number:06d}.jpg" for number in range(1, 7)]
    assert sorted(path.name for path in folder.glob("*.jpg")) == [line["image"] for line in lines]
    assert [line["prompt"] for line in lines[:3]] == ["prompt 0", "prompt 4", "prompt 9"]
    assert lines[0]["answers"] == ["zwei", "狗"]
    assert lines[0]["questions"] == list(COUNTING["questions"])
    assert lines[0]["score"] == 0
    with pytest.raises(ValueError, match=r"log_per_call must be an integer in \[1, 1000000\]; got 0"):
        load_reward("vlm_vqa", model=Scripted(["two"]), log_folder=folder, log_per_call=0)


@pytest.fixture(scope="module")
def llava_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "llava"
    save_random_llava(folder)
    return folder


def test_model_in_this_process_answers_greedily_for_any_batch(llava_folder):
    images = list(random_images(8))
    questions = ["what ?", "how many ? how many ?"] * 4
    judge = JudgeModel(llava_folder, device="cpu", max_new_tokens=5)
    together = judge.ask(images, questions)
    assert together == judge.ask(images, questions), "the sampling settings of the model are not used"
    in_threes = JudgeModel(llava_folder, device="cpu", max_new_tokens=5, batch_size=3).ask(images, questions)
    alone = [judge.ask(images[index : index + 1], questions[index : index + 1])[0] for index in range(8)]
    assert together == in_threes == alone
    assert len(set(together[::2])) > 1, "the image matters"
    assert set(together[::2]) != set(together[1::2]), "the question matters"
    assert judge.ask([], []) == []
    with pytest.raises(ValueError, match="one question per image; got 8 and 1"):
        judge.ask(images, questions[:1])


def test_judge_is_asked_with_the_chat_template(llava_folder):
    words = [*SPECIAL, *WORDS]
    ids = [words.index(word) for word in ["user", ":", *["<image>"] * 4, "what", "?", "judge", ":"]]
    model = LlavaForConditionalGeneration.from_pretrained(llava_folder).eval()
    pixels = CLIPImageProcessorPil.from_pretrained(llava_folder)(
        Image.fromarray(random_images(3)[1]), return_tensors="pt"
    )["pixel_values"]
    expected = []
    for _ in range(5):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids + expected]), pixel_values=pixels).logits
        expected.append(int(logits[0, -1].argmax()))
    shown = [words[index] for index in expected if index > 4 or index == words.index("<unk>")]
    (answer,) = JudgeModel(llava_folder, device="cpu", max_new_tokens=5).ask([random_images(3)[1]], ["what ?"])
    assert answer.split() == shown
    assert shown


def test_alignment_in_process_from_image_to_score(llava_folder, text_folder):
    reward = load_reward(
        "vlm_alignment",
        model=llava_folder,
        text_model=text_folder,
        device="cpu",
        judge_options={"max_new_tokens": 5, "dtype": "bfloat16"},
    )
    scores, details = evaluate_reward(reward, random_images(4), ["a fox"] * 4, [{}] * 4, non_finite="keep")
    for score, answer in zip(scores, details["answer"], strict=True):
        if answer:
            expected = recall_by_definition(text_folder, answer, "The image contains a fox", -1)
            assert score == pytest.approx(expected, abs=1e-5)
        else:
            assert math.isnan(score)
    assert reward.judge.loaded.model.dtype == torch.bfloat16
    reward.unload()


def test_wrong_arguments_of_the_judge_are_named(llava_folder, tmp_path):
    with pytest.raises(TypeError, match="model must be a folder, a Hub id or a judge with ask, load and unload; got 3"):
        load_reward("vlm_vqa", model=3)
    with pytest.raises(TypeError, match="a judge of your own takes no options; got timeout"):
        load_reward("vlm_vqa", model=Scripted([]), judge_options={"timeout": 3})
    with pytest.raises(TypeError, match="model must be the served model's name where a server is given"):
        load_reward("vlm_vqa", model=Scripted([]), server="http://localhost:1")
    with pytest.raises(ValueError, match="judge_options must be among .*attempts, .*; got retries"):
        load_reward("vlm_vqa", server="http://localhost:1", judge_options={"retries": 3})
    with pytest.raises(ValueError, match=r"batch_size must be an integer in \[1, 1000000\]; got 0"):
        load_reward("vlm_vqa", model=llava_folder, judge_options={"batch_size": 0})
    assert load_reward("vlm_vqa").judge.source == "llava-hf/llava-1.5-7b-hf"
