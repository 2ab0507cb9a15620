"""Judges of other families than LLaVA: tiny random models of the real classes against their documented use."""

import importlib
import importlib.util
import json
from contextlib import contextmanager

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, processing_utils
from transformers.image_processing_base import ImageProcessingMixin
from transformers.models.smolvlm import processing_smolvlm

from rewards.judge.judge_model import JudgeModel

WORDS = tuple(
    "what is this how many dogs a an the fox cat dog riding bike two three chess red blue yes no in on you are helpful "
    "assistant system user model . ? : , image".split()
)
HAS_TORCHVISION = importlib.util.find_spec("torchvision") is not None
HAS_NUM2WORDS = processing_smolvlm.num2words is not None
TINY = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
TOWER = {**TINY, "patch_size": 8, "image_size": 32}
QUESTIONS = ("what is this ?", "how many dogs ? two dogs , three dogs ?")
TOKENS = 6


class ImagesOnly(ImageProcessingMixin):
    """Replaces the video processor, which needs torchvision; no test has a video."""

    num_frames, fps = 8, 1

    @classmethod
    def from_pretrained(cls, *_, **__):
        return cls()


@contextmanager
def without_videos():
    """Let the families with a video processor load without torchvision and num2words."""
    with pytest.MonkeyPatch.context() as patch:
        if not HAS_TORCHVISION:
            auto = importlib.import_module("transformers.models.auto.video_processing_auto")
            patch.setattr(auto, "AutoVideoProcessor", ImagesOnly)
            for base in ("BaseVideoProcessor", "VideoProcessorMixin"):
                patch.setattr(processing_utils.transformers_module, base, ImagesOnly, raising=False)
        if not HAS_NUM2WORDS:
            patch.setattr(processing_smolvlm, "num2words", str)
        yield


def video_processor(name):
    return getattr(transformers, name)() if HAS_TORCHVISION else ImagesOnly()


def image_processor(name, **arguments):
    return getattr(transformers, name if HAS_TORCHVISION else f"{name}Pil")(**arguments)


def tokenizer_of(special, *, bos=None, named, **tokens):
    """One token per word; a `bos` is added in front of every text, as Llama's and Gemma's tokenizers do."""
    words = [*special, "<unk>", *WORDS]
    splitter = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    splitter.pre_tokenizer = pre_tokenizers.Whitespace()
    if bos is not None:
        ids = [(bos, words.index(bos))]
        splitter.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=ids)
        tokens["bos_token"] = bos
    return PreTrainedTokenizerFast(
        tokenizer_object=splitter,
        unk_token="<unk>",
        extra_special_tokens={f"special_{index}": word for index, word in enumerate(special)} | named,
        padding_side="right",
        model_input_names=["input_ids", "attention_mask"],
        **tokens,
    )


