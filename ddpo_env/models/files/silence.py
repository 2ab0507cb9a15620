"""What libraries print while files are read: progress bars and warnings that help nobody."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging


@contextmanager
def without_progress_bars() -> Iterator[None]:
    """Progress bars are for downloads; a folder is read in a moment."""
    libraries = [library for library in (diffusers_logging, transformers_logging) if library.is_progress_bar_enabled()]
    for library in libraries:
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library in libraries:
            library.enable_progress_bar()


@contextmanager
def quiet() -> Iterator[None]:
    """Silence progress bars, and diffusers' warnings of what a file holds or lacks for some of the components."""
    verbosity = diffusers_logging.get_verbosity()
    diffusers_logging.set_verbosity_error()
    try:
        with without_progress_bars():
            yield
    finally:
        diffusers_logging.set_verbosity(verbosity)
