"""A base model and a trained LoRA on the same prompts and seeds: their scores, with 95 % intervals, and their images.

Only diffusers generates the images. The folder of the results has the tables (Markdown and JSON), a CSV file with every
image's scores, a figure, and a grid of images per prompt set.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
from numpy.typing import NDArray

from agents.evaluation.comparison import BASE, ScoredImage, best_strengths, compare
from agents.evaluation.comparison_report import (
    ImageTable,
    comparison_grid,
    read_text,
    strength_label,
    tables,
    write_comparison_figure,
)
from agents.evaluation.generation import (
    SEED,
    SEEDS_APART,
    GenerationArguments,
    StockImages,
    check_model,
    stock_images,
    with_images,
)
from agents.evaluation.image_grid import write_image
from agents.evaluation.intervals import RESAMPLES
from agents.output.files import check_writable, leaving_traceback, write_file
from agents.output.terminal import print_line
from ddpo_env.prompts import PromptSet, load_prompts
from ddpo_env.validation.options import Range
from rewards import (
    Loadable,
    Reward,
    TwoStageReward,
    asking_people,
    check_prompts,
    configured_reward,
    evaluate_reward,
    is_stateful,
    kinds_of,
    parse_options,
)

_SCORES, _RESULTS = "scores.csv", "evaluation.json"
_IN_GRID = 24
"""Prompts of a set whose first image is in the grid."""


@dataclass(frozen=True, kw_only=True)
class EvaluateArguments(GenerationArguments):
    """Which models to score, with which rewards, on which prompts."""

    rewards: tuple[str, ...]
    """Names of rewards, or module:function. Each must score an image by itself, so weighted sums are not taken."""
    prompts: tuple[str, ...]
    """Names of prompt sets, or files with prompts."""
    reward_options: tuple[str, ...] = ()
    """Options of the rewards as reward.key=value, such as aesthetic.model=tiny."""
    samples_per_prompt: Annotated[int, Range(at_least=1, at_most=SEEDS_APART)] = 4
    """Images per prompt, each from a seed of its own."""
    seed: Annotated[int, SEED] = 0
    """Seed of the first image. Sample k of the prompt with index p has the seed `seed + k + 1000 p`."""
    strengths: tuple[Annotated[float, Range(above=0, at_most=10)], ...] = (1.0,)
    """Factors of the LoRA's change of the weights; 1 is the LoRA as it is. The base model (0) is always scored."""
    batch_size: Annotated[int, Range(at_least=1, at_most=100_000)] = 16
    """Images generated at once. It changes memory and speed; images change by rounding only."""
    output: Path = Path("evaluation")
    """Folder for the results; it must not exist yet."""

    def check(self) -> None:
        """Check the arguments before anything is loaded.

        Raises:
            ValueError: naming the argument, its value and what is valid.
        """
        super().check()
        for name in ("rewards", "prompts", "strengths"):
            values = vars(self)[name]
            if not values:
                raise ValueError(f"{name} must be at least one; got none")
            if len(set(values)) < len(values):
                raise ValueError(f"{name} must name each one once; got {', '.join(map(str, values))}")
        if self.lora is None and self.strengths != (1.0,):
            raise ValueError(f"strengths must be used with a LoRA: add --lora; got {self.strengths}")
        if self.output.exists() or self.output.is_symlink():
            is_unfinished = (self.output / _SCORES).is_file() and not (self.output / _RESULTS).exists()
            raise ValueError(
                f"output must be a folder that does not exist yet; got {str(self.output)!r}"
                + (", which holds an evaluation that did not finish and may be deleted" if is_unfinished else "")
            )
        check_writable("output", self.output, "folder")


def evaluate_models(arguments: EvaluateArguments) -> str:
    """Generate and score the images, and write everything to the folder `output`.

    The scores of every image are written as they come, so an evaluation that is interrupted leaves them. The traceback
    of an error in generating and scoring is in the folder's `error.txt`.

    Returns:
        The tables, in Markdown.

    Raises:
        ValueError: for an argument that is not valid, before any image is generated; or for a score that is not finite.
        Exception: whatever a reward raises, with a note that names it.
    """
    from ddpo_env.models.files.pipelines import file_fingerprint
    from ddpo_env.models.lora.lora_file import find_lora

    arguments.check()
    sets = prompt_sets(arguments.prompts)
    arguments = with_images(arguments, sets.values())
    rewards = named_rewards(arguments.rewards, arguments.reward_options)
    check_model(arguments)
    for reward in rewards.values():
        for prompts in sets.values():
            check_prompts(reward, prompts)
    for reward in rewards.values():
        if isinstance(reward, Loadable):
            reward.load()
    scored: list[ScoredImage] = []
    with stock_images(arguments) as images:
        arguments.output.mkdir(parents=True)
        with (
            leaving_traceback(arguments.output / "error.txt"),
            (arguments.output / _SCORES).open("x", newline="", encoding="utf-8") as file,
        ):
            table = ImageTable(file)
            for name, prompts in sets.items():
                scored += _score_set(images, rewards, name, prompts, table, arguments)
    results = compare(scored)
    report = {
        "lora_sha256": None if arguments.lora is None else file_fingerprint(find_lora(arguments.lora)),
        "settings": {key: str(value) if isinstance(value, Path) else value for key, value in asdict(arguments).items()},
        "intervals": f"95 %: percentile bootstrap over prompts, {RESAMPLES} resamples; of shares Wilson's over images",
        "results": [asdict(result) for result in results],
        "best_strengths": best_strengths(results),
    }
    write_file(arguments.output / _RESULTS, json.dumps(report, indent=1, allow_nan=False) + "\n")
    written = tables(results)
    write_file(arguments.output / "evaluation.md", written)
    write_comparison_figure(arguments.output / "rewards.png", results)
    return written


