"""`rewrite`: a new folder with other ties, made from the files alone, shard by shard, and verified by loading it."""

import json
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

from ..config import SCHEMES, TyingConfig, TyingError, nearest
from ..report.checkpoint import Checkpoint, read_checkpoint
from ..report.file_values import ValuesOnDisk
from ..report.opening import open_source
from ..report.stock_table import FLAG
from .facts import ModelFacts
from .new_folder import Plan, new_folder, placed_in, refuse_unloadable, replaced, write_folder

#: What can be asked for, beside the schemes.
FORMS = ("portable", "dedup", "merged")
# Files that are not copied: weights in another form, and what belongs to the run that wrote them.
_LEFT_OUT = (".bin", ".pt", ".pth", ".safetensors", ".index.json", ".gguf", ".h5", ".msgpack")


class UndecidedError(TyingError):
    """A choice is missing, without which nothing is written."""

    exit_code = 4


@dataclass
class Rewriting:
    """What will be written, or was.

    Args:
        source: what was read.
        out: the new folder.
        ties: the groups of the new files, the root first.
        changes: what changes in config.json, as (field, before, after).
        parameters: parameters in the files before and after.
        bytes: bytes of weights before and after.
        files: the weight files that are written; `[]` of a dry run of `"merged"`.
        copied: the other files.
        left_out: weights that are not of these files, such as other forms of them, states of a run or modules in
            subfolders.
    """

    source: str
    out: str
    ties: dict[str, list[str]]
    changes: list[tuple[str, Any, Any]]
    parameters: tuple[int, int] = (0, 0)
    bytes: tuple[int, int] = (0, 0)
    files: list[str] = field(default_factory=list)
    copied: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain types, ready for JSON."""
        return {
            "out": self.out,
            "groups": self.ties,
            "changes": [{"field": name, "before": old, "after": new} for name, old, new in self.changes],
            "parameters": list(self.parameters),
            "bytes": list(self.bytes),
            "files": self.files,
            "copied": self.copied,
            "left_out": self.left_out,
        }


def rewrite(
    source: str | Path,
    out: str | Path,
    to: str,
    *,
    init_from: str | None = None,
    untied: list[str] | None = None,
    dry_run: bool = False,
    revision: str | None = None,
    subfolder: str | None = None,
    token: str | bool | None = None,
) -> Rewriting:
    """Write a checkpoint anew with other ties, or in another form of file. `source` is left as it is.

    One shard is written at a time, in its dtypes and under its name, in pieces of 16 MiB. The tokenizer and all other
    files come along, but for weights in another form. The folder is made beside `out`, loaded once, and renamed when
    all is well.

    Args:
        source: a folder with safetensors or `.bin` files, or the same on the Hub (whose pieces are read by range).
        out: the new folder; it must not exist, or be empty.
        to: a scheme (`"two_way"`, `"three_way"`, `"source_target"`, `"none"`); `"portable"` or `"dedup"` for the ties
            that there are, with every name written, or each matrix once; or `"merged"`: the projection before the
            softmax is folded into it, for which the model is loaded.
        init_from: role (`"source"`, `"target"`, `"output"`) or parameter name whose values a group keeps where its
            names differ.
        untied: with `to="none"`, the names to untie. Default: all.
        dry_run: write nothing.
        revision: branch, tag or commit on the Hub.
        subfolder: folder inside of `source`.
        token: token of the Hub.

    Returns:
        What was written, or would be.

    Raises:
        UndecidedError: names of a group differ, and `init_from` does not choose.
        TyingError: the files cannot be read, the scheme does not fit the model, `out` is not empty; or the files have
            relaxed groups or shared layers, which are written from the live model.
    """
    checkpoint = read_checkpoint(open_source(source, revision, subfolder, token))
    if checkpoint.form == "gguf":
        raise TyingError(f"{source} is a GGUF file, which is not written here: rewrite the model it was made from.")
    if not checkpoint.config or checkpoint.source.only:
        raise TyingError(f"{source} is one file: expected a folder with config.json, whose ties can be written.")
    out = Path(out)
    refuse_existing(out)
    _refuse_live(checkpoint)
    if to == "merged":
        return _merged(checkpoint, out, dry_run)
    plan = _plan(checkpoint, to, init_from, untied)
    result = _described(checkpoint, plan, out)
    if not dry_run:
        write_folder(checkpoint, plan, out, result.copied)
    return result


def refuse_existing(out: Path) -> None:
    """Refuse a folder that has something in it, and one that cannot be made."""
    if out.is_symlink() or (out.exists() and (not out.is_dir() or any(out.iterdir()))):
        raise TyingError(f"{out} exists already: give a new folder; nothing is written over.")
    if not out.absolute().parent.is_dir():
        raise TyingError(f"{out.absolute().parent} is no folder: expected one that exists, to make {out.name} in.")


def _refuse_live(checkpoint: Checkpoint) -> None:
    """Refuse what no file has as it is used: a tie with differences, and layers that are visits of one block."""
    entry = checkpoint.entry
    if entry is not None and (entry.relax or any(not stack.get("unrolled") for stack in entry.depth)):
        what, away = ("relaxed groups", "untie") if entry.relax else ("shared layers", "unroll")
        raise TyingError(
            f"{checkpoint.source.name} has {what}, which are written from the model and not from its files: load it, "
            f"{away}(model), or tie(model, TyingConfig(save_format=...)) for another form, and save_pretrained."
            + ("" if entry.relax else " The plain model: hf-tying export --format unrolled.")
        )


def _plan(checkpoint: Checkpoint, to: str, init_from: str | None, untied: list[str] | None) -> Plan:
    model = ModelFacts(checkpoint)
    if to not in SCHEMES and to not in FORMS:
        raise TyingError(f"Unknown form {to!r:.80}: expected one of {', '.join([*SCHEMES, *FORMS])}.")
    if to in SCHEMES and checkpoint.stock is None and (checkpoint.entry is None or to != "none"):
        raise TyingError(
            f"transformers has no {checkpoint.architecture}, so that its ties are not known here: load the model, "
            "tie(model, ...) or untie(model), and save_pretrained."
        )
    now = dict(checkpoint.groups)
    groups = now if to in FORMS else _groups_of_scheme(model, to, now, untied)
    _refuse_unknown_choice(model, groups, init_from)
    has = _values_now(model, now)
    value_of: dict[str, str] = {}
    for names in groups.values():
        kept = _chosen(checkpoint, model, names, has, init_from)
        value_of |= dict.fromkeys(names, kept)
    entry = checkpoint.entry
    names_of = {name: names for names in groups.values() for name in names}
    # A tie that is taken away leaves each name the values that it had.
    value_of |= {name: has[name] for names in now.values() for name in names if name in has and name not in names_of}
    by_class = {frozenset(chain) for chain in _declared_with(model, groups)}
    dedup = to == "dedup" or (to in SCHEMES and all(frozenset(names) in by_class for names in groups.values()))
    if to == "dedup" and any(frozenset(names) not in by_class for names in groups.values()) and entry is None:
        raise TyingError("The class does not tie these names by itself, so that dedup would lose them: use portable.")
    written = [name for name in value_of if not (dedup and name in names_of and name != names_of[name][0])]
    config = _config(model, to, groups, dedup, untied)
    return Plan(groups, value_of, written, config)


def _groups_of_scheme(
    model: ModelFacts, scheme: str, now: dict[str, list[str]], untied: list[str] | None
) -> dict[str, list[str]]:
    """The groups under a scheme: the roles that it names, each role's carriers with it, and ties of no embedding."""
    roles = model.stock.roles
    if scheme == "none" and untied:
        known = {name for names in now.values() for name in names}
        if strange := [name for name in untied if name not in known]:
            raise TyingError(f"{strange[0]!r:.200} is not tied: expected some of {', '.join(sorted(known))}.")
        left = {group: [name for name in names if name not in untied] for group, names in now.items()}
        return {group: names for group, names in left.items() if len(names) > 1}
    if missing := [role for role in SCHEMES[scheme] if role not in roles]:
        raise TyingError(
            f"{model.checkpoint.architecture} cannot be tied {scheme}: it has no {missing[0]} embedding that is known "
            f"here. Roles found: {', '.join(roles) or 'none'}."
        )
    named = {name for names in roles.values() for name in names}
    groups = {group: names for group, names in now.items() if not named & set(names)}
    if scheme == "none":
        return {} if untied is None else groups
    joined = [name for role in SCHEMES[scheme] for name in roles[role]]
    alone = [list(names) for role, names in roles.items() if role not in SCHEMES[scheme]]
    roots = [name for chain in model.stock.declared(model.config, flagged=False) for name in chain[:1]]
    ordered = [*(name for name in roots if name in joined), *joined]
    for names in (list(dict.fromkeys(ordered)), *alone):
        if len(names) > 1:
            groups[next(n for n in ("embeddings", "embeddings_2", "embeddings_3") if n not in groups)] = names
    return groups


