"""The header of a GGUF file: its architecture, and the shape, type and place of each tensor.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little-endian.
"""

from dataclasses import dataclass
from math import prod
from struct import Struct
from typing import Any

from ..config import TyingError
from .sources import Source

# A vocabulary of 256,000 words with scores and merges has some ten megabytes.
_LARGEST = 64 * 2**20
_PIECE = 2**20
_MOST = 150_000
_LONGEST_STRING = 2**20
_DEEPEST = 4
# Format of each kind of value, by its number in the file; 8 is a string and 9 an array.
_VALUES = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
# Name, elements in a block and bytes of a block of each type of tensor.
_TYPES = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 9: ("Q8_1", 32, 36), 10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210), 15: ("Q8_K", 256, 292),
    24: ("I8", 1, 1), 25: ("I16", 1, 2), 26: ("I32", 1, 4), 27: ("I64", 1, 8), 28: ("F64", 1, 8), 30: ("BF16", 1, 2),
}  # fmt: skip


@dataclass(frozen=True)
class GgufTensor:
    """A tensor: shape as torch has it (rows first), type, and where its bytes are; 0 bytes of an unknown type."""

    shape: tuple[int, ...]
    dtype: str
    start: int
    size: int


@dataclass(frozen=True)
class GgufHeader:
    """What a header says: `general.architecture`, and the tensors by name."""

    architecture: str
    tensors: dict[str, GgufTensor]


def read_gguf(source: Source, file: str) -> GgufHeader:
    """Read the header of a GGUF file. No weight is read.

    Raises:
        TyingError: it is truncated, malformed, of another version, or larger than any real one.
    """
    try:
        return _read(_Reader(source, file))
    except TyingError:
        raise
    except (ValueError, OverflowError) as error:
        raise TyingError(
            f"{file} in {source.name} cannot be read as GGUF ({error}): it is truncated, corrupted or of another "
            "format."
        ) from error


class _Reader:
    """Takes values from the front of a file, which is read in pieces."""

    def __init__(self, source: Source, file: str) -> None:
        self.source, self.file = source, file
        self.size = source.size(file)
        self.data, self.first, self.at = b"", 0, 0

    def take(self, count: int) -> bytes:
        if self.at + count > min(self.size, _LARGEST):
            raise ValueError("it ends too early" if self.at + count > self.size else "its header is too long")
        if self.at + count > self.first + len(self.data):
            self.first, piece = self.at, max(count, _PIECE)
            self.data = self.source.read(self.file, self.at, min(piece, self.size - self.at))
        start = self.at - self.first
        self.at += count
        return self.data[start : start + count]

    def number(self, kind: str) -> Any:
        form = Struct(f"<{kind}")
        return form.unpack(self.take(form.size))[0]

    def count(self) -> int:
        if (found := self.number("Q")) > _MOST:
            raise ValueError(f"{found:,} entries are more than any real file has")
        return found

    def string(self) -> str:
        if (length := self.number("Q")) > _LONGEST_STRING:
            raise ValueError(f"a text of {length:,} bytes")
        return self.take(length).decode("utf-8", "replace")

    def value(self, kind: int, depth: int = 0) -> Any:
        """Read a value; of an array nothing is kept."""
        if kind == 8:
            return self.string()
        if kind in _VALUES:
            return self.number(_VALUES[kind])
        if kind != 9 or depth > _DEEPEST:
            raise ValueError(f"a value of unknown kind {kind}")
        inner, length = self.number("I"), self.number("Q")
        if inner in _VALUES:
            self.skip(length * Struct(f"<{_VALUES[inner]}").size)
        else:
            if length > _LARGEST // 8:
                raise ValueError(f"an array of {length:,} values")
            for _ in range(length):
                self.value(inner, depth + 1)
        return None

    def skip(self, count: int) -> None:
        if self.at + count > min(self.size, _LARGEST):
            raise ValueError("it ends too early")
        self.at += count
        if not self.first <= self.at <= self.first + len(self.data):
            self.data, self.first = b"", self.at


def _read(reader: _Reader) -> GgufHeader:
    if reader.take(4) != b"GGUF":
        raise ValueError("it does not begin with GGUF")
    if (version := reader.number("I")) not in (2, 3):
        raise ValueError(f"its version is {version}, and 2 and 3 are read")
    tensors, values = reader.count(), reader.count()
    known: dict[str, Any] = {}
    for _ in range(values):
        name = reader.string()
        known[name] = reader.value(reader.number("I"))
    held: list[tuple[str, tuple[int, ...], int, int]] = []
    for _ in range(tensors):
        name = reader.string()
        if (dimensions := reader.number("I")) > 8:
            raise ValueError(f"a tensor of {dimensions} dimensions")
        shape = tuple(reader.number("Q") for _ in range(dimensions))[::-1]
        held.append((name, shape, reader.number("I"), reader.number("Q")))
    alignment = known.get("general.alignment", 32)
    if not isinstance(alignment, int) or not 0 < alignment <= 2**16:
        raise ValueError("its alignment is no size")
    first = -(-reader.at // alignment) * alignment
    found = {}
    for name, shape, kind, offset in held:
        dtype, block, size = _TYPES.get(kind, (f"type {kind}", 1, 0))
        length = -(-prod(shape) // block) * size
        if first + offset + length > reader.size:
            raise ValueError(f"{name!r:.100} reaches beyond its end")
        found[name] = GgufTensor(shape, dtype, first + offset, length)
    architecture = known.get("general.architecture")
    return GgufHeader(architecture if isinstance(architecture, str) else "unknown", found)
