"""Which tensors of safetensors files have the same values, by their bytes. No tensor is made."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

# Matrices up to this size are compared whole, which takes about a second. Larger ones are compared in samples.
WHOLE = 2**30
_PIECE = 2**20
_SAMPLES, _SAMPLE = 256, 2**16


class ValuesOnDisk:
    """Compares tensors in the files of a checkpoint.

    Args:
        file_of: the file of each tensor.
        header: (shape, dtype) of each tensor, from headers that were found to be sound.
    """

    def __init__(self, file_of: Mapping[str, Path], header: Mapping[str, tuple[tuple[int, ...], str]]) -> None:
        self.file_of = file_of
        self.header = header
        self._offsets: dict[Path, dict[str, tuple[int, int]]] = {}

    def different(self, keys_of: Mapping[str, Sequence[str]]) -> tuple[dict[str, int], str | None]:
        """Number the values of some names: names with equal values have the same number.

        Args:
            keys_of: from a name to the tensors that hold it, which are several where a file holds experts one by one.

        Returns:
            The number of each name, from 0; and how they were compared, as in `GroupReport.compared`.
        """
        first_with: list[str] = []
        number_of: dict[str, int] = {}
        for name, keys in keys_of.items():
            same = (i for i, other in enumerate(first_with) if self._equal(keys, keys_of[other]))
            number_of[name] = next(same, len(first_with))
            if number_of[name] == len(first_with):
                first_with.append(name)
        if len(keys_of) < 2:
            return number_of, None
        sizes = (end - start for keys in keys_of.values() for start, end in map(self._span, keys))
        return number_of, "samples" if max(sizes, default=0) > WHOLE else "whole"

    def _equal(self, keys: Sequence[str], others: Sequence[str]) -> bool:
        if [self.header[key] for key in keys] != [self.header[key] for key in others]:
            return False
        return all(self._same_bytes(a, b) for a, b in zip(keys, others, strict=True))

    def _same_bytes(self, a: str, b: str) -> bool:
        (start, end), (other, _) = self._span(a), self._span(b)
        size = end - start
        pieces = [(at, _PIECE) for at in range(0, size, _PIECE)] if size <= WHOLE else _spread(size)
        with self.file_of[a].open("rb") as left, self.file_of[b].open("rb") as right:
            for at, length in pieces:
                left.seek(start + at)
                right.seek(other + at)
                count = min(length, size - at)
                if left.read(count) != right.read(count):
                    return False
        return True

    def _span(self, key: str) -> tuple[int, int]:
        """Where the bytes of a tensor are in its file."""
        file = self.file_of[key]
        if file not in self._offsets:
            with file.open("rb") as opened:
                length = int.from_bytes(opened.read(8), "little")
                entries = json.loads(opened.read(length))
            self._offsets[file] = {
                name: (8 + length + entry["data_offsets"][0], 8 + length + entry["data_offsets"][1])
                for name, entry in entries.items()
                if name != "__metadata__"
            }
        return self._offsets[file][key]


def _spread(size: int) -> list[tuple[int, int]]:
    """Places and lengths of samples, evenly over `size` bytes, the first and the last byte included."""
    return [((size - _SAMPLE) * i // (_SAMPLES - 1), _SAMPLE) for i in range(_SAMPLES)]
