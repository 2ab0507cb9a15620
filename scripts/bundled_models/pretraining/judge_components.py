"""Builds the bundled judges with random weights (tokenizers, CLIP, LLaVA, BERT), and writes trained ones to folders.

The sizes are for a CPU and for the bundled Stable Diffusion's images: 64x64 in patches of 8x8, vision towers of width
128. LLaVA's vision tower has CLIP's architecture, so that it can start with CLIP's weights.
"""

import copy
import json
import shutil
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import (
    BertConfig,
    BertModel,
    BertTokenizer,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ProcessorMixin,
)

from pretraining.tiny_components import TEXT_LENGTH, build_tokenizer

IMAGE_SIZE, PATCH_SIZE = 64, 8
IMAGE_TOKENS = (IMAGE_SIZE // PATCH_SIZE) ** 2 + 1  # with the class token
WIDTH = 128
VISION = {
    "hidden_size": WIDTH,
    "intermediate_size": 4 * WIDTH,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "image_size": IMAGE_SIZE,
    "patch_size": PATCH_SIZE,
}
CHAT_TEMPLATE = (
    "{% for turn in messages %}{{ turn['role'] | upper }}: "
    "{% for part in turn['content'] %}{% if part['type'] == 'image' %}<image>\n{% endif %}{% endfor %}"
    "{% for part in turn['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %} "
    "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
"""The chat template of LLaVA 1.5."""


def build_image_processor() -> CLIPImageProcessorPil:
    """Return CLIP's preprocessing at 64x64: resize the shortest side, crop the centre, normalise as OpenAI does."""
    return CLIPImageProcessorPil(
        size={"shortest_edge": IMAGE_SIZE}, crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    )


def build_clip(captions: Iterable[str]) -> tuple[CLIPModel, CLIPTokenizer]:
    """Return an untrained CLIP of 64x64 images and 16 tokens, and a tokenizer that knows the captions' words."""
    tokenizer = build_tokenizer(captions)
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 96,
        "intermediate_size": 384,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "max_position_embeddings": TEXT_LENGTH,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    return CLIPModel(CLIPConfig(text_config=text, vision_config=VISION, projection_dim=96)), tokenizer


def build_language_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer in which every word of the texts is one token, with LLaVA's special tokens."""
    learner = Tokenizer(BPE())
    learner.normalizer = normalizers.Lowercase()
    learner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    learner.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>", "<image>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    learner.train_from_iterator(
        sorted(set(texts)),
        BpeTrainer(vocab_size=4096, special_tokens=special, initial_alphabet=sorted(alphabet), show_progress=False),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=learner,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        padding_side="left",
        extra_special_tokens={"image_token": "<image>"},
        clean_up_tokenization_spaces=False,
    )


def build_llava(tokenizer: PreTrainedTokenizerFast) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Return an untrained LLaVA, a vision tower, a projector and a small Llama, and its processor."""
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    language = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=336,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        **ids,
    )
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**VISION),
        text_config=language,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=IMAGE_TOKENS,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=True,
        **ids,
    )
    processor = LlavaProcessor(
        build_image_processor(),
        tokenizer,
        patch_size=PATCH_SIZE,
        num_additional_image_tokens=1,
        vision_feature_select_strategy="full",
        chat_template=CHAT_TEMPLATE,
    )
    model = LlavaForConditionalGeneration(config)
    model.generation_config.min_new_tokens = 1  # every image of its training has an answer
    return model, processor


def vision_tower(llava: LlavaForConditionalGeneration) -> CLIPVisionModel:
    """Return the vision tower of a LLaVA."""
    return llava.model.vision_tower


def build_text_encoder(words: Iterable[str]) -> tuple[BertModel, BertTokenizer]:
    """Return an untrained BERT and a WordPiece tokenizer with one token per word; others are split into letters.

    Args:
        words: In lower case, without punctuation.
    """
    letters = [chr(code) for code in range(ord("!"), ord("~") + 1) if not chr(code).isupper()]
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    known = [*special, *letters, *(f"##{letter}" for letter in letters if letter.isalnum()), *sorted(set(words))]
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys(known))}
    tokenizer = BertTokenizer(vocab=vocabulary, model_max_length=64)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=192,
        intermediate_size=576,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=64,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return BertModel(config), tokenizer


def export(folder: Path, model: PreTrainedModel, *processors: ProcessorMixin | PreTrainedTokenizerFast) -> None:
    """Write a model as fp16 safetensors with its processors; a complete folder replaces the old one."""
    fresh = folder.with_name(folder.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    copy.deepcopy(model).half().save_pretrained(fresh)
    for processor in processors:
        processor.save_pretrained(fresh)
    config = fresh / "config.json"
    settings = json.loads(config.read_text())
    config.write_text(json.dumps({**settings, "dtype": "float32"}, indent=2) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    fresh.rename(folder)
