"""Declaration of ties: `TyingConfig`, its plain-dict form in `config.json`, and the mixin for config classes.

Nothing here needs torch or model code, so that a declaration can be read and checked before any model exists.
"""

import copy
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from .entries import RELAXATIONS as RELAXATIONS
from .entries import checked_depth, checked_groups, group_name, groups_of_pairs, split_relaxed
from .errors import TyingError as TyingError
from .errors import nearest, short

# The base of `TyingConfigMixin`: a type checker sees the methods of the config class behind it.
if TYPE_CHECKING:
    from transformers.configuration_utils import PreTrainedConfig as _ConfigBase
else:
    _ConfigBase = object

#: Newest version of an entry. Without a relaxed group an entry is of version 1, which older readers know.
VERSION = 2

#: The usual groups by name: which roles each scheme makes one parameter. `source` is the encoder's input embedding,
#: `target` the decoder's (the only one of a language model), `output` the softmax matrix.
#: two_way: Press & Wolf 2016 section 3 (WT); three_way: the same, section 3.3 (TWWT), and Vaswani et al. 2017 section
#: 3.4.
SCHEMES: dict[str, tuple[str, ...]] = {
    "none": (),
    "two_way": ("target", "output"),
    "source_target": ("source", "target"),
    "three_way": ("source", "target", "output"),
}
SAVE_FORMATS = ("dedup", "portable")
LOSSES = ("stock", "tied")


class Extension(NamedTuple):
    """The module that honours an entry of `tying` that is not a tie.

    Args:
        module: module of this package, with the functions that `hf_tying.ties.extensions` describes.
        without: effect of the entry in the code of a published class, which runs where this package may not be
            installed: the end of a warning. `None`: the room of the module is copied along with that code.
    """

    module: str
    without: str | None = None


#: The entries of `tying` beside the ties, in the order in which they are honoured. A further one is a line here and a
#: module; in a `TyingConfig` its value is in `extensions`, as it stands in the file.
EXTENSIONS: dict[str, Extension] = {
    "projection": Extension("projection.model"),
    "loss": Extension("objectives.tied_loss", without="the stock loss is used, of the same value"),
}


@dataclass(frozen=True)
class ProjectionConfig:
    """A projection before the softmax (PR, Press & Wolf 2016 section 3.2), and the penalty that keeps it small.

    Args:
        bias (`bool`): whether the projection has a bias, as in the released code, with which the published
            perplexities were made. Default `True`.
        norm (`str`): norm of the penalty, see `hf_tying.losses.projection_penalty`.
        strength (`float`, *optional*): factor of the penalty, see `hf_tying.losses.projection_penalty`.

    Raises:
        TyingError: for an unknown norm or a negative strength.
    """

    bias: bool = True
    norm: str = "fro_squared_half"
    strength: float | None = None

    def __post_init__(self) -> None:
        if self.norm not in ("fro_squared_half", "fro"):
            raise TyingError(f"Unknown norm {short(self.norm)}: expected 'fro_squared_half' or 'fro'.")
        number = isinstance(self.strength, int | float) and not isinstance(self.strength, bool)
        if self.strength is not None and not (number and 0 <= self.strength < float("inf")):
            raise TyingError(f"The strength of a projection is {short(self.strength)}: expected 0 or more, or None.")
        if not isinstance(self.bias, bool):
            raise TyingError(f"The bias of a projection is {short(self.bias)}: expected True or False.")

    @classmethod
    def of(cls, value: "bool | dict[str, Any] | ProjectionConfig | None") -> "ProjectionConfig | None":
        """Read the value of an entry: a dict of fields, `True` for defaults, `None` or `False` for no projection."""
        if value is None or value is False:
            return None
        if value is True:
            return cls()
        if isinstance(value, cls):
            return value
        known = {"bias", "norm", "strength"}
        if not isinstance(value, dict) or not value.keys() <= known:
            found = sorted(value.keys() - known, key=str) if isinstance(value, dict) else value
            raise TyingError(
                f"`projection` has {short(found[0] if isinstance(found, list) else found)}: expected a dict with "
                f"some of {sorted(known)}, or true."
            )
        return cls(**value)

    def to_dict(self) -> dict[str, Any]:
        """The plain dict that `config.json` carries."""
        return {"bias": self.bias, "norm": self.norm, "strength": self.strength}


