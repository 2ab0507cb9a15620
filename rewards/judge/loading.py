"""From a reward's arguments to the judge that they describe."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rewards.judge.judge_model import JudgeModel
from rewards.judge.judge_server import JudgeServer
from rewards.judge.protocol import Judge
from rewards.registry import check_options

DEFAULT_JUDGE = "llava-hf/llava-1.5-7b-hf"
"""The model in this process if none is named, from the family that the DDPO paper used. The download is about 14 GB."""


def load_judge(
    model: str | Path | Judge | None, server: str | None, options: Mapping[str, Any] | None, **in_process: Any
) -> Judge:
    """Return the judge that a reward's arguments describe. Nothing is loaded and no request is sent yet.

    Args:
        model: Folder or Hub id of a vision-language model, `"tiny"` for the bundled one, or a judge object. With a
            server: the name under which it serves the model; None: the only model that it serves.
        server: URL of an OpenAI-compatible server; None: a model in this process.
        options: Further arguments of `JudgeServer` or `JudgeModel`.
        **in_process: Arguments of `JudgeModel` that `JudgeServer` does not have.

    Raises:
        TypeError: The judge does not take such options.
        ValueError: An argument is not valid.
        ImportError: The package for HTTP is missing.
    """
    if not isinstance(options, Mapping | None):
        raise ValueError(f"judge_options must be a dictionary; got {options!r}")
    given = dict(options or {})
    if server is not None:
        if model is not None and not isinstance(model, str | Path):
            raise TypeError(f"model must be the served model's name where a server is given; got {model!r}")
        check_options(JudgeServer, given, "judge_options", without=("url", "model"))
        return JudgeServer(server, None if model is None else str(model), **given)
    if model is None or isinstance(model, str | Path):
        check_options(JudgeModel, given, "judge_options", without=("model",))
        return JudgeModel(DEFAULT_JUDGE if model is None else model, **{**in_process, **given})
    if not isinstance(model, Judge):
        raise TypeError(f"model must be a folder, a Hub id or a judge with ask, load and unload; got {model!r}")
    if given:
        raise TypeError(f"a judge of your own takes no options; got {', '.join(given)}")
    return model
