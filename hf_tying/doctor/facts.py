"""What every disease is looked for in: the files, the report on them, and for an adapter the base model's files."""

import shlex
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ..config import SCHEMES
from ..report.checkpoint import Checkpoint
from ..report.records import TyingReport
from ..report.sources import Source
from ..report.stock_table import StockClass


@dataclass
class Facts:
    """A model or an adapter that is examined.

    Args:
        source: where its files are.
        report: the report on its ties; `None` where it could not be made.
        checkpoint: the model's files; `None` of an adapter.
        base: the base model's files, of an adapter whose base is known.
        thorough: whether the class may be built and all values of an adapter be read.
    """

    source: Source
    report: TyingReport | None = None
    checkpoint: Checkpoint | None = None
    base: Checkpoint | None = None
    thorough: bool = True

    @property
    def name(self) -> str:
        """The source as an argument of a command."""
        return shlex.quote(self.source.name)


@dataclass
class ModelFacts:
    """What the declarations and the files of a model say about its ties, read once.

    Args:
        checkpoint: the model's files.
    """

    checkpoint: Checkpoint

    @cached_property
    def stock(self) -> StockClass:
        """The class; an empty one where transformers has none."""
        return self.checkpoint.stock or StockClass([], {})

    @property
    def config(self) -> dict[str, Any]:
        """`config.json`."""
        return self.checkpoint.config

    def held(self, name: str) -> bool:
        """Whether the files have a parameter."""
        return bool(self.checkpoint.keys_of(name))

    @cached_property
    def declared(self) -> list[list[str]]:
        """The chains that the class ties under the flags of the file."""
        return self.stock.declared(self.config)

    @cached_property
    def switched_off(self) -> list[list[str]]:
        """The chains that the class can tie, and does not under these flags."""
        off = []
        for chain in self.stock.declared(self.config, flagged=False):
            rest = [name for name in chain if not any(name in other for other in self.declared)]
            if len(rest) == len(chain):
                off.append(chain)
        return off

    @cached_property
    def recorded(self) -> list[set[str]]:
        """The groups of the `tying` entry."""
        entry = self.checkpoint.entry
        return [set(names) for names in entry.groups.values()] if entry else []

    def pair(self) -> tuple[str, str] | None:
        """The names of target and output; `None` of a model that lacks one, or has one module for both."""
        roles = self.stock.roles
        if not {"target", "output"} <= roles.keys():
            return None
        target, output = roles["target"][-1], roles["output"][-1]
        return None if target == output else (target, output)

    def scheme_of(self, chain: list[str]) -> str:
        """The scheme that ties a chain: of the roles that it has."""
        roles = {self.stock.role_of[name] for name in chain if name in self.stock.role_of}
        return next((name for name, members in SCHEMES.items() if set(members) == roles), "two_way")
