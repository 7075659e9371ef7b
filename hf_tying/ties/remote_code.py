"""Copy this room next to a published custom class, so that `trust_remote_code` loads it tied without this package.

transformers copies the module of a class registered by `register_for_auto_class`, and its relative imports, next to
the weights. A class over `TiedModelMixin` imports it from `hf_tying`. So the whole room is copied beside the class,
with the rooms of the extensions that cannot be left out, the modules of all that the class imports, and what these
import. Each file gets a flat name, and the copied files import from there (`user_imports` rewrites their imports).

Only files of the class are written: other files of the folder, and what links in it point to, stay as they are.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from importlib import import_module, resources
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers.dynamic_module_utils import get_relative_import_files

from ..config import EXTENSIONS, TyingError
from .user_imports import imports_package, rewrite_imports

_PACKAGE = "hf_tying"
_PREFIX = "hf_tying_"
_RELATIVE_IMPORT = re.compile(r"from (\.+)([\w.]+) import")
_NOT_CARRIED = re.compile(r"from \.+ import|import_module\(f?[\"']\.|^\s*(?:import|from) hf_tying\b", re.MULTILINE)
_SECONDS = 300

#: First lines of a program in which importing this package fails, as where it is not installed.
WITHOUT_THIS_PACKAGE = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "hf_tying":
            raise ModuleNotFoundError("No module named 'hf_tying'", name=name)
sys.meta_path.insert(0, Absent())
"""
# Run in a process of its own: the class is imported as `trust_remote_code` would.
_CLEAN_IMPORT = f"""{WITHOUT_THIS_PACKAGE}
from transformers.dynamic_module_utils import get_class_from_dynamic_module
get_class_from_dynamic_module(sys.argv[1], sys.argv[2])
"""


def save_code(copy: Callable[..., Any], obj: Any, folder: str | os.PathLike[str], config: Any = None) -> Any:
    """Copy the code of a custom class into a folder, with all of this package that it needs.

    Args:
        copy: `transformers.dynamic_module_utils.custom_object_save`. It copies code that does not use this package.
        obj: model, config or tokenizer whose class is registered for an Auto class.
        folder: folder that gets the files.
        config: the config, or configs, that get the `auto_map`.

    Returns:
        What `copy` returns: the files written.

    Raises:
        TyingError: the code cannot be carried; no file is written.
    """
    code = code_of(obj)
    if not code:
        return copy(obj, folder, config)
    folder = Path(folder)
    refuse_overwriting(obj, folder)
    with tempfile.TemporaryDirectory(dir=folder) as work:
        for path in copy(obj, work, config):
            code.setdefault(Path(path).name, Path(path).read_text(encoding="utf-8"))
        for name, text in code.items():
            (Path(work) / name).write_text(text, encoding="utf-8")
        for name in code:
            os.replace(Path(work) / name, folder / name)  # replaces a link, and leaves alone what it points to
    return [folder / name for name in code]


def code_of(obj: Any) -> dict[str, str]:
    """The files of a custom class that differ from the user's own, by name. Empty if the class needs none.

    Args:
        obj: instance of a class registered for an Auto class.

    Raises:
        TyingError: an import of this package cannot be carried along.
    """
    sources = {path.name: path.read_text(encoding="utf-8") for path in source_files(obj)}
    if not any(imports_package(text, name) for name, text in sources.items()):
        return {}
    needed: set[str] = set()

    def place(module: str, name: str) -> str | None:
        home = _home(module, name)
        if home is None or not _can_be_carried(home):
            return None
        needed.add(home)
        return _flat(home)

    code = {name: rewrite_imports(text, name, place) for name, text in sources.items() if imports_package(text, name)}
    return code | {f"{_flat(module)}.py": f"{_origin()}{text}" for module, text in carried_modules(needed).items()}


def _origin() -> str:
    """The first lines of each copied file: what it is part of, in which version, under which licence."""
    return (
        f"# Part of hf_tying {version('hf-tying')}, copied by save_pretrained beside the class that needs it.\n"
        "# Licensed under the Apache License, Version 2.0: https://www.apache.org/licenses/LICENSE-2.0\n"
    )


def source_files(obj: Any) -> list[Path]:
    """The files that transformers copies for the class of `obj`. None for a class that a program itself defines."""
    file = getattr(sys.modules.get(obj.__module__), "__file__", None)
    if obj.__module__ == "__main__" or file is None:
        return []
    return [Path(path) for path in dict.fromkeys([file, *get_relative_import_files(file)])]


def refuse_overwriting(obj: Any, folder: str | os.PathLike[str]) -> None:
    """Refuse to write the published form of a file over the user's own.

    Raises:
        TyingError: a source of the class lies in `folder`.
    """
    for source in source_files(obj):
        target = Path(folder) / source.name
        if target.exists() and not target.is_symlink() and target.samefile(source):
            raise TyingError(
                f"Cannot save into {str(folder)!r}: the published {source.name} would overwrite your own file. "
                "Save into another folder."
            )


