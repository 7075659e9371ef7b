"""Text to train a language model on: documents, a split that does not leak, and blocks of token ids.

The demo's corpus is English that every CPython carries: the language reference (`pydoc_data.topics`, which
`help("for")` prints) and the docstrings of the standard library, some two megabytes of prose. It needs no network and
no licence to agree to. The docstrings are read from the source files with `ast`: no module is imported or run.
"""

import ast
import hashlib
import os
import re
import sysconfig
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from ..config import TyingError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

# Not the library itself: its tests, and what pip installs beside it.
_NOT_THE_LIBRARY = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "_bundled"}
_PARAGRAPH_BREAK = re.compile(r"\n[ \t]*\n\s*")


@dataclass(frozen=True)
class Document:
    """A text and the group it belongs to; documents of one group never part at the split."""

    group: str
    text: str


@dataclass(frozen=True)
class Corpus:
    """Training and validation documents with no paragraph in common.

    Args:
        name (`str`): what it is, for reports.
        train (`list[str]`): training documents.
        validation (`list[str]`): validation documents.
    """

    name: str
    train: list[str]
    validation: list[str]

    @property
    def fingerprint(self) -> str:
        """The first 16 hexadecimal digits of the SHA-256 of all documents: equal corpora, equal fingerprint."""
        digest = hashlib.sha256()
        for document in (*self.train, "", *self.validation):
            digest.update(document.encode() + b"\0")
        return digest.hexdigest()[:16]


def standard_library_corpus(validation_fraction: float = 0.05) -> Corpus:
    """The language reference and the standard library's docstrings, each paragraph once.

    A module and all that belongs to it (a package's files; `_pyio` with `io`) stand on one side of the split, and so
    does a topic of the reference. The sides are drawn by a hash of the group's name: the same on every machine with
    the same Python.

    Args:
        validation_fraction (`float`, default 0.05): the share of characters to hold out; what is held out is at most
            this much, and close to it.

    Raises:
        TyingError: if this Python was installed without the library's source files.
    """
    documents = _each_paragraph_once([*_language_reference(), *_docstrings()])
    size = sum(len(document.text) for document in documents)
    if size < 100_000:
        raise TyingError(
            f"The standard library of this Python has {size} characters of docstrings: expected over a million. Its "
            "source files seem not to be installed; give text of your own with --train_file."
        )
    held_out = _held_out_groups(documents, round(validation_fraction * size))
    return Corpus(
        name="Python's language reference and the standard library's docstrings",
        train=[document.text for document in documents if document.group not in held_out],
        validation=[document.text for document in documents if document.group in held_out],
    )


def corpus_from_files(paths: Sequence[str | Path], validation_fraction: float = 0.05) -> Corpus:
    """The user's own UTF-8 text files: the end of each file is held out, cut at a paragraph, line or word.

    Args:
        paths (`Sequence[str | Path]`): text files, each one document.
        validation_fraction (`float`, default 0.05): the share of each file's characters to hold out. A held-out
            paragraph that also stands in the training text is dropped.

    Raises:
        TyingError: for a file that is missing, unreadable, not UTF-8 or empty, or if nothing is left to validate on.
    """
    train, validation = [], []
    for path in paths:
        beginning, end = _cut(read_text(Path(path)), validation_fraction)
        train.append(beginning)
        validation.append(end)
    seen = {_normal(paragraph) for text in train for paragraph in _PARAGRAPH_BREAK.split(text)}
    validation = [text for text in (_unseen_paragraphs(text, seen) for text in validation) if text]
    if not validation:
        raise TyingError(
            f"Nothing is left to validate on: every paragraph in the last {validation_fraction:.0%} of "
            f"{_names(paths)} stands in the training text as well. Give more text, or text with less repetition."
        )
    return Corpus(name=_names(paths), train=train, validation=validation)


def blocks_for_language_modeling(
    texts: Iterable[str], tokenizer: "PreTrainedTokenizerBase", block_size: int
) -> "Dataset":
    """Join the documents, each closed by the end-of-text token, and cut them into blocks of equal length.

    Args:
        texts (`Iterable[str]`): documents.
        tokenizer: a transformers tokenizer with an end token.
        block_size (`int`): tokens in a block. What is left over at the end is dropped: less than one block.

    Returns:
        `datasets.Dataset` with `input_ids` and `labels`, both `(blocks, block_size)` and equal; the model shifts them.

    Raises:
        TyingError: if all the text together is shorter than one block.
    """
    from datasets import Dataset

    encoded = tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    tokens = [token for document in encoded for token in (*document, tokenizer.eos_token_id)]
    blocks = [tokens[i : i + block_size] for i in range(0, len(tokens) - block_size + 1, block_size)]
    if not blocks:
        raise TyingError(
            f"The text has {len(tokens)} tokens, less than one block of {block_size}. Give more text, or a smaller "
            "block."
        )
    return Dataset.from_dict({"input_ids": blocks, "labels": blocks})