def _refuse_unknown_choice(model: ModelFacts, groups: dict[str, list[str]], init_from: str | None) -> None:
    known = [name for names in groups.values() for name in names if model.held(name)]
    if init_from is not None and init_from not in model.stock.roles and init_from not in known:
        raise TyingError(
            f"--init-from {init_from!r:.200}: expected a role ({', '.join(model.stock.roles) or 'none here'}) or a "
            f"name in the tie groups that the files have{nearest(init_from, known)}."
        )


def _values_now(model: ModelFacts, now: dict[str, list[str]]) -> dict[str, str]:
    """The name under which the files have the values of each name: its own, or another one of its tie."""
    has = {}
    for names in now.values():
        present = next((name for name in names if model.held(name)), None)
        has |= {name: name if model.held(name) else present for name in names if present is not None}
    return has


def _chosen(
    checkpoint: Checkpoint, model: ModelFacts, names: list[str], has: dict[str, str], init_from: str | None
) -> str:
    """The name whose values a group keeps; `has` tells where a name that the files leave out has its own."""
    has = {name: has.get(name, name) for name in names}
    held = [name for name in dict.fromkeys(has.values()) if model.held(name)]
    if not held:
        raise TyingError(f"The files have no name of {', '.join(map(repr, names))}: there are no values to keep.")
    used = [has[name] for name in names if name not in model.stock.carriers]
    used = [name for name in dict.fromkeys(used) if name in held] or held
    shapes = {checkpoint.matrix(name)[0] for name in held}
    if len(shapes) > 1:
        raise TyingError(f"{', '.join(map(repr, held))} have different shapes, {sorted(shapes)}: they cannot be one.")
    other = next((name for name in used[1:] if not _same_values(checkpoint, used[0], name)), None)
    if other is None:
        return used[0]
    by_role = model.stock.roles.get(init_from or "", [])
    for name in [*by_role[::-1], init_from]:
        if has.get(name) in held:
            return has[name]
    roles = [role for role, of_role in model.stock.roles.items() if set(of_role) & has.keys()]
    found = checkpoint.values.difference(checkpoint.keys_of(used[0])[0], checkpoint.keys_of(other)[0])
    raise UndecidedError(
        f"{' and '.join(map(repr, used))} differ ({found}), and one of them is kept: choose it with "
        f"--init-from {'|'.join(roles) or 'NAME'}, or with the name of a parameter."
    )