def save(folder, processor, config, family, **generation):
    """Random weights so large that image and question decide the answer; the settings turn sampling on."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = getattr(transformers, f"{family}ForConditionalGeneration")(config)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.4)
    model.generation_config.update(do_sample=True, temperature=3.0, top_k=20, **generation)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


QWEN = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"),
    *("<|image_pad|>", "<|video_pad|>"),
)
QWEN_CHAT = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system\n"
    "You are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{% for content in message['content'] %}{% if content['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QWEN_FAMILIES = {
    "Qwen2VL": ({"embed_dim": 16}, {"mrope_section": [1, 1, 2]}),
    "Qwen2_5_VL": (
        {"intermediate_size": 32, "out_hidden_size": 16, "window_size": 32, "fullatt_block_indexes": [1]},
        {"mrope_section": [1, 1, 2]},
    ),
    "Qwen3VL": (
        {"intermediate_size": 32, "out_hidden_size": 16, "num_position_embeddings": 16}
        | {"deepstack_visual_indexes": [0, 1]},
        {"mrope_section": [2, 1, 1], "mrope_interleaved": True},
    ),
}


def save_qwen(folder, family):
    """Qwen: images of any size as one list of patches, three positions per token, two tokens that end an answer."""
    tokenizer = tokenizer_of(
        QWEN,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        named={"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"},
    )
    merge = {"patch_size": 8, "merge_size": 2, "temporal_patch_size": 2}
    processor = getattr(transformers, f"{family}Processor")(
        image_processor("Qwen2VLImageProcessor", **merge, size={"shortest_edge": 256, "longest_edge": 2048}),
        tokenizer,
        video_processor("Qwen3VLVideoProcessor" if family == "Qwen3VL" else "Qwen2VLVideoProcessor"),
        chat_template=QWEN_CHAT,
    )
    vision, rope = QWEN_FAMILIES[family]
    text = {**TINY, "num_key_value_heads": 1, "vocab_size": len(tokenizer), "bos_token_id": 0, "eos_token_id": 2}
    if family == "Qwen3VL":
        text["head_dim"] = 8
    config = getattr(transformers, f"{family}Config")(
        text_config={**text, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, **rope}},
        vision_config={"depth": 2, "num_heads": 2, "patch_size": 8, "hidden_size": 16, **vision},
        vision_start_token_id=3,
        vision_end_token_id=4,
        image_token_id=5,
        video_token_id=6,
    )
    # the settings pad with an ordinary word, which must not reach an answer
    ends = {"eos_token_id": [2, 0], "pad_token_id": tokenizer.convert_tokens_to_ids("chess")}
    save(folder, processor, config, family, **ends)


IDEFICS = (
    *("<|im_start|>", "<|im_end|>", "<end_of_utterance>", "<fake_token_around_image>", "<image>", "<global-img>"),
    *(f"<row_{row}_col_{column}>" for row in range(1, 5) for column in range(1, 5)),
)
IDEFICS_CHAT = (
    "<|im_start|>{% for message in messages %}{{message['role'] | capitalize}}{% if message['content'][0]['type'] == "
    "'image' %}{{':'}}{% else %}{{': '}}{% endif %}{% for line in message['content'] %}{% if line['type'] == 'text' %}"
    "{{line['text']}}{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)


def save_idefics(folder, family):
    """Idefics3 and SmolVLM: an image is cut into tiles, and images of one batch have different numbers of tiles."""
    bos = "<|im_start|>" if family == "Idefics3" else None
    videos = [video_processor("SmolVLMVideoProcessor")] if family == "SmolVLM" else []
    tokenizer = tokenizer_of(
        IDEFICS, bos=bos, eos_token="<end_of_utterance>", pad_token="<|im_end|>", named={"image_token": "<image>"}
    )
    edges = {"size": {"longest_edge": 64}, "max_image_size": {"longest_edge": 32}}
    processor = getattr(transformers, f"{family}Processor")(
        image_processor(f"{family}ImageProcessor", **edges),
        tokenizer,
        *videos,
        image_seq_len=4,
        chat_template=IDEFICS_CHAT,
    )
    text = {**TINY, "model_type": "llama", "vocab_size": len(tokenizer), "max_position_embeddings": 512}
    ids = {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}
    config = getattr(transformers, f"{family}Config")(
        text_config={**text, **ids}, vision_config=TOWER, image_token_id=4, scale_factor=2
    )
    save(folder, processor, config, family)


def save_llava_onevision(folder, family):
    """LLaVA-OneVision: a grid of padded tiles, and a tokenizer without a padding token."""
    special = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<video>")
    named = {"image_token": "<image>", "video_token": "<video>"}
    tokenizer = tokenizer_of(special, eos_token="<|im_end|>", named=named)
    grid = [[32, 32], [32, 64], [64, 32], [64, 64]]
    chat = (
        "{% for message in messages %}{{'<|im_start|>' + message['role'] + ' '}}{% for content in message['content'] | "
        "selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}{% for content in message['content'] | "
        "selectattr('type', 'equalto', 'text') %}{{ '\n' + content['text'] }}{% endfor %}{{'<|im_end|>'}}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    processor = transformers.LlavaOnevisionProcessor(
        image_processor("LlavaOnevisionImageProcessor", size={"height": 32, "width": 32}, image_grid_pinpoints=grid),
        tokenizer,
        video_processor("LlavaOnevisionVideoProcessor"),
        num_image_tokens=16,
        vision_feature_select_strategy="full",
        chat_template=chat,
    )
    config = transformers.LlavaOnevisionConfig(
        vision_config={**TOWER, "model_type": "siglip_vision_model", "vision_use_head": False},
        text_config={**TINY, "model_type": "qwen2", "num_key_value_heads": 1, "vocab_size": len(tokenizer)},
        image_token_index=3,
        video_token_index=4,
        image_grid_pinpoints=grid,
    )
    config.text_config.bos_token_id, config.text_config.eos_token_id = 0, 2
    save(folder, processor, config, family, eos_token_id=2)


def save_gemma3(folder, family):
    """Gemma 3: the template begins with the token that the tokenizer adds too; image tokens attend to each other."""
    special = ("<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>")
    special += ("<start_of_image>", "<end_of_image>", "<image_soft_token>")
    tokenizer = tokenizer_of(
        special,
        bos="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        named={"boi_token": special[5], "eoi_token": special[6], "image_token": special[7]},
    )
    chat = (
        "{{ bos_token }}{% for message in messages %}<start_of_turn>{{ message['role'] }}\n"
        "{% for item in message['content'] %}{% if item['type'] == 'image' %}{{ '<start_of_image>' }}{% else %}"
        "{{ item['text'] | trim }}{% endif %}{% endfor %}<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}"
        "{{ '<start_of_turn>model\n' }}{% endif %}"
    )
    processor = transformers.Gemma3Processor(
        image_processor("Gemma3ImageProcessor", size={"height": 32, "width": 32}),
        tokenizer,
        chat_template=chat,
        image_seq_length=4,
    )
    config = transformers.Gemma3Config(
        text_config={
            **{**TINY, "vocab_size": len(tokenizer), "num_key_value_heads": 1, "head_dim": 8},
            **{"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8},
            **{"query_pre_attn_scalar": 8, "tie_word_embeddings": False},
        },
        vision_config={**TOWER, "model_type": "siglip_vision_model", "vision_use_head": False},
        mm_tokens_per_image=4,
        boi_token_index=5,
        eoi_token_index=6,
        image_token_index=7,
        tie_word_embeddings=False,  # random tied weights say one word again and again
    )
    save(folder, processor, config, family, eos_token_id=[1, 4])


def save_internvl(folder, family):
    """InternVL: the tiles of images of different shapes, one after the other."""
    special = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>", "<video>")
    tokenizer = tokenizer_of(
        special,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        named={
            **{"start_image_token": "<img>", "end_image_token": "</img>"},
            **{"context_image_token": "<IMG_CONTEXT>", "video_token": "<video>"},
        },
    )
    chat = (
        "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n'}}{% for content in message['content'] "
        "%}{% if content['type'] == 'image' %}{{ '<IMG_CONTEXT>\n' }}{% else %}{{ content['text'] }}{% endif %}"
        "{% endfor %}{{'<|im_end|>\n'}}{% endfor %}{% if add_generation_prompt %}{{'<|im_start|>assistant\n' }}"
        "{% endif %}"
    )
    processor = transformers.InternVLProcessor(
        image_processor("GotOcr2ImageProcessor", size={"height": 32, "width": 32}, max_patches=4),
        tokenizer,
        video_processor("InternVLVideoProcessor"),
        image_seq_length=4,
        chat_template=chat,
    )
    config = transformers.InternVLConfig(
        vision_config={**TINY, "patch_size": [8, 8], "image_size": [32, 32]},
        text_config={**TINY, "model_type": "qwen2", "num_key_value_heads": 1, "vocab_size": len(tokenizer)},
        image_token_id=5,
        image_seq_length=4,
    )
    save(folder, processor, config, family, eos_token_id=2)


FAMILIES = {
    **dict.fromkeys(QWEN_FAMILIES, save_qwen),
    **dict.fromkeys(["Idefics3", "SmolVLM"], save_idefics),
    "LlavaOnevision": save_llava_onevision,
    "Gemma3": save_gemma3,
    "InternVL": save_internvl,
}


def images_of_many_shapes():
    """Coloured squares in images of several sizes and shapes."""
    generator = np.random.default_rng(0)
    squares = [generator.integers(0, 256, (12, 12, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1) for _ in range(6)]
    sizes = [(32, 32), (20, 30), (64, 48), (33, 70), (64, 64), (90, 40)]
    return [square[:height, :width] for square, (height, width) in zip(squares, sizes, strict=True)]


def documented_answers(folder, family, images, questions):
    """What the model's documentation shows: one image at a time, with the classes of the family."""
    processor = getattr(transformers, f"{family}Processor").from_pretrained(folder)
    model = getattr(transformers, f"{family}ForConditionalGeneration").from_pretrained(folder).eval()
    answers = []
    for image, question in zip(images, questions, strict=True):
        content = [{"type": "image", "image": Image.fromarray(image)}, {"type": "text", "text": question}]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        with torch.inference_mode():
            tokens = model.generate(**inputs, do_sample=False, max_new_tokens=TOKENS)
        answers += processor.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [answer.strip() for answer in answers]


