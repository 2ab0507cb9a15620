"""Prompt-image alignment (DDPO, arXiv 2305.13301, section 5.3): how well a judge's description matches the prompt.

The score is BERTScore recall without rescaling. With the paper's text encoder even noise scores about 0.8, so look at
the differences between scores and not at their size.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from rewards.judge.bert_score import DEFAULT_ENCODER, BertScoreRecall
from rewards.judge.judge_reward import JudgeReward
from rewards.judge.protocol import Judge
from rewards.networks.pretrained import TINY
from rewards.protocol import Details, Images, Metadata
from rewards.registry import check_text

QUESTION = "Answer concisely: what is going on in this image?"
TEMPLATE = "The image contains {prompt}"


class VlmAlignment(JudgeReward):
    """BERTScore recall of a judge's description, compared with "The image contains {prompt}"."""

    __name__ = "vlm_alignment"

    def __init__(
        self,
        model: str | Path | Judge | None = None,
        server: str | None = None,
        *,
        question: str = QUESTION,
        template: str = TEMPLATE,
        text_model: str | Path | None = None,
        text_layer: int | None = None,
        device: str | torch.device = "auto",
        **options: Any,
    ) -> None:
        """Check the arguments. Nothing is loaded and no question is asked yet.

        Args:
            model: The judge, as in `JudgeReward`.
            server: URL of the judge's server, as in `JudgeReward`.
            question: The question that the judge is asked.
            template: The text that the answer is compared with; it must contain `{prompt}`.
            text_model: Folder or Hub id of BERTScore's text encoder, or `"tiny"` for the bundled one. None: the DDPO
                paper's DeBERTa xlarge, or the bundled encoder if the judge is the bundled one.
            text_layer: The layer of the text encoder; None: the recommended one.
            device: The device of the models in this process.
            **options: `judge_options`, `log_folder` and `log_per_call` as in `JudgeReward`.

        Raises:
            ValueError: An argument is not valid.
            ImportError: An optional dependency is missing.
        """
        check_text("question", question)
        check_text("template", template)
        if "{prompt}" not in template:
            raise ValueError(f"template must contain {{prompt}}; got {template!r}")
        super().__init__(model, server, device=device, **options)
        self.question = question
        self.template = template
        if text_model is None:
            text_model = TINY if model == TINY and server is None else DEFAULT_ENCODER
        self.recall = BertScoreRecall(text_model, text_layer, device=device)

    def load(self) -> None:
        """Load the models, or check that the server answers, now."""
        super().load()
        self.recall.load()

    def unload(self) -> None:
        """Release the models and connections."""
        super().unload()
        self.recall.unload()

    def __call__(
        self, images: Images, prompts: Sequence[str], metadata: Metadata
    ) -> tuple[NDArray[np.float64], Details]:
        """Return the recall, (batch,), NaN where the judge gave no answer, and each image's `answer`."""
        questions = [self.question] * len(images)
        answers = self.judge.ask(list(images), questions)
        scores = self.recall(answers, [self.template.replace("{prompt}", prompt) for prompt in prompts])
        self.log.record(
            list(images), prompts, [[one] for one in questions], [[one] for one in answers], scores.tolist()
        )
        return scores, {"answer": answers}