@dataclass(frozen=True)
class TyingConfig:
    """Declaration of the ties of a model: a scheme, explicit groups, or both.

    It is the same as the `tying` entry of `config.json`.

    Args:
        scheme (`str`, *optional*): `"none"`, `"two_way"`, `"source_target"` or `"three_way"` (see `SCHEMES`). `None`
            leaves the embeddings to the model's own declaration (`tie_word_embeddings`).
        groups (`dict[str, list[str]]`): further tie groups by name. Each is a list of at least two parameter names (or
            module names, which stand for all their parameters, pairwise). The first name of a group is its root, the
            name kept on disk. Names are plain strings, never patterns. A relaxed group is a dict `{"names": [...],
            "relax": {"kind": ...}}`: its other members differ from the root by a small amount (see `RELAXATIONS`).
        on_conflict (`str`): choice for a file with different values for names of one group: `"error"` (the default,
            so that no weights are dropped unasked), `"keep_untied"` (the group is removed, also from the config), or
            `"use:<parameter name>"`.
        save_format (`str`, *optional*): form of the file. `"dedup"` writes each group once, under its root;
            `"portable"` writes every name, so that any stock loader gets the right values. `None`, the default, is
            dedup where the stock class re-ties exactly these groups by itself, portable elsewhere.
        loss (`str`): loss of training steps. `"tied"` lets the model train through the tied softmax (`use_tied_loss`);
            `"stock"`, the default, leaves its loss alone, and is not written to the file.
        projection (`ProjectionConfig`, *optional*): a projection before the softmax (PR), which also takes a dict or
            `True`. `None`, the default, is not written to the file.
        extensions (`dict[str, Any]`): values of further entries of `EXTENSIONS`, by their keys.
        relax (`dict[str, dict]`): settings of relaxed groups by the names of the groups. They are taken from `groups`.
        depth (`list[dict]`): stacks whose layers are shared, see `hf_tying.share_layers`: `path` of the list of
            layers, `order` (the shared block of each layer), and, where there are any, `private` (names within a
            layer that stay apart), `relax`, `damped` (layers with a factor before what they add), `unrolled`.

    Raises:
        TyingError: for an unknown scheme, option or extension, a group of one, or one name in two groups.

    Example:
        >>> TyingConfig(scheme="two_way").to_dict()
        {'version': 1, 'scheme': 'two_way', 'groups': {}, 'on_conflict': 'error', 'save_format': None}
    """

    scheme: str | None = None
    groups: dict[str, list[str]] = field(default_factory=dict)
    on_conflict: str = "error"
    save_format: str | None = None
    loss: str = "stock"
    projection: ProjectionConfig | None = None
    extensions: dict[str, Any] = field(default_factory=dict)
    relax: dict[str, dict[str, Any]] = field(default_factory=dict)
    depth: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.scheme is not None and not (isinstance(self.scheme, str) and self.scheme in SCHEMES):
            hint = nearest(self.scheme, SCHEMES) if isinstance(self.scheme, str) else ""
            raise TyingError(f"Unknown tying scheme {short(self.scheme)}: expected one of {', '.join(SCHEMES)}{hint}.")
        if not isinstance(self.on_conflict, str) or (
            self.on_conflict not in ("error", "keep_untied") and not self.on_conflict.startswith("use:")
        ):
            raise TyingError(
                f"Unknown on_conflict {short(self.on_conflict)}: expected 'error', 'keep_untied' or 'use:<parameter "
                "name>'."
            )
        if self.save_format is not None and self.save_format not in SAVE_FORMATS:
            raise TyingError(f"Unknown save_format {short(self.save_format)}: expected 'dedup' or 'portable'.")
        if not isinstance(self.loss, str) or self.loss not in LOSSES:
            raise TyingError(f"Unknown loss {short(self.loss)}: expected 'stock' or 'tied'.")
        groups, relax = split_relaxed(self.groups)
        object.__setattr__(self, "groups", checked_groups(groups))
        object.__setattr__(self, "relax", {name: dict(self.relax[name]) for name in self.relax} | relax)
        object.__setattr__(self, "depth", checked_depth(self.depth))
        object.__setattr__(self, "projection", ProjectionConfig.of(self.projection))
        for key in self.extensions:
            if key not in EXTENSIONS or key in _FIELDS:
                raise TyingError(
                    f"Unknown extension {short(key)}: expected one of {sorted(EXTENSIONS.keys() - _FIELDS)}."
                )

    @classmethod
    def from_dict(cls, entry: object) -> "TyingConfig":
        """Read the `tying` entry of a config (`None`, an absent entry, gives the empty declaration).

        Raises:
            TyingError: for another type, an unknown key, or an entry that a newer version of hf_tying wrote.
        """
        if isinstance(entry, cls):
            return entry
        if entry is None:
            return cls()
        if not isinstance(entry, dict):
            raise TyingError(
                f"The `tying` entry of the config is {short(entry)}: expected a dict such as "
                f"{cls(scheme='two_way').to_dict()}. Correct the entry in config.json, or remove it to load untied."
            )
        version = entry.get("version", 1)
        if not isinstance(version, int) or isinstance(version, bool) or version < 1:
            raise TyingError(f"The `tying` entry has version {short(version)}: expected a number from 1 to {VERSION}.")
        groups = entry.get("groups")
        relaxed = isinstance(groups, dict) and any(isinstance(names, dict) for names in groups.values())
        second = relaxed or bool(entry.get("depth"))
        if version > (known := VERSION if second else 1):
            raise TyingError(
                f"The `tying` entry has version {short(version)}; this hf_tying reads up to version {known} of an "
                f"entry with{'' if second else 'out'} relaxed groups or shared layers. Upgrade with `pip install -U "
                "hf-tying`."
            )
        for key in entry:
            if key not in _keys() | {"version"}:
                hint = nearest(key, _keys()) if isinstance(key, str) else ""
                raise TyingError(
                    f"The `tying` entry has an unknown key {short(key)}: expected {sorted(_keys())}{hint}."
                )
        given = {key: entry[key] for key in _FIELDS & _keys() & entry.keys()}
        for key in ("on_conflict", "loss"):
            if given.get(key, "") is None:
                del given[key]
        further = {key: value for key, value in entry.items() if key in EXTENSIONS and key not in _FIELDS}
        return cls(**given, extensions=further)

    @classmethod
    def in_config(cls, config: Any) -> "TyingConfig":
        """The declaration in the config of a model; the empty one where it has none.

        Args:
            config: a `PreTrainedConfig`, or anything else that may have an attribute `tying`.

        Raises:
            TyingError: see `from_dict`.
        """
        return cls.from_dict(entry_of(config))

    @classmethod
    def of(cls, scheme_or_groups: "str | list[str] | tuple[str, ...] | dict[str, Any] | TyingConfig") -> "TyingConfig":
        """Read a declaration in any of the forms that `tie(model, ...)` accepts.

        Args:
            scheme_or_groups: name of a scheme, one group, a dict of named groups, a dict from tied name to source as
                in transformers' `_tied_weights_keys`, the dict of an entry, or a `TyingConfig`.

        Raises:
            TyingError: for anything else.
        """
        if isinstance(scheme_or_groups, cls):
            return scheme_or_groups
        if isinstance(scheme_or_groups, str):
            return cls(scheme=scheme_or_groups)
        if isinstance(scheme_or_groups, dict):
            if scheme_or_groups.keys() & {"version", "scheme"}:
                return cls.from_dict(scheme_or_groups)
            if scheme_or_groups and all(isinstance(value, str) for value in scheme_or_groups.values()):
                return cls(groups=groups_of_pairs(scheme_or_groups))
            return cls(groups=scheme_or_groups)
        if isinstance(scheme_or_groups, list | tuple):
            names = list(scheme_or_groups)
            return cls(groups={group_name(names): names})
        raise TyingError(
            f"Nothing to tie in {short(scheme_or_groups)}: expected a scheme ({', '.join(SCHEMES)}), a list of "
            "parameter names, a dict of such lists, or a TyingConfig."
        )

    def to_dict(self) -> dict[str, Any]:
        """The plain dict that `config.json` carries."""
        entry = {
            "version": VERSION if self.relax or self.depth else 1,
            "scheme": self.scheme,
            "groups": {name: self._group_entry(name) for name in self.groups},
            "on_conflict": self.on_conflict,
            "save_format": self.save_format,
        }
        if self.depth:
            entry["depth"] = copy.deepcopy(self.depth)
        if self.loss != "stock":
            entry["loss"] = self.loss
        if self.projection is not None:
            entry["projection"] = self.projection.to_dict()
        return entry | copy.deepcopy(self.extensions)

    def _group_entry(self, name: str) -> list[str] | dict[str, Any]:
        names = list(self.groups[name])
        return {"names": names, "relax": dict(self.relax[name])} if name in self.relax else names

    def relaxed_names(self, group: str) -> set[str]:
        """The names of a group that may differ from its root."""
        return (
            set(self.groups[group][1:]).difference(self.relax[group].get("exact", ()))
            if group in self.relax
            else set()
        )

    def declared_extensions(self) -> dict[str, Any]:
        """The entries beside the ties that are declared, in the order of `EXTENSIONS`, as the file has them."""
        entry = self.to_dict()
        return {key: entry[key] for key in EXTENSIONS if key in entry}

    def replace(self, **changes: Any) -> "TyingConfig":
        """A copy with some fields changed, or extensions by their keys; `None` removes an extension."""
        further = {key: changes.pop(key) for key in [*changes] if key in EXTENSIONS and key not in _FIELDS}
        if further:
            kept = self.extensions | further
            changes["extensions"] = {key: value for key, value in kept.items() if value is not None}
        if "groups" in changes and "relax" not in changes:  # those of groups that are no more are gone with them
            changes["relax"] = {
                name: self.relax[given]
                for name in changes["groups"]
                for given in self.relax
                if name == given or name.startswith(f"{given}.")  # one group of each parameter of modules
            }
        return replace(self, **changes)


