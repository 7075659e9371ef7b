"""The collectives of a training step, and what each process sends for one in a ring."""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Collective:
    """One collective of a training step.

    Attributes:
        kind: `"all_reduce"`, `"all_gather"` or `"reduce_scatter"`.
        axis: of the mesh.
        ranks: how many take part.
        payload: bytes of the whole tensor, on each of them.
        sent: bytes that each of them sends, in a ring.
        what: what is sent.
    """

    kind: str
    axis: str
    ranks: int
    payload: int
    sent: int
    what: str


def ring(kind: str, axis: str, ranks: int, payload: int, what: str) -> Collective:
    """A collective by a ring of `ranks` processes: its arguments are those of `Collective`."""
    rounds = 2 if kind == "all_reduce" else 1
    return Collective(kind, axis, ranks, payload, rounds * (ranks - 1) * payload // ranks, what)


def joined(found: Iterable[Collective]) -> tuple[Collective, ...]:
    """One for each kind, axis and purpose, with the bytes of all."""
    sums: dict[tuple, list[int]] = {}
    for c in found:
        totals = sums.setdefault((c.kind, c.axis, c.ranks, c.what), [0, 0])
        totals[0] += c.payload
        totals[1] += c.sent
    return tuple(
        Collective(kind, axis, n, payload, sent, what) for (kind, axis, n, what), (payload, sent) in sums.items()
    )
