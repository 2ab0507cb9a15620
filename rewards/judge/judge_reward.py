"""The base of the rewards that ask a judge: it holds the judge and the log of its answers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from rewards.judge.answer_log import AnswerLog
from rewards.judge.loading import load_judge
from rewards.judge.protocol import Judge
from rewards.kinds import images_only
from rewards.protocol import Details, Images, Metadata


@images_only
class JudgeReward(ABC):
    """Scores images by a judge's answers; a subclass implements `__call__`.

    Attributes:
        judge: The judge that is asked.
        log: Keeps some of the images and answers of each call, if it has a folder.
    """

    def __init__(
        self,
        model: str | Path | Judge | None = None,
        server: str | None = None,
        *,
        judge_options: Mapping[str, Any] | None = None,
        device: str | torch.device = "auto",
        log_folder: str | Path | None = None,
        log_per_call: int = 4,
    ) -> None:
        """Check the arguments. Nothing is loaded and no question is asked yet.

        Args:
            model: The judge: folder or Hub id of a vision-language model, `"tiny"` for the bundled one, None for LLaVA
                1.5 7B; or your own `rewards.judge.protocol.Judge`. With a server: the name under which it serves the
                model; None: the only model that it serves.
            server: URL of an OpenAI-compatible server; None: the judge runs in this process.
            judge_options: Further arguments of `JudgeServer` (`timeout`, `attempts`, `concurrency`, ...) or of
                `JudgeModel` (`dtype`, `batch_size`, ...).
            device: The device of the models in this process.
            log_folder: Folder for some of the images and answers; None: no log, unless `log_to` is called.
            log_per_call: How many images of each call are logged, at least 1.

        Raises:
            ValueError: An argument is not valid.
            ImportError: An optional dependency is missing.
        """
        self.log = AnswerLog(log_folder, log_per_call)
        self.judge = load_judge(model, server, judge_options, device=device)

    def log_to(self, folder: Path) -> None:
        """Log some of the images and answers to this folder from now on, unless there is a `log_folder`."""
        self.log.use_folder(folder)

    def load(self) -> None:
        """Load the model, or check that the server answers, now."""
        self.judge.load()

    def unload(self) -> None:
        """Release the model, or the connections to the server."""
        self.judge.unload()

    @abstractmethod
    def __call__(
        self, images: Images, prompts: Sequence[str], metadata: Metadata
    ) -> tuple[NDArray[np.float64], Details]:
        """Return scores, (batch,), NaN where the judge gave no answer, and the answers as details."""
