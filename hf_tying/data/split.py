"""A split of sentence pairs without leaks: no line of either language is in both training and validation."""

import hashlib
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

# Separators in numbers, in any language: 1,234.5 and 1.234,5 and 1 234,5 and 1'234.5.
_SEPARATOR = re.compile(r"(?<=\d)[.,'’٫٬\s](?=\d)")


class Pair(NamedTuple):
    """A sentence, its translation, and their group. The pairs of one group stay on one side of the split.

    A pair without a group (`None`) is always in training.
    """

    group: str | None
    source: str
    target: str


def split_pairs(pairs: Iterable[Pair], validation_fraction: float, seed: int = 0) -> tuple[list[Pair], list[Pair]]:
    """Split pairs into training and validation pairs, by whole groups and without leaks.

    A source sentence that occurs again is left out, so that each has one translation. A training pair is left out if
    its target sentence is also that of a validation pair. Sentences are compared by `comparable`.

    Args:
        pairs (`Iterable[Pair]`): pairs; both parts keep their order.
        validation_fraction (`float`): largest share of the validation pairs in all pairs.
        seed (`int`, default 0): seed of the choice. Groups are chosen by a hash of their names, so the choice is the
            same on every machine.

    Returns:
        `tuple[list[Pair], list[Pair]]`: training pairs and validation pairs.
    """
    unique = {comparable(pair.source): pair for pair in reversed(list(pairs))}
    kept = list(reversed(unique.values()))
    held_out = _held_out_groups(kept, round(validation_fraction * len(kept)), seed)
    validation = [pair for pair in kept if pair.group in held_out]
    seen = {comparable(pair.target) for pair in validation}
    training = [pair for pair in kept if pair.group not in held_out and comparable(pair.target) not in seen]
    return training, validation


def comparable(line: str) -> str:
    """Normalise a line for comparison: case, kinds of spaces and digits, and separators in numbers do not count.

    Numbers count: `7 days` and `8 days` are two lines, `1,000 days` and `1000 days` are one.
    """
    plain = unicodedata.normalize("NFKC", line).casefold()
    visible = (c for c in plain if unicodedata.category(c) != "Cf")  # marks of writing direction, soft hyphens
    digits = "".join(str(unicodedata.decimal(c)) if c.isdecimal() else c for c in visible)
    return _SEPARATOR.sub("", " ".join(digits.split()))


def _held_out_groups(pairs: list[Pair], size: int, seed: int) -> set[str]:
    """Groups of at most `size` pairs together, in the order of their hashes. A group that is too large is skipped."""
    sizes = Counter(pair.group for pair in pairs if pair.group is not None)
    held_out: set[str] = set()
    total = 0
    for group in sorted(sizes, key=lambda name: hashlib.sha256(f"{seed} {name}".encode()).digest()):
        if total + sizes[group] <= size:
            held_out.add(group)
            total += sizes[group]
    return held_out
