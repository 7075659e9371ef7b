"""`save_tied` and `load_tied`: the weights of any `nn.Module`, and beside them the record of its ties.

The folder has two files: `model.safetensors`, and `tying.json` with the entry that `config.json` has for a
`PreTrainedModel`. Both are written beside their place and moved there whole.
"""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.parameter import is_lazy

from ..config import TyingConfig, TyingError, nearest
from .anatomy import Anatomy
from .checkpoint import check_loaded_state, parts_by_value, settle
from .groups import TieGroup, declaration_of, make_groups, names_held, resolve
from .headers import RECORD, read_header, read_json
from .plain_modules import hold, refuse_extensions
from .relaxation import make_exact, relaxation_at, relaxed_names, value_at
from .relaxed_values import refuse_other_value
from .relaxing import refuse_unrelaxable, relax_declared
from .sharding import gathered, refuse_in_parts, whole
from .slots import state_key, untie_others
from .tying import refuse_unfit
from .verify import refuse_untied, tied_part

_WEIGHTS = "model.safetensors"
Module = TypeVar("Module", bound=nn.Module)


def save_tied(module: nn.Module, folder: str | os.PathLike[str], save_format: str | None = None) -> None:
    """Save the weights of any module, and the record of its ties, so that `load_tied` gives them back.

    What is one parameter is recorded as tied, also if it was tied by hand. Of a module that FSDP2 has sharded, all
    processes must call this.

    Args:
        module: a plain `nn.Module`, also wrapped by DistributedDataParallel, torch.compile or torch's `AveragedModel`:
            names are those of the module inside.
        folder: where `model.safetensors` and `tying.json` are written; it is made if it is not there.
        save_format: `"portable"` writes every name, so that any loader of safetensors gets the right values; `"dedup"`
            writes each group once, under its root. Default `None`: that of the record, which is portable unless `tie`
            was given a `TyingConfig` with another.

    Raises:
        TyingError: for a broken tie, a tensor without values, a state dict with other things than tensors, and a
            `PreTrainedModel`, which has `save_pretrained`; nothing is written.
    """
    part = _plain(module, "save")
    anatomy = Anatomy(part)
    known = names_held(part)
    if "_tying" in vars(part):
        refuse_untied(part, "save")
    groups = make_groups(anatomy, anatomy.tied, known)
    record = declaration_of(part) if known or "_tying" in vars(part) else TyingConfig()
    record = record.replace(
        groups={group.name: list(group.names) for group in groups},
        save_format=save_format or record.save_format or "portable",
    )
    with gathered(part.parameters()):
        tensors = _tensors_to_write(part, groups, record.save_format)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights, entry = folder / f".{_WEIGHTS}.{os.getpid()}", folder / f".{RECORD}.{os.getpid()}"
    try:
        save_file(tensors, weights, metadata={"format": "pt"})
        entry.write_text(json.dumps(record.to_dict(), indent=2) + "\n", encoding="utf-8")
        weights.replace(folder / _WEIGHTS)
        entry.replace(folder / RECORD)
    finally:
        for path in (weights, entry):
            path.unlink(missing_ok=True)


def load_tied(module: Module, folder: str | os.PathLike[str], on_conflict: str | None = None) -> Module:
    """Load what `save_tied` wrote into a module of the same architecture, and tie it by the record.

    The record decides: names that it does not tie get a parameter of their own. Nothing is changed if anything is
    wrong. An optimizer made before may hold matrices that the module no longer has: make it again.

    Args:
        module: a plain `nn.Module`, tied or not, also on the meta device or wrapped.
        folder: folder with `model.safetensors` and `tying.json`. A file may lack names of a group, if it has one.
        on_conflict: choice where the file has different values for names of one group, see `TyingConfig`. Default
            `None`: that of the record, which is `"error"` unless something else was chosen.

    Returns:
        The same module.

    Raises:
        TyingError: for files that are missing, malformed or too large, names that the module or the file lacks,
            other shapes, and values that differ without a choice.
    """
    part = _plain(module, "load")
    refuse_in_parts(part, "load into", gathers=True)
    folder = Path(folder)
    config = TyingConfig.from_dict(read_json(folder / RECORD))
    if on_conflict is not None:
        config = config.replace(on_conflict=on_conflict)
    refuse_extensions(part, config)
    refuse_unrelaxable(part, config)
    with gathered(part.parameters(), write=True):
        _load(part, folder, config)
    return module


def _load(part: nn.Module, folder: Path, config: TyingConfig) -> None:
    """Load the file of `folder` into a plain module, whose ties become those of `config`."""
    exact = {name for name in Anatomy(part).slots if relaxation_at(part, name) is None}
    relax_declared(part, config)
    try:
        groups = resolve(Anatomy(part), config)
        state = part.state_dict(keep_vars=True)
        _refuse_misfit(part, groups, state, folder / _WEIGHTS)
        tensors = load_file(folder / _WEIGHTS)
        kept: list[TieGroup] = []
        for group in groups:
            kept += _settled(part, group, tensors, config)
    except TyingError:
        for name in exact:
            make_exact(part, name)
        raise
    untie_others(part, kept)
    hold(part, kept, on_conflict=config.on_conflict, save_format=config.save_format)
    part.load_state_dict(tensors, assign=any(tensor.is_meta for tensor in state.values()))


