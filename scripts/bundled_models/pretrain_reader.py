"""Pretrain the reader, the network behind the reward `tiny_reader`, and measure it on renderings that it has not seen.

    python scripts/bundled_models/pretrain_reader.py --output-folder rewards/data

It learns to read word, activity and count from renderings of emoji. Its seed belongs to it alone: no other bundled
model is trained on its renderings. Some of its images show nothing: it must not see an emoji in every image.
"""

import copy
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from pretraining.emoji_renderings import ALL_ACTIVITIES, WORDS, Mixture, Subject, all_subjects, render_dataset
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from ddpo_env.prompts.vocabulary import COUNTS
from rewards.judge.reader import Reader, ReaderNetwork, Reading

TRAIN_SEED, TEST_SEED = 5_000_001, 6_000_001  # of this network alone
MIXTURE = Mixture(simple_animals=0.3, held_out=0.2, activities=0.12, counts=0.1, other_activities=0.28)
LABELS: tuple[tuple[str | None, ...], ...] = ((None, *WORDS), (None, *ALL_ACTIVITIES), (None, *COUNTS))


@dataclass
class Arguments:
    """Pretrain the bundled reader."""

    output_folder: Path = Path("runs/pretrain_reader")
    """The folder `tiny_reader` is written here."""
    renderings: int = 28_000
    """Number of renderings to learn from."""
    epochs: int = 2
    """Passes over these renderings."""
    batch_size: int = 64
    """Images per update."""
    nothing: int = 4
    """Images per update that are made unreadable; their word is None."""
    learning_rate: float = 3e-3
    """Peak learning rate."""
    test_renderings: int = 3000
    """Number of other renderings that measure the network."""
    seed: int = 0
    """Seed of weights and batches."""
    threads: int = 2
    """CPU threads."""


def to_pixels(images: np.ndarray) -> Tensor:
    """Turn `(batch, height, width, 3)` uint8 into `(batch, 3, height, width)` float32 in [0, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255


def blur_and_noise(pixels: Tensor) -> Tensor:
    """Blur half of the images a little and add noise, so that the network cannot rely on sharpness."""
    soft = functional.avg_pool2d(functional.pad(pixels, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    pixels = pixels + torch.rand(len(pixels), 1, 1, 1) * (torch.rand(len(pixels), 1, 1, 1) < 0.5) * (soft - pixels)
    return pixels + 0.03 * torch.rand(len(pixels), 1, 1, 1) * torch.randn_like(pixels)


def unreadable(pixels: Tensor) -> Tensor:
    """Return images in which nothing can be recognised: tiles of 8 pixels in random order, four colours, or noise."""
    tiles = functional.unfold(pixels, 8, stride=8)
    order = torch.rand(len(pixels), 1, tiles.shape[2]).argsort(dim=2).expand_as(tiles)
    shuffled = functional.fold(tiles.gather(2, order), pixels.shape[2:], 8, stride=8)
    colours = functional.interpolate(functional.adaptive_avg_pool2d(pixels, 2), pixels.shape[2:], mode="bilinear")
    noise = colours + 0.2 * torch.randn_like(pixels)
    choice = torch.randint(3, (len(pixels), 1, 1, 1))
    return torch.where(choice == 0, shuffled, torch.where(choice == 1, colours, noise)).clamp(0, 1)


def train(arguments: Arguments) -> ReaderNetwork:
    """Return a trained network."""
    images, subjects = render_dataset(arguments.renderings, TRAIN_SEED, mixture=MIXTURE, workers=arguments.threads)
    wanted = [Reading(subject.word, subject.activity, subject.count) for subject in subjects]
    targets = torch.tensor([[names.index(name) for names, name in zip(LABELS, one, strict=True)] for one in wanted])
    network = ReaderNetwork([len(names) for names in LABELS]).to(memory_format=torch.channels_last)
    steps = arguments.epochs * len(images) // arguments.batch_size
    optimizer = torch.optim.AdamW(network.parameters(), lr=arguments.learning_rate, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, arguments.learning_rate, total_steps=steps)
    started = time.monotonic()
    for step in range(steps):
        chosen = torch.randint(len(images), (arguments.batch_size,))
        pixels, labels = to_pixels(images[chosen.numpy()]), targets[chosen]
        pixels[: arguments.nothing] = unreadable(pixels[: arguments.nothing])
        labels[: arguments.nothing] = 0
        logits = network(blur_and_noise(pixels))
        losses = [functional.cross_entropy(row, labels[:, head]) for head, row in enumerate(logits)]
        optimizer.zero_grad()
        torch.stack(losses).sum().backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == steps - 1:
            shown = " ".join(f"{loss:.3f}" for loss in losses)
            print(f"reader {step}/{steps} {shown} {time.monotonic() - started:.0f} s", flush=True)
    return network.eval()


def export(folder: Path, network: ReaderNetwork) -> None:
    """Write the weights in float16, the labels, and what each prompt asks for."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = copy.deepcopy(network).half().state_dict()
    save_file({name: value.contiguous() for name, value in weights.items()}, folder / "model.safetensors")
    settings = {
        "labels": [names[1:] for names in LABELS],
        "prompts": {one.caption: [one.word, one.activity, one.count] for one in all_subjects()},
    }
    (folder / "config.json").write_text(json.dumps(settings, separators=(",", ":")) + "\n")


def accuracy(reader: Reader, images: np.ndarray, subjects: Sequence[Subject]) -> dict[str, float]:
    """Return the fractions of images whose word, activity, count, and all three are read right."""
    found = [one for start in range(0, len(images), 250) for one in reader.read(images[start : start + 250])]
    wanted = [Reading(subject.word, subject.activity, subject.count) for subject in subjects]
    right = np.array([[a == b for a, b in zip(*pair, strict=True)] for pair in zip(found, wanted, strict=True)])
    parts = dict(zip(Reading._fields, right.mean(axis=0).round(4).tolist(), strict=True))
    return {**parts, "all": round(float(right.all(axis=1).mean()), 4), "images": len(images)}


def main() -> None:
    """Parse the command line, train, write the network, and print how accurate it is."""
    arguments = tyro.cli(Arguments, description=__doc__)
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    folder = arguments.output_folder / "tiny_reader"
    export(folder, train(arguments))
    reader = Reader(folder, torch.device("cpu"), torch.float32)
    images, subjects = render_dataset(arguments.test_renderings, TEST_SEED, mixture=MIXTURE, workers=arguments.threads)
    report = {"renderings": accuracy(reader, images, subjects)}
    hidden = (unreadable(to_pixels(images)) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    read = [one for start in range(0, len(hidden), 250) for one in reader.read(hidden[start : start + 250])]
    report["unreadable"] = {"nothing": round(float(np.mean([one.word is None for one in read])), 4)}
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
