"""BERTScore recall (Zhang et al. 2020, arXiv 1904.09675): how much of a reference sentence a candidate says.

For each token of the reference, take the largest cosine with a token of the candidate, in a layer of a text encoder.
Recall is the mean of these cosines, without special tokens and without rescaling. (In the `bert_score` package a token
of the reference may also match a special token of the candidate, so its recall can be higher.) torchmetrics does the
matching. The encoder runs here, once for each distinct sentence.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rewards.networks.pretrained import ModelHolder, load_network, load_processor, require
from rewards.registry import check_number

DEFAULT_ENCODER = "microsoft/deberta-xlarge-mnli"
"""The encoder of the DDPO paper. The download is about 3 GB."""

LAYERS: dict[str, int] = {DEFAULT_ENCODER: 40}
"""The layer that agrees best with people, from the table of the `bert_score` package. Other models: the last one."""

_PAIRS = 2
"""Pairs per call of torchmetrics. It sorts candidates and references separately by length, and then applies the sorting
permutation again where its inverse is needed (Lightning-AI/torchmetrics issue 2728, in 1.9). Larger calls therefore
compare sentences of different pairs. A permutation of two elements is its own inverse."""


class TextEncoder:
    """A transformers encoder and its tokenizer, as `load_cached` holds them."""

    def __init__(self, source: str, device: torch.device, dtype: torch.dtype) -> None:
        """Load both: safetensors, or PyTorch's format, which transformers reads with `weights_only=True`."""
        from transformers import AutoModel, AutoTokenizer

        self.model = load_network(AutoModel, source, dtype).to(device).eval().requires_grad_(False)
        self.tokenizer = load_processor(AutoTokenizer, source)
        positions = getattr(self.model.config, "max_position_embeddings", 512)
        # The length of DeBERTa's tokenizer is 1e30, which overflows in its own truncation.
        self.tokenizer.model_max_length = min(self.tokenizer.model_max_length, positions, 512)

    def hidden_states(self, sentences: Sequence[str], layer: int) -> dict[tuple[int, ...], Tensor]:
        """Return the layer's states of each sentence, (tokens, dimensions) float32 on the CPU, by token ids."""
        tokens = self.tokenizer(list(sentences), padding=True, truncation=True, return_tensors="pt")
        tokens = tokens.to(self.model.device)
        ids, mask = tokens["input_ids"], tokens["attention_mask"]
        with torch.inference_mode():
            states = self.model(ids, attention_mask=mask, output_hidden_states=True).hidden_states[layer]
        return {
            tuple(row[kept.bool()].tolist()): state[kept.bool()].float().cpu()
            for row, kept, state in zip(ids, mask, states, strict=True)
        }


class BertScoreRecall(ModelHolder[TextEncoder]):
    """Scores candidates against references by BERTScore recall, without rescaling by a baseline."""

    purpose = "text_encoder"
    option = "text_model"

    def __init__(
        self,
        model: str | Path = DEFAULT_ENCODER,
        layer: int | None = None,
        *,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "float32",
        batch_size: int = 64,
    ) -> None:
        """Check the arguments. Nothing is loaded yet.

        Args:
            model: Folder or Hub id of a text encoder, or `"tiny"` for the bundled one, which has a small vocabulary.
            layer: Index into the hidden states, where 0 is the embeddings; None: the layer in `LAYERS`, or the last.
            device: The device of the encoder.
            dtype: Dtype of its weights.
            batch_size: Sentences per call of the encoder.

        Raises:
            ValueError: An argument is not valid.
            ImportError: torchmetrics is not installed.
        """
        if layer is not None:
            check_number("layer", layer, -1000, 1000)
        require("torchmetrics", "BERTScore")
        super().__init__(TextEncoder, model, device=device, dtype=dtype, batch_size=batch_size)
        self.layer = LAYERS.get(str(model), -1) if layer is None else layer

    def load(self) -> None:
        """Load the text encoder now.

        Raises:
            ValueError: The encoder has no layer `layer`.
        """
        layers = self.loaded.model.config.num_hidden_layers
        if not -layers - 1 <= self.layer <= layers:
            raise ValueError(f"layer must be at most {layers} in {self.source!r}; got {self.layer}")

    def __call__(self, candidates: Sequence[str], references: Sequence[str]) -> NDArray[np.float64]:
        """Score each candidate against the reference of the same index.

        Returns:
            Recall, (pairs,), at most 1; NaN where the candidate or the reference has only special tokens.

        Raises:
            ValueError: The numbers of candidates and references differ.
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
        """Whether each sentence has tokens that are not special."""
        return all(self.loaded.tokenizer(sentence, add_special_tokens=False)["input_ids"] for sentence in sentences)

    def _hidden_states(self, sentences: list[str]) -> dict[tuple[int, ...], Tensor]:
        states: dict[tuple[int, ...], Tensor] = {}
        for start in range(0, len(sentences), self.batch_size):
            states.update(self.loaded.hidden_states(sentences[start : start + self.batch_size], self.layer))
        return states

    def _match(self, pairs: Sequence[tuple[str, str]], states: Mapping[tuple[int, ...], Tensor]) -> list[float]:
        from torchmetrics.functional.text.bert import bert_score

        def look_up(_: Any, batch: Mapping[str, Tensor]) -> Tensor:
            rows = zip(batch["input_ids"].tolist(), batch["attention_mask"].bool().tolist(), strict=True)
            found = [states[tuple(one for one, keep in zip(ids, kept, strict=True) if keep)] for ids, kept in rows]
            length = batch["input_ids"].shape[1]
            # Padding is filled with ones: zeros would be normalised to NaN before they are masked.
            return torch.stack([torch.cat([one, one.new_ones(length - len(one), one.shape[1])]) for one in found])

        encoder = torch.nn.Identity()  # the real one would be moved to the device, and `look_up` needs none
        vars(encoder)["config"] = SimpleNamespace(num_hidden_layers=0)  # without it torchmetrics warns
        scores = bert_score(
            preds=[candidate for candidate, _ in pairs],
            target=[reference for _, reference in pairs],
            model=encoder,
            user_tokenizer=self.loaded.tokenizer,
            user_forward_fn=look_up,
            device="cpu",  # where the states are
            max_length=max(len(ids) for ids in states),
            truncation=True,
        )
        return torch.atleast_1d(torch.as_tensor(scores["recall"])).tolist()
