"""Which tensors of a checkpoint have the same values, by their bytes, and how far others are apart."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod, sqrt
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

    from .checkpoint import HeldTensor

# Matrices up to this size are compared whole, which takes about a second. Larger ones are compared in samples.
WHOLE = 2**30
_PIECE = 2**20
_SAMPLES, _SAMPLE = 256, 2**16
# Of a matrix on the Hub this much is fetched.
_PROBES, _PROBE = 8, 2**12
# Rows whose difference tells its rank.
_ROWS_FOR_RANK = 128


@dataclass(frozen=True)
class Difference:
    """How far two matrices of one shape are apart.

    Args:
        rows: rows that differ.
        of: rows that were compared: all of them, or those of samples.
        largest: largest absolute difference of two elements; `nan` where one is not a number.
        cosine: cosine of the two matrices, as long vectors.
        rank: rank of the difference if it is low, as an adapter that was merged into one side leaves it; else `None`.
        sampled: whether only samples were read.
    """

    rows: int
    of: int
    largest: float
    cosine: float
    rank: int | None = None
    sampled: bool = False

    def __str__(self) -> str:
        compared = f"{self.of:,} sampled rows" if self.sampled else f"{self.of:,} rows"
        return (
            f"{self.rows:,} of {compared} differ, largest difference {self.largest:.3g}, "
            f"cosine {self.cosine:.{6 if self.cosine > 0.999 else 3}f}"
        )


class ValuesOnDisk:
    """Compares tensors in the files of a checkpoint.

    Args:
        read: reads `count` bytes from `start` of the named tensor.
        tensors: shape, dtype and place of each tensor, from headers that were found to be sound.
        remote: whether bytes come over a network, so that samples are few. Default `False`.
        exact: whether every byte is compared, however large the matrices are. Default `False`.
    """

    def __init__(
        self,
        read: Callable[[str, int, int], bytes],
        tensors: "Mapping[str, HeldTensor]",
        remote: bool = False,
        exact: bool = False,
    ) -> None:
        self._read, self.tensors, self.remote, self.exact = read, tensors, remote, exact

    def different(self, keys_of: Mapping[str, Sequence[str]]) -> tuple[dict[str, int], str | None]:
        """Number the values of some names: names with equal values have the same number.

        Args:
            keys_of: tensors that hold each name, several where a file holds experts one by one.

        Returns:
            The number of each name, from 0; and how they were compared, as in `GroupReport.compared`.
        """
        first_with: list[str] = []
        number_of: dict[str, int] = {}
        for name, keys in keys_of.items():
            same = (i for i, other in enumerate(first_with) if self.equal(keys, keys_of[other]))
            number_of[name] = next(same, len(first_with))
            if number_of[name] == len(first_with):
                first_with.append(name)
        if len(keys_of) < 2:
            return number_of, None
        sizes = (self.tensors[key].size for keys in keys_of.values() for key in keys)
        return number_of, "samples" if self._sampled(max(sizes, default=0)) else "whole"

    def equal(self, keys: Sequence[str], others: Sequence[str]) -> bool:
        """Whether two names, each held by some tensors, have the same shapes, dtypes and bytes."""
        if [self.tensors[key].kind for key in keys] != [self.tensors[key].kind for key in others]:
            return False
        return all(self._same_bytes(a, b) for a, b in zip(keys, others, strict=True))

    def difference(self, a: str, b: str) -> Difference | None:
        """How far two tensors are apart; `None` where their shapes differ or their elements cannot be read here."""
        one, other = self.tensors[a], self.tensors[b]
        if one.shape != other.shape or not one.size or not other.size:
            return None
        width = prod(one.shape[1:])
        step, steps = one.size // one.shape[0], other.size // other.shape[0]
        pieces = self._rows(one.shape[0], max(step, steps))
        rows = of = 0
        largest = dot = squares = others = 0.0
        kept: list = []
        for first, count in pieces:
            left = _numbers(self._read(a, first * step, count * step), one.dtype, width)
            right = _numbers(self._read(b, first * steps, count * steps), other.dtype, width)
            if left is None or right is None:
                return None
            apart = left - right
            differs = (left != right).any(axis=1)
            rows, of = rows + int(differs.sum()), of + len(left)
            largest = max(largest, float(abs(apart).max(initial=0.0)))
            dot, squares = dot + float((left * right).sum()), squares + float((left * left).sum())
            others += float((right * right).sum())
            if len(kept) < _ROWS_FOR_RANK:
                kept.extend(apart[differs][: _ROWS_FOR_RANK - len(kept)])
        cosine = dot / sqrt(squares * others) if squares and others else 0.0
        sampled = of < one.shape[0]
        return Difference(rows, of, largest, cosine, _low_rank(kept), sampled)

    def same_numbers(self, a: str, b: str) -> bool | None:
        """Whether two tensors have the same numbers, whatever their dtypes; `None` where that cannot be told."""
        found = self.difference(a, b)
        return None if found is None else found.rows == 0

    def _sampled(self, size: int) -> bool:
        return not self.exact and size > (_PROBES * _PROBE if self.remote else WHOLE)

    def _same_bytes(self, a: str, b: str) -> bool:
        size = self.tensors[a].size
        if not self._sampled(size):
            pieces = [(at, _PIECE) for at in range(0, size, _PIECE)]
        else:
            pieces = _spread(size, *((_PROBES, _PROBE) if self.remote else (_SAMPLES, _SAMPLE)))
        return all(
            self._read(a, at, min(length, size - at)) == self._read(b, at, min(length, size - at))
            for at, length in pieces
        )

    def _rows(self, rows: int, step: int) -> list[tuple[int, int]]:
        """The (first, count) of rows to compare."""
        count = max(_PIECE // step, 1)
        if not self._sampled(rows * step):
            return [(first, min(count, rows - first)) for first in range(0, rows, count)]
        pieces = _PROBES if self.remote else _SAMPLES
        count = min(max((_PROBE if self.remote else _SAMPLE) // step, 1), rows)
        firsts = sorted({(rows - count) * i // (pieces - 1) for i in range(pieces)})
        return [(first, count) for first in firsts]


def _numbers(data: bytes, dtype: str, width: int) -> "np.ndarray | None":
    """The rows of a matrix as float64; `None` of a dtype that numpy lacks."""
    import numpy as np

    kinds = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1",
             "U8": "u1"}  # fmt: skip
    if dtype == "BF16":
        flat = (np.frombuffer(data, "<u2").astype("<u4") << 16).view("<f4")
    elif dtype in kinds:
        flat = np.frombuffer(data, kinds[dtype])
    else:
        return None
    with np.errstate(invalid="ignore"):
        return flat.astype(np.float64).reshape(-1, width)


def _low_rank(rows: list) -> int | None:
    """The rank of some rows, if it is a quarter of what it could be or less."""
    import numpy as np

    if len(rows) < 8:
        return None
    matrix = np.stack(rows)
    if not np.isfinite(matrix).all():
        return None
    values = np.linalg.svd(matrix, compute_uv=False)
    # The largest error of a sum in the dtypes of weights, with room.
    rank = int((values > values[0] * 0.02).sum())
    return rank if rank * 4 <= min(matrix.shape) else None


def _spread(size: int, samples: int, length: int) -> list[tuple[int, int]]:
    """Places and lengths of samples, evenly over `size` bytes, the first and the last byte included."""
    return [((size - length) * i // (samples - 1), length) for i in range(samples)]
