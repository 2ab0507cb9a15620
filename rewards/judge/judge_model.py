"""A judge in this process: any vision-language model that transformers loads as `AutoModelForImageTextToText`.

LLaVA, Qwen-VL, SmolVLM and others differ in how an image enters the prompt. Their processors and chat templates take
care of this.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from rewards.networks.pretrained import TINY, ModelHolder, load_network, load_processor
from rewards.registry import check_number

FAMILY_PACKAGES = ("torchvision", "num2words", "timm", "sentencepiece")
"""Packages that transformers needs for some families but does not install."""


class VisionLanguageModel:
    """The model and its processor, as `load_cached` holds them."""

    def __init__(self, source: str, device: torch.device, dtype: torch.dtype) -> None:
        """Load both. Only safetensors are loaded, and no code from the repository.

        Raises:
            ValueError: The processor has no chat template.
            ImportError: The family needs a package that is not installed; the message names it.
        """
        from transformers import AutoModelForImageTextToText, AutoProcessor

        self.processor = _naming_packages(source, load_processor, AutoProcessor, source)
        if not getattr(self.processor, "chat_template", None):
            raise ValueError(f"model {source!r} has no chat template, so it is not known how to ask it a question")
        model = _naming_packages(source, load_network, AutoModelForImageTextToText, source, dtype, use_safetensors=True)
        self.model = model.to(device).eval().requires_grad_(False)
        tokenizer = self.processor.tokenizer
        tokenizer.padding_side = "left"  # the answer must follow the question directly
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        # Answers that end early are padded with a token that decoding leaves out; the model's own settings may differ.
        greedy = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None, "num_beams": 1}
        self.model.generation_config.update(**greedy, pad_token_id=tokenizer.pad_token_id)

    def answer(self, images: Sequence[Image.Image], questions: Sequence[str], max_new_tokens: int) -> list[str]:
        """Answer one question per image by greedy decoding."""
        texts = [self.processor.apply_chat_template(user_turn(text), add_generation_prompt=True) for text in questions]
        bos = self.processor.tokenizer.bos_token
        inputs = self.processor(
            images=[[image] for image in images],
            text=texts,
            add_special_tokens=bos is None
            or not texts[0].startswith(bos),  # some templates contain it, such as Gemma's
            padding=True,
            return_tensors="pt",
        )
        inputs = inputs.to(self.model.device, self.model.dtype)
        with torch.inference_mode():
            tokens = self.model.generate(**inputs, max_new_tokens=max_new_tokens)
        answers = tokens[:, inputs["input_ids"].shape[1] :]
        return [text.strip() for text in self.processor.batch_decode(answers, skip_special_tokens=True)]


class JudgeModel(ModelHolder[VisionLanguageModel]):
    """Answers questions about images with a model in this process.

    Decoding is always greedy; the model's own sampling settings are not used. Answers depend on the batch only through
    rounding, which does not change the words in float32.

    It is tested with random models of the classes of LLaVA, LLaVA-OneVision, Qwen2-VL, Qwen2.5-VL, Qwen3-VL, Idefics3
    (also the first SmolVLM), SmolVLM2, Gemma 3 and InternVL, against the same models used directly. Families whose
    processor takes videos (LLaVA-OneVision, Qwen-VL, SmolVLM2, InternVL) need `pip install torchvision` also for
    images, and SmolVLM2 needs `num2words` too.
    """

    purpose = "judge"

    def __init__(
        self,
        model: str | Path,
        *,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
        batch_size: int | None = None,
        max_new_tokens: int = 64,
    ) -> None:
        """Check the arguments. Nothing is loaded yet.

        Args:
            model: Folder or Hub id, or `"tiny"` for the bundled LLaVA, which has the bundled model's vocabulary.
            device: `auto`, `cpu`, `cuda:1`, ...; it may differ from the denoiser's device.
            dtype: Dtype of the weights; `auto`: float32 on a CPU, bfloat16 on an accelerator.
            batch_size: Questions per call of the model; None: 64 for the bundled model, else 8.
            max_new_tokens: Largest length of an answer, in tokens.

        Raises:
            ValueError: An argument is not valid.
        """
        if batch_size is None:
            batch_size = 64 if str(model) == TINY else 8
        check_number("max_new_tokens", max_new_tokens, 1, 1_000_000)
        super().__init__(VisionLanguageModel, model, device=device, dtype=dtype, batch_size=batch_size)
        self.max_new_tokens = max_new_tokens

    def ask(self, images: Sequence[NDArray[np.uint8]], questions: Sequence[str]) -> list[str]:
        """Answer one question about each image, (height, width, 3) uint8. An answer may be empty."""
        if len(images) != len(questions):
            raise ValueError(f"there must be one question per image; got {len(images)} and {len(questions)}")
        answers: list[str] = []
        for start in range(0, len(images), self.batch_size):
            batch = slice(start, start + self.batch_size)
            shown = [Image.fromarray(image) for image in images[batch]]
            answers += self.loaded.answer(shown, questions[batch], self.max_new_tokens)
        return answers


def user_turn(question: str) -> list[dict[str, object]]:
    """Return a conversation that shows an image and asks a question about it, in the form of chat templates."""
    return [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]


def _naming_packages(source: str, load: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """Load something, and name the package that a family of judges needs and that is not installed."""
    try:
        return load(*arguments, **options)
    except (ImportError, ValueError) as error:  # transformers raises one of these for a missing package
        text = str(error).replace(source, "").lower()
        package = next((name for name in FAMILY_PACKAGES if name in text and find_spec(name) is None), None)
        if package is None:
            raise
        raise ImportError(f"judge {source!r} needs the package {package!r}: pip install {package}") from error
