"""Slots: the places where parameters live (a module and the attribute in it), and the few things done to them.

A tie is one `nn.Parameter` in several slots. Names of slots are those of the bare model: PEFT, activation
checkpointing, torch.compile and FSDP keep a module inside one of their own, and a tie is on what lies inside.
"""

import copy
from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import nn

from ..config import TyingError, nearest
from .sharding import gathered, is_partitioned, shape_of, shown_as_shards

# Attributes in which wrappers keep the stock module. PEFT: tuner layers under `base_layer`, modules_to_save under
# `original_module`, trainable tokens under `token_adapter.base_layer`. torch: activation checkpointing, FSDP1,
# torch.compile.
_WRAPPERS = (
    *("base_layer", "original_module", "token_adapter"),
    *("_checkpoint_wrapped_module", "_fsdp_wrapped_module", "_orig_mod"),
)
# Wrappers whose name a state dict leaves out.
_NOT_IN_KEYS = ("_checkpoint_wrapped_module", "_fsdp_wrapped_module")
# The packages whose modules and tensors hold quantised weights; transformers' own such layers are in `integrations`.
_QUANTISERS = (
    *("aqlm", "auto_gptq", "awq", "bitsandbytes", "compressed_tensors", "eetq", "fbgemm_gpu", "gptqmodel", "hqq"),
    *("optimum.quanto", "quanto", "torch.ao", "torchao", "transformers.integrations", "vptq"),
)


def unwrap(module: nn.Module) -> nn.Module:
    """The stock module inside PEFT's wrappers (itself, where there is none)."""
    while inner := next((m for key in _WRAPPERS if (m := module._modules.get(key)) is not None), None):
        module = inner
    return module


def find_slot(model: nn.Module, name: str) -> tuple[nn.Module, str] | None:
    """The module and attribute that `name` means, seen through adapters; `None` where a module is missing."""
    *path, attribute = name.split(".")
    module = model
    for part in path:
        if (child := module._modules.get(part)) is None:
            return None
        module = unwrap(child)
    return module, attribute


def find_parameter(model: nn.Module, name: str) -> nn.Parameter | None:
    """The parameter that `name` means in `model`, or `None`."""
    slot = find_slot(model, name)
    return slot[0]._parameters.get(slot[1]) if slot else None


