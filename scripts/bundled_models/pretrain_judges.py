"""Pretrains the bundled judges from nothing on a CPU: a CLIP, and a LLaVA that begins with its vision tower.

    python scripts/bundled_models/pretrain_judges.py --output-folder rewards/data

The text encoder for BERTScore is `scripts/bundled_models/pretrain_text_encoder.py`'s. The result depends on the arguments, up to the
machine's arithmetic. `docs/tiny-judges.md` has the time behind the shipped weights; `scripts/bundled_models/evaluate_judges.py`
measures them.
"""

import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

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
from pretraining.judge_lessons import Lessons, all_texts, answer, draw_question, make_lessons, soften
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPImageProcessorPil, CLIPModel, LlavaProcessor

from rewards.judge.judge_model import user_turn

IGNORED = -100  # Label of tokens that the language model is not asked to predict.


@dataclass
class Arguments:
    """Pretrain the bundled CLIP and LLaVA."""

    output_folder: Path = Path("runs/pretrain_judges")
    """Where the folders `tiny_clip` and `tiny_llava` go."""
    stages: tuple[str, ...] = ("clip", "llava")
    """What to train; llava alone begins with the vision tower of an exported `tiny_clip`."""
    seed: int = 0
    """Seed of the weights, the pictures and the batches."""
    pictures: int = 60_000
    """Pictures to learn from."""
    decoded_share: float = 0.3
    """Share of the pictures that go through the bundled model's VAE."""
    jpeg_share: float = 0.3
    """Share of the pictures that go through JPEG."""
    clip_steps: int = 1600
    """Updates of CLIP."""
    clip_learning_rate: float = 1.5e-3
    """Its peak learning rate."""
    llava_steps: int = 1000
    """Updates of LLaVA."""
    llava_learning_rate: float = 1.5e-3
    """Its peak learning rate."""
    batch_size: int = 128
    """Pictures in an update."""
    weight_decay: float = 0.05
    """Of AdamW."""
    threads: int = 2
    """CPU threads."""


class Trainer:
    """AdamW with warm-up and cosine decay, gradients clipped to norm 1, and a line of progress now and then."""

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
        """Takes one update."""
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.schedule.step()
        self.done += 1
        if self.done % 50 == 0 or self.done == self.steps:
            shown = " ".join(f"{name} {value:.3f}" for name, value in {"loss": loss.item(), **figures}.items())
            print(f"{self.name} {self.done}/{self.steps} {shown} {time.monotonic() - self.started:.0f} s", flush=True)


class Pictures:
    """Batches of pictures, drawn with replacement and prepared as the image processor does."""

    def __init__(self, lessons: Lessons, processor: CLIPImageProcessorPil, batch_size: int, seed: int) -> None:
        self.lessons, self.batch_size = lessons, batch_size
        self.rng = np.random.default_rng(seed)
        self.mean = torch.tensor(processor.image_mean).view(1, 3, 1, 1)
        self.std = torch.tensor(processor.image_std).view(1, 3, 1, 1)

    def draw(self) -> tuple[Tensor, np.ndarray]:
        """Returns pixel values, `(batch, 3, 64, 64)`, and which pictures they are of."""
        indices = self.rng.integers(0, len(self.lessons.images), self.batch_size)
        pixels = torch.from_numpy(self.lessons.images[indices]).permute(0, 3, 1, 2).float() / 255
        return soften((pixels - self.mean) / self.std), indices


def contrastive_loss(similarity: Tensor, captions: Tensor) -> Tensor:
    """Returns CLIP's loss where the texts are all captions there are, and several pictures may share one.

    Args:
        similarity: Scaled cosines of pictures and captions, `(batch, captions)`.
        captions: Each picture's own, `(batch,)`.
    """
    by_picture = functional.cross_entropy(similarity, captions)
    present, positions = captions.unique(return_inverse=True)
    own = functional.one_hot(positions, len(present)).T.float()
    by_caption = functional.cross_entropy(similarity[:, present].T, own / own.sum(dim=1, keepdim=True))
    return (by_picture + by_caption) / 2


