"""Names of parameters and modules as people read them: as patterns, in lines, without controls."""

from collections.abc import Iterable, Sequence
from re import split

from rich.cells import cell_len

from .layer_order import is_index

# Longer names are cut: nobody reads them, and a hostile file may have names of megabytes.
_LONGEST = 300
# Names of more parts are not those of a model, and are not looked at for patterns.
_MOST_PARTS = 50


def printable(text: str) -> str:
    """Escape control characters, also those that turn the direction of text, and cut what is too long to be read.

    Names come from files that somebody else wrote. None of them may move the cursor or hide a line.
    """
    if len(text) > _LONGEST:
        text = f"{text[: _LONGEST // 2]}...{text[-_LONGEST // 2 :]}"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def printable_text(text: str) -> str:
    """`printable` for a message of any length: word by word."""
    return " ".join(printable(word) for word in text.split())


def scheme_words(scheme: str | None, groups: int) -> str:
    """The scheme as it ends a heading; nothing where there is none, or where groups without a scheme are tied.

    Example:
        >>> scheme_words("two_way", 1), scheme_words("none", 0), scheme_words("none", 3)
        (', scheme two_way', ', scheme none', '')
    """
    return f", scheme {scheme}" if scheme and not (scheme == "none" and groups) else ""


def patterns(names: Sequence[str]) -> list[str]:
    """Write many names as few patterns, in the order of the names.

    Example:
        >>> patterns(["layers.0.q", "layers.0.k", "layers.1.q", "layers.1.k", "layers.2.q", "layers.2.k"])
        ['layers.{0-2}.{q,k}']
    """
    if any(name.count(".") >= _MOST_PARTS for name in names):
        return list(names)
    return [".".join(parts) for parts in _patterns([tuple(name.split(".")) for name in names])]


def _patterns(names: Sequence[tuple[str, ...]]) -> list[tuple[str, ...]]:
    # From the last part to the first: names that differ in that place alone become one.
    rows: list[tuple[tuple[str, ...], ...]] = [tuple((part,) for part in name) for name in dict.fromkeys(names)]
    for place in reversed(range(max(map(len, rows), default=0))):
        merged: dict[tuple, tuple[str, ...]] = {}
        for row in rows:
            rest = (row[:place], row[place + 1 :]) if place < len(row) else (row, None)
            merged[rest] = merged.get(rest, ()) + (row[place] if place < len(row) else ())
        rows = [
            before if after is None else (*before, tuple(dict.fromkeys(parts)), *after)
            for (before, after), parts in merged.items()
        ]
    return [tuple(map(_alternatives, row)) for row in rows]


def _alternatives(parts: tuple[str, ...]) -> str:
    if len(parts) == 1:
        return parts[0]
    if not all(map(is_index, parts)):
        return "{" + ",".join(parts) + "}"
    return "{" + ranges([int(part) for part in parts]) + "}"


def ranges(numbers: Iterable[int]) -> str:
    """Numbers in their order, those in a row as one: `0-3,7`."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" if b > a + 1 else f"{a},{b}" for a, b in runs)


def wrapped(text: str, width: int, indent: int = 0) -> list[str]:
    """Break text into lines between its words, and a word that is wider than a line behind a dot, slash or dash.

    Args:
        text: printable text.
        width: cells of a terminal in a line.
        indent: spaces in front of every line but the first.
    """
    lines, line = [], ""
    for word in text.split(" "):
        joined = f"{line} {word}" if line else word
        if cell_len(joined) <= width:
            line = joined
            continue
        if line.strip():
            lines.append(line)
        line = " " * indent if lines else ""
        for piece in split(r"(?<=[./_,:-])(?!$)", word) if cell_len(word) > width - indent else [word]:
            while cell_len(line + piece) > width:
                if line.strip():
                    lines.append(line)
                    line = " " * indent
                    continue
                cut = max(n for n in range(1, len(piece) + 1) if n == 1 or cell_len(line + piece[:n]) <= width)
                lines.append(line + piece[:cut])
                line, piece = " " * indent, piece[cut:]
            line += piece
    return [*lines, line] if line.strip() or not lines else lines


def shortened(text: str, length: int) -> str:
    """Cut the middle out of a printable text that is longer than `length` characters."""
    if len(text) <= length:
        return text
    kept = length - 3
    return f"{text[: kept - kept * 2 // 3]}...{text[-(kept * 2 // 3) :]}"
