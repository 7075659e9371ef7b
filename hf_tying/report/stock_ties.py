"""What plain transformers makes of the ties of a file: its own rule of `tie_weights`, applied to names and values."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from .checkpoint import Checkpoint


@dataclass(frozen=True)
class StockTies:
    """How the model of plain transformers differs from that of this package.

    Args:
        copies: number of elements that it holds more, as copies of what is tied.
        merged: number of elements that it holds less, of names that are apart with us and that its class ties.
        wrong: names that get the values of another matrix.
        random: names of ties that get random numbers.
    """

    copies: int
    merged: int
    wrong: list[str]
    random: list[str]


def stock_ties(model: Any, checkpoint: Checkpoint, groups: Iterable[list[str]], own: Iterable[str] = ()) -> StockTies:
    """Compare what plain transformers loads with what this package does.

    Args:
        model: the stock class, built without weights and without the `tying` entry.
        checkpoint: the files.
        groups: the names of each tie group that this package makes of them.
        own: names whose values are those of the file, though a group has them: of relaxed ties.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    tied = {alias: root for alias, root in model.all_tied_weights_keys.items() if {alias, root} <= parameters.keys()}
    groups, own = [list(names) for names in groups], set(own)
    ours = {name: i for i, names in enumerate(groups) for name in names if name in parameters}
    held = {name for name in {*ours, *tied, *tied.values()} if checkpoint.keys_of(name)}
    root_of = _tie(tied, held, checkpoint)
    place: dict[str, object] = {name: root_of.get(name, id(parameters[name])) for name in {*ours, *root_of}}

    def elements(names: Iterable[str], key: Mapping[str, object]) -> int:
        """The elements beyond the first matrix, of names that are one matrix by another count."""
        apart = {key.get(name, name): parameters[name].numel() for name in names}
        return sum(apart.values()) - max(apart.values(), default=0)

    one = {root: [name for name in root_of if root_of[name] == root] for root in root_of.values()}
    carriers = checkpoint.stock.carriers if checkpoint.stock else set()
    wrong, random = [], []
    for name in place.keys() - carriers:
        read = root_of.get(name, name)
        known = [each for each in (groups[ours[name]] if name in ours else [name]) if checkpoint.keys_of(each)]
        meant = [name] if name in own else known
        if known and not checkpoint.keys_of(read):
            random.append(name)
        elif known and read not in meant and not _equal(checkpoint, read, meant[0]):
            wrong.append(name)
    return StockTies(
        copies=sum(elements((name for name in names if name in place), place) for names in groups),
        merged=sum(elements(names, ours) for names in one.values()),
        wrong=sorted(wrong),
        random=sorted(random),
    )


def _tie(tied: Mapping[str, str], held: set[str], checkpoint: Checkpoint) -> dict[str, str]:
    """The name whose values each name of `tied` has after loading, as `PreTrainedModel.tie_weights` does it.

    A pair of which the file has both is tied where they are equal; of a pair of which it has one, that one counts;
    of a pair of which it has none, another name of the same root does.
    """
    root_of = {name: name for pair in tied.items() for name in pair}
    missing = root_of.keys() - held
    pairs = list(tied.items())
    for i, (alias, root) in enumerate(pairs):
        target, source, found = alias, root, True
        if root not in missing and alias not in missing:
            if not _equal(checkpoint, root_of[root], root_of[alias]):
                continue
        elif alias not in missing:
            target, source = root, alias
        elif root in missing:
            backup = next((other for other, of in pairs[i + 1 :] if of == root and other not in missing), None)
            source, found = backup or root, backup is not None
        root_of[target] = root_of[source]
        if found:
            missing.discard(target)
    return root_of


def _equal(checkpoint: Checkpoint, name: str, other: str) -> bool:
    """Whether the files have the same values for two names; a model loads both in one dtype."""
    keys, others = checkpoint.keys_of(name), checkpoint.keys_of(other)
    if name == other or keys == others:
        return True
    if len(keys) != len(others) or not keys:
        return False
    values = checkpoint.values
    return values.equal(keys, others) or all(values.same_numbers(a, b) for a, b in zip(keys, others, strict=True))
