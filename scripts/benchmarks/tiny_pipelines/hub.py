"""Stand-ins for the tiny models that diffusers' tests load from the Hugging Face Hub: nothing is downloaded.

A stand-in tokenizer has one token per word. The words of the benchmark's prompts have tokens of their own, and all
other words, such as those of a prompt template, share one.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
import transformers
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    BatchEncoding,
    FeatureExtractionMixin,
    ImageProcessingMixin,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    ProcessorMixin,
)

_WORDS = ("a", "red", "cat", "sits", "on", "the", "roof", "of", "house", "and", "looks", "at", "moon", "blurry", "dog")
_CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{% if message.content is string %}{{ message.content "
    "}}{% else %}{% for part in message.content %}{{ part.text if part.type == 'text' else '<|vision_start|><|image_pad"
    "|><|vision_end|>' }}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>"
    "assistant\n{% endif %}"
)
_QWEN = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>"),
    *("<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>"),
    *("<|image_pad|>", "<|video_pad|>"),
)
_KINDS: dict[str, dict[str, Any]] = {
    "t5": {"special": ("<pad>", "</s>", "<unk>"), "frame": "$A </s>", "pad": "<pad>", "eos": "</s>"},
    "clip": {"last": ("<s>", "</s>"), "frame": "<s> $A </s>", "pad": "</s>", "eos": "</s>", "bos": "<s>"},
    "qwen": {"special": _QWEN, "first": 151643, "frame": "$A", "pad": "<|endoftext|>", "eos": "<|im_end|>"},
    "gemma": {
        "special": ("<pad>", "<eos>", "<bos>"),
        "frame": "<bos> $A",
        "pad": "<pad>",
        "eos": "<eos>",
        "bos": "<bos>",
    },
    "llama": {"special": ("<unk>", "<s>", "</s>"), "frame": "<s> $A", "pad": "</s>", "eos": "</s>", "bos": "<s>"},
    "bert": {"special": ("[PAD]", "[CLS]", "[SEP]"), "frame": "[CLS] $A [SEP]", "pad": "[PAD]", "eos": "[SEP]"},
    "roberta": {"special": ("<s>", "<pad>", "</s>"), "frame": "<s> $A </s>", "pad": "<pad>", "eos": "</s>"},
    "glm": {"special": ("[gMASK]", "sop", "<pad>"), "frame": "[gMASK] sop $A", "pad": "<pad>", "eos": "<pad>"},
}
"""Special tokens by kind of tokenizer, and the frame around a text. The end of CLIP's must have the largest id."""

_NAMES = {
    **{"mclip": "roberta", "xlmroberta": "roberta", "roberta": "roberta", "clip": "clip", "t5": "t5", "qwen": "qwen"},
    **{"gemma": "gemma", "llama": "llama", "bert": "bert", "hunyaun": "llama", "glm": "glm", "mistral": "llama"},
    **{"cosmos3": "qwen", "llada": "llama"},
}
"""Part of a name → kind of tokenizer; the first one that fits counts."""

_TEXT = {"num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 37}
_MODELS: dict[str, dict[str, Any]] = {
    "t5": {"vocab_size": 1103, "d_model": 32, "d_kv": 8, "d_ff": 37, "num_layers": 2, "num_heads": 4}
    | {"feed_forward_proj": "gated-gelu", "dropout_rate": 0.0},
    "bert": {"vocab_size": 1124, "hidden_size": 32, **_TEXT},
    "llama": {"vocab_size": 1000, "hidden_size": 16, **_TEXT},
    "chatglm": {"padded_vocab_size": 1000, "hidden_size": 8, "num_layers": 2, "num_attention_heads": 2}
    | {"ffn_hidden_size": 16, "kv_channels": 4, "add_qkv_bias": True, "multi_query_attention": True}
    | {"original_rope": True},
    "gemma3": {
        "text_config": {"vocab_size": 1000, "hidden_size": 32, **_TEXT, "num_key_value_heads": 2, "head_dim": 8},
        "vision_config": {"hidden_size": 16, **_TEXT, "image_size": 16, "patch_size": 4},
        "mm_tokens_per_image": 4,
    },
    "qwen2vl": {
        "text_config": {"vocab_size": 152064, "hidden_size": 16, **_TEXT, "num_key_value_heads": 2}
        | {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 0], "rope_theta": 1e6}},
        "vision_config": {"depth": 2, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "mlp_ratio": 2},
    },
}
"""Configurations by part of a name."""


