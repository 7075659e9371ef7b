"""`rewrite`: a new folder with other ties, made from the files alone, shard by shard, and verified by loading it."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import SCHEMES, TyingConfig, TyingError
from ..report.checkpoint import Checkpoint, read_checkpoint
from ..report.opening import open_source
from ..report.sources import INDEX, Folder
from ..report.stock_table import FLAG
from .facts import ModelFacts

if TYPE_CHECKING:
    import torch

_WEIGHTS = "model.safetensors"
#: What can be asked for, beside the schemes.
FORMS = ("portable", "dedup", "merged")
# Up to this size the new folder is loaded whole; a larger one is compared with its class by names and shapes.
_LOADED_WHOLE = 2**30
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
        files: the weight files that are written.
        copied: the other files.
    """

    source: str
    out: str
    ties: dict[str, list[str]]
    changes: list[tuple[str, Any, Any]]
    parameters: tuple[int, int] = (0, 0)
    bytes: tuple[int, int] = (0, 0)
    files: list[str] = field(default_factory=list)
    copied: list[str] = field(default_factory=list)

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

    One shard is read and written at a time, in its dtypes and under its name. The tokenizer and all other files come
    along. The folder is made beside `out`, loaded once, and renamed when all is well.

    Args:
        source: a folder with safetensors or `.bin` files, or the same on the Hub (whose pieces are read by range).
        out: the new folder; it must not exist, or be empty.
        to: a scheme (`"two_way"`, `"three_way"`, `"source_target"`, `"none"`), or `"portable"` or `"dedup"` for the
            ties that there are, with every name written, or each matrix once.
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
        TyingError: the files cannot be read, the scheme does not fit the model, or `out` is not empty.
    """
    checkpoint = read_checkpoint(open_source(source, revision, subfolder, token))
    if checkpoint.form == "gguf":
        raise TyingError(f"{source} is a GGUF file, which is not written here: rewrite the model it was made from.")
    if not checkpoint.config or checkpoint.source.only:
        raise TyingError(f"{source} is one file: expected a folder with config.json, whose ties can be written.")
    out = Path(out)
    _refuse_existing(out)
    if to == "merged":
        return _merged(checkpoint, out, dry_run)
    plan = _plan(checkpoint, to, init_from, untied)
    result = _described(checkpoint, plan, out)
    if not dry_run:
        _write(checkpoint, plan, out, result)
    return result


@dataclass
class _Plan:
    """Groups of the new files; for each, the name whose values it has, and the names that are written."""

    groups: dict[str, list[str]]
    value_of: dict[str, str]
    written: list[str]
    config: dict[str, Any]


def _refuse_existing(out: Path) -> None:
    if out.is_symlink() or (out.exists() and (not out.is_dir() or any(out.iterdir()))):
        raise TyingError(f"{out} exists already: give a new folder; nothing is written over.")
    if not out.absolute().parent.is_dir():
        raise TyingError(f"{out.absolute().parent} is no folder: expected one that exists, to make {out.name} in.")


def _plan(checkpoint: Checkpoint, to: str, init_from: str | None, untied: list[str] | None) -> _Plan:
    model = ModelFacts(checkpoint)
    if to not in SCHEMES and to not in FORMS:
        raise TyingError(f"Unknown form {to!r:.80}: expected one of {', '.join([*SCHEMES, *FORMS])}.")
    now = dict(checkpoint.groups)
    groups = now if to in FORMS else _groups_of_scheme(model, to, now, untied)
    value_of: dict[str, str] = {}
    for names in groups.values():
        kept = _chosen(checkpoint, model, names, init_from)
        value_of |= dict.fromkeys(names, kept)
    entry = checkpoint.entry
    names_of = {name: names for names in groups.values() for name in names}
    # A tie that is taken away leaves each name the values that it had.
    for names in now.values():
        present = next((name for name in names if model.held(name)), None)
        for name in names:
            if name not in names_of and present is not None:
                value_of[name] = name if model.held(name) else present
    by_class = {frozenset(chain) for chain in _declared_with(model, groups)}
    dedup = to == "dedup" or (to in SCHEMES and all(frozenset(names) in by_class for names in groups.values()))
    if to == "dedup" and any(frozenset(names) not in by_class for names in groups.values()) and entry is None:
        raise TyingError("The class does not tie these names by itself, so that dedup would lose them: use portable.")
    written = [name for name in value_of if not (dedup and name in names_of and name != names_of[name][0])]
    config = _config(model, to, groups, dedup, untied)
    return _Plan(groups, value_of, written, config)


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


def _chosen(checkpoint: Checkpoint, model: ModelFacts, names: list[str], init_from: str | None) -> str:
    """The name whose values a group keeps."""
    held = [name for name in names if model.held(name)]
    if not held:
        raise TyingError(f"The files have no name of {', '.join(map(repr, names))}: there are no values to keep.")
    used = [name for name in held if name not in model.stock.carriers] or held
    numbers, _ = checkpoint.values.different({name: checkpoint.keys_of(name) for name in used})
    shapes = {checkpoint.matrix(name)[0] for name in held}
    if len(shapes) > 1:
        raise TyingError(f"{', '.join(map(repr, held))} have different shapes, {sorted(shapes)}: they cannot be one.")
    if len(set(numbers.values())) == 1:
        return used[0]
    by_role = model.stock.roles.get(init_from or "", [])
    for name in [*by_role[::-1], init_from]:
        if name in held:
            return str(name)
    roles = [role for role, of_role in model.stock.roles.items() if set(of_role) & set(held)]
    found = checkpoint.values.difference(checkpoint.keys_of(used[0])[0], checkpoint.keys_of(used[-1])[0])
    raise UndecidedError(
        f"{' and '.join(map(repr, used))} differ ({found}), and one of them is kept: choose it with "
        f"--init-from {'|'.join(roles) or 'NAME'}, or with the name of a parameter."
    )


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
    for path in {"", *paths, *(p for p in ("text_config", "decoder") if FLAG in (config.get(p) or {}))}:
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


def _described(checkpoint: Checkpoint, plan: _Plan, out: Path) -> Rewriting:
    sizes = {name: _size(checkpoint, kept) for name, kept in plan.value_of.items()}
    kept = {name: held for name, held in checkpoint.tensors.items() if name not in _replaced(checkpoint, plan)}
    before = sum(prod(held.shape) for held in checkpoint.tensors.values())
    after = sum(prod(held.shape) for held in kept.values()) + sum(sizes[name][0] for name in plan.written)
    bytes_before = sum(held.size for held in checkpoint.tensors.values())
    bytes_after = sum(held.size for held in kept.values()) + sum(sizes[name][1] for name in plan.written)
    old, new = checkpoint.config, plan.config
    changes = [(key, old.get(key), new.get(key)) for key in sorted({*old, *new}) if old.get(key) != new.get(key)]
    files = sorted(set(_placed(checkpoint, plan).values()))
    return Rewriting(
        checkpoint.source.name, str(out), plan.groups, changes, (before, after), (bytes_before, bytes_after), files,
        _others(checkpoint),
    )  # fmt: skip


def _size(checkpoint: Checkpoint, name: str) -> tuple[int, int]:
    keys = checkpoint.keys_of(name)
    return sum(prod(checkpoint.tensors[k].shape) for k in keys), sum(checkpoint.tensors[k].size for k in keys)


def _replaced(checkpoint: Checkpoint, plan: _Plan) -> set[str]:
    """The tensors of the old files that hold a name of the plan."""
    return {key for name in plan.value_of for key in checkpoint.keys_of(name)}


def _disk_name(checkpoint: Checkpoint, name: str) -> str:
    """The key under which files of this class have a name."""
    keys = checkpoint.keys_of(name) or (checkpoint.stock.keys.get(name) if checkpoint.stock else None) or [name]
    if len(keys) > 1:
        raise TyingError(f"{name!r} is in the files as {len(keys)} tensors: rewrite it as a model, with tie(model).")
    return keys[0]


def _placed(checkpoint: Checkpoint, plan: _Plan) -> dict[str, str]:
    """The file of each tensor that is written: its own, or that of the values it is given."""
    replaced = _replaced(checkpoint, plan)
    files = {
        name: _new_file(checkpoint, held.file) for name, held in checkpoint.tensors.items() if name not in replaced
    }
    for name in plan.written:
        key = checkpoint.keys_of(name) or checkpoint.keys_of(plan.value_of[name])
        files[_disk_name(checkpoint, name)] = _new_file(checkpoint, checkpoint.tensors[key[0]].file)
    return files


def _new_file(checkpoint: Checkpoint, file: str) -> str:
    return file.replace("pytorch_model", "model").replace(".bin", ".safetensors") if checkpoint.form == "bin" else file


def _others(checkpoint: Checkpoint) -> list[str]:
    names = [name for name in checkpoint.source.files() if not name.startswith(".")]
    return [name for name in names if name != "config.json" and not name.endswith(_LEFT_OUT)]


def _write(checkpoint: Checkpoint, plan: _Plan, out: Path, result: Rewriting) -> None:
    with _atomic(checkpoint, out, result.copied) as folder:
        _write_weights(checkpoint, plan, folder)
        (folder / "config.json").write_text(json.dumps(plan.config, indent=2) + "\n", encoding="utf-8")
        _verify(folder, plan)


@contextmanager
def _atomic(checkpoint: Checkpoint, out: Path, copied: list[str]) -> Iterator[Path]:
    """A folder beside `out` that becomes it at the end, with the other files of the source; on an error, nothing."""
    folder = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.absolute().parent))
    try:
        for name in copied:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            with (folder / name).open("wb") as file:
                size = checkpoint.source.size(name)
                for at in range(0, size, 2**24):
                    file.write(checkpoint.source.read(name, at, min(2**24, size - at)))
        yield folder
        umask = os.umask(0)
        os.umask(umask)
        folder.chmod(0o777 & ~umask)
        if out.is_dir():
            out.rmdir()
        folder.rename(out)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _merged(checkpoint: Checkpoint, out: Path, dry_run: bool) -> Rewriting:
    """Fold the projection before the softmax into it. The model is loaded for that."""
    entry, folder = checkpoint.entry, checkpoint.source.path()
    if entry is None or entry.projection is None or folder is None:
        raise TyingError(
            f"{checkpoint.source.name} has no projection to merge: expected a folder of a model with one."
        )
    import transformers

    from ..projection.model import merge_projection

    cls: Any = getattr(transformers, checkpoint.architecture, None)
    if cls is None:
        raise TyingError(
            f"transformers has no {checkpoint.architecture}: load the model, and merge_projection(model)."
        )
    model = merge_projection(cls.from_pretrained(folder, dtype="auto"))
    sizes = sum(p.numel() for p in model.parameters())
    before = sum(prod(held.shape) for held in checkpoint.tensors.values())
    result = Rewriting(
        checkpoint.source.name, str(out), {}, [("tying.projection", entry.projection.to_dict(), None)],
        (before, sizes), copied=_others(checkpoint),
    )  # fmt: skip
    if not dry_run:
        with _atomic(checkpoint, out, result.copied) as new:
            model.save_pretrained(new)
    return result


def _write_weights(checkpoint: Checkpoint, plan: _Plan, folder: Path) -> None:
    """Write one shard at a time; what is in memory is that shard."""
    from safetensors.torch import save_file

    placed = _placed(checkpoint, plan)
    taken = {_disk_name(checkpoint, name): checkpoint.keys_of(plan.value_of[name])[0] for name in plan.written}
    for file in sorted(set(placed.values())):
        tensors = {name: _tensor(checkpoint, taken.get(name, name)) for name, at in placed.items() if at == file}
        save_file(tensors, folder / file, {"format": "pt"})
        del tensors
    if set(placed.values()) != {_WEIGHTS}:
        size = sum(checkpoint.tensors[taken.get(name, name)].size for name in placed)
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(placed.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _tensor(checkpoint: Checkpoint, name: str) -> "torch.Tensor":
    import torch

    if checkpoint.pickled is not None:
        return checkpoint.pickled.tensor(name).contiguous().clone()
    held = checkpoint.tensors[name]
    dtype = _torch_dtypes().get(held.dtype)
    if dtype is None:
        raise TyingError(f"{name!r} has the dtype {held.dtype}, which cannot be rewritten here.")
    data = bytearray(checkpoint.read(name, 0, held.size))
    flat = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
    return flat.reshape(held.shape)


def _torch_dtypes() -> dict[str, Any]:
    import torch

    names = {
        "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32",
        "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool", "F8_E4M3": "float8_e4m3fn",
        "F8_E5M2": "float8_e5m2", "U16": "uint16", "U32": "uint32", "U64": "uint64", "C64": "complex64",
    }  # fmt: skip
    return {name: getattr(torch, dtype) for name, dtype in names.items() if hasattr(torch, dtype)}


def _verify(folder: Path, plan: _Plan) -> None:
    """Read the new files, and where transformers has the class, ask it to load them."""
    written = read_checkpoint(Folder(folder, str(folder)))
    groups = {frozenset(names) for _, names in written.groups}
    if groups != {frozenset(names) for names in plan.groups.values()}:
        raise TyingError(f"The new folder would have other ties, {[sorted(g) for g in groups]}: it is not written.")
    for problem in _load_problems(folder, written):
        raise TyingError(f"The new folder does not load as it should ({problem}): it is not written.")


def _load_problems(folder: Path, written: Checkpoint) -> Iterator[str]:
    """What goes wrong when transformers loads the folder."""
    import transformers

    cls: Any = getattr(transformers, written.architecture, None)
    if cls is None or not hasattr(cls, "post_init"):
        return
    from ..report.stock_building import shapes_in_files
    from ..ties.verify import groups_of

    built = written.built
    shapes, optional = shapes_in_files(built)
    tied = {name for group in groups_of(built) for name in group.names}
    keys = {key for name in tied for key in (written.stock.keys.get(name, [name]) if written.stock else [name])}
    for name, shape in shapes.items():
        if name in written.tensors and written.tensors[name].shape != shape:
            yield f"{name!r} is {list(written.tensors[name].shape)}, expected {list(shape)}"
        if name not in written.tensors and name not in optional | keys:
            yield f"{name!r} is missing"
    if sum(held.size for held in written.tensors.values()) <= _LOADED_WHOLE:
        from ..ties.verify import problems

        yield from problems(cls.from_pretrained(folder))
