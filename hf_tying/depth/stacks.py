"""The stacks of layers of a model: where they are, which layers can be one block, how a stack grows."""

import copy

import torch
from torch import nn
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel

from ..config import TyingError, nearest
from ..ties.classes import mixins_of, without_mixin
from ..ties.shared_configs import own_config
from ..ties.slots import named_slots

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
# Attributes in which a module keeps the number of its layer: its place in the cache.
_NUMBERS = ("layer_idx", "layer_id", "layer_number")
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
    lengths = {value for _, _, value in _length_fields(model.config)}
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

    The field of the config with the number of layers follows, and lists that have an element for each layer.

    Raises:
        TyingError: a model that is made from the new config has other parameters; nothing is changed.
    """
    stack = model.get_submodule(path)
    assert isinstance(stack, nn.ModuleList)
    old, before = list(stack), len(stack)
    fields = _fields_to_change(model, path, order)
    own_config(model)
    seen: set[int] = set()
    layers = []
    for i, source in enumerate(order):
        layer = old[source] if source not in seen else copy.deepcopy(old[source])
        seen.add(source)
        layers.append(layer)
        for module in layer.modules():
            vars(module).update({name: i for name in _NUMBERS if isinstance(vars(module).get(name), int)})
    stack._modules.clear()
    stack._modules.update({str(i): layer for i, layer in enumerate(layers)})
    known = {id(config) for config in _configs(model.config)}
    _follow(model.config, fields, before, order)
    for place in range(1, path.count(".") + 1):  # a model inside may have a config of its own, as T5's stacks have
        inner = getattr(model.get_submodule(".".join(path.split(".")[:place])), "config", None)
        if isinstance(inner, PreTrainedConfig) and id(inner) not in known:
            known.add(id(inner))
            same = [i for i, (_, _, value) in enumerate(_length_fields(inner)) if value == before]
            _follow(inner, same, before, order)


def _fields_to_change(model: PreTrainedModel, path: str, order: list[int]) -> list[int]:
    """Which of `_length_fields` give a model with the grown stack. T5 has the same number in two fields."""
    before = len(model.get_submodule(path)._modules)
    fields = [i for i, (_, _, value) in enumerate(_length_fields(model.config)) if value == before]
    cls = type(model)
    for mixin in mixins_of(cls):
        cls = without_mixin(mixin, cls)
    have = _shapes_made(cls, copy.deepcopy(model.config))  # without what this package has added to the model
    wanted = {each for each in have if not each[0].startswith(f"{path}.")}
    for name, shape in have - wanted:
        number, _, rest = name.removeprefix(f"{path}.").partition(".")
        wanted |= {(f"{path}.{i}.{rest}", shape) for i, source in enumerate(order) if source == int(number)}
    differing = set(wanted)
    for chosen in [*([field] for field in fields), fields]:
        config = copy.deepcopy(model.config)
        _follow(config, chosen, before, order)
        try:
            made = _shapes_made(cls, config)
        except (ValueError, IndexError, KeyError):  # numbers that do not fit each other
            continue
        if made == wanted:
            return chosen
        differing = min(differing, made ^ wanted, key=len)
    raise TyingError(
        f"Cannot grow {path!r}: a {cls.__name__} made from a config with {len(order)} layers has other parameters "
        f"({', '.join(sorted(name for name, _ in differing)[:2])}), and could not read the file. Leave out the layer "
        "that is unlike the others (the first one, often) from the repeated ones."
    )


def _shapes_made(cls: type[PreTrainedModel], config: PreTrainedConfig) -> set[tuple[str, tuple[int, ...]]]:
    """Name and shape of each parameter of the stock model that `config` makes, built without values."""
    vars(config).pop("tying", None)
    with torch.device("meta"):
        model = cls(config)
    return {(name, tuple(parameter.shape)) for name, parameter in named_slots(model).items()}


def _follow(config: PreTrainedConfig, fields: list[int], before: int, order: list[int]) -> None:
    """Write the new number of layers into fields of `_length_fields`, and repeat the elements of lists by layers."""
    found = _length_fields(config)
    for holder, name, _ in (found[i] for i in fields):
        for key, value in list(vars(holder).items()):
            if isinstance(value, list) and len(value) == before:
                setattr(holder, key, [value[source] for source in order])
        setattr(holder, name, len(order))


def lists_by_layer(config: PreTrainedConfig, fewer: int, layers: int) -> list[str]:
    """Fields of a config, and of its parts, that have an element for each of `layers`, where there may be `fewer`."""
    if fewer == layers:
        return []
    parts = (vars(each).items() for each in _configs(config))
    return [name for items in parts for name, value in items if isinstance(value, list) and len(value) == layers]


def _configs(config: PreTrainedConfig) -> list[PreTrainedConfig]:
    """A config and those of its parts."""
    configs = [config]
    for each in configs:
        configs += [value for value in vars(each).values() if isinstance(value, PreTrainedConfig)]
    return configs


def _length_fields(config: PreTrainedConfig) -> list[tuple[PreTrainedConfig, str, int]]:
    """Config, field and value of each number of layers in a config, and in the configs of its parts."""
    fields = []
    for each in _configs(config):
        names = {each.attribute_map.get(name, name) for name in _LENGTHS}
        numbers = ((name, getattr(each, name, None)) for name in sorted(names))
        fields += [(each, name, value) for name, value in numbers if isinstance(value, int)]
    return fields
