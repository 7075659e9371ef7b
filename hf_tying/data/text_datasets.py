"""Text in files, on the Hub or in folders as `datasets.Dataset`: checked before any work, and cut into blocks."""

import codecs
import csv
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import TyingError
from .text import joined_blocks, refuse_encoding

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset
    from transformers import PreTrainedTokenizerBase

#: How `datasets` reads a file, by its suffix.
_FORMS = {".txt": "text", ".text": "text", ".json": "json", ".jsonl": "json", ".csv": "csv"}
_PIECE = 1 << 20


@dataclass(frozen=True)
class TextSplit:
    """The rows of a split, and the column of their text.

    Args:
        name: name of the split, `"train"` or `"validation"`.
        rows: dataset of the split.
        column: column of the text.
        by_line: whether the rows are the lines of one document. Default `False`: each row is a document.
    """

    name: str
    rows: "Dataset | IterableDataset"
    column: str
    by_line: bool = False

    def texts(self) -> Iterator[str]:
        """The text of each row, read as it is asked for."""
        for number, row in enumerate(self.rows):
            yield self._checked(row[self.column], number)

    def _checked(self, text: Any, number: int) -> str:
        if not isinstance(text, str):
            raise TyingError(
                f"The {self.name} text has {text!r} in column {self.column!r} of row {number}: expected text. Take "
                "the row out, or choose another column with --text_column."
            )
        return text


def read_text_file(name: str, file: str | Path, column: str = "text", streaming: bool = False) -> TextSplit:
    """Read a split from one file: text, JSON lines or CSV by its suffix; or from a folder that `save_to_disk` wrote.

    Args:
        name: name of the split, `"train"` or `"validation"`.
        file: file with UTF-8 text in `.txt`, `.json`, `.jsonl` or `.csv`.
        column: column of the text in JSON and CSV. Default `"text"`.
        streaming: whether to read while training, for text larger than memory and disk cache. Default `False`.

    Raises:
        TyingError: if the file is missing, empty, not UTF-8, of another suffix, or without the column.
    """
    from datasets import load_dataset

    path = Path(file)
    if path.is_dir():
        splits = read_text_dataset(str(path), None, column, streaming)
        found = splits.get(name) or (splits["train"] if [*splits] == ["train"] else None)
        if found is None:
            raise TyingError(f"The folder {str(path)!r} has no split {name!r}; it has {', '.join(splits)}.")
        return replace(found, name=name)
    if not path.is_file():
        raise TyingError(f"There is no file {str(path)!r}. Expected text in a .txt, .json, .jsonl or .csv file.")
    form = _FORMS.get(path.suffix.lower())
    if form is None:
        raise TyingError(
            f"{str(path)!r} ends in {path.suffix or 'no suffix'!r}: expected .txt, .json, .jsonl or .csv. Rename it "
            "by what it contains."
        )
    _check_text(path)
    if form != "text":
        _check_column(_first_columns(path, form), column, repr(str(path)))
    options = {"keep_linebreaks": True} if form == "text" else {}
    try:
        rows = load_dataset(form, data_files={name: str(path)}, split=name, streaming=streaming, **options)
    except Exception as error:  # datasets, pyarrow and pandas each have their own
        raise _unreadable(path, error) from error
    column = "text" if form == "text" else column
    return _split(name, rows, column, repr(str(path)), by_line=form == "text")


