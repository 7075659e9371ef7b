"""The new folder of `rewrite`: made beside its place, shard by shard, verified by loading it, and renamed."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import TyingError
from ..report.checkpoint import Checkpoint, read_checkpoint
from ..report.sources import Folder
from ..ties.headers import BITS, INDEX, WHOLE

# Up to this size the new folder is loaded whole, one of several files up to the second; a larger one is compared with
# its class by names and shapes, so that no more than a shard is ever in memory.
_LOADED_WHOLE, _SHARDS_LOADED_WHOLE = 2**30, 2**26
# Bytes that are read and written at once.
_PIECE = 2**24


@dataclass
class Plan:
    """What the new files have.

    Args:
        groups: the tie groups, the root first.
        value_of: for each name that a tie has or had, the name whose values it gets.
        written: the names that are written.
        config: the new `config.json`.
    """

    groups: dict[str, list[str]]
    value_of: dict[str, str]
    written: list[str]
    config: dict[str, Any]


def write_folder(checkpoint: Checkpoint, plan: Plan, out: Path, copied: list[str]) -> None:
    """Write what `plan` says, with the other files, and verify it.

    Raises:
        TyingError: the new files would have other ties, or do not load. Nothing is left.
    """
    with new_folder(checkpoint, out, copied) as folder:
        _write_weights(checkpoint, plan, folder)
        (folder / "config.json").write_text(json.dumps(plan.config, indent=2) + "\n", encoding="utf-8")
        written = refuse_unloadable(folder)
        groups = {frozenset(names) for _, names in written.groups}
        if groups != {frozenset(names) for names in plan.groups.values()}:
            raise TyingError(
                f"The new folder would have other ties, {[sorted(g) for g in groups]}: it is not written."
            )


@contextmanager
def new_folder(checkpoint: Checkpoint, out: Path, copied: list[str]) -> Iterator[Path]:
    """A folder beside `out` that becomes it at the end, with the other files of the source; on an error, nothing."""
    folder = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.absolute().parent))
    try:
        copy_files(checkpoint, folder, copied)
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


def copy_files(checkpoint: Checkpoint, folder: Path, names: list[str]) -> None:
    """Copy other files of the source into `folder`."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        with (folder / name).open("wb") as file:
            size = checkpoint.source.size(name)
            for at in range(0, size, _PIECE):
                file.write(checkpoint.source.read(name, at, min(_PIECE, size - at)))


def replaced(checkpoint: Checkpoint, plan: Plan) -> set[str]:
    """The tensors of the old files that hold a name of the plan."""
    return {key for name in plan.value_of for key in checkpoint.keys_of(name)}


def _disk_name(checkpoint: Checkpoint, name: str) -> str:
    """The key under which files of this class have a name."""
    keys = checkpoint.keys_of(name) or (checkpoint.stock.keys.get(name) if checkpoint.stock else None) or [name]
    if len(keys) > 1:
        raise TyingError(f"{name!r} is in the files as {len(keys)} tensors: rewrite it as a model, with tie(model).")
    return keys[0]


def placed_in(checkpoint: Checkpoint, plan: Plan) -> dict[str, str]:
    """The file of each tensor that is written: its own, or that of the values it is given."""
    old = replaced(checkpoint, plan)
    files = {n: _new_file(checkpoint, held.file) for n, held in checkpoint.tensors.items() if n not in old}
    for name in plan.written:
        key = checkpoint.keys_of(name) or checkpoint.keys_of(plan.value_of[name])
        files[_disk_name(checkpoint, name)] = _new_file(checkpoint, checkpoint.tensors[key[0]].file)
    return files


def _new_file(checkpoint: Checkpoint, file: str) -> str:
    return file.replace("pytorch_model", "model").replace(".bin", ".safetensors") if checkpoint.form == "bin" else file


def _write_weights(checkpoint: Checkpoint, plan: Plan, folder: Path) -> None:
    """Write one shard after the other; what is in memory is a piece of one tensor."""
    placed = placed_in(checkpoint, plan)
    taken = {_disk_name(checkpoint, name): checkpoint.keys_of(plan.value_of[name])[0] for name in plan.written}
    source_of = {name: taken.get(name, name) for name in placed}
    for file in sorted(set(placed.values())):
        _write_file(checkpoint, {name: source_of[name] for name, at in placed.items() if at == file}, folder / file)
    if set(placed.values()) != {WHOLE}:
        size = sum(checkpoint.tensors[source].size for source in source_of.values())
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(placed.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write_file(checkpoint: Checkpoint, source_of: dict[str, str], path: Path) -> None:
    """Write a safetensors file, each name with the bytes of a tensor of the old files.

    The same bytes as `safetensors.torch.save_file` writes, which holds the whole file in memory, and twice.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in sorted(source_of, key=lambda name: (-BITS.get(checkpoint.tensors[source_of[name]].dtype, 0), name)):
        held = checkpoint.tensors[source_of[name]]
        if held.dtype not in BITS:
            raise TyingError(f"{source_of[name]!r} has the dtype {held.dtype}, which no safetensors file has.")
        offsets = [end, end := end + held.size]
        header[name] = {"dtype": held.dtype, "shape": [*held.shape], "data_offsets": offsets}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in [*header][1:]:
            size = checkpoint.tensors[source_of[name]].size
            for at in range(0, size, _PIECE):
                file.write(checkpoint.read(source_of[name], at, min(_PIECE, size - at)))


def refuse_unloadable(folder: Path) -> Checkpoint:
    """Read the new files, and where transformers has the class, load them.

    Raises:
        TyingError: with the first thing that is wrong.
    """
    written = read_checkpoint(Folder(folder, str(folder)))
    for problem in _load_problems(folder, written):
        raise TyingError(f"The new folder does not load as it should ({problem}): it is not written.")
    return written


def _load_problems(folder: Path, written: Checkpoint) -> Iterator[str]:
    """What goes wrong when transformers loads the folder."""
    if (built := written.built) is None:
        return
    from ..report.stock_building import shapes_in_files
    from ..ties.verify import groups_of

    shapes, optional = shapes_in_files(built)
    tied = {name for group in groups_of(built) for name in group.names}
    keys = {key for name in tied for key in (written.stock.keys.get(name, [name]) if written.stock else [name])}
    for name, shape in shapes.items():
        if name in written.tensors and written.tensors[name].shape != shape:
            yield f"{name!r} is {list(written.tensors[name].shape)}, expected {list(shape)}"
        if name not in written.tensors and name not in optional | keys:
            yield f"{name!r} is missing"
    files = {held.file for held in written.tensors.values()}
    most = _LOADED_WHOLE if len(files) == 1 else _SHARDS_LOADED_WHOLE
    if sum(held.size for held in written.tensors.values()) <= most:
        from ..ties.verify import problems

        try:
            yield from problems(type(built).from_pretrained(folder))
        except Exception as error:  # of transformers, by class and by what is wrong
            yield f"{type(error).__name__}: {error}"