def prompt_sets(names: tuple[str, ...]) -> dict[str, PromptSet]:
    """Return the prompt sets by name; that of a file is the file's name without its ending.

    A prompt that occurs again, with the same metadata, is left out: it would count as another one in the intervals.

    Raises:
        ValueError: if there is no such set or file, or two have the same name.
    """
    sets: dict[str, PromptSet] = {}
    for given in names:
        found = load_prompts(given)
        assert isinstance(found, PromptSet)
        name = Path(given).stem
        if name in sets or name == "rewards":
            raise ValueError(f"prompts must have names of their own, {name!r} is taken; rename the file {given!r}")
        different = load_prompts(list({repr(one): one for one in found}.values()))
        assert isinstance(different, PromptSet)
        sets[name] = different
    return sets


def named_rewards(names: tuple[str, ...], pairs: tuple[str, ...]) -> dict[str, Reward]:
    """Return the rewards by name, with their options. No model is loaded.

    Args:
        names: as `rewards.load_reward` takes them.
        pairs: options as `reward.key=value`.

    Raises:
        ValueError: if there is no such reward or option, or a reward does not score each image by itself.
        TypeError: if a class does not take the options.
    """
    options = parse_options(pairs)
    if without := [key for key in options if key not in names or not isinstance(options[key], Mapping)]:
        raise ValueError(
            f"reward_options must begin with one of the rewards ({', '.join(names)}), such as {names[0]}.device=cpu; "
            f"got {', '.join(without)}"
        )
    found = {name: configured_reward(name, options.get(name, {}), "rewards") for name in names}
    for name, reward in found.items():
        if asking_people(reward):
            raise ValueError(f"rewards must score images by themselves; got {name!r}, which asks people")
        if is_stateful(reward) or isinstance(reward, TwoStageReward):
            raise ValueError(f"rewards must score each image by itself; got {name!r}: name its terms instead")
        if "image" not in kinds_of(reward):
            raise ValueError(f"rewards must take images; got {name!r}, which takes {', '.join(kinds_of(reward))}")
    return found


def _score_set(
    images: StockImages,
    rewards: Mapping[str, Reward],
    name: str,
    prompts: PromptSet,
    table: ImageTable,
    arguments: EvaluateArguments,
) -> list[ScoredImage]:
    """Score a prompt set at every strength, and write its image grid."""
    scored: list[ScoredImage] = []
    shown: dict[float, list[NDArray[np.uint8]]] = {}
    in_grid: dict[float, list[ScoredImage]] = {}
    chosen = set(np.linspace(0, len(prompts) - 1, min(len(prompts), _IN_GRID)).round().astype(int).tolist())
    for strength in [BASE] if arguments.lora is None else [BASE, *arguments.strengths]:
        started, before = time.monotonic(), len(scored)
        shown[strength], in_grid[strength] = [], []
        for pixels, one in _scored_images(images, rewards, name, prompts, strength, arguments):
            scored.append(one)
            table.write(one)
            if one.sample == 0 and one.prompt_index in chosen:
                shown[strength].append(pixels)
                in_grid[strength].append(one)
        seconds = time.monotonic() - started
        print_line(f"{name}, {strength_label(strength)}: {len(scored) - before} images in {seconds:.0f} s")
    texts = {strength: [read_text(one.details) for one in row] for strength, row in in_grid.items()}
    stacked = {strength: np.stack(row) for strength, row in shown.items()}
    grid = comparison_grid(stacked, [one.prompt for one in in_grid[BASE]], texts)
    write_image(arguments.output / f"{name}.png", grid)
    return scored


def _scored_images(
    images: StockImages,
    rewards: Mapping[str, Reward],
    name: str,
    prompts: PromptSet,
    strength: float,
    arguments: EvaluateArguments,
) -> Iterator[tuple[NDArray[np.uint8], ScoredImage]]:
    """Generate and score a prompt set in batches: the first sample of every prompt, then the second, ..."""
    places = [(sample, index) for sample in range(arguments.samples_per_prompt) for index in range(len(prompts))]
    for start in range(0, len(places), arguments.batch_size):
        batch = places[start : start + arguments.batch_size]
        texts, metadata = zip(*(prompts[index] for _, index in batch), strict=True)
        seeds = [arguments.seed + sample + SEEDS_APART * index for sample, index in batch]
        pixels = images(texts, seeds, strength, metadata)
        answers = {key: evaluate_reward(reward, pixels, texts, metadata) for key, reward in rewards.items()}
        for row, (sample, index) in enumerate(batch):
            scores = {key: float(values[row]) for key, (values, _) in answers.items()}
            details = {
                f"{key}.{detail}": values[row]
                for key, (_, found) in answers.items()
                for detail, values in found.items()
            }
            yield (
                pixels[row],
                ScoredImage(name, index, texts[row], sample, seeds[row], strength, scores, details),
            )
