"""From what a user writes (a name, `module:function` or a callable, and options) to a reward object.

A built-in reward is one line of `BUILTIN_REWARDS`. Its module is imported only when the reward is asked for.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import os
import re
import reprlib
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pkgutil import resolve_name
from types import ModuleType
from typing import Any, cast

import numpy as np
import yaml
from numpy.typing import ArrayLike, NDArray

from rewards.protocol import (
    Details,
    Images,
    Metadata,
    Reward,
    calling_user_code,
    is_torch_module,
    reward_name,
    split_answer,
)

BUILTIN_REWARDS: dict[str, str] = {
    "jpeg_compressibility": "rewards.formulas.jpeg:jpeg_compressibility",
    "jpeg_incompressibility": "rewards.formulas.jpeg:jpeg_incompressibility",
    "aesthetic": "rewards.clip.aesthetic:Aesthetic",
    "tiny_preference": "rewards.formulas.preference:tiny_preference",
    "clip_score": "rewards.clip.clip_score:ClipScore",
    "pickscore": "rewards.clip.preference:PickScore",
    "hps_v2": "rewards.clip.preference:HPSv2",
    "vlm_alignment": "rewards.judge.alignment:VlmAlignment",
    "vlm_vqa": "rewards.judge.vqa:VlmVqa",
    "votes": "rewards.votes.reward:Votes",
    "tiny_reader": "rewards.judge.reader:TinyReader",
    "temporal_consistency": "rewards.formulas.video:temporal_consistency",
    "points_ring": "rewards.formulas.points:points_ring",
    "points_mixture": "rewards.formulas.points:points_mixture",
}
"""Name to `module:attribute`, where the attribute is a reward function, or a class whose instances are rewards."""

HARMLESS_TEXT_OPTIONS = frozenset({"device", "dtype", "question", "template"})
"""Options of built-in rewards whose text is no path, server or environment variable.