def train_clip(arguments: Arguments, lessons: Lessons) -> CLIPModel:
    """Trains CLIP and writes it."""
    captions = [subject.caption for subject in all_subjects()]
    model, tokenizer = build_clip(captions)
    tokens = tokenizer(captions, padding=True, return_tensors="pt")
    pictures = Pictures(lessons, build_image_processor(), arguments.batch_size, arguments.seed)
    trainer = Trainer("clip", model, arguments.clip_learning_rate, arguments.clip_steps, arguments.weight_decay)
    while trainer.done < arguments.clip_steps:
        pixels, indices = pictures.draw()
        own = lessons.captions[indices]
        with torch.autocast("cpu", torch.bfloat16):
            seen = functional.normalize(model.get_image_features(pixels).pooler_output.float(), dim=-1)
            read = functional.normalize(model.get_text_features(**tokens).pooler_output.float(), dim=-1)
        similarity = model.logit_scale.clamp(max=np.log(100)).exp() * seen @ read.T
        right = (similarity.argmax(dim=1) == own).float().mean().item()
        trainer.step(contrastive_loss(similarity, own), right=right)
    with torch.no_grad():
        model.logit_scale.clamp_(max=np.log(100))
    export(arguments.output_folder / "tiny_clip", model, tokenizer, build_image_processor())
    return model


class Dialogues:
    """Questions about pictures and their answers, as token ids."""

    def __init__(self, processor: LlavaProcessor, seed: int) -> None:
        self.processor, self.rng = processor, np.random.default_rng([seed, 2])
        self.tokenizer = processor.tokenizer

    def prompt(self, question: str) -> str:
        """Returns the text that the model answers, with a place for every image token."""
        text = self.processor.apply_chat_template(user_turn(question), add_generation_prompt=True)
        return text.replace("<image>", "<image>" * IMAGE_TOKENS)

    def batch(self, lessons: Lessons, indices: np.ndarray) -> dict[str, Tensor]:
        """Returns one question a picture with its answer: `input_ids`, `attention_mask` and `labels`."""
        rows, labels = [], []
        for index in indices:
            question = draw_question(self.rng)
            asked = self.tokenizer(self.prompt(question))["input_ids"]
            said = self.tokenizer(answer(lessons.subjects[index], question))["input_ids"]
            said = [*said, self.tokenizer.eos_token_id]
            rows.append(torch.tensor(asked + said))
            labels.append(torch.tensor([IGNORED] * len(asked) + said))
        padded = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=self.tokenizer.pad_token_id)
        wanted = nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=IGNORED)
        return {"input_ids": padded, "attention_mask": padded != self.tokenizer.pad_token_id, "labels": wanted}


def train_llava(arguments: Arguments, lessons: Lessons, clip: CLIPModel) -> None:
    """Trains LLaVA, all of it, from CLIP's vision tower on, and writes it."""
    template_words = ["USER: \nAnswer", "\nWhat", "\nHow", "\nDescribe", " ASSISTANT:"]
    model, processor = build_llava(build_language_tokenizer([*all_texts(), *template_words]))
    vision_tower(model).load_state_dict(clip.vision_model.state_dict())
    pictures = Pictures(lessons, build_image_processor(), arguments.batch_size, arguments.seed + 1)
    dialogues = Dialogues(processor, arguments.seed)
    trainer = Trainer("llava", model, arguments.llava_learning_rate, arguments.llava_steps, arguments.weight_decay)
    while trainer.done < arguments.llava_steps:
        pixels, indices = pictures.draw()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(pixel_values=pixels, **dialogues.batch(lessons, indices)).loss
        trainer.step(loss)
    export(arguments.output_folder / "tiny_llava", model, processor)


def check(stages: Iterable[str]) -> None:
    """Refuses stages that do not exist."""
    unknown = set(stages) - {"clip", "llava"}
    if unknown:
        raise ValueError(f"stages must be among clip, llava; got {', '.join(sorted(unknown))}")


def main(arguments: Arguments) -> None:
    """Makes the lessons and trains what is asked for."""
    check(arguments.stages)
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    arguments.output_folder.mkdir(parents=True, exist_ok=True)
    lessons = make_lessons(
        arguments.pictures, arguments.seed, arguments.decoded_share, arguments.jpeg_share, arguments.threads
    )
    if "clip" in arguments.stages:
        clip = train_clip(arguments, lessons)
    else:
        clip = CLIPModel.from_pretrained(arguments.output_folder / "tiny_clip")
    if "llava" in arguments.stages:
        train_llava(arguments, lessons, clip)


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))