def read_text_dataset(
    name_or_folder: str, config_name: str | None = None, column: str = "text", streaming: bool = False
) -> dict[str, TextSplit]:
    """Read the splits of a dataset on the Hub, or of a folder that `save_to_disk` wrote. Each row is a document.

    Args:
        name_or_folder: id of the dataset, or the folder.
        config_name: configuration of the dataset. Default: none.
        column: column of the text. Default `"text"`.
        streaming: whether to read while training, as for `read_text_file`. Default `False`.

    Raises:
        TyingError: if the dataset cannot be loaded, or does not have the column.
    """
    from datasets import DatasetDict, load_dataset, load_from_disk

    folder = Path(name_or_folder)
    saved = any((folder / file).is_file() for file in ("dataset_dict.json", "state.json"))
    try:
        if saved:
            data = load_from_disk(name_or_folder)
            data = dict(data) if isinstance(data, DatasetDict) else {"train": data}
            data = {name: rows.to_iterable_dataset() if streaming else rows for name, rows in data.items()}
        else:
            data = load_dataset(name_or_folder, config_name, streaming=streaming)
    except Exception as error:  # as above, and those of the Hub
        raise TyingError(f"The dataset {name_or_folder!r} cannot be loaded: {_reason(error)}.") from error
    return {name: _split(name, rows, column, f"{name_or_folder!r} ({name})") for name, rows in data.items()}


@contextmanager
def naming_unreadable_rows(*files: str | Path | None) -> Iterator[None]:
    """Turn what datasets says about a row that it cannot read, also late in a stream, into one line, a `TyingError`.

    Args:
        *files: files that are read meanwhile. The first bad line of a file of JSON lines is named.
    """
    import pandas
    import pyarrow
    from datasets.exceptions import DatasetGenerationError

    try:
        yield
    except (pyarrow.ArrowException, pandas.errors.ParserError, DatasetGenerationError) as error:
        paths = [Path(file) for file in files if file and Path(file).is_file()]
        bad = [path for path in paths if _first_bad_line(path)][:1] or paths
        if len(bad) == 1:
            raise _unreadable(bad[0], error) from error
        where = " or ".join(repr(str(path)) for path in bad) or "The text"
        raise TyingError(f"{where} cannot be read: {_reason(error)}.") from error


def hold_out(split: TextSplit, percentage: float) -> tuple[TextSplit, TextSplit]:
    """Training and validation text: the last `percentage` of the rows are held out.

    Raises:
        TyingError: for a percentage that leaves one of them without a row, and for a stream, whose end is not known.
    """
    if not hasattr(split.rows, "__len__"):
        raise TyingError("A streamed text has no known end to hold out: give --validation_file.")
    total = len(split.rows)
    held_out = round(total * percentage / 100)
    if not 0 < held_out < total:
        raise TyingError(
            f"{percentage}% of the {total} rows of training text are {held_out}: expected some to train on and some "
            "to validate on. Give --validation_file, or another --validation_split_percentage."
        )
    train = split.rows.select(range(total - held_out))
    validation = split.rows.select(range(total - held_out, total))
    return replace(split, rows=train), replace(split, name="validation", rows=validation)


def token_blocks(
    split: TextSplit, tokenizer: "PreTrainedTokenizerBase", block_size: int, processes: int | None = None
) -> "Dataset | IterableDataset":
    """Tokenize a split, close each document with the end-of-text token, join all, and cut into blocks.

    Args:
        split: split with the text.
        tokenizer: tokenizer whose end token closes a document, unless it does so itself. Without an end token,
            documents are not closed.
        block_size: number of tokens in a block. Less than one block in a thousand rows is dropped.
        processes: number of processes that tokenize. It has no effect on a stream. Default: this process.

    Returns:
        Rows of `input_ids` and `labels`, both of `block_size` tokens and equal; the model shifts them.

    Raises:
        TyingError: for a text that is shorter than one block, and for a row that has no text.
    """
    end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
    rows, column, by_line = split.rows, split.column, split.by_line
    if by_line and end is not None:
        rows = _with_last_row(rows, column, tokenizer.convert_ids_to_tokens(end))

    def cut(batch: dict[str, list], numbers: list[int]) -> dict[str, list]:
        texts = [split._checked(text, number) for text, number in zip(batch[column], numbers, strict=True)]
        encoded = tokenizer(texts, add_special_tokens=not by_line, return_attention_mask=False, verbose=False)
        blocks = joined_blocks(encoded["input_ids"], None if by_line else end, block_size)
        return {"input_ids": blocks, "labels": blocks}

    stream = not hasattr(rows, "__len__")
    options = {} if stream else {"num_proc": processes, "desc": f"Blocks of {block_size}"}
    blocks = rows.map(cut, with_indices=True, batched=True, remove_columns=_columns(rows), **options)
    if next(iter(blocks), None) is None:
        raise TyingError(
            f"The {split.name} text is shorter than one block of {block_size} tokens: give more text, or a smaller "
            "--block_size."
        )
    return blocks