Text of every other option may be one, so a resumed run asks the user for it (`agents.config.authority`).
"""

_COMPOSITE = "rewards.sums.composite:Composite"
_WEIGHTED = re.compile(r".*,.*|.*:\s*[-+.\d][^:]*(:raw)?|.*:raw", re.DOTALL)
_YAML_SCALARS = {f"tag:yaml.org,2002:{kind}" for kind in ("bool", "int", "float", "null")}
_POWER_OF_TEN = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+")


def load_reward(spec: str | Callable[..., Any], **options: Any) -> Reward:
    """Return the reward that `spec` names.

    Args:
        spec: A name in `BUILTIN_REWARDS`; `"module:attribute"`, which is looked up on `sys.path` and then in the
            current folder; a weighted sum of these, `"name:weight,name:weight:raw"` (`Composite`); or
            a callable `(images, prompts, metadata) -> scores`, which is returned as it is. A class is instantiated.
        **options: Arguments of the class.

    Raises:
        ValueError: There is no such reward, module or attribute; or `options` are given for a reward without options.
        TypeError: The result is not callable as a reward, or the class does not take the options.
    """
    return _loaded(spec, options, "reward")


def configured_reward(spec: str | Callable[..., Any], options: Mapping[str, Any], setting: str = "reward") -> Reward:
    """Return the reward that `spec` names, with its options in one dictionary, as a configuration stores them.

    Args:
        spec: As for `load_reward`.
        options: Arguments of the reward's class. For a weighted sum: the arguments of each term, by the term's name.
        setting: What the user calls the spec, for errors; the options are those of this setting.

    Raises:
        ValueError: As `load_reward`; or an option of a weighted sum does not belong to one of its terms.
        TypeError: As `load_reward`.
    """
    if not isinstance(options, Mapping) or not all(isinstance(name, str) for name in options):
        raise ValueError(f"{_options_of(setting)} must be a dictionary with names of options as keys; got {options!r}")
    if not (isinstance(spec, str) and _is_weighted_sum(spec)):
        return _loaded(spec, options, setting)
    if without_term := [name for name, value in options.items() if not isinstance(value, Mapping)]:
        raise ValueError(
            f"{_options_of(setting)} of the weighted sum {spec!r} must begin with a term's name, such as "
            f"clip_score.device; got {', '.join(without_term)}"
        )
    return _loaded(spec, {"options": options}, setting)


def _loaded(spec: str | Callable[..., Any], options: Mapping[str, Any], setting: str) -> Reward:
    if not isinstance(spec, str):
        return _instantiated(spec, repr(getattr(spec, "__name__", spec)), options, setting)
    if _is_weighted_sum(spec):
        return cast(Reward, resolve_name(_COMPOSITE)(spec, setting=setting, **options))
    found = resolve_name(BUILTIN_REWARDS[spec]) if spec in BUILTIN_REWARDS else _imported_by_user(spec, setting)
    return _instantiated(found, spec, options, setting)


def _options_of(setting: str) -> str:
    """Return the name of the setting with the options of a reward: `reward_options` of `reward` and of `rewards`."""
    return f"{setting.removesuffix('s')}_options"


def parse_options(pairs: Iterable[str], setting: str = "reward_options") -> dict[str, Any]:
    """Turn `key=value` pairs of a command line, such as `judge_options.timeout=30`, into a nested dictionary.

    A dot in a key separates levels, except before the colon of `module:function.key`, where a term of a weighted sum is
    named. A value is a YAML scalar: numbers, booleans and null have their types, everything else is text. Quotes turn
    any value into text.

    Raises:
        ValueError: A pair has no `=` or no name, or repeats a key; the message quotes the pair.
    """
    options: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        module, colon, rest = key.rpartition(":")
        first, *others = rest.split(".")
        *levels, last = [module + colon + first, *others]
        if not equals or not all([*levels, last]):
            raise ValueError(f"{setting} must be key=value pairs; got {pair!r}")
        inner = options
        for name in levels:
            inner = inner.setdefault(name, {})
            if not isinstance(inner, dict):
                raise ValueError(f"{setting} must not give {name} a value and options of its own; got {pair!r}")
        if last in inner:
            raise ValueError(f"{setting} must name each key once; {key} comes again in {pair!r}")
        inner[last] = _scalar(text)
    return options


def per_sample(score: Callable[[NDArray[np.uint8], str, Mapping[str, Any]], Any]) -> Reward:
    """Turn a function that scores a single image into a reward.

        @per_sample
        def brightness(image, prompt, metadata):
            return image.mean() / 255

    Args:
        score: Called with `(image, prompt, metadata)`, where `image` is (height, width, 3) uint8. It returns a number,
            or a number and a dictionary of details. Every image must have the same details.
    """

    @functools.wraps(score)
    def batched(images: Images, prompts: Sequence[str], metadata: Metadata) -> ArrayLike | tuple[ArrayLike, Details]:
        answers = [split_answer(score(*sample)) for sample in zip(images, prompts, metadata, strict=True)]
        scores = [one for one, _ in answers]
        details = [one for _, one in answers]
        if len({frozenset(one) for one in details}) > 1:
            raise ValueError(f"reward {reward_name(score)} must return the same details for every image; got {details}")
        return scores, {name: [one[name] for one in details] for name in (details[0] if details else ())}

    # A check of the signature would follow this link to `score`, whose signature is the one for a single image.
    del batched.__wrapped__
    return batched


def reward_names(spec: str) -> list[str]:
    """Return the names in a reward's name or weighted sum.

    Raises:
        ValueError: A weighted sum is not spelled as one.
    """
    if not _is_weighted_sum(spec):
        return [spec]
    return [term.name for term in resolve_name("rewards.sums.composite:parse_terms")(spec)]


def user_functions(spec: str) -> list[str]:
    """Return the `module:function` names in a reward's name or weighted sum, whose code runs when it is loaded.

    Raises:
        ValueError: A weighted sum is not spelled as one.
    """
    return [name for name in reward_names(spec) if name not in BUILTIN_REWARDS]


def _scalar(text: str) -> bool | int | float | str | None:
    """Read a YAML scalar; but `1e-3` is a number, and the sexagesimal `10:30` of YAML 1.1 is text."""
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        return text[1:-1]
    if _POWER_OF_TEN.fullmatch(text):
        return float(text)
    loader = yaml.SafeLoader("")
    tag = loader.resolve(yaml.ScalarNode, text, (True, False))
    if tag not in _YAML_SCALARS or ":" in text:
        return text
    value: bool | int | float | None = loader.construct_object(yaml.ScalarNode(tag, text))
    return value


def _is_weighted_sum(spec: str) -> bool:
    """Tell a sum from `module:function`: it has a comma, or ends in a number, or gives a built-in reward a weight."""
    return bool(_WEIGHTED.fullmatch(spec)) or spec.partition(":")[0] in BUILTIN_REWARDS.keys() - {spec}


def _imported_by_user(spec: str, setting: str) -> Any:
    """Import `module:attribute` from `sys.path` or the current folder."""
    module_name, separator, attribute = spec.partition(":")
    near = _of_file(module_name, attribute)
    if not separator or not all(part.isidentifier() for part in [*module_name.split("."), attribute]):
        raise ValueError(
            f"{setting} must be one of {', '.join(BUILTIN_REWARDS)}; or module:function; or a weighted sum such as "
            f"aesthetic:1,clip_score:0.5; got {spec!r}{near or did_you_mean(module_name, BUILTIN_REWARDS)}"
        )
    _user_modules.allow(module_name.partition(".")[0], os.getcwd())
    try:
        with calling_user_code(f"raised by the import of the reward {spec!r}"):
            module = import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not (module_name + ".").startswith(error.name + "."):
            raise
        raise ValueError(
            f"{setting} {spec!r}: there is no module {error.name!r}; it must be in the current folder or on PYTHONPATH"
            f"{near}"
        ) from error
    if not hasattr(module, attribute):
        public = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
        raise ValueError(
            f"{setting} {spec!r}: module {module_name!r} of {getattr(module, '__file__', None) or 'Python'} has no "
            f"{attribute!r}; it has {', '.join(public) or 'no functions'}"
        )
    return getattr(module, attribute)


def _of_file(module_name: str, attribute: str) -> str:
    """Return the end of an error's message for a file in the place of a module: how its module is written."""
    module = module_name.removeprefix("./").removesuffix(".py").replace("/", ".")
    is_file = module_name.endswith(".py") and all(part.isidentifier() for part in module.split("."))
    return f"; did you mean {module}:{attribute}?" if is_file else ""


