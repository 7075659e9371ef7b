"""The plan of an adapter before the model is changed: the modules to adapt, and the factors that they share."""

import copy
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features, check_target_module_exists
from peft.utils import resolve_quantization_backend
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..report.layer_order import in_layer_order
from .config import TiedLoraConfig
from .layers import COMPILED, find_layers
from .matrices import CONTAINER, TiedMatrices
from .sharing import FactorNames, name_factors, recorded_names, sizes_of
from .tensor_names import BASE_PREFIX, is_factor_name, refuse_misfit, size_mismatches


@dataclass(frozen=True)
class PlannedModule:
    """A module that will be adapted.

    Args:
        names: names of its factors, and its size.
        a_columns: number of columns of its A. It is larger than the module's inputs if a wider module shares that A.
        b_rows: number of rows of its B. It is larger than the module's outputs if a wider module shares that B.
    """

    names: FactorNames
    a_columns: int
    b_rows: int


#: The name of this class in pickles of 0.1.
Adapted = PlannedModule


def plan_adapter(config: TiedLoraConfig, model: nn.Module) -> dict[str, PlannedModule]:
    """Find the modules that an adapter with these settings will adapt.

    Args:
        config: settings of the adapter.
        model: model, which is not changed.

    Returns:
        The planned modules by name.

    Raises:
        ValueError: a target module cannot be adapted, or `layer_groups` leaves out its layer.
    """
    targets = _targets(config, model)
    for name, module in targets.items():
        if features_of(module) is None:
            raise ValueError(
                f"Target module {name!r}, {module}, is not supported: Tied-LoRA adapts torch.nn.Linear (also "
                "quantised), transformers' Conv1D and torch.nn.Embedding. Take it out of target_modules, or put it "
                "into exclude_modules."
            )
    found = name_factors(config, {name: features_of(module) for name, module in targets.items()})
    found = {name: replace(names, padding=_padding(targets[name])) for name, names in found.items()}
    widths: dict[tuple[str, str], int] = {}
    for names in found.values():
        for factor, size in ((("A", names.A), names.in_features), (("B", names.B), names.out_features)):
            widths[factor] = max(size, widths.get(factor, 0))
    return {name: PlannedModule(names, widths["A", names.A], widths["B", names.B]) for name, names in found.items()}


def of_all_layers(config: TiedLoraConfig) -> TiedLoraConfig:
    """Copy a config without its choice of layers. PEFT would count the layers by the names of modules alone.

    Args:
        config: settings of the adapter.
    """
    config = copy.copy(config)
    config.layers_to_transform = config.layers_pattern = None
    return config


def _targets(config: TiedLoraConfig, model: nn.Module) -> dict[str, nn.Module]:
    """The modules that the config names, in the layers that it chooses."""
    free = of_all_layers(config)
    found = {name: m for name, m in modules_outside_adapters(model) if check_target_module_exists(free, name)}
    chosen = config.layers_to_transform
    if chosen is None or chosen == [] or isinstance(config.target_modules, str):
        return found
    indices = {chosen} if isinstance(chosen, int) else set(chosen)
    sizes = {name: features_of(module) or (type(module).__name__, 0, 0) for name, module in found.items()}
    places = find_layers(sizes, config.layers_pattern)
    named = config.target_modules or ()  # a module with its full name is adapted in any layer
    return {name: module for name, module in found.items() if name in named or places[name].index in indices}


