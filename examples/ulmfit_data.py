"""The texts of `run_ulmfit.py`: read and checked whole, before any training."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from hf_tying import TyingError
from hf_tying.data import LabelledTexts, classes_of, read_labelled_texts
from hf_tying.data.text import read_text


@dataclass(frozen=True)
class Data:
    """All texts.

    Args:
        pretrain: documents of the first stage.
        splits: `train`, `validation` and, if there is one, `test`, as texts and the numbers of their labels.
        unlabeled: texts without labels.
        classes: names of the classes.
        several: whether a text may have any number of classes.
    """

    pretrain: list[str]
    splits: dict[str, tuple[list[str], list[list[int]]]]
    unlabeled: list[str]
    classes: list[str]
    several: bool

    def targets(self, split: str) -> torch.Tensor:
        """The classes of a split: (texts,), int64, or (texts, classes), 0 or 1."""
        _, numbers = self.splits[split]
        if not self.several:
            return torch.tensor([number for [number] in numbers])
        targets = torch.zeros(len(numbers), len(self.classes))
        for row, found in enumerate(numbers):
            targets[row, found] = 1
        return targets


def read_data(args: Any, seed: int) -> Data:
    """Read all files that the flags name.

    Raises:
        TyingError: if a file, a text or a label is not as it has to be.
    """
    columns = {"text_column": args.text_column, "label_column": args.label_column, "separator": args.label_separator}
    train = read_labelled_texts(args.train_file, **columns)
    classes = classes_of(train)
    files = {"validation": args.validation_file, "test": args.test_file}
    others = {name: read_labelled_texts(file, **columns) for name, file in files.items() if file}
    for other in others.values():
        if other.several != train.several:
            raise TyingError(f"{other.name} and {train.name}: expected lists of labels in both, or in none.")
    splits = {name: _numbered(split, classes) for name, split in {"train": train, **others}.items()}
    if "validation" not in splits:
        splits["train"], splits["validation"] = _held_out(*splits["train"], seed, train.name)
    splits = {name: splits[name] for name in ("train", "validation", "test") if name in splits}
    unlabeled = read_labelled_texts(args.unlabeled_file, args.text_column, None).texts if args.unlabeled_file else []
    pretrain = []
    if args.pretrain_file:
        pretrain = [line.strip() for line in read_text(Path(args.pretrain_file)).split("\n") if line.strip()]
    return Data(pretrain, splits, unlabeled, classes, train.several)


def pieces(texts: list[str], tokenizer: PreTrainedTokenizerBase, chunk: int, overlap: int) -> tuple[list, list[int]]:
    """Encode texts, whole or in overlapping pieces.

    Returns:
        The ids of each piece, and the number of its text.
    """
    if not chunk:
        return tokenizer(texts, return_attention_mask=False)["input_ids"], list(range(len(texts)))
    encoded = tokenizer(
        texts,
        truncation=True,
        max_length=chunk,
        stride=overlap,
        return_overflowing_tokens=True,
        return_attention_mask=False,
    )
    return encoded["input_ids"], encoded["overflow_to_sample_mapping"]


def _numbered(split: LabelledTexts, classes: list[str]) -> tuple[list[str], list[list[int]]]:
    return split.texts, split.class_ids(classes)


def _held_out(texts: list[str], numbers: list[list[int]], seed: int, name: str) -> tuple[tuple, tuple]:
    """A tenth of the texts, drawn by the seed, for validation; each class keeps a text to train on."""
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed)).tolist()
    needed = {next(row for row in order if label in numbers[row]) for found in numbers for label in found}
    out = [row for row in order if row not in needed][: max(1, len(texts) // 10)]
    if not out:
        raise TyingError(f"{name} has {len(texts)} texts, too few to hold some out: give --validation_file.")
    kept = sorted(set(order) - set(out))
    return tuple(([texts[row] for row in rows], [numbers[row] for row in rows]) for rows in (kept, sorted(out)))