class _GlmTokenizer(PreTrainedTokenizerFast):
    """A tokenizer that counts positions, as ChatGLM's does."""

    def __call__(self, *arguments: Any, **options: Any) -> BatchEncoding:
        encoded = super().__call__(*arguments, **options)
        mask = torch.as_tensor(encoded["attention_mask"])
        encoded["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
        return encoded


def stand_in_tokenizer(name: str, **options: Any) -> PreTrainedTokenizerFast:
    """Return a tokenizer of the kind that a Hub id or a class name contains.

    Args:
        name: Hub id, class name, or both.
        **options: of the tokenizer; `model_max_length` and `padding_side` count.

    Raises:
        ValueError: for a name of an unknown kind.
    """
    found = next((kind for part, kind in _NAMES.items() if part in name.lower()), None)
    if found is None:
        raise ValueError(f"name must contain one of {', '.join(_NAMES)}; got {name!r}")
    kind = _KINDS[found]
    special = {word: kind.get("first", 0) + index for index, word in enumerate(kind.get("special", ()))}
    words = dict(special)
    for word in ("<other>", *_WORDS, *kind.get("last", ())):
        words[word] = len(words)
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<other>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n|\w+|[^\w\s]"), "removed", invert=True)
    framed = [(word, words[word]) for word in kind["frame"].split() if word != "$A"]
    tokenizer.post_processor = processors.TemplateProcessing(single=kind["frame"], special_tokens=framed)
    named = {f"{role}_token": kind[role] for role in ("pad", "eos", "bos") if role in kind}
    others = [word for word in (*special, *kind.get("last", ())) if word not in named.values()]
    given = {key: options[key] for key in ("model_max_length", "padding_side") if key in options}
    made = (_GlmTokenizer if "chatglm" in name.lower() else PreTrainedTokenizerFast)(
        tokenizer_object=tokenizer,
        unk_token="<other>",
        additional_special_tokens=others,
        **named,
        **{"model_max_length": 77} | given,
    )
    made.chat_template = _CHAT
    made.image_token, made.video_token = "<|image_pad|>", "<|video_pad|>"
    return made


def stand_in_settings(name: str) -> dict[str, Any]:
    """Return the settings of a tiny text encoder.

    Raises:
        ValueError: for a name of an unknown kind.
    """
    found = next((settings for part, settings in _MODELS.items() if part in name.lower()), None)
    if found is None:
        raise ValueError(f"name must contain one of {', '.join(_MODELS)}; got {name!r}")
    return found


def stand_in_processor(name: str) -> Any:
    """Return a processor of images and text, or a tokenizer for one that is used for text only."""
    tokenizer = stand_in_tokenizer(name)
    if "mistral" in name.lower():
        return tokenizer
    kind = transformers.Qwen3VLProcessor if "qwen3" in name.lower() else transformers.Qwen2VLProcessor
    images = transformers.Qwen2VLImageProcessor(min_pixels=28 * 28, max_pixels=28 * 28)
    return kind(images, tokenizer, SimpleNamespace(), chat_template=_CHAT)


def install() -> None:
    """Let `from_pretrained` return stand-ins in this process."""

    def tokenizer(cls: type[Any], name: Any, *_: Any, **options: Any) -> Any:
        return stand_in_tokenizer(f"{cls.__name__ if cls is not transformers.AutoTokenizer else ''} {name}", **options)

    def config(cls: type[Any], name: Any, *_: Any, **options: Any) -> Any:
        return transformers.T5Config(**stand_in_settings(str(name)))

    def model(cls: type[Any], name: Any, *_: Any, **options: Any) -> Any:
        return cls(cls.config_class(**stand_in_settings(f"{cls.__name__} {name}"))).eval()

    def processor(cls: type[Any], name: Any, *_: Any, **options: Any) -> Any:
        return stand_in_processor(f"{cls.__name__} {name}")

    def default(cls: type[Any], name: Any, *_: Any, **options: Any) -> Any:
        return cls(**{key: value for key, value in options.items() if key != "subfolder"})

    for base in (PreTrainedTokenizerBase, transformers.AutoTokenizer):
        base.from_pretrained = classmethod(tokenizer)
    for base in (PreTrainedConfig, transformers.AutoConfig):
        base.from_pretrained = classmethod(config)
    for base in (ProcessorMixin, transformers.AutoProcessor):
        base.from_pretrained = classmethod(processor)
    for base in (FeatureExtractionMixin, ImageProcessingMixin):
        base.from_pretrained = classmethod(default)
    PreTrainedModel.from_pretrained = classmethod(model)
    ProcessorMixin.check_argument_for_proper_class = lambda self, name, argument: type(argument)