@pytest.fixture(scope="module", params=FAMILIES)
def saved(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("judges") / request.param
    with without_videos():
        FAMILIES[request.param](folder, request.param)
    return request.param, folder


@pytest.fixture
def family(saved):
    with without_videos():
        yield saved


def test_answers_equal_those_of_the_documented_use(family):
    name, folder = family
    images = images_of_many_shapes()
    questions = [*QUESTIONS] * 3
    judge = JudgeModel(folder, device="cpu", max_new_tokens=TOKENS)
    together = judge.ask(images, questions)
    assert together == documented_answers(folder, name, images, questions)
    in_fours = JudgeModel(folder, device="cpu", max_new_tokens=TOKENS, batch_size=4)
    assert in_fours.ask(images[::-1], questions[::-1]) == together[::-1]


def test_image_and_question_decide_the_answer(family):
    judge = JudgeModel(family[1], device="cpu", max_new_tokens=TOKENS)
    first, second = (judge.ask(images_of_many_shapes(), [question] * 6) for question in QUESTIONS)
    assert len(set(first)) >= 3
    assert sum(one != other for one, other in zip(first, second, strict=True)) >= 3


def test_half_precision_reaches_the_weights_and_the_image(family):
    judge = JudgeModel(family[1], device="cpu", max_new_tokens=2, dtype="bfloat16")
    assert len(judge.ask(images_of_many_shapes()[:3], QUESTIONS[:1] * 3)) == 3
    assert judge.loaded.model.dtype == torch.bfloat16


@pytest.mark.skipif(HAS_TORCHVISION, reason="torchvision is there")
@pytest.mark.parametrize("recorded", [{}, {"video_processor_type": "Qwen2VLVideoProcessor"}])
def test_missing_torchvision_is_named(tmp_path, recorded):
    with without_videos():
        save_qwen(tmp_path / "qwen", "Qwen2VL")
    settings = tmp_path / "qwen" / "processor_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "video_processor": recorded}))
    with pytest.raises(ImportError, match=r"judge .*qwen' needs the package 'torchvision': pip install torchvision$"):
        JudgeModel(tmp_path / "qwen", device="cpu").load()


@pytest.mark.skipif(HAS_NUM2WORDS, reason="num2words is there")
def test_missing_num2words_is_named(tmp_path, monkeypatch):
    with without_videos():
        save_idefics(tmp_path / "smol", "SmolVLM")
        monkeypatch.setattr(processing_smolvlm, "num2words", None)
        with pytest.raises(ImportError, match=r"judge .*smol' needs the package 'num2words': pip install num2words$"):
            JudgeModel(tmp_path / "smol", device="cpu").load()


def test_model_without_chat_template_is_an_error(tmp_path):
    save_gemma3(tmp_path / "gemma", "Gemma3")
    (tmp_path / "gemma" / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match="gemma' has no chat template, so it is not known how to ask it a question"):
        JudgeModel(tmp_path / "gemma", device="cpu").load()