# The keys of an entry that are fields of `TyingConfig`.
_FIELDS = TyingConfig.__dataclass_fields__.keys() - {"extensions"}


def _keys() -> set[str]:
    """The keys of an entry in a file. `relax` stands within its group there."""
    return (_FIELDS | EXTENSIONS.keys()) - {"relax"}


def entry_of(config: Any) -> dict[str, Any] | None:
    """The `tying` entry of a model's config; `None` where it has none, or where that field has another meaning.

    The config is a `PreTrainedConfig`, or the dict in its file. An entry of this package is a dict with one of its
    keys. The name of a scheme alone is refused as a mistake.

    Raises:
        TyingError: for the name of a scheme instead of an entry.
    """
    value = config.get("tying") if isinstance(config, dict) else getattr(config, "tying", None)
    if isinstance(value, TyingConfig):
        return value.to_dict()
    if isinstance(value, str) and value in SCHEMES:
        return TyingConfig.from_dict(value).to_dict()  # refuses it, with the form that is expected
    ours = _keys() | {"version"}
    return value if isinstance(value, dict) and (not value or value.keys() & ours) else None


class TyingConfigMixin(_ConfigBase):
    """Mixin that gives a config class the keyword `tying`, which is checked when the config is made.

    The live value is the same plain dict as in `config.json`; `tying_config` reads it as a `TyingConfig`.

    Example:
        >>> class TiedLlamaConfig(TyingConfigMixin, LlamaConfig):
        ...     model_type = "tied_llama"
        >>> TiedLlamaConfig(tying={"version": 1, "scheme": "two_way"}).tying_config.scheme
        'two_way'
    """

    tying: dict[str, Any] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        tying = kwargs.pop("tying", self.tying)
        super().__post_init__(**kwargs)
        # Always on the instance: `to_dict` writes attributes of instances, and a class default would be shared.
        self.tying = TyingConfig.from_dict(tying).to_dict() if tying is not None else None

    @property
    def tying_config(self) -> TyingConfig:
        """The declaration. It is empty when nothing is declared."""
        return TyingConfig.from_dict(self.tying)
