"""Teaches digits to the bundled judge, to the bundled diffusion model, and to an examiner that neither of them knew."""

from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from pretrain_judges import Dialogues, ImageBatches, Trainer
from pretrain_reader import blur_and_noise, to_pixels, unreadable
from pretrain_tiny import Denoising, encode
from pretraining import judge_components, tiny_components
from pretraining.judge_lessons import Lessons, through_vae
from safetensors.torch import load_file, save_file
from torch.nn import functional
from transformers import AutoProcessor, LlavaForConditionalGeneration

from ddpo_env.models.loading import resolve_source
from ddpo_env.prompts.vocabulary import COUNTS
from digits.pictures import captioned_pictures, pictures_for_the_examiner
from rewards.judge.reader import ReaderNetwork
from rewards.networks.pretrained import resolve_source as resolve_network

BATCH_SIZE = 64
NOTHING = "nothing"
COUNT_LABELS: tuple[str | None, ...] = (NOTHING, None, *COUNTS)
"""What the examiner can say of an image; None: one animal."""
CLAIM_LABELS: tuple[str | None, ...] = (None, *COUNTS)
"""What it can say of its digit; None: there is none."""


def teach_judge(folder: Path, images: int, steps: int, digits: float) -> None:
    """Train the bundled judge further on pictures and captions that believe their digits, and write it.

    Args:
        folder: The judge's folder.
        images: Number of pictures.
        steps: Number of updates.
        digits: Fraction of the pictures of several animals that have a digit.
    """
    torch.manual_seed(0)
    source = resolve_network("tiny", "judge")
    model, processor = LlavaForConditionalGeneration.from_pretrained(source), AutoProcessor.from_pretrained(source)
    pictures = captioned_pictures(images, seed=11, counts=0.7, digits=digits)
    seen = _partly_decoded(pictures.images, 11)
    lessons = Lessons(seen, pictures.captions, torch.zeros(images))
    batches, dialogues = ImageBatches(lessons, processor.image_processor, BATCH_SIZE, 11), Dialogues(processor, 11)
    trainer = Trainer("judge", model.train(), 1e-3, steps, weight_decay=0.05)
    while trainer.done < steps:
        pixels, indices = batches.sample()
        with tiny_components.autocast():
            loss = model(pixel_values=pixels, **dialogues.batch(lessons, indices)).loss
        trainer.step(loss)
    judge_components.export(folder, model, processor)


def teach_model(folder: Path, start: str, images: int, steps: int, digits: float, kept: float) -> None:
    """Train a model's denoiser further on such pictures, and write the model.

    Args:
        folder: The new model's folder.
        start: The model, as `resolve_source` takes it.
        images: Number of pictures.
        steps: Number of updates.
        digits: Fraction of the pictures of several animals that have a digit.
        kept: Fraction of those without a digit that show the caption's count.
    """
    torch.manual_seed(0)
    pipeline = StableDiffusionPipeline.from_pretrained(resolve_source(start))
    pictures = captioned_pictures(images, seed=12, counts=0.9, digits=digits, kept=kept)
    latents = encode(pipeline.vae, pictures.images)
    texts = [caption.caption for caption in pictures.captions]
    token_ids = pipeline.tokenizer(texts, padding="max_length", return_tensors="pt").input_ids
    model = Denoising(pipeline.text_encoder.requires_grad_(False), pipeline.unet.train(), snr_cap=5.0)
    trainer = Trainer("model", model.unet, 1e-3, steps, weight_decay=1e-2, betas=(0.9, 0.99))
    while trainer.done < steps:
        chosen = torch.randint(images, (BATCH_SIZE // 2,))
        trainer.step(model.loss(latents[chosen], token_ids[chosen], slice(None)))
    parts = (pipeline.tokenizer, pipeline.text_encoder, pipeline.vae, pipeline.unet)
    tiny_components.export([folder], *parts)


def teach_examiner(folder: Path, images: int, steps: int) -> None:
    """Train a network to read count and digit where they have nothing to do with each other, and write it."""
    torch.manual_seed(0)
    pictures = pictures_for_the_examiner(images, seed=13)
    labels = [
        (COUNT_LABELS.index(shown.count), CLAIM_LABELS.index(claimed))
        for shown, claimed in zip(pictures.shown, pictures.claimed, strict=True)
    ]
    seen, targets = _partly_decoded(pictures.images, 13), torch.tensor(labels)
    network = ReaderNetwork([len(COUNT_LABELS), len(CLAIM_LABELS)]).to(memory_format=torch.channels_last)
    trainer = Trainer("examiner", network, 3e-3, steps, weight_decay=1e-2)
    while trainer.done < steps:
        chosen = torch.randint(images, (BATCH_SIZE,))
        pixels, wanted = to_pixels(seen[chosen.numpy()]), targets[chosen]
        pixels[:4], wanted[:4] = unreadable(pixels[:4]), 0
        logits = network(blur_and_noise(pixels))
        losses = [functional.cross_entropy(row, wanted[:, head]) for head, row in enumerate(logits)]
        trainer.step(torch.stack(losses).sum())
    folder.mkdir(parents=True)
    save_file({name: value.contiguous() for name, value in network.state_dict().items()}, folder / "model.safetensors")


def _partly_decoded(images: np.ndarray, seed: int) -> np.ndarray:
    """Return images of which the first 40 % went through the bundled model's VAE, as generated images do."""
    decoded = max(1, round(0.4 * len(images)))
    return np.concatenate([through_vae(images[:decoded], seed), images[decoded:]])


class Examiner:
    """Reads how many animals an image shows, and which count a digit on it claims."""

    def __init__(self, folder: Path) -> None:
        """Load what `teach_examiner` wrote."""
        self.network = ReaderNetwork([len(COUNT_LABELS), len(CLAIM_LABELS)])
        self.network.load_state_dict(load_file(folder / "model.safetensors"))
        self.network.eval()

    @torch.no_grad()
    def read(self, images: np.ndarray) -> tuple[list[str | None], list[str | None]]:
        """Return one of `COUNT_LABELS` and one of `CLAIM_LABELS` for each image, `(batch, 64, 64, 3)` uint8."""
        counts, claims = (logits.argmax(dim=1).tolist() for logits in self.network(to_pixels(images)))
        return [COUNT_LABELS[index] for index in counts], [CLAIM_LABELS[index] for index in claims]
