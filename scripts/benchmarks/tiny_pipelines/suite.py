"""The tiny random pipelines that diffusers' own tests build: found in a checkout, and built without a hub."""

from __future__ import annotations

import ast
import importlib
import inspect
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import diffusers
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import is_ftfy_available, is_torchvision_available
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel, PreTrainedTokenizerBase


def _resize(images: Tensor, size: tuple[int, int], interpolation: str) -> Tensor:
    return functional.interpolate(images, size=tuple(size), mode=interpolation)


_FTFY = SimpleNamespace(fix_text=str)
_TRANSFORMS = SimpleNamespace(
    functional=SimpleNamespace(resize=_resize), InterpolationMode=SimpleNamespace(NEAREST="nearest")
)
"""Stand in for packages that some pipelines use and that may be absent."""
_ABSENT = ("parameterized", "requests_mock")
"""Packages that tests import and that building a pipeline does not need."""


@dataclass(frozen=True)
class TestClass:
    """A class of diffusers' tests that builds a pipeline.

    Attributes:
        pipeline: name of the pipeline's class.
        module: dotted name of the file.
        name: of the class.
    """

    pipeline: str
    module: str
    name: str


def pipeline_classes() -> list[str]:
    """Return the names of the installed pipelines, without the modular ones, which have no call of their own."""
    found = []
    for name in dir(diffusers):
        value = getattr(diffusers, name, None) if "Pipeline" in name else None
        if inspect.isclass(value) and issubclass(value, DiffusionPipeline) and value is not DiffusionPipeline:
            found.append(name)
    return found


def test_classes(tests: Path) -> Iterator[TestClass]:
    """Yield the classes of the tests that name a pipeline, without importing anything.

    Args:
        tests: the folder `tests` of a checkout of diffusers.

    Raises:
        ValueError: for a folder without pipelines.
    """
    files = sorted((tests / "pipelines").rglob("test_*.py"))
    if not files:
        raise ValueError(f"tests must be the folder tests of a checkout of diffusers; got {str(tests)!r}")
    for file in files:
        module = ".".join(("tests", *file.relative_to(tests).with_suffix("").parts))
        classes = [node for node in ast.parse(file.read_text(encoding="utf-8")).body if isinstance(node, ast.ClassDef)]
        bases = {node.name: ast.unparse(node.bases[0]) for node in classes if node.bases}
        for node in classes:
            for statement in node.body:
                if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == "pipeline_class":
                    name = ast.unparse(statement.value)
                    yield TestClass(bases.get(name, name).split(".")[-1], module, node.name)


def build(tests: Path, found: TestClass) -> tuple[Any, dict[str, Any]]:
    """Return a pipeline with random weights, and the arguments with which the test calls it.

    Weights that are zero at the start become small random numbers, because a network that returns zeros shows nothing.
    """
    if str(tests.parent) not in sys.path:
        sys.path.insert(0, str(tests.parent))
    for name in _ABSENT:
        sys.modules.setdefault(name, MagicMock())
    test_class = getattr(importlib.import_module(found.module), found.name)
    test = test_class()
    pipeline = test_class.pipeline_class(**test.get_dummy_components())
    pipeline.set_progress_bar_config(disable=True)
    for name, component in pipeline.components.items():
        if "text_encoder" in name and isinstance(component, PreTrainedModel):
            _enlarge(component, pipeline.components.get(name.replace("text_encoder", "tokenizer")))
    for name, module in list(sys.modules.items()):
        if name.startswith("diffusers.") and not is_torchvision_available():
            vars(module).setdefault("transforms", _TRANSFORMS)
        if name.startswith("diffusers.pipelines.") and not is_ftfy_available():
            vars(module).setdefault("ftfy", _FTFY)
    torch.manual_seed(0)
    with torch.no_grad():
        for component in pipeline.components.values():
            for weight in component.eval().parameters() if isinstance(component, nn.Module) else ():
                if weight.is_floating_point() and not weight.any():
                    weight.normal_(std=0.05)
    takes_device = "device" in inspect.signature(test.get_dummy_inputs).parameters
    inputs = test.get_dummy_inputs("cpu") if takes_device else test.get_dummy_inputs()
    return pipeline, inputs


def _enlarge(encoder: PreTrainedModel, tokenizer: Any) -> None:
    """Give a text encoder rows for all tokens of its tokenizer."""
    if isinstance(tokenizer, PreTrainedTokenizerBase):
        rows = max(tokenizer.get_vocab().values()) + 1
        if encoder.config.get_text_config().vocab_size < rows:
            encoder.resize_token_embeddings(rows)
