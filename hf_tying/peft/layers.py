"""Which layer of a model an adapted module is in: found in the names and sizes of the modules, or as the user says."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from re import Match

#: The part that torch.compile adds to the names of modules. The names in a file are without it.
COMPILED = "_orig_mod."
#: Kind, inputs and outputs of a module.
Features = tuple[str, int, int]


@dataclass(frozen=True)
class Place:
    """Where a module is.

    Args:
        layer: path of its layer, such as `model.layers.3`; `None` for a module outside all layers.
        index: number of the layer, 3; `None` outside all layers.
        inside: the module's name inside its layer, such as `self_attn.q_proj`; outside all layers, its whole name.
    """

    layer: str | None
    index: int | None
    inside: str


def find_layers(modules: Mapping[str, Features], pattern: str | list[str] | None = None) -> dict[str, Place]:
    """The place of each module.

    A layer is a numbered part of a model that is repeated: it has the same module, of the same size, under another
    number (`layers.3`, `layer_3`). Where such parts lie within each other (experts within layers), it is the outer
    one. A list of models that holds one model, and Swin's stages, each of another width, are not repeated: the layers
    are what they hold. Where nothing is repeated (one layer), a layer ends with the first number of the name.

    Args:
        modules: name and size of each.
        pattern: `layers_pattern` of an adapter's config: the name of the list of layers, or several such names.
    """
    names = {name: name.replace(COMPILED, "") for name in modules}
    if pattern:
        patterns = [pattern] if isinstance(pattern, str) else pattern
        return {name: _by_pattern(clean, patterns) for name, clean in names.items()}
    # By the form of a name, which has `#` for each number, and by the place of the number that may be the layer's:
    # the other parts and the size, each with the numbers that it is found under.
    repeats: dict[tuple[str, int], dict[tuple, set[str]]] = {}
    for name, clean in names.items():
        for number in _numbers(clean):
            others = clean[: number.start()], clean[number.end() :], modules[name]
            repeats.setdefault((_form(clean), _rank(clean, number)), {}).setdefault(others, set()).add(number["index"])
    repeated = {key for key, found in repeats.items() if any(len(indices) > 1 for indices in found.values())}
    return {name: _by_number(clean, repeated) for name, clean in names.items()}


def _numbers(name: str) -> list[Match]:
    """The numbers in a name that may be a layer's: those that end a part, and of the last part only a whole one.

    `fc1` and `fc2` are no layers; the modules of an `nn.ModuleList` of linear layers are.
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
    # A module that is a layer itself has the name of the list that it is in.
    return Place(layer, index, inside or layer.rpartition(".")[0].rpartition(".")[2] or "layer")
