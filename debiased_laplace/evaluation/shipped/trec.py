"""Questions of TREC and a Transformer, trained in half a minute. Inputs are numbers of words ``[N, 24]``, 0: padding.

The folder of the data, or ``trec`` in it, holds ``TREC.train.all`` and ``TREC.test.all`` (a line is a label and the
words of a question; Li and Roth, COLING 2002). Headlines of AG News, ``ag_news/test.csv``, are used where they are.
"""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Callable, Iterable
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from debiased_laplace.evaluation.shipped.common import (
    CPU,
    Batches,
    Loader,
    existing,
    fingerprint,
    initialised,
    kept,
    one_thread,
    stamp,
    train,
)

NAME = "TREC, Transformer"
DESCRIPTION = (
    "TREC, short questions of six kinds, and a Transformer: embeddings of words and positions, two encoder layers of "
    "width 32, and the mean over the words. It is trained with AdamW and a cosine schedule, with three tenths of the "
    "words made unknown. The official test questions are those to test on; validation questions are drawn from the "
    "training file, the same for every seed; a question that is there twice is taken once."
)
LIKELIHOOD = "classification"
CLASSES = ("description", "entity", "abbreviation", "human", "number", "location")
BUDGET = 128
SEEDS = 5
SEEDS_NOTE = (
    "A seed decides the initialisation of the network, the order of its training data and their unknown words, the "
    "data drawn for the fits, and the shifts. Training, validation and test questions are the same for every seed, so "
    "a standard error speaks about trainings, not about other questions."
)
#: Shares of words by severity.
SHARES = (0.1, 0.2, 0.3, 0.4, 0.5)
NOTES = {
    "test": "The official test questions as they are.",
    "missing words": "Each word is left out with probability 0.1 to 0.5; one at least stays.",
    "word order": "Each word is drawn with probability 0.1 to 0.5, and the drawn ones change places at random.",
    "typos": "Each word of two letters and more has two neighbouring ones swapped with probability 0.1 to 0.5.",
    "AG News": "No questions: headlines of news.",
}
#: Numbers that stand for no word, and for a word that fewer than two training questions have.
PADDING, UNKNOWN = 0, 1
#: Words of a question; others are cut off. Of a hundred questions 99 have at most 22.
LENGTH = 24
N_VALIDATION = 500
QUICK_TRAIN, QUICK_TEST = 400, 100
EPOCHS, QUICK_EPOCHS = 20, 6
LEARNING_RATE, WEIGHT_DECAY, TRAIN_BATCH, MADE_UNKNOWN = 4e-3, 1e-1, 64, 0.3
MEMBERS = 5

Text = tuple[str, ...]
Labelled = list[tuple[Text, int]]