class _UserModules(MetaPathFinder):
    """Finds modules in a folder that is not on `sys.path`, only for a reward's module and for what it imports.

    On `sys.path`, whatever lies in the folder could be imported by a library in the place of a package that is not
    installed. Installed modules are found before this finder is asked.
    """

    def __init__(self) -> None:
        self._folders: dict[str, str] = {}

    def allow(self, name: str, folder: str) -> None:
        """Let a top-level module be found in a folder."""
        self._folders[name] = folder
        if self not in sys.meta_path:
            sys.meta_path.append(self)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Find a top-level module that the user named, or that is imported by such a module, now or later."""
        folder = self._folders.get(fullname) or self._folders.get(_importing_module())
        if path is not None or folder is None:
            return None  # a package's own modules are found where the package is
        spec = PathFinder.find_spec(fullname, [folder], target)
        if spec is not None:
            self._folders[fullname] = folder
        return spec


_user_modules = _UserModules()


def _importing_module() -> str:
    """Return the name of the top-level module whose code runs the present import."""
    frame = sys._getframe(2)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] == "importlib":
        frame = frame.f_back
    return str(frame.f_globals.get("__name__", "")).partition(".")[0]


def did_you_mean(value: object, valid: Iterable[str]) -> str:
    """Return the end of an error's message: the valid name that is nearest to a wrong one, if one is near."""
    near = difflib.get_close_matches(str(value), list(valid), 1)
    return f"; did you mean {near[0]}?" if near else ""


def check_number(name: str, value: Any, least: float, most: float) -> None:
    """Check a number among the arguments. An integer is required if both limits are integers.

    Raises:
        ValueError: It is no number, or outside the limits.
    """
    integer = isinstance(least, int) and isinstance(most, int)
    is_number = isinstance(value, int if integer else int | float) and not isinstance(value, bool)
    if not is_number or not least <= value <= most:
        noun = "an integer" if integer else "a number"
        raise ValueError(f"{name} must be {noun} in [{least}, {most}]; got {value!r}")


def check_text(name: str, value: Any) -> None:
    """Check a text among the arguments.

    Raises:
        ValueError: It is no text, or an empty one.
    """
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{name} must be a text that is not empty; got {value!r}")


def check_options(takes: Callable[..., Any], given: Mapping[str, Any], name: str, without: Sequence[str] = ()) -> None:
    """Check that a function or class takes options with these names.

    Raises:
        ValueError: It does not; the message says which it takes.
    """
    valid: list[str] = []
    for owner in inspect.getmro(takes) if inspect.isclass(takes) else (takes,):
        try:
            parameters = inspect.signature(owner).parameters
        except ValueError:  # `object`: everything above it passes on what it does not know
            return
        valid += [key for key in parameters if key not in valid and key not in without]
        catches_all = [key for key, one in parameters.items() if one.kind is inspect.Parameter.VAR_KEYWORD]
        valid = [key for key in valid if key not in catches_all]
        if not catches_all:
            break
    if unknown := [str(key) for key in given if key not in valid]:
        near = did_you_mean(unknown[0], valid)
        raise ValueError(f"{name} must be among {', '.join(valid) or 'none'}; got {', '.join(unknown)}{near}")


def _instantiated(reward: Any, label: str, options: Mapping[str, Any], setting: str) -> Reward:
    """Instantiate a class with its options, and check that the result can be called as a reward."""
    if inspect.isclass(reward):
        check_options(reward, options, f"{_options_of(setting)} of {label}")
        try:
            reward = reward(**options)
        except TypeError as error:
            raise TypeError(
                f"reward {label} must be a class that takes its options: {error}; got {reprlib.repr(options)}"
            ) from error
    elif options:
        raise ValueError(f"reward {label} takes no options ({_options_of(setting)}); got {', '.join(options)}")
    if not callable(reward):
        raise TypeError(f"reward {label} must be callable as (images, prompts, metadata); got {reward!r}")
    forward = getattr(reward, "forward", None) if is_torch_module(reward) else None  # its __call__ takes anything
    for function in (reward, type(reward).__call__, forward):
        if is_deferred(function):
            raise TypeError(f"reward {label} must be a plain function that returns scores; it is async or a generator")
    try:
        inspect.signature(forward or reward).bind(None, None, None)
    except TypeError as error:
        raise TypeError(f"reward {label} must be callable as (images, prompts, metadata): {error}") from error
    except ValueError:
        pass  # a function written in C may have no signature
    return cast(Reward, reward)


def is_deferred(function: Any) -> bool:
    """Return whether a call returns something to wait for or to go through, and no result: async, or a generator."""
    kinds = (inspect.iscoroutinefunction, inspect.isgeneratorfunction, inspect.isasyncgenfunction)
    return any(is_kind(function) for is_kind in kinds)
