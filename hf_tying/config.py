"""Declaration of ties: `TyingConfig`, its plain-dict form in `config.json`, and the mixin for config classes.

Nothing here needs torch or model code, so that a declaration can be read and checked before any model exists.
"""

import copy
import difflib
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from itertools import takewhile
from typing import TYPE_CHECKING, Any, NamedTuple

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


#: The ways in which a member of a group may differ from its root, and their settings with the defaults. `scale`: a
#: factor for each row. `lora`: a product of rank `rank`, from `init` `"zero"` or, of values that differ when they are
#: tied, `"svd"`. `basis`: `filters` further matrices that all members share, with coefficients for each. `bound`, for
#: every kind: largest norm of the difference as a share of the root's; none by default.
RELAXATIONS: dict[str, dict[str, Any]] = {
    "scale": {},
    "lora": {"rank": 8, "init": "zero"},
    "basis": {"filters": 2},
}


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

# A declaration may come from a file of unknown origin. Real ones have up to some thousand names of some hundred
# characters (every parameter of every layer tied). Larger ones are refused before any work.
_MOST_NAMES = 50_000
_LONGEST_NAME = 512
_LARGEST_RANK = 65_536
_MOST_STACKS = 16
_MOST_LAYERS = 10_000


class TyingError(ValueError):
    """A tie is wrongly declared, cannot be made, or no longer holds. Messages say what, expected, found, way out."""