def _plain(module: nn.Module, action: str) -> nn.Module:
    """The plain module inside wrappers; anything else is refused."""
    part = tied_part(module)
    if hasattr(part, "save_pretrained") and hasattr(part, "config"):
        stock = "model.save_pretrained(folder)" if action == "save" else "type(model).from_pretrained(folder)"
        raise TyingError(f"Cannot {action} a {type(part).__name__} so: it is a PreTrainedModel. Use {stock}.")
    refuse_unfit(part, action, plain=True)
    return part


def _tensors_to_write(module: nn.Module, groups: list[TieGroup], save_format: str | None) -> dict[str, torch.Tensor]:
    """The tensors of the file, each with memory of its own, as safetensors wants them."""
    state = dict(module.state_dict())
    for key, value in state.items():
        if not isinstance(value, torch.Tensor):
            raise TyingError(
                f"Cannot save {key!r}: a {type(value).__name__}, and safetensors holds tensors only. Make it a buffer."
            )
        if value.is_meta or is_lazy(value):
            raise TyingError(f"Cannot save {key!r}: it has no value yet. Load or initialise the module first.")
    check_loaded_state(module, state, "", action="save")
    for group in groups:
        for name in group.aliases if save_format == "dedup" else ():
            del state[state_key(module, name)]
    for _, _, name in relaxed_names(module) if save_format != "dedup" else ():
        state[state_key(module, name)] = value_at(module, name)
    tensors, memory = {}, set()
    for key, value in state.items():
        value = whole(value.detach()).contiguous()
        tensors[key] = value.clone() if value.untyped_storage().data_ptr() in memory else value
        memory.add(value.untyped_storage().data_ptr())
    return tensors


def _refuse_misfit(module: nn.Module, groups: list[TieGroup], state: dict[str, Any], file: Path) -> None:
    """Refuse a file that does not fit the module, by its header alone."""
    header = read_header(file)
    filled = set()
    for group in groups:
        keys = {state_key(module, name) for name in group.names}
        filled |= keys if keys & header.keys() else set()
    _refuse_names(f"{file} has", header.keys() - state.keys(), f"which {type(module).__name__} does not have", state)
    _refuse_names(f"{file} lacks", state.keys() - header.keys() - filled, "and no name tied with it is there", header)
    for key, (shape, _) in header.items():
        if not is_lazy(state[key]) and tuple(state[key].shape) != shape:
            raise TyingError(
                f"{file} has {key!r} of shape {shape}: expected {tuple(state[key].shape)}, as in the "
                f"{type(module).__name__}. Make the module with the sizes that were saved."
            )


def _refuse_names(start: str, names: Iterable[str], why: str, others: Iterable[str]) -> None:
    if names := sorted(names):
        more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
        raise TyingError(
            f"{start} {names[0]!r}{more}, {why}{nearest(names[0], others)}. Make the module as it was saved."
        )


def _settled(
    module: nn.Module, group: TieGroup, tensors: dict[str, torch.Tensor], config: TyingConfig
) -> list[TieGroup]:
    """The groups that `group` becomes by the values of a file. `tensors` gets a value for each name."""
    keys = {name: state_key(module, name) for name in group.names}
    relaxed = {name for name in group.names if relaxation_at(module, name) is not None}
    present = [name for name in group.names if keys[name] in tensors and name not in relaxed]
    if not present:
        raise TyingError(f"The file has no value of {group.root!r}, from which {', '.join(sorted(relaxed))} differ.")
    parts = parts_by_value(present, lambda name: tensors[keys[name]])
    if len(parts) > 1:
        choose = f"load_tied(module, folder, on_conflict=...) or in {RECORD}"
        parts = settle(config, group, parts, lambda name: tensors[keys[name]], choose)
    for name in relaxed:
        refuse_other_value(module, config, group, name, tensors, keys[parts[0][0]], "")
    parts[0] = [name for name in group.names if name in parts[0] or name not in present]
    kept = []
    for i, part in enumerate(parts):
        first = next(name for name in part if name in present) if i or config.on_conflict == "keep_untied" else None
        chosen = config.on_conflict.removeprefix("use:")
        source = chosen if chosen in part and chosen in present else first or next(n for n in part if n in present)
        for name in part:
            tensors[keys[name]] = tensors[keys[source]]
        if len(part) > 1:
            kept.append(TieGroup(group.name if i == 0 else f"{group.name}_{i + 1}", tuple(part)))
    return kept
