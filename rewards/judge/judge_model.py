"""A judge in this process: any vision-language model that transformers loads as `AutoModelForImageTextToText`.

LLaVA, Qwen-VL, SmolVLM and others differ in how a picture enters the prompt; their processors and chat templates know.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from rewards.devices import resolve_device, resolve_dtype
from rewards.pretrained import TINY, free_memory, resolve_source, shared

FAMILY_PACKAGES = ("torchvision", "num2words", "timm", "sentencepiece")
"""What transformers needs for some families and does not bring."""


class VisionLanguageModel:
    """The model and its processor, as `shared` holds them."""

    def __init__(self, source: str, device: torch.device, dtype: torch.dtype) -> None:
        """Load both; only safetensors, and no code from the repository.

        Raises:
            ValueError: The processor has no chat template.
            ImportError: The family needs a package that is not installed; the message names it.
        """
        from transformers import AutoModelForImageTextToText, AutoProcessor

        self.processor = _from_pretrained(AutoProcessor, source)
        if not getattr(self.processor, "chat_template", None):
            raise ValueError(f"model {source!r} has no chat template, so it is not known how to ask it a question")
        model = _from_pretrained(AutoModelForImageTextToText, source, dtype=dtype, use_safetensors=True)
        self.model = model.to(device).eval().requires_grad_(False)
        tokenizer = self.processor.tokenizer
        tokenizer.padding_side = "left"  # the answer goes on where the question ends
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        # an answer that ends early is padded with what decoding leaves out, whatever the model's own settings say
        greedy = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None, "num_beams": 1}
        self.model.generation_config.update(**greedy, pad_token_id=tokenizer.pad_token_id)

    def answer(self, images: Sequence[Image.Image], questions: Sequence[str], max_new_tokens: int) -> list[str]:
        """Answer greedily."""
        texts = [self.processor.apply_chat_template(user_turn(text), add_generation_prompt=True) for text in questions]
        bos = self.processor.tokenizer.bos_token
        inputs = self.processor(
            images=[[image] for image in images],
            text=texts,
            add_special_tokens=bos is None or not texts[0].startswith(bos),  # some templates begin with it, as Gemma's
            padding=True,
            return_tensors="pt",
        )
        inputs = inputs.to(self.model.device, self.model.dtype)
        with torch.inference_mode():
            tokens = self.model.generate(**inputs, max_new_tokens=max_new_tokens)
        answers = tokens[:, inputs["input_ids"].shape[1] :]
        return [text.strip() for text in self.processor.batch_decode(answers, skip_special_tokens=True)]


class JudgeModel:
    """Answers questions about pictures by a model in this process, loaded by the first question.

    Answers are greedy, whatever the model's own settings say about sampling, and do not depend on the batch but for
    rounding, which float32 keeps out of the words.

    Tested with random models of the classes of LLaVA, LLaVA-OneVision, Qwen2-VL, Qwen2.5-VL, Qwen3-VL, Idefics3 (which
    is SmolVLM's first version too), SmolVLM2, Gemma 3 and InternVL, against the same models used directly. Families
    whose processor knows videos (LLaVA-OneVision, Qwen-VL, SmolVLM2, InternVL) need `pip install torchvision` even for
    still pictures, and SmolVLM2 `num2words` too.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
        batch_size: int | None = None,
        max_new_tokens: int = 64,
    ) -> None:
        """Check the arguments; nothing is loaded yet.

        Args:
            model: Folder or Hub id, or `"tiny"`: the bundled LLaVA, which knows the bundled model's vocabulary.
            device: `auto`, `cpu`, `cuda:1`, ...; it need not be the denoiser's.
            dtype: Of the weights; auto: float32 on a CPU, bfloat16 on an accelerator.
            batch_size: Questions in one call of the model; None: 8, and 64 for the bundled one.
            max_new_tokens: Length of an answer.

        Raises:
            ValueError: An argument is not valid.
        """
        if batch_size is None:
            batch_size = 64 if str(model) == TINY else 8
        if batch_size < 1 or max_new_tokens < 1:
            raise ValueError(f"batch_size and max_new_tokens must be at least 1; got {batch_size} and {max_new_tokens}")
        self.device = resolve_device(device)
        self.dtype = resolve_dtype(dtype, self.device)
        self.batch_size = batch_size
        self.max_new_tokens = max_new_tokens
        self._source = resolve_source(model, "judge")
        self._loaded: VisionLanguageModel | None = None

    @property
    def loaded(self) -> VisionLanguageModel:
        """The model, loaded if it is not."""
        if self._loaded is None:
            self._loaded = shared(VisionLanguageModel, self._source, self.device, self.dtype)
        return self._loaded

    def load(self) -> None:
        """Load the model now."""
        _ = self.loaded

    def unload(self) -> None:
        """Let the model go; its memory is free once nobody else uses it."""
        self._loaded = None
        free_memory(self.device)

    def ask(self, images: Sequence[NDArray[np.uint8]], questions: Sequence[str]) -> list[str]:
        """Answer one question about each picture, (height, width, 3) uint8; the answer may be empty."""
        if len(images) != len(questions):
            raise ValueError(f"there must be one question a picture; got {len(images)} and {len(questions)}")
        pictures = [Image.fromarray(image) for image in images]
        answers: list[str] = []
        for start in range(0, len(pictures), self.batch_size):
            batch = slice(start, start + self.batch_size)
            answers += self.loaded.answer(pictures[batch], questions[batch], self.max_new_tokens)
        return answers


def user_turn(question: str) -> list[dict[str, object]]:
    """Return a conversation that shows a picture and asks about it, as chat templates take it."""
    return [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]


def _from_pretrained(loader: Any, source: str, **options: Any) -> Any:
    try:
        return loader.from_pretrained(source, **options)
    except (ImportError, ValueError) as error:  # transformers raises either for a missing package
        text = str(error).replace(source, "").lower()
        package = next((name for name in FAMILY_PACKAGES if name in text and find_spec(name) is None), None)
        if package is None:
            raise
        raise ImportError(f"judge {source!r} needs the package {package!r}: pip install {package}") from error
