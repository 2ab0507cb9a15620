"""What a person reads after an evaluation: the tables, the figure and the image grids."""

from __future__ import annotations

import csv
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from agents.evaluation.comparison import BASE, Estimate, Result, ScoredImage, best_strengths
from agents.evaluation.image_grid import image_grid
from agents.evaluation.plots import blank_figure, write_figure

_COLUMNS = 8
_METHOD = (
    "Brackets are 95 % intervals. Those of means and of changes are percentile bootstraps over prompts, whose samples "
    "are averaged first (over samples, if there is one prompt). Those of shares are Wilson's over images. A change is "
    "that of the same prompts and seeds."
)


class ImageTable:
    """A CSV file with one line per image, whose columns are those of the first image."""

    def __init__(self, file: IO[str]) -> None:
        """Take an open file."""
        self._file = file
        self._writer: csv.DictWriter[str] | None = None

    def write(self, image: ScoredImage) -> None:
        """Write an image's place, scores and details."""
        row = {key: value for key, value in vars(image).items() if key not in ("scores", "details")}
        row |= {**image.scores, **image.details}
        if self._writer is None:
            self._writer = csv.DictWriter(self._file, list(row))
            self._writer.writeheader()
        self._writer.writerow(row)
        self._file.flush()


def strength_label(strength: float) -> str:
    """Return what a model is called in tables and images."""
    if strength == BASE:
        return "base"
    return "tuned" if strength == 1 else f"tuned at {strength:g}"


def tables(results: Sequence[Result]) -> str:
    """Return one Markdown table per reward."""
    blocks = []
    best = best_strengths(results)
    for reward in dict.fromkeys(result.reward for result in results):
        own = [result for result in results if result.reward == reward]
        noun = "share" if own[0].is_share else "mean"
        lines = [
            f"## {reward}",
            "",
            f"| prompts | images | model | {noun} | change |",
            "| --- | --- | --- | --- | --- |",
        ]
        for one in own:
            change = "" if one.change is None else _shown(one.change, one.is_share, sign="+")
            model, score = strength_label(one.strength), _shown(one.score, one.is_share)
            lines.append(f"| {one.prompt_set} ({one.prompts}) | {one.images} | {model} | {score} | {change} |")
        if len({one.strength for one in own}) > 2:
            found = ", ".join(f"{strength:g} on {name}" for name, strength in best[reward].items())
            lines += ["", f"Strength with the highest {noun}: {found} (0 is the base model)."]
        blocks.append("\n".join(lines))
    return "\n\n".join([*blocks, _METHOD]) + "\n"


def _shown(estimate: Estimate, is_share: bool, sign: str = "") -> str:
    """Write `0.512 [0.480, 0.544]`, or a share in percent and a change of it in points."""
    unit = 100 if is_share else 1
    form = f"{sign}.1f" if is_share else f"{sign}.4g"
    ending = "" if not is_share else " points" if sign else " %"
    bounds = "" if estimate.interval is None else f" [{', '.join(f'{unit * one:{form}}' for one in estimate.interval)}]"
    return f"{unit * estimate.mean:{form}}{ending}{bounds}"


def write_comparison_figure(path: Path, results: Sequence[Result]) -> None:
    """Plot every reward's mean with its interval, by prompt set and strength, to a PNG file."""
    rewards = list(dict.fromkeys(result.reward for result in results))
    sets = list(dict.fromkeys(result.prompt_set for result in results))
    strengths = list(dict.fromkeys(result.strength for result in results))
    figure = blank_figure(max(4.0, 1.1 * len(sets) + 1) * len(rewards), 4.2)
    panels = figure.subplots(1, len(rewards), squeeze=False)[0]
    for axes, reward in zip(panels, rewards, strict=True):
        for place, strength in enumerate(strengths):
            own = {one.prompt_set: one.score for one in results if (one.reward, one.strength) == (reward, strength)}
            shift = 0.15 * (place - (len(strengths) - 1) / 2)
            for x, name in enumerate(sets):
                low, high = own[name].interval or (own[name].mean, own[name].mean)
                errors = [[max(0.0, own[name].mean - low)], [max(0.0, high - own[name].mean)]]
                colour = "tab:gray" if strength == BASE else f"C{place - 1}"
                label = strength_label(strength) if x == 0 else None
                axes.errorbar(x + shift, own[name].mean, errors, fmt="o", capsize=3, color=colour, label=label)
        labels = [textwrap.fill(name.replace("_", " "), 14) for name in sets]
        axes.set_xticks(range(len(sets)), labels, fontsize=8)
        axes.set_xlim(-0.6, len(sets) - 0.4)
        axes.set_title(reward, fontsize=10)
        axes.grid(axis="y", alpha=0.3)
    panels[0].set_ylabel("mean, 95 % interval")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=len(strengths), fontsize=8)
    write_figure(path, figure)


def comparison_grid(
    images: Mapping[float, NDArray[np.uint8]], prompts: Sequence[str], texts: Mapping[float, Sequence[str]]
) -> Image.Image:
    """Return a grid with the base model's images over the tuned model's, and the prompts beneath.

    Args:
        images: by strength, `(prompts, height, width, 3)`.
        prompts: one per image.
        texts: by strength, what a judge read in each image, or empty texts; it is written beneath the image.
    """
    rows, labels, captions = [], [], []
    last = list(images)[-1]
    for start in range(0, len(prompts), _COLUMNS):
        band = slice(start, start + _COLUMNS)
        for strength, shown in images.items():
            read = [f'"{_one_line(text)}"' if text else "" for text in texts[strength][band]]
            asked = [_one_line(prompt) for prompt in prompts[band]] if strength == last else [""] * len(read)
            rows.append(shown[band])
            labels.append(strength_label(strength))
            captions.append(["\n".join(filter(None, pair)) for pair in zip(read, asked, strict=True)])
    return image_grid(rows, labels, [""] * len(rows[0]), captions)


def _one_line(text: str) -> str:
    return " ".join(text.split())


def read_text(details: Mapping[str, Any]) -> str:
    """Return what judges read in an image: the texts among the details, in their order."""
    values = [one for value in details.values() for one in (value if isinstance(value, list | tuple) else [value])]
    return ", ".join(dict.fromkeys(one for one in values if isinstance(one, str) and one))