def refuse_unloadable(obj: Any) -> None:
    """Import the published code of a custom class in a process without this package.

    Args:
        obj: model, config or tokenizer. One that is not registered for an Auto class, or that does not use this
            package, is not checked.

    Raises:
        TyingError: the code cannot be carried, or the import failed; the message ends with its last line.
    """
    if getattr(obj, "_auto_class", None) is None or not code_of(obj):
        return
    from transformers.dynamic_module_utils import custom_object_save

    with tempfile.TemporaryDirectory() as work:
        folder = Path(work) / "published_code"
        folder.mkdir()
        save_code(getattr(custom_object_save, "__wrapped__", custom_object_save), obj, folder)
        name = f"{source_files(obj)[0].stem}.{type(obj).__name__}"
        environment = os.environ | {"HF_MODULES_CACHE": str(Path(work) / "modules"), "HF_HUB_OFFLINE": "1"}
        try:
            done = subprocess.run(
                [sys.executable, "-c", _CLEAN_IMPORT, name, str(folder)],
                capture_output=True, text=True, env=environment, cwd=work, timeout=_SECONDS, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            reason = f"the import took more than {_SECONDS} seconds"
        else:
            if not done.returncode:
                return
            reason = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        shutil.rmtree(folder)
    raise TyingError(
        f"Nothing is uploaded: the code of {type(obj).__name__} cannot be imported where hf_tying is not installed "
        f"({reason}). Mend the imports of {source_files(obj)[0].name}, then push again."
    )


def carried_modules(also: Iterable[str] = ()) -> dict[str, str]:
    """The text of each module that is copied, by its name in the package; imports are already rewritten.

    Args:
        also: further modules to copy, by their names in the package.
    """
    extensions = [extension.module for extension in EXTENSIONS.values() if extension.without is None]
    rooms = ["ties", *dict.fromkeys(module.partition(".")[0] for module in extensions)]
    whole = [
        f"{room}.{file.name.removesuffix('.py')}"
        for room in rooms
        for file in resources.files(_PACKAGE).joinpath(room).iterdir()
        if file.name.endswith(".py") and file.name != "__init__.py"
    ]
    carried = {}
    for module, text in _with_imports([*whole, *sorted(also)]).items():
        carried[module] = _RELATIVE_IMPORT.sub(
            lambda match, at=module: f"from .{_flat(_imported(match, at))} import", text
        )
    carried["ties.extensions"] += "".join(_carrying(module) for module in extensions)
    return carried


def _with_imports(modules: Iterable[str]) -> dict[str, str]:
    """The text of modules of this package and of all that they import from it, by name."""
    waiting, texts = list(modules), {}
    while waiting:
        if (module := waiting.pop()) not in texts:
            path = resources.files(_PACKAGE).joinpath(module.replace(".", "/") + ".py")
            texts[module] = path.read_text(encoding="utf-8")
            waiting += [_imported(match, module) for match in _RELATIVE_IMPORT.finditer(texts[module])]
    return texts


def _can_be_carried(module: str) -> bool:
    """Whether `module` and all that it imports are plain files that import each other by name."""
    try:
        texts = _with_imports([module])
    except FileNotFoundError:  # a package, whose names are found at their first use
        return False
    return not any(_NOT_CARRIED.search(text) for name, text in texts.items() if not name.startswith("ties."))


def _home(module: str, name: str) -> str | None:
    """The module of this package, by its name in it, that defines `name` as `module` has it."""
    try:
        value = getattr(import_module(module), name)
    except (ImportError, AttributeError):
        return None
    home = getattr(value, "__module__", None)
    if not isinstance(home, str) or not home.startswith(f"{_PACKAGE}.") or getattr(value, "__name__", None) != name:
        return None
    return home.removeprefix(f"{_PACKAGE}.")


def _carrying(module: str) -> str:
    """The lines by which the copied core finds an extension. transformers copies what a file imports by name."""
    function = f"_{module.replace('.', '_')}"
    return (
        f"\n\ndef {function}():\n    from types import SimpleNamespace\n\n"
        f"    from .{_flat(module)} import honour, refuse_misfit\n\n"
        f"    return SimpleNamespace(honour=honour, refuse_misfit=refuse_misfit)\n\n\n"
        f"_CARRIED[{module!r}] = {function}\n"
    )


def _imported(match: re.Match[str], module: str) -> str:
    """The name in the package of what a relative import in `module` imports from."""
    return ".".join([*module.split(".")[: -len(match[1])], match[2]])


def _flat(module: str) -> str:
    return _PREFIX + module.replace(".", "_")
