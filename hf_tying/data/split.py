"""A split of sentence pairs that does not leak: no line of either side stands both in training and in validation."""

import hashlib
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

# What numbers are grouped and divided by in the world: 1,234.5 and 1.234,5 and 1 234,5 and 1'234.5.
_SEPARATOR = re.compile(r"(?<=\d)[.,'’٫٬\s](?=\d)")


class Pair(NamedTuple):
    """A sentence, its translation, and the group that it belongs to: groups do not part at the split.

    A pair whose group is `None` is never held out.
    """

    group: str | None
    source: str
    target: str


def split_pairs(pairs: Iterable[Pair], validation_fraction: float, seed: int = 0) -> tuple[list[Pair], list[Pair]]:
    """Hold out whole groups, then take out of the training pairs what the held-out ones would give away.

    A source sentence that comes again is left out, so that each has one translation. A training pair whose target
    sentence is also a held-out one is left out. Sentences are compared as `comparable` gives them.

    Args:
        pairs (`Iterable[Pair]`): in the order in which they are to be kept.
        validation_fraction (`float`): share of all pairs to hold out, at most; a few training pairs more are
            left out, see above.
        seed (`int`, default 0): of the choice. Groups are drawn by a hash of their names: the same on every machine.

    Returns:
        `tuple[list[Pair], list[Pair]]`: training pairs, held-out pairs.
    """
    unique = {comparable(pair.source): pair for pair in reversed(list(pairs))}
    kept = list(reversed(unique.values()))
    held_out = _held_out_groups(kept, round(validation_fraction * len(kept)), seed)
    validation = [pair for pair in kept if pair.group in held_out]
    seen = {comparable(pair.target) for pair in validation}
    training = [pair for pair in kept if pair.group not in held_out and comparable(pair.target) not in seen]
    return training, validation


def comparable(line: str) -> str:
    """What is left of a line when case, kinds of spaces and digits, and the separators in numbers are no difference.

    Numbers stay: `7 days` and `8 days` are two lines, `1,000 days` and `1000 days` are one.
    """
    plain = unicodedata.normalize("NFKC", line).casefold()
    visible = (c for c in plain if unicodedata.category(c) != "Cf")  # marks of writing direction, soft hyphens
    digits = "".join(str(unicodedata.decimal(c)) if c.isdecimal() else c for c in visible)
    return _SEPARATOR.sub("", " ".join(digits.split()))


def _held_out_groups(pairs: list[Pair], size: int, seed: int) -> set[str]:
    """Groups of `size` pairs in all at most, in the order of their hashes; one too big is passed over."""
    sizes = Counter(pair.group for pair in pairs if pair.group is not None)
    held_out: set[str] = set()
    total = 0
    for group in sorted(sizes, key=lambda name: hashlib.sha256(f"{seed} {name}".encode()).digest()):
        if total + sizes[group] <= size:
            held_out.add(group)
            total += sizes[group]
    return held_out