def modules_outside_adapters(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Iterate over the modules that an adapter may adapt, with their names. Parts of adapted modules are left out.

    Args:
        model: any model.
    """
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if not name or (inside and name.startswith(inside)):
            continue
        if isinstance(module, BaseTunerLayer | TiedMatrices):
            inside += (name + ".",)
        if not isinstance(module, TiedMatrices):
            yield name, module


def _padding(module: nn.Module) -> int | None:
    base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    return base.padding_idx if isinstance(base, nn.Embedding) else None


def features_of(module: nn.Module) -> tuple[str, int, int] | None:
    """Return `(kind, in_features, out_features)` of a module that can be adapted.

    Args:
        module: any module, also an adapted one.

    Returns:
        The kind, `"linear"` or `"embedding"`, with the numbers of inputs and outputs; `None` for any other module.
    """
    if isinstance(module, BaseTunerLayer):
        module = module.get_base_layer()
    if isinstance(module, nn.Embedding):
        return "embedding", module.num_embeddings, module.embedding_dim
    # The backend of a quantised `nn.Linear` is not needed: for torchao, PEFT needs an argument that is unknown here.
    backend = None if isinstance(module, nn.Linear | Conv1D) else resolve_quantization_backend(module)
    if isinstance(module, nn.Linear | Conv1D) or (backend is not None and backend.layer_type == "linear"):
        found = _get_in_out_features(module)
        return None if None in found else ("linear", *found)
    return None


def check_adapter_file(
    config: TiedLoraConfig,
    model: nn.Module,
    saved: dict[str, torch.Tensor],
    renamed: Mapping[str, str] | None = None,
) -> None:
    """Check that the tensors of an adapter's file fit a model, before they are loaded.

    Args:
        config: settings that were saved with the file, or those of an adapter in the model.
        model: model without adapters, or with other adapters.
        saved: tensors by their names in the file.
        renamed: map from regular expressions of old names of modules to their replacements, PEFT's `key_mapping`.
            Default: none.

    Raises:
        RuntimeError: a tensor is missing, has no place in the model, or has another shape.
    """
    shapes: dict[str, list[int]] = {}
    rows_of_u: dict[str, set[str]] = {}
    planned = plan_adapter(config, model)
    for module in planned.values():
        names = module.names
        shapes[f"tied_lora_A.{names.A}"] = [config.r, module.a_columns]
        shapes[f"tied_lora_B.{names.B}"] = [module.b_rows, config.r]
        if config.train_u:
            rows_of_u.setdefault(names.u_rows, set()).add(names.u)
            shapes[f"tied_lora_u.{names.u_rows}"] = [len(rows_of_u[names.u_rows]), config.r]
        if config.train_v:
            shape_of_v = shapes.setdefault(f"tied_lora_v.{names.v_rows}", [0, names.out_features])
            shape_of_v[0] += 1
    found = {key.removeprefix(BASE_PREFIX): list(value.shape) for key, value in saved.items() if is_factor_name(key)}
    found = {key.removeprefix(f"{CONTAINER}."): shape for key, shape in found.items()}
    for name, other in size_mismatches(shapes, found).items():
        found[name] = found.pop(other)
    problems = [f"{name} {shape} is missing" for name, shape in sorted(shapes.items()) if name not in found]
    problems += [f"{name} has no place in the model" for name in sorted(found.keys() - shapes.keys())]
    problems += [
        f"size mismatch for {name}: {found[name]} in the file, {shape} in the model"
        for name, shape in sorted(shapes.items())
        if found.get(name, shape) != shape
    ]
    recorded = recorded_names(config)
    saved_for = {_new_name(name, renamed or {}): recorded[name] for name in in_layer_order(recorded)}
    if saved_for and len(saved_for) != len(planned):
        problems.append(f"it was saved for {len(saved_for)} modules, and the model has {len(planned)} of that name")
    names = {name.replace(COMPILED, ""): module.names for name, module in planned.items()}
    problems += [
        f"adapted_modules of {name!r} are not what the settings make of it"
        for name, of in names.items()
        if name in recorded and not recorded[name].is_like(of)  # a module with a new name has other factor names too
    ][:1]
    refuse_misfit(problems or _unknown_order(saved_for, names))


def _new_name(name: str, renamed: Mapping[str, str]) -> str:
    found = (re.subn(pattern, replacement, name) for pattern, replacement in renamed.items())
    return next((new for new, times in found if times), name)


def _unknown_order(saved: Mapping[str, FactorNames], planned: Mapping[str, FactorNames]) -> list[str]:
    """The problem of a file whose rows cannot be matched with modules; empty if they can.

    The rows of a file are in the order of the modules' names. If the modules have new names since the file was saved,
    the order is the same within one list of layers, but unknown across several lists.
    """
    lists = [
        {place.layer.rpartition(".")[0] for place in find_layers(sizes_of(of)).values() if place.layer}
        for of in (saved, planned)
    ]
    if not saved or list(saved) == in_layer_order(planned) or all(len(of_layers) < 2 for of_layers in lists):
        return []
    was, now = (", ".join(map(repr, sorted(of_layers))) for of_layers in lists)
    return [
        f"it was saved for layers in {was} and the model has {now}, so it is not known which row is whose; export it "
        "to LoRA in the model that it was saved from (hf_tying.peft.export_to_lora), where each module has its name"
    ]
