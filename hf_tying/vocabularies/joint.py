"""One vocabulary from two: the words of two tokenizers that become one word, and the resulting ids.

This file does not depend on a model.
"""

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..config import TyingError, nearest
from .conventions import convention_of, piece_of, spelled

if TYPE_CHECKING:
    from transformers.tokenization_utils_base import PreTrainedTokenizerBase


#: The rules by which two words become one; see `join_vocabularies`.
OVERLAPS = ("word", "spelling", "none")


class VocabularySide:
    """The vocabulary of one side of a translation: its words by their ids, and their meaning.

    Args:
        tokenizer: transformers tokenizer of this side.
        vocabulary (`dict[str, int]`): ids of its words, from `vocabularies_of`.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", vocabulary: dict[str, int]) -> None:
        # If two words have one id, the first in alphabetical order is kept.
        self.words = {index: word for word, index in reversed(sorted(vocabulary.items()))}
        self.convention = convention_of(vocabulary)
        special = {name: str(word) for name, word in tokenizer.special_tokens_map.items()}
        #: The roles of each special token, such as `{"pad_token"}`.
        self.roles = {word: frozenset(n for n, w in special.items() if w == word) for word in special.values()}
        #: The words that a tokenizer never splits, because they are not pieces of text: special and added tokens.
        self.whole = {*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()}

    def piece(self, index: int) -> tuple[str, str]:
        """Read the word with this id: its place in a word, and its text."""
        return piece_of(self.words[index], self.convention)


@dataclass(frozen=True)
class JointVocabulary:
    """The ids of a joint vocabulary.

    Args:
        target_size (`int`): number of rows of the target side, whose ids are unchanged. Ids from this number on belong
            to words that only the source side has.
        source_ids (`dict[int, int]`): map from the id of each source word to its id in the joint vocabulary.

    Raises:
        TyingError: two source words have one id, or the ids of words that only the source has leave a gap.
    """

    target_size: int
    source_ids: dict[int, int]

    def __post_init__(self) -> None:
        ids = self.source_ids.values()
        own = sorted(index for index in ids if index >= self.target_size)
        if len(set(ids)) < len(ids) or own != list(range(self.target_size, self.target_size + len(own))):
            raise TyingError(
                f"The ids of {len(ids)} source words do not make a joint vocabulary: expected each once, below "
                f"{self.target_size} for a word of both sides, and from there on without a gap."
            )

    @functools.cached_property
    def joint_to_source(self) -> dict[int, int]:
        """The map from joint ids to the source side's own ids."""
        return {joint: source for source, joint in self.source_ids.items()}

    @property
    def size(self) -> int:
        """Number of rows of the joint vocabulary."""
        return self.target_size + len(self.source_only)

    @functools.cached_property
    def source_only(self) -> list[int]:
        """The source's own ids of the words that only it has, in the order of their joint ids."""
        return [source for joint, source in sorted(self.joint_to_source.items()) if joint >= self.target_size]


def join_words(source: VocabularySide, target: VocabularySide, target_size: int, overlap: str) -> JointVocabulary:
    """Give each source word the id of the target word that it becomes one with, or else a new id.

    New ids are in the order of the old ones.

    Args:
        source: vocabulary of the source side.
        target: vocabulary of the target side.
        target_size: number of rows of the target's matrix, which may have more rows than words.
        overlap: rule, one of `OVERLAPS`.

    Raises:
        TyingError: `overlap` is not one of these.
    """
    check_overlap(overlap)
    known: dict = {}
    for index in sorted(target.words):
        for meaning in _meanings(target, index, overlap):
            known.setdefault(meaning, index)
    source_ids: dict[int, int] = {}
    taken = set()
    # Equal spellings come first, so that a token is matched by its roles only if no token has its spelling.
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
    """Refuse an unknown rule.

    Args:
        overlap: rule.

    Raises:
        TyingError: `overlap` is not one of `OVERLAPS`.
    """
    if overlap not in OVERLAPS:
        hint = nearest(overlap, OVERLAPS) if isinstance(overlap, str) else ""
        raise TyingError(f"Unknown overlap rule {overlap!r}: expected one of {', '.join(OVERLAPS)}{hint}.")


def row_names(
    source: VocabularySide, target: VocabularySide, joint: JointVocabulary
) -> tuple[dict[int, str], dict[int, str]]:
    """Name each row of the joint vocabulary.

    A source word is spelled by the convention of the target: the WordPiece `##ing` becomes `ing` beside a byte-level
    vocabulary. A row without a word is named as unused.

    Args:
        source: vocabulary of the source side.
        target: vocabulary of the target side.
        joint: ids of the joint vocabulary.

    Returns:
        A map from each id to its unique name, and a map from each id to its spelling. They differ if another word has
        the spelling as its name.
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


def _meanings(side: VocabularySide, index: int, overlap: str) -> list:
    """The keys by which a word is found on the other side, the stronger key first."""
    word = side.words[index]
    if word in side.whole:
        return [("token", word), *([("role", side.roles[word])] if word in side.roles else [])]
    return {"none": [], "spelling": [word], "word": [side.piece(index)]}[overlap]
