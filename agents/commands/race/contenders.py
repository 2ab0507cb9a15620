"""From a file of contenders to their settings: those that all share, and those in which they differ.

    base:                                  # optional: settings of all contenders
      eval_samples: 45
    contenders:
      ppo:
        learning_rate: [2e-3, 5e-3]        # a list: one contender for each rate, ppo-0.002 and ppo-0.005
      nft:
        algorithm: nft

The file may be anybody's. Code of the user's own, a server and paths are used only if the command line names them, and
a contender can change nothing of what all of them must share to be compared.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agents.config.algorithms import WITHOUT_EFFECT
from agents.config.authority import reaching_out
from agents.config.config_file import read_handwritten_yaml
from agents.config.train_config import TrainConfig
from ddpo_env.validation.options import shown
from rewards.registry import did_you_mean

RACE_OWNED = ("iterations", "preset", "resume", "run_dir", "seed")
"""Settings that neither a file nor, but for the preset, a command line may give: the race sets them."""

_HASHES = tuple(name for name in TrainConfig().flat() if name.endswith("_sha256"))
_SHARED = (
    *("model", "base_lora", "lora", "quantization", "resolution", "pipeline_arguments", "prompts"),
    *("reward", "reward_options", "holdout_reward", "holdout_reward_options", "eval_samples", "eval_interval"),
    *("device", "process_timeout"),
)
"""Settings that are the same for all contenders: the model that they start from, and how they are judged."""

_SECTIONS = ("base", "contenders")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]{0,59}")


@dataclass(frozen=True)
class Contender:
    """Settings that compete with others.

    Attributes:
        name: of the contender, and of its folder.
        family: its name in the file, which contenders with different learning rates share.
        config: its settings, with open ones left open.
    """

    name: str
    family: str
    config: TrainConfig


def read_contenders(path: Path, line: TrainConfig, folder: Path) -> list[Contender]:
    """Return the contenders of a file in its order.

    Args:
        path: of the file.
        line: settings of the command line, which come before those of the file's base; the preset comes last.
        folder: of the race, in which paths may be.

    Raises:
        ValueError: for a file that does not name contenders and their settings, or a setting that is not valid; naming
            the contender, the setting and what is valid.
    """
    if wrong := sorted(line._given.intersection(RACE_OWNED) - {"preset"}):
        raise ValueError(
            f"{wrong[0]} must not be given to a race: iterations follow from --budget, seeds are --seeds, and the "
            "folder is --output"
        )
    try:
        base_settings, contenders = _sections(read_handwritten_yaml(path))
        base = _base(base_settings, line, folder)
        found = [one for name, settings in contenders.items() for one in _expanded(name, settings, base)]
        counts = Counter(contender.name.casefold() for contender in found)
        if twice := [contender.name for contender in found if counts[contender.name.casefold()] > 1]:
            raise ValueError(
                f"names of contenders must differ, and not only in capital letters; got {twice[0]!r} twice"
            )
    except OSError as error:
        raise ValueError(f"contenders: {str(path)!r} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"contenders: {str(path)!r} is not a file of contenders: {error}") from error
    return found


def _sections(content: Any) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    if not isinstance(content, Mapping) or not isinstance(content.get("contenders"), Mapping):
        raise ValueError("it must have a section contenders, with a name and settings for each")
    if unknown := sorted(content.keys() - set(_SECTIONS)):
        raise ValueError(f"its sections must be {' and '.join(_SECTIONS)}; got {shown(unknown[0])}")
    base = content.get("base") or {}
    if not isinstance(base, Mapping):
        raise ValueError(f"base must hold settings by name; got {shown(base)}")
    if not content["contenders"]:
        raise ValueError("it must name at least one contender")
    return base, content["contenders"]


def _base(settings: Mapping[str, Any], line: TrainConfig, folder: Path) -> TrainConfig:
    """Return what all contenders have in common: settings that are on the command line, the file's, the preset's."""
    checked = _changed(TrainConfig(), settings, "base", (*RACE_OWNED, *_HASHES)).flat()
    config = line.changed(**{name: checked[name] for name in settings if name not in line._given})
    own = settings.keys() - line._given
    if needed := [name for name in reaching_out(config, folder.resolve()) if name in own]:
        raise ValueError(
            f"base: {', '.join(needed)} would use code, a server, an environment variable or a path, which a file "
            f"alone must not choose. If you trust it, name it on the command line: --{needed[0].replace('_', '-')}"
        )
    return config


def _expanded(name: str, settings: Any, base: TrainConfig) -> Iterator[Contender]:
    """Yield the contenders of one entry: one, or one for each learning rate of a list."""
    where = f"contender {shown(name)}"
    if not _NAME.fullmatch(name):
        raise ValueError(f"{where}: a name must have 1 to 60 letters, digits and _ . + -, and begin with no sign")
    settings = {} if settings is None else settings
    if not isinstance(settings, Mapping):
        raise ValueError(f"{where} must hold settings by name; got {shown(settings)}")
    rates = settings.get("learning_rate")
    variants = {name: dict(settings)}
    if isinstance(rates, list):
        if not rates or not all(isinstance(rate, int | float) for rate in rates):
            raise ValueError(f"{where}: learning_rate must be a number or a list of them; got {shown(rates)}")
        if len(set(rates)) < len(rates):
            raise ValueError(f"{where}: each learning_rate must occur once; got {shown(rates)}")
        variants = {f"{name}-{rate:g}": {**settings, "learning_rate": rate} for rate in rates}
    shared = base._given - WITHOUT_EFFECT.keys()  # what all share may have an effect on some of them only
    for variant, own in variants.items():
        config = _changed(base, own, where, (*RACE_OWNED, *_HASHES, *_SHARED))
        yield Contender(variant, name, config.with_given(shared | own.keys()))


def _changed(config: TrainConfig, settings: Mapping[str, Any], where: str, fixed: tuple[str, ...]) -> TrainConfig:
    """Return settings with those of a section of the file."""
    known = config.flat()
    for name in settings:
        if name in RACE_OWNED:
            raise ValueError(f"{where} must not set {name}, which the command line says")
        if name in _SHARED and name in fixed:
            raise ValueError(f"{where} must not set {name}, which all contenders share: set it in base")
        if name not in known or name in fixed:
            valid = sorted(known.keys() - set(fixed))
            near = did_you_mean(name, valid)
            raise ValueError(f"{where}: there is no setting {shown(name)}; valid are {', '.join(valid)}{near}")
    try:
        return config.changed(**{name: _tuple(value) for name, value in settings.items()})
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
