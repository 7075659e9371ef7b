"""Texts with labels in CSV, TSV and JSON files, checked row by row before any work."""

import csv
import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import TyingError, nearest
from .text import read_text

_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_FORMS = "a .csv, .tsv, .json or .jsonl file"


@dataclass(frozen=True)
class LabelledTexts:
    """The rows of a file.

    Args:
        name: the file, for messages.
        texts: text of each row.
        labels: labels of each row: one, or any number of them with `several`. Empty if labels were not asked for.
        several: whether a text may have any number of labels.
    """

    name: str
    texts: list[str]
    labels: list[tuple[str, ...]]
    several: bool = False

    def class_ids(self, classes: Sequence[str]) -> list[list[int]]:
        """The numbers of each row's labels.

        Args:
            classes: all classes, in the order of their numbers.

        Raises:
            TyingError: if a label is not among the classes.
        """
        number = {label: i for i, label in enumerate(classes)}
        for row, labels in enumerate(self.labels, 1):
            for label in labels:
                if label not in number:
                    known = ", ".join(map(repr, classes[:10])) + (", ..." if len(classes) > 10 else "")
                    raise TyingError(
                        f"{self.name}, row {row}: the label {label!r} is not in the training file"
                        f"{nearest(label, classes)}. Its labels are {known}. Take the row out, or give training texts "
                        "with this label."
                    )
        return [[number[label] for label in labels] for labels in self.labels]


def read_labelled_texts(
    file: str | Path, text_column: str = "text", label_column: str | None = "label", separator: str | None = None
) -> LabelledTexts:
    """Read texts and their labels.

    Args:
        file: UTF-8 file. `.csv` and `.tsv` have a line of column names; `.jsonl` has an object on each line, and
            `.json` the same or one list of objects. Fields of a `.tsv` may be quoted or not.
        text_column: name of the text's column. Default `"text"`.
        label_column: name of the label's column. Default `"label"`; `None` for texts without labels.
        separator: text between the labels of a row, for texts with any number of labels (also none). A list of labels
            in JSON needs no separator. Default: one label for each text.

    Raises:
        TyingError: if the file cannot be read, a column is missing, or a row has no text or no label (NaN included).
    """
    path = Path(file)
    rows = read_rows(path)
    if not rows:
        raise TyingError(f"{str(path)!r} has no rows: expected texts.")
    flags = {text_column: "--text_column"} | ({label_column: "--label_column"} if label_column is not None else {})
    for column, flag in flags.items():
        if not any(column in row for row in rows):
            names = ", ".join(map(repr, dict.fromkeys(name for row in rows for name in row)))
            raise TyingError(f"{str(path)!r} has no column {column!r}; it has {names}. Name one with {flag}.")
    texts, labels = [], []
    for number, row in enumerate(rows, 1):
        text = row.get(text_column)
        if not isinstance(text, str) or not text.strip():
            raise TyingError(
                f"{str(path)!r}, row {number}: the text is {text!r}, expected some words in column {text_column!r}. "
                "Take the row out."
            )
        texts.append(text)
        if label_column is not None:
            labels.append(_labels(row.get(label_column), separator, f"{str(path)!r}, row {number}"))
    lists = sum(isinstance(row.get(label_column), list) for row in rows)
    if separator is None and 0 < lists < len(rows):
        raise TyingError(f"{str(path)!r} has lists of labels in some rows only: expected lists in all, [] for none.")
    return LabelledTexts(str(path), texts, labels, several=separator is not None or lists > 0)


def classes_of(train: LabelledTexts) -> list[str]:
    """The classes of the training texts, in the order of their names, or of their numbers if all are numbers.

    Raises:
        TyingError: if there are fewer than two.
    """
    classes = {label for labels in train.labels for label in labels}
    if len(classes) < (1 if train.several else 2):
        found = ", ".join(map(repr, sorted(classes))) or "none"
        raise TyingError(
            f"{train.name} has texts of one class only ({found}): expected two classes at least. Is another column "
            "meant? Name it with --label_column."
        )
    numbers = all(label.removeprefix("-").isdecimal() for label in classes)
    return sorted(classes, key=lambda label: (int(label), label) if numbers else label)


def _labels(found: Any, separator: str | None, where: str) -> tuple[str, ...]:
    if isinstance(found, list):
        return tuple(label for one in found for label in _labels(one, None, where))
    if separator is not None and isinstance(found, str):
        return tuple(dict.fromkeys(part.strip() for part in found.split(separator) if part.strip()))
    if isinstance(found, float) and found.is_integer():
        found = int(found)
    missing = found is None or (isinstance(found, float) and math.isnan(found))
    label = "" if missing else str(found).strip()
    if not label or label.lower() in ("nan", "none", "null"):
        raise TyingError(
            f"{where}: the label is {found!r}, expected a class. Take the row out or give it as a text without label; "
            "if it is a class, give it another name."
        )
    return (label,)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read the rows of a file, by its suffix, as `read_labelled_texts` does. Values of `.csv` and `.tsv` are text.

    Raises:
        TyingError: if the file cannot be read, or a row does not have the columns of the first line.
    """
    suffix = path.suffix.lower()
    if suffix not in (*_DELIMITERS, ".json", ".jsonl"):
        raise TyingError(f"{str(path)!r} ends in {path.suffix or 'no suffix'!r}: expected {_FORMS}.")
    text = read_text(path)
    return _objects(path, text) if suffix in (".json", ".jsonl") else _table(path, text, _DELIMITERS[suffix])


def _objects(path: Path, text: str) -> list[dict[str, Any]]:
    try:
        whole = json.loads(text) if text.lstrip().startswith("[") else None
        rows = [json.loads(line) for line in text.split("\n") if line.strip()] if whole is None else whole
    except ValueError as error:
        raise TyingError(f"{str(path)!r} is not JSON: {error}. Expected an object on each line.") from None
    if wrong := next((row for row in rows if not isinstance(row, dict)), None):
        raise TyingError(f"{str(path)!r} has a {type(wrong).__name__} as a row: expected objects with columns.")
    return rows


def _table(path: Path, text: str, delimiter: str) -> list[dict[str, Any]]:
    # In files of tab-separated values a quotation mark is mostly a part of the text.
    forms = [csv.QUOTE_NONE, csv.QUOTE_MINIMAL] if delimiter == "\t" else [csv.QUOTE_MINIMAL]
    try:
        for quoting in forms:
            # Not `splitlines`: a text may have other ends of a line, such as U+2028, inside.
            lines = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, quoting=quoting)
            header, *rows = [row for row in lines if row]
            wrong = next((i for i, row in enumerate(rows, 1) if len(row) != len(header)), None)
            if wrong is None:
                return [dict(zip(header, row, strict=True)) for row in rows]
    except csv.Error as error:
        raise TyingError(
            f"{str(path)!r} cannot be read: {error}. A text of more than {csv.field_size_limit():,} characters needs "
            "a .jsonl file."
        ) from None
    raise TyingError(
        f"{str(path)!r}, row {wrong}: {len(rows[wrong - 1])} columns, expected the {len(header)} of the first line "
        f"({', '.join(map(repr, header))}). Quote texts that contain {delimiter!r}."
    )