def nearest(name: str, candidates: Iterable[str], most: int = 3) -> str:
    """`"; the nearest names are 'a', 'b'"`, or nothing when none resembles `name`: the tail of many messages."""
    tail = name.rsplit(".", 2)[-2:]  # of ten thousand names, only those with a similar end are compared
    pool = [c for c in candidates if any(part in c for part in tail)] or list(candidates)
    matches = difflib.get_close_matches(name, pool[:2000], n=most, cutoff=0.4)
    return f"; the nearest names are {', '.join(repr(m) for m in matches)}" if matches else ""


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
            raise TyingError(f"Unknown norm {_short(self.norm)}: expected 'fro_squared_half' or 'fro'.")
        number = isinstance(self.strength, int | float) and not isinstance(self.strength, bool)
        if self.strength is not None and not (number and 0 <= self.strength < float("inf")):
            raise TyingError(f"The strength of a projection is {_short(self.strength)}: expected 0 or more, or None.")
        if not isinstance(self.bias, bool):
            raise TyingError(f"The bias of a projection is {_short(self.bias)}: expected True or False.")

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
                f"`projection` has {_short(found[0] if isinstance(found, list) else found)}: expected a dict with "
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
            raise TyingError(
                f"Unknown tying scheme {_short(self.scheme)}: expected one of {', '.join(SCHEMES)}{hint}."
            )
        if not isinstance(self.on_conflict, str) or (
            self.on_conflict not in ("error", "keep_untied") and not self.on_conflict.startswith("use:")
        ):
            raise TyingError(
                f"Unknown on_conflict {_short(self.on_conflict)}: expected 'error', 'keep_untied' or 'use:<parameter "
                "name>'."
            )
        if self.save_format is not None and self.save_format not in SAVE_FORMATS:
            raise TyingError(f"Unknown save_format {_short(self.save_format)}: expected 'dedup' or 'portable'.")
        if not isinstance(self.loss, str) or self.loss not in LOSSES:
            raise TyingError(f"Unknown loss {_short(self.loss)}: expected 'stock' or 'tied'.")
        groups, relax = _split_relaxed(self.groups)
        object.__setattr__(self, "groups", _checked_groups(groups))
        object.__setattr__(self, "relax", {name: dict(self.relax[name]) for name in self.relax} | relax)
        object.__setattr__(self, "depth", _checked_depth(self.depth))
        object.__setattr__(self, "projection", ProjectionConfig.of(self.projection))
        for key in self.extensions:
            if key not in EXTENSIONS or key in _FIELDS:
                raise TyingError(
                    f"Unknown extension {_short(key)}: expected one of {sorted(EXTENSIONS.keys() - _FIELDS)}."
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
                f"The `tying` entry of the config is {_short(entry)}: expected a dict such as "
                f"{cls(scheme='two_way').to_dict()}. Correct the entry in config.json, or remove it to load untied."
            )
        version = entry.get("version", 1)
        if not isinstance(version, int) or isinstance(version, bool) or version < 1:
            raise TyingError(
                f"The `tying` entry has version {_short(version)}: expected a number from 1 to {VERSION}."
            )
        groups = entry.get("groups")
        relaxed = isinstance(groups, dict) and any(isinstance(names, dict) for names in groups.values())
        second = relaxed or bool(entry.get("depth"))
        if version > (known := VERSION if second else 1):
            raise TyingError(
                f"The `tying` entry has version {_short(version)}; this hf_tying reads up to version {known} of an "
                f"entry with{'' if second else 'out'} relaxed groups or shared layers. Upgrade with `pip install -U "
                "hf-tying`."
            )
        for key in entry:
            if key not in _keys() | {"version"}:
                hint = nearest(key, _keys()) if isinstance(key, str) else ""
                raise TyingError(
                    f"The `tying` entry has an unknown key {_short(key)}: expected {sorted(_keys())}{hint}."
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
                return cls(groups=_groups_of_pairs(scheme_or_groups))
            return cls(groups=scheme_or_groups)
        if isinstance(scheme_or_groups, list | tuple):
            names = list(scheme_or_groups)
            return cls(groups={_group_name(names): names})
        raise TyingError(
            f"Nothing to tie in {_short(scheme_or_groups)}: expected a scheme ({', '.join(SCHEMES)}), a list of "
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


def _split_relaxed(groups: Any) -> tuple[Any, dict[str, dict[str, Any]]]:
    """Groups as lists of names, and the checked settings of those that are relaxed."""
    if not isinstance(groups, dict) or not any(isinstance(value, dict) for value in groups.values()):
        return groups, {}
    names, relax = {}, {}
    for group, value in groups.items():
        names[group] = value
        if isinstance(value, dict):
            if value.keys() - {"names", "relax"} or "names" not in value:
                raise TyingError(
                    f"Group {_short(group)} has the keys {sorted(map(str, value))[:5]}: expected a name and a list of "
                    'parameter names, or a dict {"names": [...], "relax": {"kind": ...}}.'
                )
            names[group] = value["names"]
            if value.get("relax") is not None:
                relax[group] = _checked_relaxation(group, value["relax"])
    return names, relax


def _checked_relaxation(group: Any, value: Any) -> dict[str, Any]:
    kind = value.get("kind") if isinstance(value, dict) else None
    if not isinstance(kind, str) or kind not in RELAXATIONS:
        raise TyingError(
            f"Group {_short(group)} is relaxed by {_short(kind if isinstance(value, dict) else value)}: expected a "
            f"dict with `kind`, one of {', '.join(RELAXATIONS)}."
        )
    for key, setting in value.items():
        if key not in {*RELAXATIONS[kind], "kind", "bound"}:
            known = sorted([*RELAXATIONS[kind], "bound"])
            raise TyingError(f"Group {_short(group)}: kind {kind!r} has no setting {_short(key)}: expected {known}.")
        if key in ("rank", "filters"):
            fits = isinstance(setting, int) and not isinstance(setting, bool) and 0 < setting <= _LARGEST_RANK
            wanted = f"a whole number from 1 to {_LARGEST_RANK}"
        elif key == "bound":
            fits = (
                setting is None or isinstance(setting, int | float) and not isinstance(setting, bool) and setting > 0
            )
            fits, wanted = fits and setting != float("inf"), "a positive number, or none"
        else:
            fits, wanted = key == "kind" or setting in ("zero", "svd"), "'zero' or 'svd'"
        if not fits:
            raise TyingError(f"Group {_short(group)} is relaxed with {key}={_short(setting)}: expected {wanted}.")
    return dict(value)


def _checked_depth(depth: Any) -> list[dict[str, Any]]:
    if not isinstance(depth, list | tuple) or len(depth) > _MOST_STACKS:
        raise TyingError(f"`depth` is {_short(depth)}: expected a list of up to {_MOST_STACKS} stacks of layers.")
    checked = []
    for stack in depth:
        known = {"path", "order", "private", "relax", "damped", "unrolled"}
        if not isinstance(stack, dict) or not {"path", "order"} <= stack.keys() <= known:
            raise TyingError(
                f"`depth` has the stack {_short(sorted(map(str, stack)) if isinstance(stack, dict) else stack)}: "
                f"expected a dict with `path` and `order`, and some of {sorted(known - {'path', 'order'})}."
            )
        path, order = stack["path"], stack["order"]
        if not isinstance(path, str) or not path or len(path) > _LONGEST_NAME:
            raise TyingError(f"`depth` has the path {_short(path)}: expected the name of a list of layers.")
        if any(path == other["path"] for other in checked):
            raise TyingError(f"`depth` has the path {_short(path)} twice: expected each list of layers once.")
        if not isinstance(order, list | tuple) or not 1 < len(order) <= _MOST_LAYERS:
            raise TyingError(f"The order of {_short(path)} is {_short(order)}: expected the block of each layer.")
        for key, wanted in (("order", order), ("damped", stack.get("damped", []))):
            fits = isinstance(wanted, list | tuple) and all(
                isinstance(number, int) and not isinstance(number, bool) and 0 <= number < _MOST_LAYERS
                for number in wanted
            )
            if not fits:
                raise TyingError(f"`{key}` of {_short(path)} is {_short(wanted)}: expected whole numbers from 0.")
        private = stack.get("private", [])
        named = isinstance(private, list | tuple) and len(private) <= _MOST_NAMES
        if not named or not all(isinstance(name, str) and 0 < len(name) <= _LONGEST_NAME for name in private):
            raise TyingError(f"`private` of {_short(path)} is {_short(private)}: expected names within a layer.")
        entry = {"path": path, "order": list(order)}
        if private:
            entry["private"] = list(private)
        if stack.get("relax") is not None:
            entry["relax"] = _checked_relaxation(path, stack["relax"])
        if stack.get("damped"):
            entry["damped"] = list(stack["damped"])
        if stack.get("unrolled"):
            entry["unrolled"] = True
        checked.append(entry)
    return checked


def _checked_groups(groups: Any) -> dict[str, list[str]]:
    if groups is None:
        return {}
    if not isinstance(groups, dict):
        raise TyingError(
            f"`groups` is {_short(groups)}: expected a dict from a group's name to a list of parameter names."
        )
    if sum(len(names) for names in groups.values() if isinstance(names, list | tuple)) > _MOST_NAMES:
        raise TyingError(f"`groups` has more than {_MOST_NAMES} names: no model ties that many; the entry is refused.")
    group_of: dict[str, str] = {}
    for group, names in groups.items():
        if not isinstance(group, str) or not isinstance(names, list | tuple):
            raise TyingError(
                f"Group {_short(group)} is {_short(names)}: expected a name and a list of parameter names."
            )
        for name in names:
            if not isinstance(name, str) or not name or len(name) > _LONGEST_NAME:
                raise TyingError(f"Group {_short(group)} has the member {_short(name)}: expected a parameter name.")
            if name in group_of:
                where = f"twice in {group!r}" if group_of[name] == group else f"in {group_of[name]!r} and {group!r}"
                raise TyingError(f"{name!r} stands {where}: a name belongs to one group, once. Merge the groups.")
            group_of[name] = group
        if len(names) < 2:
            raise TyingError(
                f"Group {_short(group)} has {len(names)} name(s) {list(names)}: a tie needs at least two."
            )
    return {group: list(names) for group, names in groups.items()}


def _groups_of_pairs(source_of: dict[str, str]) -> dict[str, list[str]]:
    """Groups from `{tied name: source}`. Each source is the root of its group."""
    groups: dict[str, list[str]] = {}
    for name in source_of:
        root, seen = name, {name}
        while (root := source_of.get(root, root)) in source_of and root not in seen:
            seen.add(root)
        group = groups.setdefault(root, [root])
        if name not in group:
            group.append(name)
    named: dict[str, list[str]] = {}
    for names in groups.values():
        base = _group_name(names)
        named[next(n for n in (base, *(f"{base}_{i}" for i in range(2, 10_000))) if n not in named)] = names
    return named


def _group_name(names: list) -> str:
    """A readable name for a group given as a list: the common end of its names."""
    if not names or not all(isinstance(name, str) for name in names):
        return "group"
    tails = zip(*(name.split(".")[::-1] for name in names), strict=False)
    common = [parts[0] for parts in takewhile(lambda parts: len(set(parts)) == 1, tails)]
    return ".".join(common[::-1]) or names[0]


def _short(value: Any) -> str:
    """`repr` for messages. It never walks a hostile value deeper or longer than a message can show."""
    if isinstance(value, str):
        return repr(value if len(value) <= 80 else value[:77] + "...")
    if isinstance(value, int) and value.bit_length() > 200:
        return "a number of more than 60 digits"
    if isinstance(value, int | float | bool | None):
        return repr(value)
    return f"of type {type(value).__name__}"
