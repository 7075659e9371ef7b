"""Copy this room next to a published custom class, so that `trust_remote_code` loads it tied without this package.

transformers copies the module of a class registered by `register_for_auto_class`, and its relative imports, next to
the weights. A class over `TiedModelMixin` imports it from `hf_tying`. So the whole room is copied beside the class,
with the rooms of the extensions that cannot be left out and the modules that they import. Each file gets a flat name,
and the copied files import from there.
"""

import os
import re
from importlib import resources
from pathlib import Path

from ..config import EXTENSIONS

_PACKAGE = "hf_tying"
_PREFIX = "hf_tying_"
_HOME = {
    "TyingConfig": "config",
    "TyingConfigMixin": "config",
    "TyingError": "config",
    "TiedModelMixin": "ties.modeling",
    "share_of_update": "projection.penalty",
}
_USERS_IMPORT = re.compile(r"^from hf_tying(?:\.\w+)* import (?:\(([^)]*)\)|(.+))$", re.MULTILINE)
_RELATIVE_IMPORT = re.compile(r"from (\.+)([\w.]+) import")


def carry_along(folder: str | os.PathLike[str]) -> None:
    """Put the mixin's modules into `folder`, and let the copied modeling files there import them.

    Args:
        folder: folder to which `save_pretrained` has copied the files of a custom class.
    """
    folder = Path(folder)
    copied = [path for path in folder.glob("*.py") if not path.name.startswith(_PREFIX)]
    if not any(_USERS_IMPORT.search(path.read_text(encoding="utf-8")) for path in copied):
        return
    for path in copied:
        text = path.read_text(encoding="utf-8")
        path.write_text(_USERS_IMPORT.sub(_from_beside, text), encoding="utf-8")
    for module, text in carried_modules().items():
        (folder / f"{_flat(module)}.py").write_text(text, encoding="utf-8")


def carried_modules() -> dict[str, str]:
    """The text of each module that is copied, by its name in the package; imports are already rewritten."""
    extensions = [extension.module for extension in EXTENSIONS.values() if extension.without is None]
    rooms = ["ties", *dict.fromkeys(module.partition(".")[0] for module in extensions)]
    waiting = [
        f"{room}.{file.name.removesuffix('.py')}"
        for room in rooms
        for file in resources.files(_PACKAGE).joinpath(room).iterdir()
        if file.name.endswith(".py") and file.name != "__init__.py"
    ]
    carried = {}
    while waiting:
        if (module := waiting.pop()) in carried:
            continue
        text = resources.files(_PACKAGE).joinpath(module.replace(".", "/") + ".py").read_text(encoding="utf-8")
        waiting += [_imported(match, module) for match in _RELATIVE_IMPORT.finditer(text)]
        carried[module] = _RELATIVE_IMPORT.sub(
            lambda match, at=module: f"from .{_flat(_imported(match, at))} import", text
        )
    carried["ties.extensions"] += "".join(_carrying(module) for module in extensions)
    return carried


def _carrying(module: str) -> str:
    """The lines by which the copied core finds an extension. transformers copies what a file imports by name."""
    function = f"_{module.replace('.', '_')}"
    return (
        f"\n\ndef {function}():\n    from types import SimpleNamespace\n\n"
        f"    from .{_flat(module)} import honour, refuse_misfit\n\n"
        f"    return SimpleNamespace(honour=honour, refuse_misfit=refuse_misfit)\n\n\n"
        f"_CARRIED[{module!r}] = {function}\n"
    )


def _imported(match: re.Match, module: str) -> str:
    """The name in the package of what a relative import in `module` imports from."""
    return ".".join([*module.split(".")[: -len(match[1])], match[2]])


def _flat(module: str) -> str:
    return _PREFIX + module.replace(".", "_")


def _from_beside(match: re.Match) -> str:
    """Rewrite an import of public names to the modules beside the file. Names that are not copied stay."""
    names = [name.strip() for name in (match[1] or match[2]).split(",") if name.strip()]
    lines = []
    for name in names:
        public = name.split(" as ")[0].strip()
        home = f".{_flat(_HOME[public])}" if public in _HOME else _PACKAGE
        lines.append(f"from {home} import {name}")
    return "\n".join(lines)
