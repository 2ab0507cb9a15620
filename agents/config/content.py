"""What a model, a prompt file and a LoRA hold, so that a resumed run does not take another one of the same name."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from agents.config.train_config import TrainConfig
from ddpo_env.models import BUNDLED_MODELS
from ddpo_env.models.files.pipelines import file_fingerprint
from ddpo_env.models.lora.lora_file import find_lora
from ddpo_env.models.prompt_images import with_prompt_images
from ddpo_env.prompts import PROMPT_SETS, load_prompts
from ddpo_env.prompts.files import prompt_file_fingerprint

_MOST_BYTES = 2**20
_KINDS = (".json", ".txt", ".model", ".safetensors")


PLACES = ("model", "prompts", "lora", "base_lora")
"""Settings that name something outside the run's folder."""


def place_of(config: TrainConfig, name: str) -> Path | None:
    """Return the absolute path that a setting of `PLACES` names; `None` for a name that is no path.

    A Hub id is a path where a folder of that name lies in the working directory, as `load_model` sees it. For a LoRA's
    folder, the path is that of its file.

    Raises:
        ValueError: for a folder without a LoRA.
    """
    value = config.flat()[name]
    if name in ("lora", "base_lora"):
        path = None if value is None else Path(value).expanduser()
        return None if path is None else find_lora(path, name) if path.exists() else Path(os.path.abspath(path))
    path = Path(value).expanduser() if name == "model" else Path(value)
    if name == "prompts":
        is_path = value not in PROMPT_SETS
    else:
        is_path = value not in BUNDLED_MODELS and (path.exists() or path.is_absolute() or value.startswith((".", "~")))
    return Path(os.path.abspath(path)) if is_path else None


def fingerprint(place: Path, name: str) -> str | None:
    """Return the SHA-256 of what a setting names: a file, or a model folder's configurations and weights.

    The hash of a prompt file covers its images too. The hash of a file of weights covers samples of it, or all of it
    below 4 MiB. The hash of a folder covers the name, the size and the first MiB of each file. The first MiB holds the
    shapes of the weights, so large weights need not be read twice. `None` for a place that does not exist.
    """
    if place.is_file() and place.suffix == ".safetensors":
        return file_fingerprint(place)
    if place.is_file() and name == "prompts":
        return prompt_file_fingerprint(place)
    if place.is_file():
        return hashlib.sha256(place.read_bytes()).hexdigest()
    files = sorted(path for path in place.glob("*/*") if path.suffix in _KINDS) if place.is_dir() else []
    digest = hashlib.sha256()
    for path in [place / "model_index.json", *files]:
        if not path.is_file():
            continue
        with path.open("rb") as file:
            beginning = file.read(_MOST_BYTES)
        digest.update(f"{path.relative_to(place).as_posix()}\0{path.stat().st_size}\0".encode() + beginning)
    return digest.hexdigest() if place.is_dir() else None


def with_content(config: TrainConfig) -> TrainConfig:
    """Return settings in which model, prompt file and LoRAs have absolute paths and the hashes of what they hold."""
    found: dict[str, str | None] = {}
    for name in PLACES:
        if (place := place_of(config, name)) is not None and place.exists():
            found |= {name: str(place), f"{name}_sha256": fingerprint(place, name)}
    return config.changed(**found).with_given(config._given)


def with_images(config: TrainConfig) -> TrainConfig:
    """Return settings in which the pipeline gets the image of each prompt, if prompts have one and its call takes it.

    Nothing is downloaded: of a pipeline on the Hub this is found out when it is loaded.

    Raises:
        ValueError: for prompts that are not valid, or images that the pipeline cannot get.
    """
    if config.prompts in PROMPT_SETS:
        return config
    before = config.run.size[1]
    after = with_prompt_images(config.model, load_prompts(config.prompts), before, download=False)
    if after == before:
        return config
    assert after is not None
    added = [f"{name}={value}" for name, value in after.items() if name not in before]
    return config.changed(pipeline_arguments=(*config.run.pipeline_arguments, *added)).with_given(config._given)
