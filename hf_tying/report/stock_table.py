"""What transformers' own classes tie: a table made from the classes of the tested versions, read without torch.

`python -m tests.stock_table` makes `stock_table.json` anew; a test compares each row with its class.
"""

import json
import re
from dataclasses import asdict, dataclass, field
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

_FILE = Path(__file__).with_name("stock_table.json")
FLAG = "tie_word_embeddings"


@dataclass(frozen=True)
class StockClass:
    """The ties, roles and names of a class, whatever the sizes of its config.

    Args:
        ties: (root, tied name, path of the config whose `tie_word_embeddings` decides); the path of the model's own
            config is `""`, that of a nested one its field's name.
        roles: names of each role, carriers first, as `Anatomy` has them.
        keys: names in files of those live names that are saved under others.
        flags: value of the flag at each path where a config says nothing.
        forced: the flag's value where the config class overrides what a file says (T5); `None` elsewhere.
        sizes: for the matrix of each role, the fields of the config that count its rows, as dotted paths.
        parts: the first two parts of the paths of all modules that hold tensors of a file.
        buffers: names of tensors in files that are no parameters, numbers as `*`.
    """

    ties: list[tuple[str, str, str]]
    roles: dict[str, list[str]]
    keys: dict[str, list[str]] = field(default_factory=dict)
    flags: dict[str, bool] = field(default_factory=dict)
    forced: bool | None = None
    sizes: dict[str, list[str]] = field(default_factory=dict)
    parts: list[str] = field(default_factory=list)
    buffers: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """The row of the table: the fields that say something."""
        return {name: value for name, value in asdict(self).items() if value not in ([], {}, None)}

    @classmethod
    def from_dict(cls, row: dict[str, Any]) -> "StockClass":
        """Read a row of the table."""
        return cls(**{"ties": [], "roles": {}} | row | {"ties": [tuple(tie) for tie in row.get("ties", [])]})

    @property
    def role_of(self) -> dict[str, str]:
        """The role of each name that has one."""
        return {name: role for role, names in self.roles.items() for name in names}

    @property
    def carriers(self) -> set[str]:
        """Names that hold a role's matrix without using it."""
        return {name for names in self.roles.values() for name in names[:-1]}

    def flag(self, config: dict[str, Any], path: str = "") -> bool:
        """The flag that counts at `path` for a config as it is in the file."""
        if self.forced is not None:
            return self.forced
        held = config.get(path) if path else config
        value = held.get(FLAG) if isinstance(held, dict) else None
        if isinstance(value, bool):
            return value
        kind = held.get("model_type") if isinstance(held, dict) and path else None
        return bool(config_defaults(kind).get(FLAG, self.flags.get(path, False)))

    def declared(self, config: dict[str, Any], flagged: bool = True) -> list[list[str]]:
        """The chains of names that the class ties, the root first.

        Args:
            config: the config as it is in the file.
            flagged: leave out what the flags of the config switch off. Default `True`.
        """
        chains: list[list[str]] = []
        for root, alias, path in self.ties:
            if flagged and not self.flag(config, path):
                continue
            met = [chain for chain in chains if root in chain or alias in chain]
            joined = list(dict.fromkeys([name for chain in met for name in chain] + [root, alias]))
            chains = [chain for chain in chains if chain not in met] + [joined]
        return chains

    def names_in_file(self, name: str, tensors: Any) -> list[str]:
        """The names under which `tensors` has the live name `name`; `[]` where it has not."""
        if name in tensors:
            return [name]
        keys = self.keys.get(name, [])
        return keys if keys and all(key in tensors for key in keys) else []


def generalised(name: str) -> str:
    """A name with its numbers as `*`."""
    return re.sub(r"(?<![^.])[0-9]+(?![^.])", "*", name)


#: The classes of this package with two roles, which transformers lacks: it ties nothing in them.
_OURS = {"TiedLSTMForCausalLM": StockClass([], {"target": ["lstm.embed_tokens.weight"], "output": ["lm_head.weight"]})}


def part_of(name: str) -> str:
    """The first two parts of the path of the module that holds a tensor."""
    return ".".join(generalised(name).split(".")[:-1][:2]) or name


@cache
def _table() -> dict[str, Any]:
    return json.loads(_FILE.read_text(encoding="utf-8"))


def versions() -> list[str]:
    """The versions of transformers that the table was made from, oldest first."""
    return _table()["versions"]


def config_defaults(model_type: object) -> dict[str, Any]:
    """The flag and the vocabulary sizes that a config class has by default; `{}` of an unknown one."""
    return _table()["configs"].get(model_type, {}) if isinstance(model_type, str) else {}


def stock_class(architecture: str) -> StockClass | None:
    """The row of a class, as the installed transformers has it; `None` of a class that the table lacks."""
    row = _table()["classes"].get(architecture)
    if row is None:
        return None
    for other, changed in row.get("since", {}).items():
        if _numbers(installed()) >= _numbers(other):
            row = changed
    return StockClass.from_dict({key: value for key, value in row.items() if key != "since"})


def roles_in(architecture: str) -> dict[str, str]:
    """The role of each name of a class that has one; `{}` of a class that neither the table nor this package has."""
    row = stock_class(architecture) or _OURS.get(architecture)
    return row.role_of if row else {}


@cache
def installed() -> str:
    """The version of the installed transformers; the newest of the table where none is installed."""
    try:
        return version("transformers")
    except PackageNotFoundError:
        return versions()[-1]


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"[0-9]+", text)[:3])
