"""Prompt-image alignment (DDPO, arXiv 2305.13301, section 5.3): does a judge's description say what the prompt says?

The score is BERTScore recall without rescaling, so even noise scores near 0.8 with the paper's text encoder: it is
differences that count.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from rewards.judge.answer_log import AnswerLog
from rewards.judge.bert_score import DEFAULT_ENCODER, BertScoreRecall
from rewards.judge.loading import Judge, load_judge
from rewards.pretrained import TINY
from rewards.protocol import Details, Images, Metadata, images_only

QUESTION = "Answer concisely: what is going on in this image?"
TEMPLATE = "The image contains {prompt}"


@images_only
class VlmAlignment:
    """BERTScore recall of a judge's description against "The image contains {prompt}"."""

    __name__ = "vlm_alignment"

    def __init__(
        self,
        model: str | Path | Judge | None = None,
        server: str | None = None,
        *,
        judge_options: Mapping[str, Any] | None = None,
        question: str = QUESTION,
        template: str = TEMPLATE,
        text_model: str | Path | None = None,
        text_layer: int | None = None,
        device: str | torch.device = "auto",
        log_folder: str | Path | None = None,
        log_per_call: int = 4,
    ) -> None:
        """Check the arguments; nothing is loaded and nobody is asked yet.

        Args:
            model: The judge: folder or Hub id of a vision-language model, `"tiny"`: the bundled one, None: LLaVA 1.5
                7B; or an object of your own (`rewards.judge.loading.Judge`). With a server the served model's name, None: the
                only one.
            server: URL of an OpenAI-compatible server; None: the judge runs in this process.
            judge_options: Further arguments of `JudgeServer` (`timeout`, `attempts`, `concurrency`, ...) or of
                `JudgeModel` (`dtype`, `batch_size`, ...).
            question: What the judge is asked.
            template: What its answer is compared with; must contain `{prompt}`.
            text_model: Folder or Hub id of BERTScore's text encoder, or `"tiny"`; None: that of the DDPO paper, DeBERTa
                xlarge, or the bundled one where the judge is.
            text_layer: Its layer; None: the recommended one.
            device: Of the models in this process.
            log_folder: Where to keep a sample of pictures and answers; None: nowhere.
            log_per_call: How many of each call.

        Raises:
            ValueError: An argument is not valid.
            ImportError: An optional dependency is missing.
        """
        if "{prompt}" not in template:
            raise ValueError(f"template must contain {{prompt}}; got {template!r}")
        self.question = question
        self.template = template
        self.judge = load_judge(model, server, judge_options, device=device)
        if text_model is None:
            text_model = TINY if model == TINY and server is None else DEFAULT_ENCODER
        self.recall = BertScoreRecall(text_model, text_layer, device=device)
        self._log = None if log_folder is None else AnswerLog(log_folder, log_per_call)
        self._log_per_call = log_per_call

    def log_to(self, folder: Path) -> None:
        """Keep a sample of pictures and answers in this folder from now on, unless there is a `log_folder`."""
        self._log = self._log or AnswerLog(folder, self._log_per_call)

    def load(self) -> None:
        """Load the models and look for the server now."""
        self.judge.load()
        self.recall.load()

    def unload(self) -> None:
        """Let the models and connections go."""
        self.judge.unload()
        self.recall.unload()

    def __call__(
        self, images: Images, prompts: Sequence[str], metadata: Metadata
    ) -> tuple[NDArray[np.float64], Details]:
        """Return recall, (batch,), NaN where the judge said nothing, and each `answer`."""
        answers = self.judge.ask(list(images), [self.question] * len(images))
        scores = self.recall(answers, [self.template.replace("{prompt}", prompt) for prompt in prompts])
        if self._log is not None:
            asked = [[self.question]] * len(images)
            self._log.record(list(images), prompts, asked, [[answer] for answer in answers], scores.tolist())
        return scores, {"answer": answers}
