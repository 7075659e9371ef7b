"""The layer of each adapted module, from the names and sizes of the modules or from the user's setting."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from re import Match

#: The part that torch.compile adds to the names of modules. Names in a file do not have it.
COMPILED = "_orig_mod."
#: The kind of a module, and its numbers of inputs and outputs.
Features = tuple[str, int, int]


@dataclass(frozen=True)
class Place:
    """The place of a module in a model.

    Args:
        layer: path of its layer, such as `model.layers.3`; `None` for a module outside all layers.
        index: number of its layer, such as 3; `None` outside all layers.
        inside: name of the module inside its layer, such as `self_attn.q_proj`; outside all layers, its whole name.
    """

    layer: str | None
    index: int | None
    inside: str


def find_layers(modules: Mapping[str, Features], pattern: str | list[str] | None = None) -> dict[str, Place]:
    """Find the place of each module.

    A layer is a numbered part of a model that is repeated: the same module, of the same size, exists under another
    number (`layers.3`, `layer_3`). If such parts contain each other (experts in layers), the outer one is the layer. A
    list with one model, and the stages of Swin, which have different widths, are not repeated; the layers are inside
    them. If nothing is repeated (a model with one layer), a layer ends with the first number of the name.

    Args:
        modules: name and size of each module.
        pattern: `layers_pattern` of an adapter's config, the name of the list of layers or several such names.
            Default: the rule above.

    Returns:
        The place of each module by its name.
    """
    names = {name: name.replace(COMPILED, "") for name in modules}
    if pattern:
        patterns = [pattern] if isinstance(pattern, str) else pattern
        return {name: _by_pattern(clean, patterns) for name, clean in names.items()}
    # The key is the form of a name, with `#` for each number, and the position of the number that may be the layer's.
    # The value has the other parts of the name and the size, each with its numbers in this position.
    repeats: dict[tuple[str, int], dict[tuple, set[str]]] = {}
    for name, clean in names.items():
        for number in _numbers(clean):
            others = clean[: number.start()], clean[number.end() :], modules[name]
            repeats.setdefault((_form(clean), _rank(clean, number)), {}).setdefault(others, set()).add(number["index"])
    repeated = {key for key, found in repeats.items() if any(len(indices) > 1 for indices in found.values())}
    return {name: _by_number(clean, repeated) for name, clean in names.items()}


def _numbers(name: str) -> list[Match]:
    """The numbers in a name that may be a layer's: numbers that end a part; in the last part, only the whole part.

    `fc1` and `fc2` are not layers. The modules of an `nn.ModuleList` of linear layers are.
    """
    found = re.finditer(r"(?:(?<=\.)|^)(?P<stem>[^.]*?)(?P<index>\d+)(?=\.|$)", name)
    return [number for number in found if number.end() < len(name) or not number["stem"]]


def _form(name: str) -> str:
    return re.sub(r"\d+", "#", name)


def _rank(name: str, number: Match) -> int:
    return name.count(".", 0, number.start("index"))


def _by_number(name: str, repeated: set[tuple[str, int]]) -> Place:
    numbers = _numbers(name)
    whole = [number for number in numbers if not number["stem"] and number.end() < len(name)]
    number = next((n for n in numbers if (_form(name), _rank(name, n)) in repeated), next(iter(whole), None))
    return Place(None, None, name) if number is None else _place(name, number.end(), int(number["index"]))


def _by_pattern(name: str, patterns: list[str]) -> Place:
    for pattern in patterns:
        found = re.match(rf"(?:^|.*?\.){pattern}\.(?P<index>\d+)(?=\.|$)", name)
        if found:
            return _place(name, found.end(), int(found["index"]))
    return Place(None, None, name)


def _place(name: str, end: int, index: int) -> Place:
    layer, inside = name[:end], name[end + 1 :]
    # A module that is a layer itself gets the name of its list.
    return Place(layer, index, inside or layer.rpartition(".")[0].rpartition(".")[2] or "layer")