class QuestionClassifier(nn.Module):
    """A Transformer encoder (Vaswani et al., arXiv 1706.03762) and the mean over the words that are there.

    Args:
        n_words: Numbers of words, with those of padding and of unknown ones.
        width: Of every word.
        depth: Layers.
        heads: Of the attention.
        length: Words of the longest text.
        n_classes: Number of outputs.
    """

    def __init__(
        self, n_words: int, width: int = 32, depth: int = 2, heads: int = 4, length: int = LENGTH,
        n_classes: int = len(CLASSES),
    ) -> None:  # fmt: skip
        super().__init__()
        self.words = nn.Embedding(n_words, width, padding_idx=PADDING)
        self.positions = nn.Embedding(length, width)
        layer = nn.TransformerEncoderLayer(width, heads, 2 * width, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.head = nn.Linear(width, n_classes)

    def forward(self, numbers: Tensor) -> Tensor:
        """Outputs ``[N, C]`` for numbers of words ``[N, T]``, at least one of each."""
        empty = numbers == PADDING
        features = self.words(numbers) + self.positions(torch.arange(numbers.shape[1], device=numbers.device))
        features = self.encoder(features, src_key_padding_mask=empty).masked_fill(empty[..., None], 0.0)
        return self.head(features.sum(1) / (~empty).sum(1, keepdim=True))


class Questions(NamedTuple):
    """Texts and labels of the three parts, and the numbers of words."""

    train: Labelled
    validation: Labelled
    test: Labelled
    numbers: dict[str, int]

    def encoded(self, texts: Iterable[Text]) -> Tensor:
        """Numbers ``[N, 24]`` of the words."""
        rows = [[self.numbers.get(word, UNKNOWN) for word in text[:LENGTH]] or [UNKNOWN] for text in texts]
        return torch.tensor([row + [PADDING] * (LENGTH - len(row)) for row in rows])

    def tensors(self, part: Labelled, shift: Callable[[Text], Text] = lambda text: text) -> tuple[Tensor, Tensor]:
        """Numbers of words ``[N, 24]`` and labels ``[N]``."""
        return self.encoded(shift(text) for text, _ in part), torch.tensor([label for _, label in part])


def questions(data_dir: Path | None, quick: bool = False) -> Questions:
    """The three parts; a quick run has fewer data in each.

    Raises:
        FileNotFoundError: If the files are not there.
        ValueError: If a file has something else in it.
    """
    names = ("TREC.train.all", "TREC.test.all")
    files = [existing(data_dir, f"trec/{name}", name) for name in names]
    if (train := files[0]) is None or (test := files[1]) is None:
        raise FileNotFoundError(
            f"Expected {' and '.join(names)}, questions of TREC, in the folder of --data-dir or in trec there, got "
            f"none in {data_dir}. Name the folder with --data-dir."
        )
    return _questions(train, test, quick, stamp(train, test))


@lru_cache(maxsize=2)
def _questions(train: Path, test: Path, quick: bool, stamp: tuple[Any, ...]) -> Questions:
    held = _read(test)
    seen = {text for text, _ in held}
    rest = [(text, label) for text, label in _read(train) if text not in seen]
    order = torch.randperm(len(rest), generator=torch.Generator().manual_seed(0)).tolist()
    mixed, n = [rest[i] for i in order], QUICK_TEST if quick else N_VALIDATION
    chosen = mixed[n : n + QUICK_TRAIN] if quick else mixed[n:]
    counts = Counter(word for text, _ in chosen for word in set(text))
    words = sorted(word for word, count in counts.items() if count > 1)
    numbers = {word: number for number, word in enumerate(words, start=UNKNOWN + 1)}
    return Questions(chosen, mixed[:n], held[:QUICK_TEST] if quick else held, numbers)


def _read(path: Path) -> Labelled:
    """Questions of a file in small letters, each once."""
    read: dict[Text, int] = {}
    for number, line in enumerate(path.read_text("latin-1").splitlines() or [""], start=1):
        label, *words = line.lower().split() or [""]
        if label not in map(str, range(len(CLASSES))) or not words:
            raise ValueError(
                f"Expected a label from 0 to {len(CLASSES) - 1} and a question in line {number} of {path}, got "
                f"{line[:40]!r}. Fetch the file again."
            )
        read.setdefault(tuple(words), int(label))
    return list(read.items())


def model(
    *, seed: int, cache: Path, data_dir: Path | None = None, quick: bool = False, device: torch.device = CPU
) -> nn.Module:
    """The network of a seed."""
    read = questions(data_dir, quick)
    inputs, targets = read.tensors(read.train)
    epochs = QUICK_EPOCHS if quick else EPOCHS
    settings = {
        "seed": seed, "epochs": epochs, "rate": LEARNING_RATE, "decay": WEIGHT_DECAY, "batch": TRAIN_BATCH,
        "unknown": MADE_UNKNOWN, "data": fingerprint(inputs, targets),
    }  # fmt: skip

    def network() -> nn.Module:
        return QuestionClassifier(UNKNOWN + 1 + len(read.numbers))

    def make() -> nn.Module:
        model = initialised(network, seed).to(device)
        optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * -(-len(inputs) // TRAIN_BATCH))
        generator = torch.Generator().manual_seed(seed)
        copies = inputs.repeat(epochs, 1)  # with other unknown words in every epoch
        unknown = (torch.rand(copies.shape, generator=generator) < MADE_UNKNOWN) & (copies != PADDING)
        copies = copies.masked_fill(unknown, UNKNOWN)
        order = [epoch * len(inputs) + torch.randperm(len(inputs), generator=generator) for epoch in range(epochs)]
        batches = (batch for indices in order for batch in indices.to(device).split(TRAIN_BATCH))
        with one_thread():
            labels = targets.repeat(epochs).to(device)
            train(model, copies.to(device), labels, F.cross_entropy, batches, optimizer, schedule)
        return model

    return kept(cache, f"trec-{seed}", settings, network, make, device)


def ensemble(
    *, cache: Path, data_dir: Path | None = None, quick: bool = False, device: torch.device = CPU
) -> list[nn.Module]:
    """The networks of seeds 0 to 4, the same for every seed; one of these is a member of what it is compared with."""
    return [model(seed=member, cache=cache, data_dir=data_dir, quick=quick, device=device) for member in range(MEMBERS)]


def train_loader(*, data_dir: Path | None = None, quick: bool = False) -> Loader:
    """The training questions."""
    return _batches(data_dir, quick, lambda read: read.tensors(read.train))


def val_loader(*, data_dir: Path | None = None, quick: bool = False) -> Loader:
    """500 questions of the training file that the network was not trained on (100 if quick)."""
    return _batches(data_dir, quick, lambda read: read.tensors(read.validation))


def test_loader(*, data_dir: Path | None = None, quick: bool = False) -> Loader:
    """The 500 official test questions (100 if quick)."""
    return _batches(data_dir, quick, lambda read: read.tensors(read.test))


def shifted_loaders(*, seed: int, data_dir: Path | None = None, quick: bool = False) -> dict[str, dict[int, Loader]]:
    """The test questions under every shift, by severity."""

    def make(shift: Callable[[Text, float, np.random.Generator], Text], share: float, read: Questions) -> Any:
        generator = np.random.default_rng(seed)
        return read.tensors(read.test, lambda text: shift(text, share, generator))

    shifts = {"missing words": missing_words, "word order": word_order, "typos": typos}
    return {
        name: {
            severity: _batches(data_dir, quick, partial(make, shift, share))
            for severity, share in enumerate(SHARES, start=1)
        }
        for name, shift in shifts.items()
    }


def missing_words(text: Text, share: float, generator: np.random.Generator) -> Text:
    """A text of which each word is left out with a probability; one at least stays."""
    draws = generator.random(len(text))
    return tuple(word for word, draw in zip(text, draws, strict=True) if draw >= min(share, draws.max()))


def word_order(text: Text, share: float, generator: np.random.Generator) -> Text:
    """A text in which words drawn with a probability change places at random."""
    drawn = np.flatnonzero(generator.random(len(text)) < share)
    places = np.arange(len(text))
    places[drawn] = generator.permutation(drawn)
    return tuple(text[place] for place in places)


def typos(text: Text, share: float, generator: np.random.Generator) -> Text:
    """A text in which two neighbouring letters of a word are swapped with a probability."""

    def mistyped(word: str) -> str:
        wrong, first = generator.random() < share, int(generator.integers(max(1, len(word) - 1)))
        return word[:first] + word[first : first + 2][::-1] + word[first + 2 :] if wrong else word

    return tuple(mistyped(word) for word in text)


def ood_loaders(*, data_dir: Path | None = None, quick: bool = False) -> dict[str, Loader]:
    """Headlines of AG News, one for each test question, if they are there, with their kinds as targets."""
    file = existing(data_dir, "ag_news/test.csv")
    if file is None:
        return {}

    def make(read: Questions) -> tuple[Tensor, Tensor]:
        with file.open(newline="", encoding="utf-8") as lines:
            rows = [row for row, _ in zip(csv.reader(lines), read.test, strict=False)]
        return read.encoded(_tokens(row[1]) for row in rows), torch.tensor([int(row[0]) - 1 for row in rows])

    return {"AG News": _batches(data_dir, quick, make)}


def _tokens(headline: str) -> Text:
    """Words and signs apart, in small letters, as in TREC."""
    return tuple("".join(c if c.isalnum() else f" {c} " for c in headline.lower()).split())


def _batches(data_dir: Path | None, quick: bool, make: Callable[[Questions], tuple[Tensor, Tensor]]) -> Loader:
    questions(data_dir, quick)  # what is missing is said now, not when the loader is read
    return Batches(lambda: make(questions(data_dir, quick)))


def description(*, data_dir: Path | None = None, quick: bool = False) -> str:
    """What the data and the network are, with the sizes."""
    read, epochs = questions(data_dir, quick), QUICK_EPOCHS if quick else EPOCHS
    return (
        f"{DESCRIPTION} {len(read.train):,} questions with {len(read.numbers):,} words to train on for {epochs} "
        f"epochs, {len(read.validation)} for validation, {len(read.test)} to test on."
    )
