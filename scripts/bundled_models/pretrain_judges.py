"""Pretrain the bundled judges on a CPU: a CLIP from random weights on, and a LLaVA from CLIP's vision tower on.

    python scripts/bundled_models/pretrain_judges.py --output-folder rewards/data

`scripts/bundled_models/pretrain_text_encoder.py` trains the text encoder for BERTScore. The same arguments give the
same result, up to the machine's rounding. `docs/tiny-judges.md` says how long the bundled weights took;
`scripts/bundled_models/evaluate_judges.py` measures them.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from pretraining.emoji_renderings import all_subjects
from pretraining.judge_components import (
    IMAGE_TOKENS,
    build_clip,
    build_image_processor,
    build_language_tokenizer,
    build_llava,
    export,
    vision_tower,
)
from pretraining.judge_lessons import Lessons, all_texts, answer, make_lessons, random_question, soften
from pretraining.tiny_components import autocast
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoTokenizer, BatchEncoding, CLIPImageProcessorPil, CLIPModel, LlavaProcessor

from rewards.judge.judge_model import user_turn

IGNORED = -100  # label of the tokens that have no loss
Stage = Literal["clip", "llava", "clip_text"]


@dataclass
class Arguments:
    """Pretrain the bundled CLIP and LLaVA."""

    output_folder: Path = Path("runs/pretrain_judges")
    """The folders `tiny_clip` and `tiny_llava` are written here."""
    stages: tuple[Stage, ...] = ("clip", "llava")
    """What to train. llava starts with the vision tower of an exported `tiny_clip`. clip_text teaches the text tower of
    an exported `tiny_clip` further: its embeddings of images stay, and so does whatever was fitted to them."""
    seed: int = 0
    """Seed of the weights, the images and the batches."""
    images: int = 60_000
    """Number of images to learn from."""
    decoded_fraction: float = 0.3
    """Fraction of the images that go through the bundled model's VAE."""
    jpeg_fraction: float = 0.3
    """Fraction of the images that are compressed with JPEG."""
    clip_steps: int = 1600
    """Number of updates of CLIP."""
    clip_learning_rate: float = 1.5e-3
    """Peak learning rate."""
    clip_text_steps: int = 600
    """Number of updates of CLIP's text tower."""
    llava_steps: int = 1000
    """Number of updates of LLaVA."""
    llava_learning_rate: float = 1.5e-3
    """Peak learning rate."""
    batch_size: int = 128
    """Images per update."""
    weight_decay: float = 0.05
    """Weight decay of AdamW."""
    threads: int = 2
    """CPU threads."""


class Trainer:
    """AdamW with warm-up, cosine decay and gradients clipped to norm 1; it prints its progress every 50 updates."""

    def __init__(
        self,
        name: str,
        model: nn.Module,
        learning_rate: float,
        steps: int,
        weight_decay: float,
        betas: tuple[float, float] = (0.9, 0.98),
    ) -> None:
        self.name, self.model, self.steps, self.done = name, model, steps, 0
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=learning_rate, betas=betas, weight_decay=weight_decay, fused=True
        )
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, learning_rate, total_steps=steps, pct_start=0.1
        )
        self.started = time.monotonic()

    def step(self, loss: Tensor, **figures: float) -> None:
        """Make one update."""
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.schedule.step()
        self.done += 1
        if self.done % 50 == 0 or self.done == self.steps:
            shown = " ".join(f"{name} {value:.3f}" for name, value in {"loss": loss.item(), **figures}.items())
            print(f"{self.name} {self.done}/{self.steps} {shown} {time.monotonic() - self.started:.0f} s", flush=True)


class ImageBatches:
    """Random batches of images, with replacement, that are normalised like the image processor's."""

    def __init__(self, lessons: Lessons, processor: CLIPImageProcessorPil, batch_size: int, seed: int) -> None:
        self.lessons, self.batch_size = lessons, batch_size
        self.rng = np.random.default_rng(seed)
        self.mean = torch.tensor(processor.image_mean).view(1, 3, 1, 1)
        self.std = torch.tensor(processor.image_std).view(1, 3, 1, 1)

    def sample(self) -> tuple[Tensor, np.ndarray]:
        """Return pixel values, `(batch, 3, 64, 64)`, and the indices of their images, `(batch,)`."""
        indices = self.rng.integers(0, len(self.lessons.images), self.batch_size)
        pixels = torch.from_numpy(self.lessons.images[indices]).permute(0, 3, 1, 2).float() / 255
        return soften((pixels - self.mean) / self.std), indices


def contrastive_loss(similarity: Tensor, captions: Tensor) -> Tensor:
    """Return CLIP's loss for all existing captions; several images may have the same caption.

    Args:
        similarity: Scaled cosines of images and captions, `(batch, captions)`.
        captions: Index of each image's caption, `(batch,)`.
    """
    by_image = functional.cross_entropy(similarity, captions)
    present, positions = captions.unique(return_inverse=True)
    own = functional.one_hot(positions, len(present)).T.float()
    by_caption = functional.cross_entropy(similarity[:, present].T, own / own.sum(dim=1, keepdim=True))
    return (by_image + by_caption) / 2


def similarities(model: CLIPModel, seen: Tensor, tokens: BatchEncoding) -> Tensor:
    """Return the scaled cosines `(batch, captions)` of embedded images and all captions."""
    with autocast():
        read = functional.normalize(model.get_text_features(**tokens).pooler_output.float(), dim=-1)
    return model.logit_scale.clamp(max=np.log(100)).exp() * seen @ read.T


