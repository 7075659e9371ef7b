"""The floor plan: a file imports only from rooms below its own, and nothing imports in a circle."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "hf_tying"

#: From the ground up. A room is a folder of the package, or a file beside the folders.
ROOMS = (
    *("_lazy", "_moved", "errors", "entries", "config", "_extras"),
    *("losses", "ties", "depth", "projection", "objectives", "report"),
    *("diagnostics", "vocabularies", "peft", "models", "data", "metrics", "parallel", "training", "doctor", "hub"),
    *("wrappers", "hook", "demo", "cli"),
)
#: What starts the package, and so stands above all rooms.
ROOF = ("hf_tying", "hf_tying.__main__")


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def nodes_run(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes below `node`, without what is for type checkers alone and never runs."""
    for child in ast.iter_child_nodes(node):
        checked = isinstance(child, ast.If) and isinstance(child.test, ast.Name) and child.test.id == "TYPE_CHECKING"
        for part in child.orelse if checked else [child]:
            yield part
            yield from nodes_run(part)


def imports_of(module: str) -> set[str]:
    """The modules of the package that `module` imports when it runs, at its top or inside of a function."""
    path = MODULES[module]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    found = set()
    for node in nodes_run(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            start = ".".join([*base, *([node.module] if node.module else [])])
            names = [f"{start}.{alias.name}" if f"{start}.{alias.name}" in MODULES else start for alias in node.names]
        else:
            continue
        found |= {name for name in names if name in MODULES}
    return found - {module}


IMPORTS = {module: imports_of(module) for module in MODULES}


def room(module: str) -> str:
    return module.split(".")[1]


def test_every_file_stands_in_a_room_of_the_plan():
    inside = [module for module in MODULES if module not in ROOF]
    assert {room(module) for module in inside} == set(ROOMS)
    assert sum(map(len, IMPORTS.values())) > 300  # the imports are found at all


@pytest.mark.parametrize("module", [module for module in MODULES if module not in ROOF])
def test_a_file_imports_only_from_rooms_below_its_own(module):
    floor = ROOMS.index(room(module))
    above = {name for name in IMPORTS[module] if name in ROOF or ROOMS.index(room(name)) > floor}
    # Published code asks for public names at the top of the package, which knows them by their names alone.
    assert above <= ({"hf_tying"} if room(module) in ("models", "demo") else set())


def test_nothing_imports_in_a_circle():
    finished: set[str] = set()

    def follow(module: str, path: tuple[str, ...]):
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module not in finished:
            for name in sorted(IMPORTS[module]):
                follow(name, (*path, module))
            finished.add(module)

    for module in MODULES:
        follow(module, ())
    assert finished == set(MODULES)


def test_the_core_imports_no_extension():
    from hf_tying.config import EXTENSIONS

    honouring = {f"hf_tying.{extension.module}" for extension in EXTENSIONS.values()}
    assert honouring <= set(MODULES)
    rooms_of_extensions = {room(module) for module in honouring}
    for module in MODULES:
        if module not in ROOF and room(module) in ("config", "ties"):
            assert not {name for name in IMPORTS[module] if name not in ROOF and room(name) in rooms_of_extensions}
