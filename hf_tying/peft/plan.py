"""What an adapter will be put on, and what of it is shared: looked at while the model is still as it was."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from torch import nn

from .config import TiedLoraConfig
from .matrices import CONTAINER, TiedMatrices
from .sharing import COMPILED, Sharing, features_of, sharing_of, split_name
from .tensor_names import PREFIX, but_for_size, is_of_file, refuse


@dataclass(frozen=True)
class Adapted:
    """One module that will be adapted.

    Args:
        names: of the factors that it uses.
        rank: the largest that its update can have.
        columns: of its A; more than its own where a wider module has the same A.
        rows: of its B, likewise.
        out_features: of the module, the size of its v.
    """

    names: Sharing
    rank: int
    columns: int
    rows: int
    out_features: int


def plan(config: TiedLoraConfig, model: nn.Module) -> dict[str, Adapted]:
    """The modules of a model that an adapter of these settings has, by name.

    Raises:
        ValueError: a module that is asked for cannot be adapted, or has no layer group.
    """
    found, widths = {}, {}
    for name, module in outside_adapters(model):
        if not check_target_module_exists(config, name):
            continue
        features = features_of(module)
        if features is None:
            raise ValueError(
                f"Target module {name!r}, {module}, is not supported: Tied-LoRA adapts torch.nn.Linear (also "
                "quantised), transformers' Conv1D and torch.nn.Embedding. Take it out of target_modules, or put it "
                "into exclude_modules."
            )
        kind, columns, rows = features
        names = sharing_of(config, name, columns, rows, kind)
        for factor, size in ((("A", names.A), columns), (("B", names.B), rows)):
            widths[factor] = max(size, widths.get(factor, 0))
        found[name] = names, columns, rows
    return {
        name: Adapted(names, min(columns, rows), widths["A", names.A], widths["B", names.B], rows)
        for name, (names, columns, rows) in found.items()
    }


def outside_adapters(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules that an adapter may be put on, with their names: none inside of an adapted one."""
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if not name or (inside and name.startswith(inside)):
            continue
        if isinstance(module, BaseTunerLayer | TiedMatrices):
            inside += (name + ".",)
        if not isinstance(module, TiedMatrices):
            yield name, module


def check_file(config: TiedLoraConfig, model: nn.Module, saved: dict[str, torch.Tensor]) -> None:
    """Compare an adapter's file with the model that it is to be loaded into.

    Raises:
        RuntimeError: tensors are missing, are more than the adapter has, or are of another shape.
    """
    shapes: dict[str, list[int]] = {}
    rows_of_u: dict[str, set[str]] = {}
    planned = plan(config, model)
    for adapted in planned.values():
        names = adapted.names
        shapes[f"tied_lora_A.{names.A}"] = [config.r, adapted.columns]
        shapes[f"tied_lora_B.{names.B}"] = [adapted.rows, config.r]
        if config.train_u:
            rows_of_u.setdefault(names.u_rows, set()).add(names.u)
            shapes[f"tied_lora_u.{names.u_rows}"] = [len(rows_of_u[names.u_rows]), config.r]
        if config.train_v:
            of_v = shapes.setdefault(f"tied_lora_v.{names.v_rows}", [0, adapted.out_features])
            of_v[0] += 1
    found = {key.removeprefix(PREFIX): list(value.shape) for key, value in saved.items() if is_of_file(key)}
    found = {key.removeprefix(f"{CONTAINER}."): shape for key, shape in found.items()}
    for name, other in but_for_size(shapes, found).items():
        found[name] = found.pop(other)
    problems = [f"{name} {shape} is missing" for name, shape in sorted(shapes.items()) if name not in found]
    problems += [f"{name} has no place in the model" for name in sorted(found.keys() - shapes.keys())]
    problems += [
        f"size mismatch for {name}: {found[name]} in the file, {shape} in the model"
        for name, shape in sorted(shapes.items())
        if found.get(name, shape) != shape
    ]
    refuse(problems or _renamed(set(config.adapted_modules or ()), {name.replace(COMPILED, "") for name in planned}))


def _renamed(saved: set[str], planned: set[str]) -> list[str]:
    """The rows of a file are in the order of the modules' names. Where modules have other names than when it was
    saved, that is the same order for one list of layers, and cannot be known for several.
    """
    lists = [
        {split_name(name)[0].rpartition(".")[0] for name in names if split_name(name)[0]} for names in (saved, planned)
    ]
    if not saved or saved == planned or all(len(of_layers) < 2 for of_layers in lists):
        return []
    was, now = (", ".join(map(repr, sorted(of_layers))) for of_layers in lists)
    return [
        f"it was saved for layers in {was} and the model has {now}, so it is not known which row is whose; export it "
        "to LoRA in the model that it was saved from (hf_tying.peft.export_to_lora), where each module has its name"
    ]