def _same_values(checkpoint: Checkpoint, name: str, other: str) -> bool:
    """Whether two names have the same numbers, in every byte: one of them will be gone."""
    values = ValuesOnDisk(checkpoint.read, checkpoint.tensors, exact=True)
    keys = checkpoint.keys_of(name), checkpoint.keys_of(other)
    if values.equal(*keys):
        return True
    kinds = [[checkpoint.tensors[key] for key in each] for each in keys]
    if [held.dtype for held in kinds[0]] == [held.dtype for held in kinds[1]]:
        return False
    return len(keys[0]) == len(keys[1]) == 1 and values.same_numbers(keys[0][0], keys[1][0]) is True


def _declared_with(model: ModelFacts, groups: dict[str, list[str]]) -> list[list[str]]:
    """What the class will tie under the flags that the new config will have."""
    return model.stock.declared(_flagged(model, groups))


def _flagged(model: ModelFacts, groups: dict[str, list[str]]) -> dict[str, Any]:
    """The config with truthful flags for the pair of target and output."""
    config = json.loads(json.dumps(model.config))
    pair = model.pair()
    if pair is None or model.stock.forced is not None:
        return config
    tied = any(set(pair) <= set(names) for names in groups.values())
    paths = {path for _, _, path in model.stock.ties}
    for path in {
        "",
        *paths,
        *(p for p in ("text_config", "decoder") if isinstance(config.get(p), dict) and FLAG in config[p]),
    }:
        part = config.get(path) if path else config
        if isinstance(part, dict):
            part[FLAG] = tied
    return config


