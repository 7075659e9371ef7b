"""`compare`: what differs between two checkpoints, in their ties, their configs, their names and their values."""

from pathlib import Path
from typing import Any

from ..report.checkpoint import Checkpoint, read_checkpoint
from ..report.file_values import ValuesOnDisk
from ..report.opening import open_source
from ..report.stock_table import FLAG

_FIELDS = (FLAG, "vocab_size", "tying", "architectures")


def compare(a: str | Path, b: str | Path, *, token: str | bool | None = None) -> list[dict[str, Any]]:
    """Compare two checkpoints.

    A matrix that one file has under several names, and the other under one, is the same matrix. Every byte is
    compared; where one of them is on the Hub, of a matrix of more than 32 KiB, samples.

    Args:
        a: a folder, a file of weights, or an id on the Hub.
        b: the other one.
        token: token of the Hub.

    Returns:
        A dict for each difference, with `what` (`"config"`, `"tie"`, `"name"`, `"shape"`, `"values"`), `name`, and
        what each side has; for values the rows, the largest difference and the cosine.

    Raises:
        TyingError: one of them cannot be read.
    """
    one, other = (read_checkpoint(open_source(source, token=token)) for source in (a, b))
    found: list[dict[str, Any]] = [
        {"what": "config", "name": field, "a": one.config.get(field), "b": other.config.get(field)}
        for field in _FIELDS
        if one.config.get(field) != other.config.get(field)
    ]
    ties = [{frozenset(names): group for group, names in checkpoint.groups} for checkpoint in (one, other)]
    for names in sorted({*ties[0]} ^ {*ties[1]}, key=sorted):
        found.append({"what": "tie", "name": sorted(names), "a": names in ties[0], "b": names in ties[1]})
    return found + _values(one, other)


def _values(one: Checkpoint, other: Checkpoint) -> list[dict[str, Any]]:
    both = _Both(one, other)
    found: list[dict[str, Any]] = []
    for name in sorted({*one.tensors, *other.tensors}):
        left, right = _held_as(one, name), _held_as(other, name)
        if left is None or right is None:
            found.append({"what": "name", "name": name, "a": left is not None, "b": right is not None})
            continue
        kinds = one.tensors[left].kind, other.tensors[right].kind
        if kinds[0] != kinds[1]:
            found.append({"what": "shape", "name": name, "a": _shown(kinds[0]), "b": _shown(kinds[1])})
        elif not both.values.equal([f"a {left}"], [f"b {right}"]):
            apart = both.values.difference(f"a {left}", f"b {right}")
            figures = {} if apart is None else {"rows": apart.rows, "of": apart.of, "largest": apart.largest,
                                                "cosine": apart.cosine}  # fmt: skip
            found.append({"what": "values", "name": name} | figures)
    return found


def _held_as(checkpoint: Checkpoint, name: str) -> str | None:
    """The tensor that holds `name`: itself, or another name of its tie."""
    if name in checkpoint.tensors:
        return name
    if name in checkpoint.relaxed:  # not its root, and what it comes to is not in the file
        return None
    keys = checkpoint.stock.keys if checkpoint.stock else {}
    live = {name, *(each for each, on_disk in keys.items() if on_disk == [name])}
    for _, names in checkpoint.groups:
        if live & set(names):
            return next((key for other in names for key in checkpoint.keys_of(other)), None)
    return None


def _shown(kind: tuple[tuple[int, ...], str]) -> str:
    return f"{list(kind[0])} {kind[1]}"


class _Both:
    """The tensors of two checkpoints under one reader of values: `a NAME` and `b NAME`."""

    def __init__(self, one: Checkpoint, other: Checkpoint) -> None:
        self.parts = {"a": one, "b": other}
        tensors = {f"{side} {name}": held for side, part in self.parts.items() for name, held in part.tensors.items()}
        remote = any(part.source.path() is None for part in self.parts.values())
        self.values = ValuesOnDisk(self.read, tensors, remote, exact=not remote)

    def read(self, name: str, start: int, count: int) -> bytes:
        side, _, name = name.partition(" ")
        return self.parts[side].read(name, start, count)
