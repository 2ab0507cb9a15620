"""What a resumed run may do: a run folder may come from anybody, and it must not choose what runs or what is reached.

`config.yaml` alone may name built-in rewards, bundled models, Hub ids (of which only configurations and safetensors are
read) and paths inside the run folder. A reward of the user's own, a server, an environment variable and a path outside
the folder are used only if the user names them again.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from agents.config.content import PLACES, fingerprint, place_of
from agents.config.train_config import TrainConfig
from agents.output.terminal import quoted
from ddpo_env.validation.options import shown
from rewards import parse_options
from rewards.registry import HARMLESS_TEXT_OPTIONS, user_functions

_REWARDS = {"reward": "reward_options", "holdout_reward": "holdout_reward_options"}
"""The rewards of a run, and the setting with the arguments of each."""
_NAMED_AGAIN = (*PLACES, *_REWARDS, *_REWARDS.values())


def resumed(own: TrainConfig, asked: TrainConfig) -> TrainConfig:
    """Return the settings of a run that is resumed.

    Args:
        own: of the run, as its folder holds them.
        asked: by the user, with `resume`. `iterations` may differ, and the places that the user names again: a
            model, a prompt file, a LoRA, and text options of the reward such as a judge's server.

    Raises:
        ValueError: for a setting that differs from the run's; for what the user must name again; for a model folder
            or a prompt file whose content has changed.
    """
    assert asked.resume is not None
    folder = asked.resume.resolve()
    given = asked.given
    _refuse_others(own, asked, folder)
    if needed := [name for name in reaching_out(own, folder) if name not in given]:
        raise ValueError(
            f"resume: the run in {str(asked.resume)!r} uses code, a server, an environment variable or a path outside "
            f"its folder ({', '.join(needed)}), and a run folder alone must not choose these. If you trust it, name "
            f"them again by adding:\n  {quoted(*setting_flags(own, needed))}"
        )
    changes = {name: asked.flat()[name] for name in _NAMED_AGAIN if name in given}
    for name in PLACES:
        _check_content(own, name, is_moved=name in changes and place_of(asked, name) != place_of(own, name))
    if asked.iterations is not None:
        changes["iterations"] = asked.iterations
    return own.changed(**changes, run_dir=asked.resume, resume=asked.resume)


def resume_flags(config: TrainConfig) -> list[str]:
    """Return what a user adds to `--resume` and the run's folder, so that a run of resolved settings can go on."""
    assert config.run_dir is not None
    return setting_flags(config, reaching_out(config, config.run_dir.resolve()))


def _refuse_others(own: TrainConfig, asked: TrainConfig, folder: Path) -> None:
    """Refuse settings that differ from the run's and cannot change."""
    mine, wanted = own.flat(), asked.flat()
    for name in sorted(asked.given - {"resume", "iterations"}):
        value, before = wanted[name], mine[name]
        if name == "run_dir":
            is_same = value is None or value.resolve() == folder
            before = folder
        elif name in PLACES:
            is_same = value == before or None not in (place_of(own, name), place_of(asked, name))
        elif name in _REWARDS.values():
            is_same = _fixed(value, name) == _fixed(before, name)
        else:
            is_same = value == before
        if not is_same:
            before = before if isinstance(before, str | int | float | None) else str(before)
            raise ValueError(
                f"{name} must not differ from the run's own, {shown(before)}, with resume, which continues a run with "
                f"its settings; got {shown(value if not isinstance(value, Path) else str(value))}"
            )


def reaching_out(config: TrainConfig, folder: Path) -> Iterator[str]:
    """Yield the settings that run code, send something, or reach a path outside the run folder."""
    for name in PLACES:
        place = place_of(config, name)
        if place is not None and not place.resolve().is_relative_to(folder):
            yield name
    settings = config.flat()
    for reward, arguments in _REWARDS.items():
        is_own = settings[reward] is not None and bool(user_functions(settings[reward]))
        if is_own:
            yield reward
        options = dict(_leaves(parse_options(settings[arguments], arguments)))
        if any(_may_reach_out(key, value) for key, value in options.items()) or (options and is_own):
            yield arguments


def _leaves(options: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in options.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _may_reach_out(key: str, value: Any) -> bool:
    return isinstance(value, str) and key.rpartition(".")[2] not in HARMLESS_TEXT_OPTIONS


def _fixed(pairs: tuple[str, ...], setting: str) -> dict[str, Any]:
    """Return options by name, without the text that the user may name anew."""
    leaves = _leaves(parse_options(pairs, setting))
    return {key: None if _may_reach_out(key, value) else (value,) for key, value in leaves}


def setting_flags(config: TrainConfig, names: Iterable[str]) -> list[str]:
    """Return settings as arguments of the command line; no value can become a flag of its own."""
    flags: list[str] = []
    for name in names:
        flag, value = f"--{name.replace('_', '-')}", config.flat()[name]
        if isinstance(value, str | Path):
            flags.append(f"{flag}={value}")
            continue
        if wrong := [pair for pair in value if pair.startswith("-")]:
            raise ValueError(f"{name} must be key=value pairs; got {shown(wrong[0])}")
        flags += [flag, *value]
    return flags


def _check_content(own: TrainConfig, name: str, is_moved: bool) -> None:
    """Refuse a model, prompt file or LoRA that has changed since the run began, unless the user names another one."""
    before, place = getattr(own.run, f"{name}_sha256"), place_of(own, name)
    if is_moved or before is None:
        return
    now = fingerprint(place, name) if place is not None else None
    if now != before:
        what = "no longer exists" if now is None else "has changed since the run began"
        raise ValueError(
            f"{name}: {str(place)!r} {what}, and a resumed run goes on with what it began with. Restore it, or name "
            f"another place with --{name.replace('_', '-')}, whose content is then used"
        )
