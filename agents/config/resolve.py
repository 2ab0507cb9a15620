"""From the settings that a user gave to the complete settings of a run: the preset, a run to be resumed, every gap."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

from agents.config.algorithms import NEVERTHELESS, WITHOUT_EFFECT
from agents.config.authority import resumed
from agents.config.content import with_content, with_images
from agents.config.presets import check_preset, preset_config
from agents.config.train_config import TrainConfig
from ddpo_env.validation.options import shown
from rewards import parse_options


def resolve(config: TrainConfig, processes: int = 1) -> TrainConfig:
    """Return the complete settings of a run that a number of processes train together.

    A run to be resumed has its own settings; see `agents.config.authority` for what may change. A model folder and a
    prompt file are stored with absolute paths and hashes of their content; if its prompts have images and the pipeline
    takes one, `pipeline_arguments` say so. The learning rate goes on as
    planned at first, so more iterations do not raise it again.

    Raises:
        ValueError: naming the setting, its value and what is valid.
    """
    check_preset(config)
    _check_adapters(config)
    if config.resume is not None:
        own = TrainConfig.read(config.resume)
        check_preset(replace(own, resume=None))
        _check_resolved(own, processes)
        return with_content(resumed(own, config)).resolved(processes)
    _check_unused(config)
    _check_holdout(config)
    reward = "".join(letter if letter.isalnum() or letter in "-_" else "-" for letter in config.reward)
    run_dir = config.run_dir or Path("runs") / f"{reward}-{time.strftime('%Y%m%d-%H%M%S')}"
    return with_images(with_content(config.changed(run_dir=run_dir))).resolved(processes)


def _check_holdout(config: TrainConfig) -> None:
    """Refuse the reward itself as the held-out reward of a new run: it could show no over-optimisation."""
    trained = config.reward, parse_options(config.reward_options)
    if (config.run.holdout_reward, parse_options(config.run.holdout_reward_options)) == trained:
        raise ValueError(f"holdout_reward must differ from reward, which is trained on; got {config.reward!r} twice")


def unused_settings(config: TrainConfig) -> dict[str, str]:
    """Return the settings without an effect by name, and where that is so: `with nft`, `without noise_window`."""
    settings = config.flat()
    settings["advantage"] = settings["advantage"] or config.default_advantage
    unused = {}
    for name, deciding in WITHOUT_EFFECT.items():
        deciders = [one for one, values in deciding.items() if settings[one] in values]
        if name == "advantage_clip" and name in config.traits.arguments:  # whatever the advantage is
            deciders = []
        if any(settings[other] != value for other, value in NEVERTHELESS.get(name, {}).items()):
            deciders = []
        for decider in deciders[:1]:
            value = settings[decider]
            with_value = f"with {value}" if decider == "algorithm" else f"with {decider} {value}"
            unused[name] = f"without {decider}" if value is None else with_value
    return unused


def _check_unused(config: TrainConfig) -> None:
    """Refuse settings that were given and have no effect, unless they have their defaults or a preset's values."""
    settings, defaults = config.flat(), TrainConfig().flat()
    preset = defaults if config.preset is None else preset_config(config.preset).flat()
    for name, where in unused_settings(config).items():
        left_open = {"advantage": config.default_advantage, "schedule_iterations": config.iterations}
        harmless = [defaults[name], preset[name], left_open.get(name)]
        if name in config._given and settings[name] not in harmless:
            why = "where it has no effect"
            if name in config.traits.keeps:
                why = f"whose class has another {name}, which is {config.traits.keeps[name]} in every run"
            raise ValueError(f"{name} must not be given {where}, {why}; got {settings[name]!r}")


def _check_adapters(config: TrainConfig) -> None:
    """Refuse a rank and layers for a LoRA that has its own, unless they are a preset's."""
    if config.policy.lora is None or config.resume is not None:
        return
    defaults = (preset_config(config.preset) if config.preset else TrainConfig()).policy
    for name in ("lora_rank", "lora_targets"):
        value, default = getattr(config.policy, name), getattr(defaults, name)
        if name in config._given and value != default:
            raise ValueError(f"{name} must not be given with lora, whose adapters have their own; got {value!r}")


def _check_resolved(own: TrainConfig, processes: int) -> None:
    """Refuse a run's settings that leave something open: a default of this version would fill it in silently."""
    complete = own.resolved(processes).flat()
    for name, value in own.flat().items():
        if value != complete[name]:
            raise ValueError(f"resume: config.yaml must hold the value of {name} that the run has; got {shown(value)}")
