"""From what a user writes, a name, `module:function` or a callable, to a reward: before anything heavy is loaded.

A built-in reward is one line of `BUILTIN_REWARDS`; its module is imported only when it is asked for.
"""

from __future__ import annotations

import inspect
import os
import re
import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any, cast

from rewards.protocol import Reward

BUILTIN_REWARDS: dict[str, str] = {
    "jpeg_compressibility": "rewards.jpeg:jpeg_compressibility",
    "jpeg_incompressibility": "rewards.jpeg:jpeg_incompressibility",
    "aesthetic": "rewards.clip.aesthetic:Aesthetic",
    "clip_score": "rewards.clip.clip_score:ClipScore",
    "pickscore": "rewards.clip.preference:PickScore",
    "hps_v2": "rewards.clip.preference:HPSv2",
    "vlm_alignment": "rewards.judge.alignment:VlmAlignment",
    "vlm_vqa": "rewards.judge.vqa:VlmVqa",
    "points_ring": "rewards.points:ring",
    "points_mixture": "rewards.points:mixture",
}
"""Name to `module:attribute`, where the attribute is a reward function, or a class whose instances are rewards."""

_WEIGHTED = re.compile(r".*,.*|.*:\s*[-+.\d][^:]*(:raw)?|.*:raw", re.DOTALL)


def load_reward(spec: str | Callable[..., Any], **options: Any) -> Reward:
    """Return the reward that `spec` names.

    Args:
        spec: A name in `BUILTIN_REWARDS`; `"module:attribute"`, looked up on `sys.path` and then in the current
            folder; a weighted sum of these, `"name:weight,name:weight:raw"` (`rewards.composite.Composite`); or a
            callable `(images, prompts, metadata) -> scores`, which is returned as it is. A class, named or given, is
            instantiated.
        **options: Arguments of that class.

    Raises:
        ValueError: There is no such reward, module or attribute, or `options` for a reward that has none.
        TypeError: What is named or given is not callable as a reward, or the class does not take the options.
    """
    if isinstance(spec, str) and _is_weighted_sum(spec):
        from rewards.composite import Composite

        return Composite(spec, **options)
    if isinstance(spec, str):
        return _instantiated(_imported(BUILTIN_REWARDS.get(spec, spec), spec), spec, options)
    return _instantiated(spec, repr(spec), options)


def configured_reward(spec: str | Callable[..., Any], options: Mapping[str, Any]) -> Reward:
    """Return the reward that `spec` names, with its options in one dictionary, as a configuration has them.

    Args:
        spec: As for `load_reward`.
        options: Arguments of the reward's class; of a weighted sum, those of each part by its name.

    Raises:
        ValueError: As `load_reward`; for options of a function or of a reward object, which take none; and for options
            of a weighted sum that are of no part.
        TypeError: As `load_reward`.
    """
    if not (isinstance(spec, str) and _is_weighted_sum(spec)):
        return load_reward(spec, **options)
    if of_no_part := [name for name, value in options.items() if not isinstance(value, Mapping)]:
        raise ValueError(
            f"reward_options of the weighted sum {spec!r} must begin with a part's name, such as clip_score.device; "
            f"got {', '.join(of_no_part)}"
        )
    return load_reward(spec, options=options)


def _is_weighted_sum(spec: str) -> bool:
    """Tell a sum from `module:function`: a comma, a number as the last part, or a weight, right or wrong, of a name."""
    return bool(_WEIGHTED.fullmatch(spec)) or spec.partition(":")[0] in BUILTIN_REWARDS.keys() - {spec}


def _imported(target: str, spec: str) -> Any:
    module_name, separator, attribute = target.partition(":")
    if not separator or not all(part.isidentifier() for part in [*module_name.split("."), attribute]):
        raise ValueError(
            f"reward must be one of {', '.join(BUILTIN_REWARDS)}; or module:function; or a weighted sum such as "
            f"aesthetic:1,clip_score:0.5; got {spec!r}"
        )
    if spec not in BUILTIN_REWARDS and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        module = import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not (module_name + ".").startswith(error.name + "."):
            raise
        raise ValueError(
            f"reward {spec!r}: there is no module {error.name!r}; it must be in the current folder or on PYTHONPATH"
        ) from error
    if not hasattr(module, attribute):
        public = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
        raise ValueError(
            f"reward {spec!r}: module {module_name!r} has no {attribute!r}; it has "
            f"{', '.join(public) or 'no functions'}"
        )
    return getattr(module, attribute)


def _instantiated(reward: Any, label: str, options: dict[str, Any]) -> Reward:
    if inspect.isclass(reward):
        try:
            reward = reward(**options)
        except TypeError as error:
            raise TypeError(f"reward {label}: {error}; got the options {options}") from error
    elif options:
        raise ValueError(f"reward {label} takes no options; got {', '.join(options)}")
    if not callable(reward):
        raise TypeError(f"reward {label} must be callable as (images, prompts, metadata); got {reward!r}")
    try:
        inspect.signature(reward).bind(None, None, None)
    except TypeError as error:
        raise TypeError(f"reward {label} must be callable as (images, prompts, metadata): {error}") from error
    except ValueError:
        pass  # a function written in C may not tell its signature
    return cast(Reward, reward)
