"""BERTScore recall (Zhang et al. 2020, arXiv 1904.09675): how much of what should be said is said, word by word.

Recall is the mean over the reference's tokens of the largest cosine with a token of the candidate, in a layer of a text
encoder; special tokens are left out and nothing is rescaled. The matching is torchmetrics'. The encoder runs here, on
each distinct sentence once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rewards.devices import resolve_device, resolve_dtype
from rewards.pretrained import free_memory, require, resolve_source, shared

DEFAULT_ENCODER = "microsoft/deberta-xlarge-mnli"
"""The encoder of the DDPO paper; about 3 GB to download."""

LAYERS: dict[str, int] = {DEFAULT_ENCODER: 40}
"""The layer that agrees best with people, from the `bert_score` package's table; other models: the last one."""

_PAIRS = 2
"""Pairs in one call of torchmetrics. It sorts candidates and references by length, each for themselves, and indexes the
sorted ones with the sorting permutation where the inverse is due (Lightning-AI/torchmetrics issue 2728, in 1.9), so
that larger calls compare sentences of different pairs. A permutation of two is its own inverse."""


class TextEncoder:
    """A transformers encoder and its tokenizer, as `shared` holds them."""

    def __init__(self, source: str, device: torch.device, dtype: torch.dtype) -> None:
        """Load both: safetensors, or else PyTorch's format, which transformers reads with `weights_only=True`."""
        from transformers import AutoModel, AutoTokenizer

        self.model = AutoModel.from_pretrained(source, dtype=dtype).to(device).eval().requires_grad_(False)
        self.tokenizer = AutoTokenizer.from_pretrained(source)
        positions = getattr(self.model.config, "max_position_embeddings", 512)
        # DeBERTa's tokenizer says 1e30, which overflows in its own truncation.
        self.tokenizer.model_max_length = min(self.tokenizer.model_max_length, positions, 512)

    def hidden_states(self, sentences: Sequence[str], layer: int) -> dict[tuple[int, ...], Tensor]:
        """Return the layer's states of each sentence, (tokens, dimensions) float32 on the CPU, by its token ids."""
        tokens = self.tokenizer(list(sentences), padding=True, truncation=True, return_tensors="pt")
        tokens = tokens.to(self.model.device)
        ids, mask = tokens["input_ids"], tokens["attention_mask"]
        with torch.inference_mode():
            states = self.model(ids, attention_mask=mask, output_hidden_states=True).hidden_states[layer]
        return {
            tuple(row[kept.bool()].tolist()): state[kept.bool()].float().cpu()
            for row, kept, state in zip(ids, mask, states, strict=True)
        }


class BertScoreRecall:
    """Scores candidates against references by BERTScore recall, without rescaling by a baseline."""

    def __init__(
        self,
        model: str | Path = DEFAULT_ENCODER,
        layer: int | None = None,
        *,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "float32",
        batch_size: int = 64,
    ) -> None:
        """Check the arguments; nothing is loaded yet.

        Args:
            model: Folder or Hub id of a text encoder, or `"tiny"`: the bundled one, for its vocabulary.
            layer: Index into its hidden states, 0 for the embeddings; None: that of `LAYERS`, else the last.
            device: Where it computes.
            dtype: Of its weights.
            batch_size: Sentences in one call of the encoder.

        Raises:
            ValueError: An argument is not valid.
            ImportError: torchmetrics is not installed.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1; got {batch_size}")
        require("torchmetrics", "BERTScore")
        self.device = resolve_device(device)
        self.dtype = resolve_dtype(dtype, self.device)
        self.layer = LAYERS.get(str(model), -1) if layer is None else layer
        self.batch_size = batch_size
        self._source = resolve_source(model, "text_encoder")
        self._encoder: TextEncoder | None = None

    @property
    def encoder(self) -> TextEncoder:
        """The text encoder, loaded if it is not."""
        if self._encoder is None:
            self._encoder = shared(TextEncoder, self._source, self.device, self.dtype)
        return self._encoder

    def load(self) -> None:
        """Load the text encoder now.

        Raises:
            ValueError: It has no such layer.
        """
        layers = self.encoder.model.config.num_hidden_layers
        if not -layers - 1 <= self.layer <= layers:
            raise ValueError(f"layer must be at most {layers} in {self._source!r}; got {self.layer}")

    def unload(self) -> None:
        """Let the text encoder go."""
        self._encoder = None
        free_memory(self.device)

    def __call__(self, candidates: Sequence[str], references: Sequence[str]) -> NDArray[np.float64]:
        """Score each candidate against the reference at its place.

        Returns:
            Recall, (pairs,), at most 1; NaN where either has no tokens but special ones: nothing can be matched.

        Raises:
            ValueError: There are not as many of one as of the other.
        """
        if len(candidates) != len(references):
            raise ValueError(f"each candidate needs a reference; got {len(candidates)} and {len(references)}")
        self.load()
        pairs = [pair for pair in dict.fromkeys(zip(candidates, references, strict=True)) if self._comparable(*pair)]
        states = self._hidden_states(list(dict.fromkeys(sentence for pair in pairs for sentence in pair)))
        recall: dict[tuple[str, str], float] = {}
        for start in range(0, len(pairs), _PAIRS):
            few = pairs[start : start + _PAIRS]
            recall.update(zip(few, self._match(few, states), strict=True))
        return np.array([recall.get(pair, np.nan) for pair in zip(candidates, references, strict=True)], np.float64)

    def _comparable(self, *sentences: str) -> bool:
        """Tell whether each sentence has tokens of its own."""
        return all(self.encoder.tokenizer(sentence, add_special_tokens=False)["input_ids"] for sentence in sentences)

    def _hidden_states(self, sentences: list[str]) -> dict[tuple[int, ...], Tensor]:
        states: dict[tuple[int, ...], Tensor] = {}
        for start in range(0, len(sentences), self.batch_size):
            states.update(self.encoder.hidden_states(sentences[start : start + self.batch_size], self.layer))
        return states

    def _match(self, pairs: Sequence[tuple[str, str]], states: Mapping[tuple[int, ...], Tensor]) -> list[float]:
        from torchmetrics.functional.text.bert import bert_score

        def look_up(_: Any, batch: Mapping[str, Tensor]) -> Tensor:
            rows = zip(batch["input_ids"].tolist(), batch["attention_mask"].bool().tolist(), strict=True)
            found = [states[tuple(one for one, keep in zip(ids, kept, strict=True) if keep)] for ids, kept in rows]
            length = batch["input_ids"].shape[1]
            # Ones where there is padding: zeros would be normalised to NaN before they are masked.
            return torch.stack([torch.cat([one, one.new_ones(length - len(one), one.shape[1])]) for one in found])

        scores = bert_score(
            preds=[candidate for candidate, _ in pairs],
            target=[reference for _, reference in pairs],
            model=self.encoder.model,
            user_tokenizer=self.encoder.tokenizer,
            user_forward_fn=look_up,
            device=str(self.device),
            max_length=max(len(ids) for ids in states),
            truncation=True,
        )
        return torch.atleast_1d(torch.as_tensor(scores["recall"])).tolist()