def _language_reference() -> Iterable[Document]:
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield Document(group=f"reference/{name}", text=topics[name].strip())


def _docstrings() -> Iterable[Document]:
    root = Path(sysconfig.get_paths()["stdlib"])
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = sorted(set(subfolders) - _NOT_THE_LIBRARY)
        for file in sorted(file for file in files if file.endswith(".py")):
            path = Path(folder, file)
            text = "\n\n".join(_docstrings_of(path))
            if text:
                # `_pyio` repeats `io` in other words, `_pydecimal` `decimal`: they belong together.
                group = path.relative_to(root).parts[0].removesuffix(".py").lstrip("_").removeprefix("py")
                yield Document(group=f"library/{group}", text=text)


def _docstrings_of(path: Path) -> list[str]:
    """The docstrings of a file in the order of its lines; none if this Python cannot read it (a template, say)."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return []
    holders = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = sorted((n for n in ast.walk(tree) if isinstance(n, holders)), key=lambda node: getattr(node, "lineno", 0))
    return [docstring for docstring in map(ast.get_docstring, nodes) if docstring]


def _each_paragraph_once(documents: Iterable[Document]) -> list[Document]:
    """Docstrings are copied from class to class; a copy on each side of the split would flatter both models."""
    seen: set[str] = set()
    unique = []
    for document in documents:
        text = _unseen_paragraphs(document.text, seen, remember=True)
        if text:
            unique.append(Document(document.group, text))
    return unique


def _unseen_paragraphs(text: str, seen: set[str], remember: bool = False) -> str:
    kept = []
    for paragraph in _PARAGRAPH_BREAK.split(text):
        normal = _normal(paragraph)
        if normal and normal not in seen:
            kept.append(paragraph.rstrip())
            if remember:
                seen.add(normal)
    return "\n\n".join(kept)


def _normal(paragraph: str) -> str:
    return " ".join(paragraph.split()).casefold()


def _held_out_groups(documents: Iterable[Document], size: int) -> set[str]:
    """Groups of `size` characters in all at most, in the order of their names' hashes; one too big is passed over."""
    sizes: dict[str, int] = {}
    for document in documents:
        sizes[document.group] = sizes.get(document.group, 0) + len(document.text)
    held_out, total = set(), 0
    for group in sorted(sizes, key=lambda name: hashlib.sha256(name.encode()).digest()):
        if total + sizes[group] <= size:
            held_out.add(group)
            total += sizes[group]
    return held_out


def read_text(path: Path) -> str:
    """The whole text of a UTF-8 file.

    Raises:
        TyingError: for a file that is missing, unreadable, not UTF-8 or empty.
    """
    way_out = "Give UTF-8 text files."
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise TyingError(f"There is no file {str(path)!r}. {way_out}") from None
    except UnicodeDecodeError as error:
        refuse_encoding(path, error.start, error)
    except OSError as error:
        raise TyingError(f"{str(path)!r} cannot be read: {error.strerror}. {way_out}") from None
    if not text.strip():
        raise TyingError(f"{str(path)!r} is empty. {way_out}")
    return text


def refuse_encoding(path: Path, position: int, error: UnicodeDecodeError) -> NoReturn:
    """Raise `TyingError` for a file whose byte at `position` is not UTF-8."""
    raise TyingError(
        f"{str(path)!r} is not UTF-8: byte {position} is {error.object[error.start]:#04x}. Give UTF-8 text files. "
        "`iconv -f <its encoding> -t utf-8` converts."
    ) from None


def _cut(text: str, validation_fraction: float) -> tuple[str, str]:
    """Cut before the last `validation_fraction` of the characters, at the best break that is not far behind."""
    start = round(len(text) * (1 - validation_fraction))
    reach = (len(text) - start) // 2
    for breaks in (_PARAGRAPH_BREAK, re.compile(r"\n"), re.compile(r"\s")):
        found = breaks.search(text, start, start + reach)
        if found:
            start = found.end()
            break
    return text[:start].strip(), text[start:].strip()


def _names(paths: Sequence[str | Path]) -> str:
    names = [Path(path).name for path in paths]
    return ", ".join(names) if len(names) <= 3 else f"{names[0]} and {len(names) - 1} more files"