def _config(
    model: ModelFacts, to: str, groups: dict[str, list[str]], dedup: bool, untied: list[str] | None
) -> dict[str, Any]:
    config = _flagged(model, groups) if to in SCHEMES else json.loads(json.dumps(model.config))
    entry = model.checkpoint.entry
    by_class = {frozenset(chain) for chain in model.stock.declared(config)}
    if to not in SCHEMES and entry is None and to == "dedup":
        return config  # as stock files are
    if {frozenset(names) for names in groups.values()} == by_class and entry is None and model.stock.forced is None:
        if to in SCHEMES:
            return config  # the flag says it all
    scheme = to if to in SCHEMES and not untied else entry.scheme if entry else None
    changed = (entry or TyingConfig()).replace(
        scheme=scheme, groups=groups, save_format="dedup" if dedup else "portable", on_conflict="error"
    )
    config["tying"] = changed.to_dict()
    return config


def _described(checkpoint: Checkpoint, plan: Plan, out: Path) -> Rewriting:
    sizes = {name: _size(checkpoint, kept) for name, kept in plan.value_of.items()}
    kept = {name: held for name, held in checkpoint.tensors.items() if name not in replaced(checkpoint, plan)}
    before = sum(prod(held.shape) for held in checkpoint.tensors.values())
    after = sum(prod(held.shape) for held in kept.values()) + sum(sizes[name][0] for name in plan.written)
    bytes_before = sum(held.size for held in checkpoint.tensors.values())
    bytes_after = sum(held.size for held in kept.values()) + sum(sizes[name][1] for name in plan.written)
    old, new = checkpoint.config, plan.config
    changes = [(key, old.get(key), new.get(key)) for key in sorted({*old, *new}) if old.get(key) != new.get(key)]
    files = sorted(set(placed_in(checkpoint, plan).values()))
    return Rewriting(
        checkpoint.source.name, str(out), plan.groups, changes, (before, after), (bytes_before, bytes_after), files,
        *other_files(checkpoint),
    )  # fmt: skip


def _size(checkpoint: Checkpoint, name: str) -> tuple[int, int]:
    keys = checkpoint.keys_of(name)
    return sum(prod(checkpoint.tensors[k].shape) for k in keys), sum(checkpoint.tensors[k].size for k in keys)


def other_files(checkpoint: Checkpoint) -> tuple[list[str], list[str]]:
    """The other files that come along, and those that do not."""
    read = {"config.json", *(held.file for held in checkpoint.tensors.values())}
    names = [name for name in checkpoint.source.files() if not name.startswith(".") and name not in read]
    copied = [name for name in names if not name.endswith(_LEFT_OUT)]
    return copied, [name for name in names if name.endswith(_LEFT_OUT) and not name.endswith(".index.json")]


def _merged(checkpoint: Checkpoint, out: Path, dry_run: bool) -> Rewriting:
    """Fold the projection before the softmax into it. The model is loaded for that."""
    entry, source = checkpoint.entry, checkpoint.source.path()
    if entry is None or entry.projection is None or source is None:
        raise TyingError(
            f"{checkpoint.source.name} has no projection to merge: expected a folder of a model with one."
        )
    import transformers

    from ..projection.model import merge_projection
    from ..ties.verify import groups_of

    cls: Any = getattr(transformers, checkpoint.architecture, None)
    if cls is None:
        raise TyingError(
            f"transformers has no {checkpoint.architecture}: load the model, and merge_projection(model)."
        )
    model = merge_projection(cls.from_pretrained(source, dtype="auto"))
    old, new = checkpoint.tensors.values(), [*model.parameters()]
    copied, left_out = other_files(checkpoint)
    result = Rewriting(
        checkpoint.source.name, str(out), {group.name: list(group.names) for group in groups_of(model)},
        [("tying.projection", entry.projection.to_dict(), None)],
        (sum(prod(held.shape) for held in old), sum(p.numel() for p in new)),
        (sum(held.size for held in old), sum(p.numel() * p.element_size() for p in new)),
        copied=copied, left_out=left_out,
    )  # fmt: skip
    if not dry_run:
        with new_folder(checkpoint, out, result.copied) as folder:
            model.save_pretrained(folder)
            refuse_unloadable(folder)
            result.files = sorted(path.name for path in folder.glob("*.safetensors"))
    return result
