"""Run folders as a run leaves them, made in a moment: what they say is chosen by a test."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from agents.config.train_config import train_config
from agents.evaluation.image_grid import write_strip
from agents.report.evaluation_files import evaluation_name, write_evaluation
from agents.report.sample_files import write_samples

PROMPTS = ["a cat", "a dog", "a fox", "a cat"]


class Scored:
    """What `write_evaluation` takes of an `agents.Evaluation`, without its libraries."""

    def __init__(
        self, images: Any, rewards: Any, holdout: Any, prompts: Sequence[str], details: Mapping[str, Any]
    ) -> None:
        self.images = images
        self.prompts = list(prompts)
        self.rewards = np.asarray(rewards, np.float64)
        self.holdout_rewards = None if holdout is None else np.asarray(holdout, np.float64)
        self.details = dict(details)


def write_run(
    folder: Path,
    rewards: Sequence[Sequence[float]] = ((0.0, 0.0, 0.0, 0.0), (1.0, 1.0, 2.0, 1.0), (2.0, 2.0, 3.0, 2.5)),
    holdout: Sequence[Sequence[float]] | None = None,
    *,
    prompts: Sequence[str] = PROMPTS,
    details: Mapping[str, Any] | None = None,
    measures: Mapping[str, Sequence[float]] | None = None,
    samples: Any = None,
    size: int = 16,
    is_finished: bool = True,
    **settings: Any,
) -> Path:
    """Write a run with an evaluation every second iteration, and return its folder.

    Args:
        folder: is made.
        rewards: of each evaluation, one for each sample.
        holdout: the same of the held-out reward.
        prompts: one for each sample.
        details: of the reward, the same at every evaluation.
        measures: columns of `progress.csv` without `eval/`, one value for each evaluation.
        samples: videos or sounds, the same at every evaluation; default: none, the run generates images.
        size: of the images in pixels.
        is_finished: whether there is a summary.
        **settings: of the run.
    """
    images = folder / "samples" / "images"
    images.mkdir(parents=True)
    last = 2 * (len(rewards) - 1)
    given = {"iterations": max(1, last), "eval_samples": len(prompts), "eval_interval": 2, **settings}
    given |= {} if holdout is None else {"holdout_reward": "tiny_reader"}
    (folder / "config.yaml").write_text(yaml.safe_dump(train_config(**given).resolved().as_dict(), sort_keys=False))
    rng, lines = np.random.default_rng(0), []
    names = ["time/iterations", "rollout/reward_mean", "eval/reward_mean", "eval/reward_std"]
    names += [] if holdout is None else ["eval/holdout_reward_mean", "eval/holdout_reward_std"]
    names += [f"eval/{name}" for name in measures or {}]
    for index, scores in enumerate(rewards):
        pictures = rng.integers(0, 256, (len(prompts), size, size, 3), dtype=np.uint8)
        name = evaluation_name(2 * index)
        write_strip(images / f"{name}.png", pictures[:9])
        scored = Scored(
            pictures if samples is None else samples, scores, holdout and holdout[index], prompts, details or {}
        )
        write_evaluation(images / f"{name}.json", scored, 2 * index, 9)  # type: ignore[arg-type]
        if samples is not None:
            write_samples(images, name, samples, 8000)
        values = [2 * index, np.nanmean(scores), np.nanmean(scores), np.nanstd(scores)]
        values += [] if holdout is None else [np.mean(holdout[index]), np.std(holdout[index])]
        values += [column[index] for column in (measures or {}).values()]
        lines.append(",".join(map(str, values)))
        if index < len(rewards) - 1:
            lines.append(f"{2 * index + 1},{np.nanmean(scores)}" + "," * (len(names) - 2))
    (folder / "progress.csv").write_text("\n".join([",".join(names), *lines]) + "\n")
    if is_finished:
        summary = {"wall_clock_seconds": 61.0, "processes": 1, "stopped_early": None, "versions": {"torch": "2.6.0"}}
        (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def write_answers(folder: Path, *entries: Mapping[str, Any]) -> None:
    """Write the log of a judge into a run folder: one image for each entry, which may change any field."""
    log = folder / "judge"
    log.mkdir()
    lines = []
    for number, entry in enumerate(entries, start=1):
        Image.new("RGB", (16, 16), "teal").save(log / f"{number:06d}.jpg")
        whole = {
            "image": f"{number:06d}.jpg",
            "prompt": "a cat",
            "questions": ["what?"],
            "answers": ["a dog"],
            "score": 0.5,
        }
        lines.append(json.dumps(whole | dict(entry)))
    (log / "answers.jsonl").write_text("\n".join(lines) + "\n")
