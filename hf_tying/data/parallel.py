"""Parallel text: sentence pairs from files, checked pair by pair, and as token ids to train a translation model on."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers.utils import logging

from ..config import TyingError
from .text import read_text
from .tokenizers import language_of

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

logger = logging.get_logger(__name__)

# Lines that a tokenizer gets at once: enough to keep it busy, few enough that the progress bar moves.
_BATCH = 1000


@dataclass(frozen=True)
class ParallelCorpus:
    """Sentence pairs: `source[i]` and `target[i]` say the same.

    Args:
        source (`list[str]`): sentences of the source side.
        target (`list[str]`, *optional*): sentences of the target side, as many; `None` for sentences to translate that
            have no references.
        source_language (`str`): code of the source language, such as `"en"`.
        target_language (`str`): code of the target language.

    Raises:
        TyingError: for sides of different lengths, no pairs at all, or a sentence that is only spaces.
    """

    source: list[str]
    target: list[str] | None
    source_language: str
    target_language: str

    def __post_init__(self) -> None:
        if self.target is not None and len(self.source) != len(self.target):
            raise TyingError(
                f"{len(self.source)} source and {len(self.target)} target sentences are no parallel text: expected as "
                "many on each side."
            )
        if not self.source:
            raise TyingError("The parallel text has no sentences: expected at least one pair.")
        for side, sentences in (("source", self.source), ("target", self.target or [])):
            for i, sentence in enumerate(sentences):
                if not sentence.strip():
                    raise TyingError(f"Sentence {i} of the {side} side is only spaces: leave the pair out.")

    def __len__(self) -> int:
        return len(self.source)

    @property
    def fingerprint(self) -> str:
        """The first 16 hexadecimal digits of the SHA-256 of all pairs: equal corpora, equal fingerprint."""
        digest = hashlib.sha256()
        for sentence in (self.source_language, *self.source, "", self.target_language, *(self.target or [])):
            digest.update(sentence.encode() + b"\0")
        return digest.hexdigest()[:16]


def read_parallel_text(
    source_file: str | Path,
    target_file: str | Path | None,
    source_language: str | None = None,
    target_language: str | None = None,
) -> ParallelCorpus:
    """Read two UTF-8 text files, one sentence per line: line i of one translates line i of the other.

    Only a line feed ends a line (a carriage return before it is dropped): the other characters that Unicode counts as
    line ends occur inside sentences, and a cut there would shift one side against the other. Spaces around a sentence
    are dropped.

    Args:
        source_file (`str | Path`): the source side.
        target_file (`str | Path`): the target side; `None` for sentences without references.
        source_language (`str`, *optional*): its code; by default the file's suffix, as in `train.en`.
        target_language (`str`, *optional*): the same for the target side.

    Raises:
        TyingError: for a file that is missing, unreadable, not UTF-8 or empty, files of different lengths, a line that
            is only spaces, or a language that is not given and that the suffix does not tell.
    """
    source_file = Path(source_file)
    source_language = source_language or _language(source_file, "source")
    if target_file is None:
        return ParallelCorpus(_lines(source_file), None, source_language, target_language or "")
    target_file = Path(target_file)
    target_language = target_language or _language(target_file, "target")
    source, target = _lines(source_file), _lines(target_file)
    if len(source) != len(target):
        shorter = source_file if len(source) < len(target) else target_file
        raise TyingError(
            f"{str(source_file)!r} has {len(source)} lines and {str(target_file)!r} has {len(target)}: expected as "
            f"many, one sentence per line. {str(shorter)!r} ends after line {min(len(source), len(target))}."
        )
    return ParallelCorpus(source, target, source_language, target_language)


def read_translation_json(
    file: str | Path, source_language: str, target_language: str, needs_target: bool = True
) -> ParallelCorpus:
    """Read JSON lines such as `{"translation": {"en": "Two dogs.", "de": "Zwei Hunde."}}`, the form of transformers.

    Args:
        file (`str | Path`): a UTF-8 file with one such object on each line; further languages and keys are left out.
        source_language (`str`): the key of the source side.
        target_language (`str`): the key of the target side.
        needs_target (`bool`, default `True`): refuse a file without the target language. Otherwise one in which no
            line has it gives sentences without references.

    Raises:
        TyingError: for a file that is missing, unreadable, not UTF-8 or empty, a line that is no such object, lacks a
            language, or has a sentence that is only spaces.
    """
    file = Path(file)
    languages = (source_language, target_language)
    lines = [(line, f"line {i} of {str(file)!r}") for i, line in enumerate(_lines(file), start=1)]
    if not needs_target:
        has_target = [target_language in _translation(line, where, languages) for line, where in lines]
        if not any(has_target):
            sources = [_pair(line, where, languages[:1], languages)[0] for line, where in lines]
            return ParallelCorpus(sources, None, *languages)
    pairs = [_pair(line, where, languages, languages) for line, where in lines]
    source, target = zip(*pairs, strict=True)
    return ParallelCorpus(list(source), list(target), *languages)


def encode_parallel(
    corpus: ParallelCorpus,
    tokenizer: "PreTrainedTokenizerBase",
    target_tokenizer: "PreTrainedTokenizerBase | None" = None,
    max_source_length: int = 128,
    max_target_length: int = 128,
    progress: bool = True,
) -> "Dataset":
    """Turn sentence pairs into token ids.

    A longer sentence is cut before its closing tokens (`</s>`, `[SEP]`, a language code), which it keeps; one warning
    counts such sentences. A target whose tokenizer does not close it (GPT-2's) is closed with the end token: a decoder
    that never sees an end never stops.

    Args:
        corpus (`ParallelCorpus`): the pairs.
        tokenizer: a transformers tokenizer, of the source side and, if it is the only one, of the target side too (set
            to the target language by `text_target`, for those that know languages).
        target_tokenizer (*optional*): the tokenizer of the target side.
        max_source_length (`int`, default 128): tokens of a source sentence at most, closing tokens included.
        max_target_length (`int`, default 128): the same for the target side.
        progress (`bool`, default `True`): show a progress bar where transformers shows its own.

    Returns:
        `datasets.Dataset` with a row for each pair: `input_ids` and `attention_mask` of the source, `labels` of the
        target if there is one; lists as long as the sentence, to be padded by `DataCollatorForSeq2Seq`.

    Raises:
        TyingError: for a maximum that leaves no room for a token beside the closing ones.
    """
    from datasets import Dataset

    sides = {
        "source": _Encoder(tokenizer, "text", max_source_length, corpus.source_language),
        "target": _Encoder(target_tokenizer or tokenizer, "text_target", max_target_length, corpus.target_language),
    }
    with logging.tqdm(
        total=(1 if corpus.target is None else 2) * len(corpus),
        desc="Tokenizing",
        unit=" sentences",
        disable=not progress,
    ) as bar:
        source = sides["source"].encode_all(corpus.source, bar)
        target = None if corpus.target is None else sides["target"].encode_all(corpus.target, bar)
    if any(side.cut for side in sides.values()):
        counts = [f"{side.cut} {name} sentences to {side.most} tokens" for name, side in sides.items() if side.cut]
        logger.warning(f"Of {len(corpus)} pairs, {' and '.join(counts)} were cut; their closing tokens are kept.")
    columns = {"input_ids": source, "attention_mask": [[1] * len(x) for x in source]}
    return Dataset.from_dict(columns if target is None else columns | {"labels": target})


class _Encoder:
    """One side: its tokenizer, how it is called, and how many sentences were too long."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", argument: str, most: int, language: str) -> None:
        self.tokenizer, self.argument, self.most, self.cut = tokenizer, argument, most, 0
        one = self._encode(["a"])[0]
        closed = bool(one) and one[-1] in tokenizer.all_special_ids
        self.closing = (
            [] if argument == "text" or closed or tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        )
        least = tokenizer.num_special_tokens_to_add() + len(self.closing) + 1
        if most < least:
            raise TyingError(
                f"At most {most} tokens for a sentence ({language}) are too few: expected at least {least}, those "
                "that its tokenizer adds and one more."
            )

    def encode_all(self, sentences: Sequence[str], bar: Any) -> list[list[int]]:
        rows = []
        for batch in _batches(sentences):
            rows += self._closed(batch)
            bar.update(len(batch))
        return rows

    def _closed(self, sentences: Sequence[str]) -> list[list[int]]:
        room = self.most - len(self.closing)
        rows = self._encode(sentences)
        long = [i for i, row in enumerate(rows) if len(row) > room]
        # Only the tokenizer knows which tokens of a row are its closing ones, so the cut is left to it.
        short = self._encode([sentences[i] for i in long], truncation=True, max_length=room) if long else []
        for i, row in zip(long, short, strict=True):
            rows[i] = row
        self.cut += len(long)
        return [row + self.closing for row in rows]

    def _encode(self, sentences: Sequence[str], **options: Any) -> list[list[int]]:
        # `verbose=False`: the tokenizer would say that a row is longer than its model's maximum before it is cut.
        options |= {self.argument: list(sentences), "return_attention_mask": False, "verbose": False}
        return self.tokenizer(**options)["input_ids"]


