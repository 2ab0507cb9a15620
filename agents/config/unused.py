"""Which settings have no effect because another one decides so: a user who gives one expects something else.

The table follows from what the classes of the algorithms read (`agents.training.build`). A setting that changes only
what is measured, such as `timestep_window` with draft, has an effect.
"""

from __future__ import annotations

from typing import Any, get_args

from agents.config.presets import preset_config
from agents.config.settings import Advantage, Algorithm
from agents.config.train_config import TrainConfig

_Deciding = dict[str, tuple[Any, ...]]


def _all_but(*names: str, of: Any = Algorithm) -> tuple[str, ...]:
    return tuple(name for name in get_args(of) if name not in names)


_STATISTICS: _Deciding = {"algorithm": ("draft",), "advantage": _all_but("per_prompt", of=Advantage)}
_MOVES: _Deciding = {"noise_window": (None,)}

WITHOUT_EFFECT: dict[str, _Deciding] = {
    "clip_range": {"algorithm": _all_but("ppo", "grpo"), "trust_region": ("dppo",)},
    "divergence_limit": {"algorithm": _all_but("ppo", "grpo"), "trust_region": ("clip", "guard")},
    "advantage": {"algorithm": ("draft",)},
    "advantage_clip": {"algorithm": ("draft",), "advantage": ("dr_grpo", "leave_one_out", "gae")},
    "stat_buffer_size": _STATISTICS,
    "stat_min_count": _STATISTICS,
    "timestep_fraction": {"algorithm": ("rwr", "rwr_sparse", "draft")},
    "noise_window_iterations": _MOVES,
    "noise_window_stride": _MOVES,
    "rwr_beta": {"algorithm": _all_but("rwr")},
    "rwr_per_prompt": {"algorithm": _all_but("rwr")},
    "rwr_percentile": {"algorithm": _all_but("rwr_sparse")},
    "nft_beta": {"algorithm": _all_but("nft")},
    "draft_steps": {"algorithm": _all_but("draft")},
    "dpo_beta": {"algorithm": _all_but("dpo")},
}
"""By setting: the settings that decide about it, and their values with which it has no effect."""
_CLIP_BY_THEMSELVES = ("nft", "awm")
"""Algorithms that read `advantage_clip` whatever the advantage is."""


def unused_settings(config: TrainConfig) -> dict[str, str]:
    """Return the settings without an effect by name, and where that is so: `with nft`, `without noise_window`."""
    settings = config.flat() | {"advantage": _advantage(config)}
    unused = {}
    for name, deciding in WITHOUT_EFFECT.items():
        deciders = [one for one, values in deciding.items() if settings[one] in values]
        if name == "advantage_clip" and settings["algorithm"] in _CLIP_BY_THEMSELVES:
            deciders = []
        for decider in deciders[:1]:
            value = settings[decider]
            with_value = f"with {value}" if decider == "algorithm" else f"with {decider} {value}"
            unused[name] = f"without {decider}" if value is None else with_value
    return unused


def check_unused(config: TrainConfig) -> None:
    """Refuse settings that were given and have no effect, unless they have their defaults or a preset's values.

    Raises:
        ValueError: naming the setting, its value and what decides that it has no effect.
    """
    settings, defaults = config.flat(), TrainConfig().flat()
    preset = defaults if config.preset is None else preset_config(config.preset).flat()
    for name, where in unused_settings(config).items():
        harmless = [defaults[name], preset[name], *([config._default_advantage()] if name == "advantage" else [])]
        if name in config._given and settings[name] not in harmless:
            raise ValueError(f"{name} must not be given {where}, where it has no effect; got {settings[name]!r}")


def _advantage(config: TrainConfig) -> str:
    return config.training.advantage or config._default_advantage()