def train_clip(arguments: Arguments, lessons: Lessons) -> None:
    """Train CLIP and write it."""
    captions = [subject.caption for subject in all_subjects()]
    model, tokenizer = build_clip(captions)
    tokens = tokenizer(captions, padding=True, return_tensors="pt")
    batches = ImageBatches(lessons, build_image_processor(), arguments.batch_size, arguments.seed)
    trainer = Trainer("clip", model, arguments.clip_learning_rate, arguments.clip_steps, arguments.weight_decay)
    while trainer.done < arguments.clip_steps:
        pixels, indices = batches.sample()
        own = lessons.captions[indices]
        with autocast():
            seen = functional.normalize(model.get_image_features(pixels).pooler_output.float(), dim=-1)
        similarity = similarities(model, seen, tokens)
        right = (similarity.argmax(dim=1) == own).float().mean().item()
        trainer.step(contrastive_loss(similarity, own), right=right)
    with torch.no_grad():
        model.logit_scale.clamp_(max=np.log(100))
    export(arguments.output_folder / "tiny_clip", model, tokenizer, build_image_processor())


def train_clip_text(arguments: Arguments, lessons: Lessons) -> None:
    """Train the text tower of an exported CLIP further, and write it; the vision tower stays as it is."""
    folder = arguments.output_folder / "tiny_clip"
    model, tokenizer = CLIPModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    tokens = tokenizer([subject.caption for subject in all_subjects()], padding=True, return_tensors="pt")
    batches = ImageBatches(lessons, build_image_processor(), arguments.batch_size, arguments.seed + 2)
    model.requires_grad_(False)
    for part in (model.text_model, model.text_projection):
        part.requires_grad_(True)
    trainer = Trainer("clip_text", model, 1e-3, arguments.clip_text_steps, arguments.weight_decay)
    while trainer.done < arguments.clip_text_steps:
        pixels, indices = batches.sample()
        with torch.no_grad(), autocast():
            seen = functional.normalize(model.get_image_features(pixels).pooler_output.float(), dim=-1)
        trainer.step(contrastive_loss(similarities(model, seen, tokens), lessons.captions[indices]))
    export(folder, model, tokenizer, build_image_processor())


class Dialogues:
    """Questions about images with their answers, as token ids."""

    def __init__(self, processor: LlavaProcessor, seed: int) -> None:
        self.processor, self.rng = processor, np.random.default_rng([seed, 2])
        self.tokenizer = processor.tokenizer

    def prompt(self, question: str) -> str:
        """Return the text before the answer; it contains every image token."""
        text = self.processor.apply_chat_template(user_turn(question), add_generation_prompt=True)
        return text.replace("<image>", "<image>" * IMAGE_TOKENS)

    def batch(self, lessons: Lessons, indices: np.ndarray) -> dict[str, Tensor]:
        """Return one question per image with its answer: `input_ids`, `attention_mask` and `labels`."""
        rows, labels = [], []
        for index in indices:
            question = random_question(self.rng)
            asked = self.tokenizer(self.prompt(question))["input_ids"]
            said = self.tokenizer(answer(lessons.subjects[index], question))["input_ids"]
            said = [*said, self.tokenizer.eos_token_id]
            rows.append(torch.tensor(asked + said))
            labels.append(torch.tensor([IGNORED] * len(asked) + said))
        padded = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=self.tokenizer.pad_token_id)
        wanted = nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=IGNORED)
        return {"input_ids": padded, "attention_mask": padded != self.tokenizer.pad_token_id, "labels": wanted}


def train_llava(arguments: Arguments, lessons: Lessons, clip: CLIPModel) -> None:
    """Train all weights of a LLaVA that starts with CLIP's vision tower, and write it."""
    template_words = ["USER: \nAnswer", "\nWhat", "\nHow", "\nDescribe", " ASSISTANT:"]
    model, processor = build_llava(build_language_tokenizer([*all_texts(), *template_words]))
    vision_tower(model).load_state_dict(clip.vision_model.state_dict())
    batches = ImageBatches(lessons, build_image_processor(), arguments.batch_size, arguments.seed + 1)
    dialogues = Dialogues(processor, arguments.seed)
    trainer = Trainer("llava", model, arguments.llava_learning_rate, arguments.llava_steps, arguments.weight_decay)
    while trainer.done < arguments.llava_steps:
        pixels, indices = batches.sample()
        with autocast():
            loss = model(pixel_values=pixels, **dialogues.batch(lessons, indices)).loss
        trainer.step(loss)
    export(arguments.output_folder / "tiny_llava", model, processor)


def main() -> None:
    """Parse the command line, make the lessons, and train."""
    arguments = tyro.cli(Arguments, description=__doc__)
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    arguments.output_folder.mkdir(parents=True, exist_ok=True)
    lessons = make_lessons(
        arguments.images, arguments.seed, arguments.decoded_fraction, arguments.jpeg_fraction, arguments.threads
    )
    if "clip" in arguments.stages:
        train_clip(arguments, lessons)
    if "clip_text" in arguments.stages:
        train_clip_text(arguments, lessons)
    if "llava" in arguments.stages:
        train_llava(arguments, lessons, CLIPModel.from_pretrained(arguments.output_folder / "tiny_clip"))


if __name__ == "__main__":
    main()