def _with_last_row(rows: "Dataset | IterableDataset", column: str, text: str) -> "Dataset | IterableDataset":
    from datasets import Dataset, concatenate_datasets

    last = Dataset.from_dict({column: [text]})
    return concatenate_datasets([rows, last if hasattr(rows, "__len__") else last.to_iterable_dataset()])


def _split(name: str, rows: Any, column: str, where: str, by_line: bool = False) -> TextSplit:
    if next(iter(rows), None) is None:
        raise TyingError(f"{where} has no rows: expected text.")
    _check_column(_columns(rows), column, where)
    feature = (rows.features or {}).get(column)
    if feature is not None and getattr(feature, "dtype", None) not in ("string", "large_string", "null"):
        held = getattr(feature, "dtype", None) or "values of several types"
        raise TyingError(f"Column {column!r} of {where} holds {held}: expected text. See --text_column.")
    return TextSplit(name, rows, column, by_line)


def _columns(rows: "Dataset | IterableDataset") -> list[str]:
    return rows.column_names or [*next(iter(rows))]


def _check_column(columns: Iterable[str] | None, column: str, where: str) -> None:
    if columns is not None and column not in (columns := list(columns)):
        names = ", ".join(map(repr, columns)) or "none"
        raise TyingError(f"{where} has no column {column!r}; it has {names}. Name one with --text_column.")


def _first_columns(path: Path, form: str) -> list[str] | None:
    """The columns that a file begins with; `None` where only the whole of it would tell (JSON over several lines)."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        if form == "csv":
            return next(csv.reader(file), None)
        line = next((line for line in file if line.strip()), "")
    try:
        row = json.loads(line)
    except ValueError as error:
        if path.suffix == ".jsonl":
            raise TyingError(f"The first line of {str(path)!r} is not JSON: {error}. Expected a row a line.") from None
        return None
    if isinstance(row, dict):
        return list(row)
    if path.suffix == ".jsonl":
        raise TyingError(f"The first line of {str(path)!r} is {type(row).__name__}: expected an object on each line.")
    return None


def _unreadable(path: Path, error: Exception) -> TyingError:
    form = _FORMS[path.suffix.lower()]
    return TyingError(f"{str(path)!r} cannot be read as {form}: {_first_bad_line(path) or _reason(error)}.")


def _first_bad_line(path: Path) -> str | None:
    """What is wrong with the first line that is not JSON; `None` where all are, or a row has several lines."""
    if _FORMS[path.suffix.lower()] != "json":
        return None
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            try:
                json.loads(line.strip() or "{}")
            except ValueError as error:
                return None if number == 1 else f"line {number:,} is not JSON: {error}"
    return None


def _check_text(path: Path) -> None:
    """Read a file once by pieces: it is UTF-8, and has more than spaces."""
    decoder, start, blank, ended = codecs.getincrementaldecoder("utf-8-sig")(), 0, True, False
    try:
        with path.open("rb") as file:
            while not ended:
                piece = file.read(_PIECE)
                ended, pending = not piece, len(decoder.getstate()[0])
                blank = not decoder.decode(piece, final=ended).strip() and blank
                start += len(piece)
    except UnicodeDecodeError as error:
        refuse_encoding(path, start - pending + error.start, error)
    except OSError as error:
        raise TyingError(f"{str(path)!r} cannot be read: {error.strerror}.") from None
    if blank:
        raise TyingError(f"{str(path)!r} is empty. Give UTF-8 text files.")


def _reason(error: BaseException) -> str:
    return " ".join(str(error.__cause__ or error).split()).rstrip(".")
