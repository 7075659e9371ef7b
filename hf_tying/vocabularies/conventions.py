"""The marks of the beginning or the end of a word in subword vocabularies, and conversions between spellings."""

import functools
from collections.abc import Iterable

# SentencePiece and byte-level BPE mark the piece that begins a word, WordPiece the piece that does not. FSMT marks the
# piece that ends a word, subword-nmt the piece that does not.
_BEFORE, _BEHIND = ("▁", "Ġ", "##"), ("</w>", "@@")
_STARTS, _INSIDE, _ENDS, _OPEN, _BYTES = "starts a word", "inside a word", "ends a word", "goes on", "bytes"


def convention_of(words: Iterable[str]) -> str:
    """Find the mark that most words of a vocabulary have.

    A mark on fewer than one word in a hundred does not count: GPT-2 has a few words of number signs, and BERT has a
    `▁`.

    Args:
        words: words of the vocabulary.

    Returns:
        The mark, or `""` if there is none.
    """
    words = list(words)
    counts = {mark: sum(word.startswith(mark) and word != "##" for word in words) for mark in _BEFORE}
    counts |= {mark: sum(word.endswith(mark) and word != mark for word in words) for mark in _BEHIND}
    mark = max(counts, key=counts.get)
    return mark if counts[mark] > len(words) / 100 else ""


def piece_of(word: str, convention: str) -> tuple[str, str]:
    """Read a piece of a vocabulary: its place in a word, and its text.

    Args:
        word: entry of the vocabulary.
        convention: mark of the vocabulary, from `convention_of`.
    """
    if convention == "Ġ":
        text = _from_bytes(word)
        if text is None:
            return _BYTES, word
        return (_STARTS, text[1:]) if text.startswith(" ") else (_INSIDE, text)
    if convention == "▁":
        text = word.replace("▁", " ")
        return (_STARTS, text[1:]) if text.startswith(" ") else (_INSIDE, text)
    if convention == "##":
        return (_INSIDE, word[2:]) if word.startswith("##") and word != "##" else (_STARTS, word)
    if convention == "</w>":
        return (_ENDS, word.removesuffix("</w>")) if word.endswith("</w>") else (_OPEN, word)
    if convention == "@@":
        return (_OPEN, word.removesuffix("@@")) if word.endswith("@@") else (_ENDS, word)
    return _STARTS, word


def spelled(piece: tuple[str, str], convention: str) -> str | None:
    """Spell a piece under a convention: the inverse of `piece_of`.

    Args:
        piece: place and text, from `piece_of`.
        convention: mark of the vocabulary, from `convention_of`.

    Returns:
        The entry of the vocabulary, or `None` if the convention cannot spell the piece.
    """
    place, text = piece
    if place == _BYTES:
        return text if convention == "Ġ" else None
    if place in (_STARTS, _INSIDE):
        spaced = f" {text}" if place == _STARTS else text
        if convention == "Ġ":
            return "".join(_byte_alphabet()[byte] for byte in spaced.encode("utf-8"))
        if convention == "▁":
            return spaced.replace(" ", "▁")
        if convention == "##":
            return text if place == _STARTS else f"##{text}"
        return text if convention == "" and place == _STARTS else None
    if convention == "</w>":
        return f"{text}</w>" if place == _ENDS else text
    if convention == "@@":
        return text if place == _ENDS else f"{text}@@"
    return None


@functools.cache
def _byte_alphabet() -> dict[int, str]:
    """The characters that stand for the 256 bytes in byte-level BPE (Radford et al. 2019, section 2.2)."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return bytes_to_unicode()


@functools.cache
def _bytes_of_alphabet() -> dict[str, int]:
    return {character: byte for byte, character in _byte_alphabet().items()}


def _from_bytes(word: str) -> str | None:
    try:
        return bytes(_bytes_of_alphabet()[character] for character in word).decode("utf-8")
    except (KeyError, UnicodeDecodeError):  # a part of a character, or not a byte-level word
        return None