def slot_of(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """`find_slot` of a name that must be there.

    Raises:
        TyingError: when a module on the way is missing.
    """
    if (slot := find_slot(model, name)) is None:
        raise TyingError(f"{name!r} {why_no_parameter(model, name)}.")
    return slot


def parameter_of(model: nn.Module, name: str) -> nn.Parameter:
    """`find_parameter` of a name that must be there.

    Raises:
        TyingError: when `name` is not a parameter.
    """
    if (parameter := find_parameter(model, name)) is None:
        raise TyingError(f"{name!r} {why_no_parameter(model, name)}.")
    return parameter


def parameter_at_work(model: nn.Module, name: str) -> nn.Parameter | None:
    """The parameter that a forward pass uses for `name`.

    That is the active copy of PEFT's `modules_to_save` if there is one, else the result of `find_parameter`.
    """
    *path, attribute = name.split(".")
    module = model
    for part in path:
        if (module := module._modules.get(part)) is None:
            return None
        copies: Any = module._modules.get("modules_to_save", {})
        active: Any = () if getattr(module, "disable_adapters", True) else module.active_adapters
        module = unwrap(next((copies[adapter] for adapter in active if adapter in copies), module))
    return module._parameters.get(attribute)


def matrix_at_work(model: nn.Module, name: str) -> nn.Parameter:
    """`parameter_at_work` of a name that must be there.

    Raises:
        TyingError: when `name` is not a parameter.
    """
    found = parameter_at_work(model, name)
    return parameter_of(model, name) if found is None else found


def adapter_at(model: nn.Module, name: str) -> str | None:
    """The kind of the adapter of PEFT at work on the module of `name`, which adds something to what the module gives.

    A merged adapter, one that is switched off, and a copy (`parameter_at_work`) are none.
    """
    path, _, _ = name.rpartition(".")
    module = model
    for part in path.split("."):
        module = unwrap(module)._modules.get(part)
        if module is None:
            return None
    while (inner := next((m for key in _WRAPPERS if (m := module._modules.get(key)) is not None), None)) is not None:
        layer: Any = module
        if hasattr(type(layer), "merged") and not layer.disable_adapters and not layer.merged:
            held = {adapter for part in layer.adapter_layer_names for adapter in getattr(layer, part, {})}
            if held.intersection(layer.active_adapters):
                return type(layer).__name__
        module = inner
    return None


def is_one(model: nn.Module, names: Collection[str]) -> bool:
    """Whether `names` are one and the same parameter in `model`."""
    return _are_one(model, names) or shown_as_shards(model) and _are_one(model, names)


def _are_one(model: nn.Module, names: Collection[str]) -> bool:
    held = [find_parameter(model, name) for name in names]
    return held[0] is not None and all(parameter is held[0] for parameter in held)


def state_key(model: nn.Module, name: str) -> str:
    """The key of `name` in `model.state_dict()`: the name itself, unless an adapter wraps a module on the way."""
    *path, attribute = name.split(".")
    module, key = model, []
    for part in path:
        module, key = module._modules[part], [*key, part]
        while inner := next((k for k in _WRAPPERS if module._modules.get(k) is not None), None):
            module, key = module._modules[inner], key if inner in _NOT_IN_KEYS else [*key, inner]
    return ".".join([*key, attribute])


def named_slots(model: nn.Module, places: list[tuple[str, nn.Module]] | None = None) -> dict[str, nn.Parameter]:
    """Every name of every parameter, tied ones under each of their names (`named_parameters` gives only the first).

    Args:
        model: any module.
        places: `places_of(model)`, where the caller has it already. Default `None`: it is read here.
    """
    return {
        f"{place}.{attribute}" if place else attribute: parameter
        for place, module in places or places_of(model)
        for attribute, parameter in module._parameters.items()
        if parameter is not None
    }


def places_of(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Every module with its path, in the order of `named_modules`. One at several paths is listed at each of them.

    Paths are without wrappers: a wrapper and the module inside it have the same.
    """
    places: list[tuple[str, nn.Module]] = []
    waiting = [("", model)]
    while waiting:
        place, module = waiting.pop()
        places.append((place, module))
        children = [(key, child) for key, child in module._modules.items() if child is not None]
        for key, child in reversed(children):
            inner = place if key in _WRAPPERS else f"{place}.{key}" if place else key
            waiting.append((inner, child))
    return places


def shared_names(slots: dict[str, nn.Parameter]) -> list[list[str]]:
    """The names of `slots` that are one parameter."""
    by_identity: dict[int, list[str]] = {}
    for name, parameter in slots.items():
        by_identity.setdefault(id(parameter), []).append(name)
    return [names for names in by_identity.values() if len(names) > 1]


def names_of(model: nn.Module, parameter: nn.Parameter) -> list[str]:
    """Every name of `parameter` in `model`, the root of its tie group first; an empty list for one of another model.

    `named_parameters()` lists a tied parameter once, under the first of its names. A recipe that chooses parameters by
    name (`"lm_head" in name`) finds the other names here.

    Args:
        model: any module, also a wrapper around the model (PEFT, DistributedDataParallel): names start at the module
            that is given, as in its `named_parameters()`. Adapters, activation checkpointing and torch.compile inside
            are seen through, and not part of a name.
        parameter: the object itself, not its values.

    Example:
        >>> decayed = [p for p in model.parameters() if not any("lm_head" in n for n in names_of(model, p))]
    """
    names = [name for name, held in named_slots(model).items() if held is parameter]
    holders = ((path, vars(module).get("tie_groups", ())) for path, module in model.named_modules())
    roots = {canonical(f"{path}.{group.root}".lstrip(".")) for path, groups in holders for group in groups}
    return sorted(names, key=lambda name: name not in roots)


def canonical(path: str) -> str:
    """Remove the modules of wrappers from a path."""
    return ".".join(part for part in path.split(".") if part not in _WRAPPERS)


def why_no_parameter(model: nn.Module, name: str, names: Iterable[str] = ()) -> str:
    """Reason why `name` is not a parameter of `model`, as the middle of a sentence that starts with the name."""
    slot = find_slot(model, name)
    if slot is None:
        return f"does not exist in {type(model).__name__}{nearest(name, names)}"
    module, attribute = slot
    if attribute in getattr(module, "parametrizations", {}):
        return "is parametrised (torch.nn.utils.parametrize, weight norm); undo it by remove_parametrizations"
    if f"{attribute}_orig" in module._parameters:
        return "is pruned (torch.nn.utils.prune); make it permanent by prune.remove"
    if f"{attribute}_g" in module._parameters:
        return "is under the old weight norm (torch.nn.utils.weight_norm); undo it by remove_weight_norm"
    if attribute in module._buffers:
        return "is a buffer, not a parameter; only parameters are tied"
    if _is_of(type(module), _QUANTISERS):
        return f"is quantised ({type(module).__name__}); untie before quantising one side"
    if isinstance(getattr(module, attribute, None), torch.Tensor):
        return f"is a plain tensor of {type(module).__name__}, not a parameter"
    return f"does not exist in {type(model).__name__}{nearest(name, names)}"


# --- what is done to slots -------------------------------------------------------------------------------------------


def set_parameter(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    """Put `parameter` into the slot `name`.

    It goes into the module's dict of parameters rather than through `setattr`, which `accelerate.init_empty_weights`
    answers by a new parameter on the meta device: the tie would be lost.
    """
    module, attribute = slot_of(model, name)
    module._parameters[attribute] = parameter


def share_parameter(model: nn.Module, names: Iterable[str], parameter: nn.Parameter) -> None:
    """Make `names` one: put `parameter` into each of their slots."""
    for name in names:
        set_parameter(model, name, parameter)


def own_module(model: nn.Module, name: str) -> None:
    """Copy the modules on the path of `name` that stand at several paths, so that the slot is separate."""
    parent = model
    for part in name.split(".")[:-1]:
        child = parent._modules[part]
        if sum(module is child for _, module in model.named_modules(remove_duplicate=False)) > 1:
            own = copy.copy(child)
            for table in ("_parameters", "_buffers", "_modules"):
                vars(own)[table] = dict(getattr(child, table))
            child = parent._modules[part] = own
        parent = child


def untie_others(model: nn.Module, groups: Iterable) -> None:
    """Give a parameter of its own to every name that is tied now and is not tied in `groups`.

    Args:
        model: model to change in place. Values stay.
        groups: tie groups (with `name` and `names`) that are to hold.
    """
    group_of = {name: group.name for group in groups for name in group.names}
    slots = named_slots(model)
    for shared in shared_names(slots):
        parts: dict[str, list[str]] = {}
        for name in shared:
            parts.setdefault(group_of.get(name, f"{name} alone"), []).append(name)
        for names in list(parts.values())[1:]:
            old = slots[names[0]]
            with gathered((old,)):
                copy = nn.Parameter(old.detach().clone(), requires_grad=old.requires_grad)
            for name in names:
                own_module(model, name)
                set_parameter(model, name, copy)


def replace_module(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put `new` wherever `old` stands in `model`."""
    for parent in list(model.modules()):
        for child, module in parent._modules.items():
            if module is old:
                parent._modules[child] = new


def partitioned_name(model: nn.Module) -> str | None:
    """The first parameter of `model` whose values are not there, because ZeRO-3 has partitioned it."""
    return next((name for name, parameter in named_slots(model).items() if is_partitioned(parameter)), None)


def is_quantised(module: nn.Module, parameter: torch.Tensor) -> bool:
    """Whether a slot holds a quantised matrix, by its dtype and the packages of its classes."""
    return not parameter.is_floating_point() or any(_is_of(type(x), _QUANTISERS) for x in (module, parameter))


def _is_of(kind: type, packages: tuple[str, ...]) -> bool:
    return f"{kind.__module__}.".startswith(tuple(f"{package}." for package in packages))


def why_incomparable(tensor: torch.Tensor) -> str | None:
    """Reason why the values of `tensor` cannot be compared, as the end of a sentence about it; `None` if they can."""
    if _is_of(type(tensor), _QUANTISERS):
        return f"is quantised ({type(tensor).__name__}). Tie before quantising, or untie(model) first"
    if getattr(tensor, "ds_numel", 0) > tensor.numel():
        return (
            "is partitioned by DeepSpeed ZeRO-3, and this process holds none of its values. Do it before the model is "
            "partitioned, or inside deepspeed.zero.GatheredParameters([...], modifier_rank=0)"
        )
    return None


def same_values(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal shape and elements; NaN equals NaN, since two copies of one broken matrix are still copies.

    Raises:
        TyingError: for values that are not there, or cannot be read: a quantised tensor, a shard of ZeRO-3.
    """
    if a is b:
        return True
    if (why := why_incomparable(a) or why_incomparable(b)) is not None:
        raise TyingError(f"Two tensors of shape {tuple(a.shape)} cannot be compared: one {why}.")
    if a.shape != b.shape or a.dtype != b.dtype or a.device != b.device:
        return False
    return torch.equal(a, b) or bool(((a == b) | (a.isnan() & b.isnan())).all())


def difference(a: torch.Tensor, b: torch.Tensor) -> str:
    """Describe how far two tensors are apart, as the middle of a sentence."""
    if a.shape != b.shape:
        return f"shapes {tuple(a.shape)} and {tuple(b.shape)}"
    a, b = a.detach().double().cpu(), b.detach().double().cpu()
    gap = (a - b).abs().nan_to_num(nan=float("inf"))
    where = [int(i) for i in torch.unravel_index(gap.argmax(), gap.shape)] if gap.ndim else []
    gaps = f"{int((gap > 0).sum())} of {gap.numel()} elements differ"
    return f"largest difference {gap.max().item():.3g} at {where}, {gaps}"


def fit_rows(module: nn.Module) -> None:
    """Adapt `num_embeddings` or `out_features`, bias and padding index to the rows of `module.weight`.

    New biases are zero, as transformers pads them.
    """
    weight = getattr(module, "weight", None)
    if not isinstance(weight, torch.Tensor) or len(shape_of(weight)) != 2:
        return
    rows, columns = shape_of(weight)
    if isinstance(module, nn.Embedding):
        module.num_embeddings = rows
        if module.padding_idx is not None and module.padding_idx >= rows:
            module.padding_idx = None
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = rows, columns
        if module.bias is not None and shape_of(module.bias)[0] != rows:
            module.bias.data = nn.functional.pad(module.bias.data, (0, rows - module.bias.shape[0]))
            module.bias.grad = None


def stands_in(model: nn.Module, name: str) -> bool:
    """Whether torch.func, FSDP or DataParallel has put a plain tensor where the parameter `name` was.

    Pruning and parametrisation do so too, but they add names by which they are recognised.
    """
    if (slot := find_slot(model, name)) is None:
        return False
    module, attribute = slot
    held = module._parameters.get(attribute, getattr(module, attribute, None))
    changed = {f"{attribute}_orig", f"{attribute}_g"} & module._parameters.keys()
    changed = changed or attribute in getattr(module, "parametrizations", {})
    return not changed and isinstance(held, torch.Tensor) and not isinstance(held, nn.Parameter)
