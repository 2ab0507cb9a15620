"""Which pipelines of the installed diffusers can be trained: each one goes through the same checks.

    git clone --depth 1 https://github.com/huggingface/diffusers
    python scripts/benchmarks/pipelines.py --tests diffusers/tests --output docs/pipelines.md

The pipelines are tiny and random; diffusers' own tests build them. Nothing is downloaded: tokenizers and text encoders
that those tests load from the Hub are replaced. Each pipeline has a process and a time limit of its own, so one that
hangs or crashes is a row of the table. The checks are those of `tiny_pipelines/checks.py`.
"""

from __future__ import annotations

import datetime
import json
import multiprocessing
import sys
import time
import warnings
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import tyro
from tiny_pipelines import hub
from tiny_pipelines.checks import Found, check_pipeline
from tiny_pipelines.document import document
from tiny_pipelines.suite import TestClass, build, pipeline_classes, test_classes


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """What is checked."""

    tests: Path
    """The folder `tests` of a checkout of diffusers."""
    only: tuple[str, ...] = ()
    """Names of pipelines; default: all."""
    seconds: float = 120.0
    """Time limit of a pipeline."""
    output: Path | None = None
    """File that the document is written to."""
    json: Path | None = None
    """File that the results are written to."""


def examine(tests: Path, candidates: list[TestClass]) -> Found:
    """Build a pipeline from the first of its test classes that builds one, and check it."""
    warnings.simplefilter("ignore")
    hub.install()
    reason = ""
    for candidate in candidates:
        try:
            pipeline, inputs = build(tests, candidate)
        except Exception as error:
            reason = reason or f"{type(error).__name__}: {error}"
            continue
        return check_pipeline(pipeline, inputs)
    return Found(failed="tiny model", reason=reason)


def _child(connection: Connection, tests: Path, candidates: list[TestClass]) -> None:
    try:
        connection.send(asdict(examine(tests, candidates)))
    except BaseException as error:
        connection.send({"figures": {}, "failed": "tiny model", "reason": f"{type(error).__name__}: {error}"})


def run(context: Any, tests: Path, candidates: list[TestClass], seconds: float) -> dict[str, Any]:
    """Examine a pipeline in a process of its own."""
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(sender, tests, candidates), daemon=True)
    process.start()
    sender.close()
    try:
        if not receiver.poll(seconds):
            return {"figures": {}, "failed": "time", "reason": f"not finished after {seconds:g} s"}
        return receiver.recv()
    except EOFError:
        return {"figures": {}, "failed": "process", "reason": "the process ended"}
    finally:
        process.kill()
        process.join()


def main() -> int:
    """Check and print."""
    arguments = tyro.cli(Arguments, description=__doc__)
    classes: dict[str, list[TestClass]] = {}
    for found in test_classes(arguments.tests):
        classes.setdefault(found.pipeline, []).append(found)
    methods = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("fork" if "fork" in methods else "spawn")
    torch.set_num_threads(1)
    results = {}
    for name in sorted(arguments.only or classes):
        start = time.perf_counter()
        results[name] = run(context, arguments.tests.resolve(), classes.get(name, []), arguments.seconds)
        one = results[name]
        print(
            f"{time.perf_counter() - start:5.1f} s  {name}: {one['failed'] or 'passed'} {one['reason'][:300]}",
            flush=True,
        )
    untested = sorted(name for name in pipeline_classes() if name not in classes)
    if arguments.output:
        arguments.output.write_text(document(results, untested, datetime.date.today()), encoding="utf-8")
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
