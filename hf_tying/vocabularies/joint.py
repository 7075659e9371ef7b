"""One vocabulary from two: which words of two tokenizers are one word, and the ids that follow from it.

Nothing here knows a model.
"""

import functools
from collections.abc import Iterable
from dataclasses import dataclass

from ..config import TyingError, nearest

#: The rules by which words of two vocabularies are one; see `join_vocabularies`.
OVERLAPS = ("word", "spelling", "none")

# How vocabularies mark where a word begins or ends: SentencePiece and byte-level BPE mark the piece that begins one,
# WordPiece the piece that does not; FSMT marks the piece that ends one, subword-nmt the piece that does not.
_BEFORE, _BEHIND = ("▁", "Ġ", "##"), ("</w>", "@@")
_STARTS, _INSIDE, _ENDS, _OPEN, _BYTES = "starts a word", "inside a word", "ends a word", "goes on", "bytes"


class Side:
    """One side of a translation: the words of its vocabulary, and what they mean.

    Args:
        tokenizer: the transformers tokenizer that has the words.
        vocabulary (`dict[str, int]`): from `vocabularies_of`.
    """

    def __init__(self, tokenizer, vocabulary: dict[str, int]):
        self.words = {index: word for word, index in reversed(sorted(vocabulary.items()))}  # of two names, the first
        self.convention = convention_of(vocabulary)
        special = {name: str(word) for name, word in tokenizer.special_tokens_map.items()}
        #: The roles of each special token, as `{"pad_token"}`.
        self.roles = {word: frozenset(n for n, w in special.items() if w == word) for word in special.values()}
        #: Words that are no pieces of text: special and added tokens.
        self.whole = {*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()}

    def piece(self, index: int) -> tuple[str, str]:
        """What the word with this id means, whatever the convention."""
        return piece_of(self.words[index], self.convention)


@dataclass(frozen=True)
class JointVocabulary:
    """The ids of a joint vocabulary.

    Args:
        target_size (`int`): rows of the target side. Their ids are unchanged, and all ids from here on are words that
            only the source side has.
        source_ids (`dict[int, int]`): from the id of each source word to its id in the joint vocabulary.

    Raises:
        TyingError: when two source words have one id, or the ids of those that only the source has leave a gap.
    """

    target_size: int
    source_ids: dict[int, int]

    def __post_init__(self):
        ids = self.source_ids.values()
        own = sorted(index for index in ids if index >= self.target_size)
        if len(set(ids)) < len(ids) or own != list(range(self.target_size, self.target_size + len(own))):
            raise TyingError(
                f"The ids of {len(ids)} source words are no joint vocabulary: expected each once, below "
                f"{self.target_size} for a word of both sides, and from there on without a gap."
            )

    @functools.cached_property
    def joint_to_source(self) -> dict[int, int]:
        """From joint ids back to those of the source side."""
        return {joint: source for source, joint in self.source_ids.items()}

    @property
    def size(self) -> int:
        """Rows of the joint vocabulary."""
        return self.target_size + len(self.source_only)

    @functools.cached_property
    def source_only(self) -> list[int]:
        """The source's own ids of the words that only it has, in the order of their joint ids."""
        return [source for joint, source in sorted(self.joint_to_source.items()) if joint >= self.target_size]


def join_words(source: Side, target: Side, target_size: int, overlap: str) -> JointVocabulary:
    """Find the words that are one, and number the others of the source in the order of their ids.

    Args:
        source: the source side.
        target: the target side.
        target_size: rows of the target's matrix; it may have more rows than words.
        overlap: one of `OVERLAPS`.

    Raises:
        TyingError: for another rule.
    """
    check_overlap(overlap)
    known: dict = {}
    for index in sorted(target.words):
        for meaning in _meanings(target, index, overlap):
            known.setdefault(meaning, index)
    source_ids: dict[int, int] = {}
    taken = set()
    # Special tokens of one spelling come first: a role shall not take a token that has its own namesake.
    for depth in (0, 1):
        for index in sorted(source.words):
            meanings = _meanings(source, index, overlap)
            joint = known.get(meanings[depth]) if depth < len(meanings) else None
            if joint is not None and joint not in taken and index not in source_ids:
                source_ids[index] = joint
                taken.add(joint)
    rest = [index for index in sorted(source.words) if index not in source_ids]
    source_ids.update(zip(rest, range(target_size, target_size + len(rest)), strict=True))
    return JointVocabulary(target_size, source_ids)


def check_overlap(overlap: str) -> None:
    """Refuse an unknown rule."""
    if overlap not in OVERLAPS:
        hint = nearest(overlap, OVERLAPS) if isinstance(overlap, str) else ""
        raise TyingError(f"Unknown overlap rule {overlap!r}: expected one of {', '.join(OVERLAPS)}{hint}.")


def joint_words(source: Side, target: Side, joint: JointVocabulary) -> tuple[dict[int, str], dict[int, str]]:
    """A name for each id of the joint vocabulary, and how the target side would write it.

    A source word is written by the target's convention: the WordPiece `##ing` as `ing` beside a byte-level vocabulary.
    The two dictionaries differ where that name is taken by another word. A row without a word is named as unused.
    """
    written = dict(target.words)
    for index in joint.source_only:
        word = source.words[index]
        own = None if word in source.whole else spelled(source.piece(index), target.convention)
        written[joint.source_ids[index]] = word if own is None else own
    names, taken = dict(target.words), set(target.words.values())
    for index in range(joint.size):
        if index in names:
            continue
        name = written.setdefault(index, f"<unused {index}>")
        if name in taken and index >= joint.target_size:
            name = source.words[joint.joint_to_source[index]]
        while name in taken:
            name += " (source)" if index >= joint.target_size else "_"
        names[index] = name
        taken.add(name)
    return names, written


def _meanings(side: Side, index: int, overlap: str) -> list:
    """By what a word can be found on the other side, the stronger reason first."""
    word = side.words[index]
    if word in side.whole:
        return [("token", word), *([("role", side.roles[word])] if word in side.roles else [])]
    return {"none": [], "spelling": [word], "word": [side.piece(index)]}[overlap]


# --- the conventions -------------------------------------------------------------------------------------------------


def convention_of(words: Iterable[str]) -> str:
    """The mark that most words of a vocabulary carry, or `""` where none marks what begins or ends.

    Fewer than one word in a hundred is no convention: GPT-2 has a few words of number signs, BERT has a `▁`.
    """
    words = list(words)
    counts = {mark: sum(word.startswith(mark) and word != "##" for word in words) for mark in _BEFORE}
    counts |= {mark: sum(word.endswith(mark) and word != mark for word in words) for mark in _BEHIND}
    mark = max(counts, key=counts.get)
    return mark if counts[mark] > len(words) / 100 else ""


def piece_of(word: str, convention: str) -> tuple[str, str]:
    """What `word` means: its place in a word, and its text."""
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
    """The word that means `piece` in a convention, the inverse of `piece_of`; `None` where it has no such word."""
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
    except (KeyError, UnicodeDecodeError):  # a part of a character, or no byte-level word at all
        return None