def _batches(sentences: Sequence[str]) -> Iterator[Sequence[str]]:
    for start in range(0, len(sentences), _BATCH):
        yield sentences[start : start + _BATCH]


def _language(file: Path, side: str) -> str:
    language = language_of(file)
    if language is None:
        raise TyingError(
            f"The name of the {side} file {str(file)!r} does not tell its language: expected a suffix as in "
            f"'train.en', or {side}_language."
        )
    return language


def _lines(file: Path) -> list[str]:
    """The lines of a file without surrounding spaces; each has something on it."""
    lines = [line.strip() for line in read_text(file).removesuffix("\n").split("\n")]
    for number, line in enumerate(lines, start=1):
        if not line:
            raise TyingError(
                f"Line {number} of {str(file)!r} is only spaces: expected a sentence. Take the line out, and its "
                "translation too."
            )
    return lines


def _pair(line: str, where: str, wanted: Sequence[str], languages: tuple[str, str]) -> list[str]:
    """The sentences of a line in the languages that are wanted, of the two that it may have."""
    sentences = _translation(line, where, languages)
    for language in wanted:
        if language not in sentences:
            has = ", ".join(map(repr, sentences)) or "none"
            raise TyingError(f"The translation on {where} has no {language!r}; it has {has}: {_expected(languages)}.")
        _check_sentence(sentences[language], f"The {language!r} on {where}")
    return [sentences[language].strip() for language in wanted]


def _expected(languages: tuple[str, str]) -> str:
    return f'expected {{"translation": {{"{languages[0]}": "...", "{languages[1]}": "..."}}}}'


def _translation(line: str, where: str, languages: tuple[str, str]) -> dict:
    """The sentences of a line by their languages."""
    expected = _expected(languages)
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        hint = " One object per line, and no list around them." if line.startswith("[") else ""
        raise TyingError(f"On {where} is no JSON ({error}): {expected}.{hint}") from None
    sentences = row.get("translation") if isinstance(row, dict) else None
    if not isinstance(sentences, dict):
        raise TyingError(f"On {where} is no translation: {expected}.")
    return sentences


def _check_sentence(sentence: Any, what: str) -> None:
    if not isinstance(sentence, str):
        raise TyingError(f"{what} is {type(sentence).__name__}: expected a sentence.")
    if not sentence.strip():
        raise TyingError(f"{what} is only spaces: expected a sentence. Take the pair out.")
    try:
        sentence.encode()
    except UnicodeEncodeError as error:
        raise TyingError(
            f"{what} has half of a surrogate pair, {sentence[error.start]!r}, at character {error.start}: expected "
            "Unicode text."
        ) from None
