"""The stacks of layers of a model: where they are, which layers can be one block, how a stack grows."""

import copy
from typing import Any

from torch import nn
from transformers.modeling_utils import PreTrainedModel

from ..config import TyingError, nearest

# Fields of configs that say how long a stack is.
_LENGTHS = (
    *(
        "num_hidden_layers",
        "num_layers",
        "n_layer",
        "n_layers",
        "encoder_layers",
        "decoder_layers",
        "num_decoder_layers",
    ),
    *("num_encoder_layers", "num_hidden_groups"),
)
#: A list of modules that has less than this share of the parameters of the largest one is no stack of layers.
_SMALL = 0.1


def stacks_of(model: PreTrainedModel) -> dict[str, nn.ModuleList]:
    """The outermost lists of layers of a model, by their paths."""
    found: dict[str, nn.ModuleList] = {}
    for path, module in model.named_modules():
        inner = any(path.startswith(f"{outer}.") for outer in found)
        if (
            isinstance(module, nn.ModuleList)
            and not inner
            and len(module) > 1
            and any(True for _ in module.parameters())
        ):
            found[path] = module
    lengths = {value for _, _, value in _length_fields(model)}
    found = {path: stack for path, stack in found.items() if len(stack) in lengths} or found
    size = {path: sum(p.numel() for p in stack.parameters()) for path, stack in found.items()}
    return {path: stack for path, stack in found.items() if size[path] >= _SMALL * max(size.values())}


def chosen_stacks(model: PreTrainedModel, stack: str | None) -> dict[str, nn.ModuleList]:
    """The stacks that `stack` names: a path, a part of one (`"encoder"`), or `None` for all.

    Raises:
        TyingError: there is none.
    """
    found: dict[str, nn.ModuleList] = stacks_of(model)
    chosen: dict[str, nn.ModuleList] = dict(found)
    if stack is not None:
        chosen = {path: layers for path, layers in found.items() if path == stack or stack in path.split(".")}
        module: nn.Module | None = dict(model.named_modules()).get(stack)
        if not chosen and isinstance(module, nn.ModuleList) and len(module):
            chosen[stack] = module
    if not chosen:
        hint = "" if stack is None else nearest(stack, found)
        raise TyingError(
            f"{type(model).__name__} has no stack of layers{'' if stack is None else f' {stack!r}'}: expected one of "
            f"{list(found) or 'its lists of modules, and it has none'}{hint}."
        )
    return chosen


def why_unlike(first: nn.Module, other: nn.Module) -> str | None:
    """Why two layers cannot be one block: the middle of a sentence about the second one. `None` where they can.

    Parameters of a module that only one of them has stay apart (the position bias of T5's first layer; the norm that
    is the identity in ModernBERT's).
    """
    if type(first) is not type(other):
        return f"is a {type(other).__name__} and not a {type(first).__name__}"
    kinds, others = dict(first.named_modules()), dict(other.named_modules())
    for path in kinds.keys() & others.keys():
        both = all(any(True for _ in each[path].parameters()) for each in (kinds, others))
        if type(kinds[path]) is not type(others[path]) and both:
            return f"has a {type(others[path]).__name__} as {path!r} and not a {type(kinds[path]).__name__}"
    more, fewer = sorted(others.keys() - kinds.keys()), sorted(kinds.keys() - others.keys())
    if more and fewer:
        return f"has {more[0]!r} where the first has {fewer[0]!r}"
    sizes = {name: p.shape for name, p in first.named_parameters()}
    for name, parameter in other.named_parameters():
        if name in sizes and sizes[name] != parameter.shape:
            return f"has {name!r} of shape {tuple(parameter.shape)} and not {tuple(sizes[name])}"
    return None


def grow(model: PreTrainedModel, path: str, order: list[int]) -> None:
    """Give the stack at `path` a layer for each element of `order`: copies of its layers, with their new numbers.

    Lists in the config that have an element for each layer follow, and the field with the number of layers.
    """
    stack = model.get_submodule(path)
    assert isinstance(stack, nn.ModuleList)
    old, before = list(stack), len(stack)
    seen: set[int] = set()
    layers = []
    for i, source in enumerate(order):
        layer = old[source] if source not in seen else copy.deepcopy(old[source])
        seen.add(source)
        layers.append(layer)
        for module in layer.modules():
            if isinstance(getattr(module, "layer_idx", None), int):
                vars(module)["layer_idx"] = i
    stack._modules.clear()
    stack._modules.update({str(i): layer for i, layer in enumerate(layers)})
    side = next((side for side in ("encoder", "decoder") if side in path.split(".")), "")
    fields = [each for each in _length_fields(model) if each[2] == before]
    for config, name, _ in [each for each in fields if side and side in each[1]] or fields:
        for key, value in list(vars(config).items()):
            if isinstance(value, list) and len(value) == before:
                setattr(config, key, [value[source] for source in order])
        setattr(config, name, len(order))


def _length_fields(model: PreTrainedModel) -> list[tuple[Any, str, int]]:
    """Config, field and value of each number of layers that the config of a model has, those of its parts too."""
    configs, fields = [model.config], []
    for config in configs:
        configs += [
            value for value in vars(config).values() if hasattr(value, "to_dict") and hasattr(value, "model_type")
        ]
        names = {config.attribute_map.get(name, name) for name in _LENGTHS}
        fields += [
            (config, name, value) for name in sorted(names) if isinstance(value := getattr(config, name, None), int)
        ]
    return fields
