"""A checkpoint as its files have it: config, tensors and where their bytes are. No weight is read, no code is run."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from ..config import TyingConfig, TyingError, entry_of
from ..entries import free_name
from ..ties.depth_groups import SUFFIX, depth_groups, with_all_visits
from ..ties.headers import RECORD
from .file_values import ValuesOnDisk
from .gguf_header import read_gguf
from .pickled import Pickled
from .sources import Source
from .stock_table import StockClass, stock_class

# Counts of a config that make a class build something that often.
_COUNTS = re.compile(r"\w*(layer|block|depth|expert|stage|stack|head|level|codebook)\w*")
# Experts are one tensor in the files of some models.
_ALWAYS_BUILT = 512


@dataclass(frozen=True)
class HeldTensor:
    """A tensor in a file: shape, dtype as the file spells it, and where its `size` bytes are."""

    shape: tuple[int, ...]
    dtype: str
    file: str
    start: int
    size: int

    @property
    def kind(self) -> tuple[tuple[int, ...], str]:
        """Shape and dtype: what two tensors with the same bytes must share to be equal."""
        return self.shape, self.dtype


@dataclass
class Checkpoint:
    """What the files of a model say.

    Args:
        source: where they are.
        config: `config.json`; empty of a single file without one.
        tensors: every tensor of the weight files.
        form: `"safetensors"`, `"bin"` or `"gguf"`.
        pickled: the opened `.bin` files; `None` of other forms.
    """

    source: Source
    config: dict[str, Any]
    tensors: dict[str, HeldTensor]
    form: str = "safetensors"
    pickled: Pickled | None = None
    twice: list[str] = field(default_factory=list)

    @cached_property
    def architecture(self) -> str:
        """The class that the config names."""
        named = self.config.get("architectures")
        first = named[0] if isinstance(named, list) and named and isinstance(named[0], str) else None
        return first or str(self.config.get("model_type", "unknown"))

    @cached_property
    def entry(self) -> TyingConfig | None:
        """The `tying` entry, checked; `None` where there is none."""
        return TyingConfig.in_config(self.config) if entry_of(self.config) is not None else None

    @cached_property
    def header(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """(shape, dtype) of each tensor."""
        return {name: held.kind for name, held in self.tensors.items()}

    @cached_property
    def values(self) -> ValuesOnDisk:
        """What compares the values of tensors."""
        return ValuesOnDisk(self.read, self.tensors, remote=self.source.path() is None)

    @cached_property
    def stock(self) -> StockClass | None:
        """What the class that the config names ties: from the table, else from the class, built without weights.

        `None` where transformers has no such class.

        Raises:
            TyingError: the config does not make that class, or would make it without measure.
        """
        if not self.config or self.form == "gguf":
            return None
        row = stock_class(self.architecture)
        if row is not None and self._fits(row):
            return row
        if (built := self.built) is None:
            return row
        from .stock_building import describe

        return describe(built)

    @cached_property
    def built(self) -> Any:
        """The class of the config on the meta device; `None` where transformers has no such class.

        Raises:
            TyingError: see `stock`.
        """
        from .stock_building import build

        if self.architecture == "unknown":
            return None
        self.refuse_counts()
        return build(self.config, self.architecture)

    def refuse_counts(self) -> None:
        """Refuse a config that asks for more layers, blocks or experts than the files can have tensors for.

        Raises:
            TyingError: naming the field.
        """
        most = max(len(self.tensors), _ALWAYS_BUILT)
        for path, value in counts_in(self.config):
            if value > most:
                raise TyingError(
                    f"config.json in {self.source.name} has {path} = {value:.6g}, and its files have "
                    f"{len(self.tensors):,} tensors: it is broken or hostile, and nothing is built of it."
                )

    def _fits(self, row: StockClass) -> bool:
        """Whether the names of the row are those of this file: a composed model can have other parts inside."""
        chains = row.declared(self.config, flagged=False)
        chains += [names for names in row.roles.values() if not any(set(names) & set(chain) for chain in chains)]
        known = [chain for chain in chains if any(name in row.role_of for name in chain)]
        return all(any(row.names_in_file(name, self.tensors) for name in chain) for chain in known)

    def read(self, name: str, start: int, count: int) -> bytes:
        """Read `count` bytes from `start` of a tensor."""
        held = self.tensors[name]
        if self.pickled is not None:
            return self.pickled.read(name, start, count)
        return self.source.read(held.file, held.start + start, min(count, held.size - start))

    def keys_of(self, name: str) -> list[str]:
        """The tensors that hold the parameter `name`; `[]` where the files do not have it.

        transformers saves some architectures under other names than those of the live model.
        """
        if name in self.tensors:
            return [name]
        return self.stock.names_in_file(name, self.tensors) if self.stock else []

    def matrix(self, name: str) -> tuple[tuple[int, ...], str]:
        """Shape and dtype of a parameter that the files have also in several tensors."""
        keys = self.keys_of(name)
        shape, dtype = self.tensors[keys[0]].kind
        return (shape if len(keys) == 1 else (len(keys), *shape)), dtype

    @cached_property
    def groups(self) -> list[tuple[str, list[str]]]:
        """The tie groups that are declared, by the entry or by the class under its flags: (name, names)."""
        if self.form == "gguf":  # llama.cpp takes the embedding for the softmax where a file has no other
            names = ["token_embd.weight", "output.weight"]
            return [("embeddings", names)] if names[0] in self.tensors and names[1] not in self.tensors else []
        entry, stock = self.entry, self.stock
        if entry is None or (entry.scheme is None and not entry.groups and not entry.depth):
            return named_groups(stock, stock.declared(self.config)) if stock else []
        if (entry.groups or entry.scheme == "none") and not self._strange_names:
            return [*entry.groups.items(), *self.layer_groups]
        if self.built is None:  # checks the names of the entry, too
            return [*entry.groups.items(), *self.layer_groups]
        from ..ties.verify import groups_of

        return [(group.name, list(group.names)) for group in groups_of(self.built)]

    @cached_property
    def layer_groups(self) -> list[tuple[str, list[str]]]:
        """The groups of shared layers, by the names that the files have."""
        stacks = self.entry.depth if self.entry else []
        every = [(with_all_visits(self.tensors, stack), stack) for stack in stacks]
        return [item for names, stack in every for item in depth_groups(names, stack).items()]

    @cached_property
    def relaxed(self) -> set[str]:
        """The names that differ from their root, by numbers that the files have beside them."""
        if self.entry is None or not (self.entry.relax or any("relax" in stack for stack in self.entry.depth)):
            return set()
        return {name.partition(f"{SUFFIX}.")[0] for name in self.tensors if f"{SUFFIX}." in name}

    @property
    def _strange_names(self) -> list[str]:
        """Names of the entry that neither the files nor the table have: of modules, or wrong; the class knows."""
        known = {name for tie in self.stock.ties for name in tie[:2]} if self.stock else set()
        names = [name for names in self.entry.groups.values() for name in names] if self.entry else []
        return [name for name in names if name not in known and not self.keys_of(name)]


def counts_in(config: dict[str, Any], path: str = "") -> Iterator[tuple[str, float]]:
    """The fields of a config, and of those in it, that count layers, blocks or experts; of lists, each number."""
    for name, value in config.items():
        where = f"{path}.{name}" if path else str(name)
        if isinstance(value, dict):
            yield from counts_in(value, where)
        elif _COUNTS.fullmatch(str(name)):
            for number in value if isinstance(value, list) else [value]:
                if isinstance(number, int | float) and not isinstance(number, bool):
                    yield where, number


def named_groups(stock: StockClass, chains: list[list[str]]) -> list[tuple[str, list[str]]]:
    """Names for the chains that a class ties, as `tie` gives them, and the names in its order: roots, then roles."""
    groups: dict[str, list[str]] = {}
    for chain in chains:
        roots = [root for root, _, _ in stock.ties if root in chain and not any(root == a for _, a, _ in stock.ties)]
        ordered = [name for name in dict.fromkeys([*roots, *stock.role_of, *chain]) if name in chain]
        held = [role for role, names in stock.roles.items() if set(names) & set(chain)]
        base = "embeddings" if len(held) > 1 else held[0] if held else ordered[0].rsplit(".", 1)[-1]
        name = free_name(base, groups)
        groups[name] = ordered
    return list(groups.items())


def read_checkpoint(source: Source) -> Checkpoint:
    """Read the config and the headers of a model.

    Raises:
        TyingError: files are missing, truncated, malformed, or larger than any real one.
    """
    if source.only and source.only.endswith(".gguf"):
        return _gguf(source, source.only)
    if source.only is None and not source.has("config.json"):
        gguf = [name for name in source.files() if name.endswith(".gguf") and "/" not in name]
        if gguf:
            return _gguf(source, gguf[0])
    config = _config_of(source)
    names = source.weight_files()
    if not names or not names[0].endswith(".safetensors"):
        if pickled := Pickled.of(source):
            tensors = {n: HeldTensor(p.shape, p.dtype, p.file, 0, p.size) for n, p in pickled.tensors.items()}
            return Checkpoint(source, config, tensors, "bin", pickled)
        raise TyingError(
            f"{source.name} has no model.safetensors, no model.safetensors.index.json and no pytorch_model.bin: "
            "expected a folder written by save_pretrained, a .safetensors, a .bin or a .gguf file."
        )
    tensors: dict[str, HeldTensor] = {}
    twice = []
    for file, places in source.all_places(names).items():
        twice += [name for name in places if name in tensors]
        for name, place in places.items():
            tensors[name] = HeldTensor(place.shape, place.dtype, file, place.start, place.end - place.start)
    return Checkpoint(source, config, tensors, twice=twice)


def _config_of(source: Source) -> dict[str, Any]:
    """The config of a model; of a plain module, one with what its record says; `{}` beside a single file."""
    if source.has("config.json"):
        return source.json("config.json")
    if source.has(RECORD):
        return {"architectures": ["nn.Module"], "tying": source.json(RECORD)}
    if source.only is not None:
        return {}
    if source.has("adapter_config.json"):
        raise TyingError(f"{source.name!r} is an adapter: expected a model. Name its base model.")
    raise TyingError(
        f"{source.name!r} has no config.json: expected a folder that save_pretrained wrote, or save_tied, whose "
        f"record is {RECORD}."
    )


def _gguf(source: Source, file: str) -> Checkpoint:
    header = read_gguf(source, file)
    tensors = {n: HeldTensor(t.shape, t.dtype, file, t.start, t.size) for n, t in header.tensors.items()}
    return Checkpoint(source, {"model_type": f"gguf ({header.architecture})"}, tensors, "gguf")
