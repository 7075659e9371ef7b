"""What a published custom class carries along, so that `trust_remote_code` loads it tied without this package.

transformers copies the module of a class registered by `register_for_auto_class`, and its relative imports, next to
the weights. A class over `TiedModelMixin` imports that from `hf_tying`; the few modules that it needs are put beside
it under flat names, and the copied files import them from there.
"""

import re
from importlib import resources
from pathlib import Path

# From the ground up; each imports only modules before it, by `from .name import`.
_MODULES = (
    "config",
    "alias",
    "parameters",
    "groups",
    "verify",
    "loading",
    "record",
    "embeddings",
    "losses.projection",
    "projection",
    "remote_code",
    "modeling",
)
_PREFIX = "hf_tying_"
_HOME = {"TyingConfig": "config", "TyingConfigMixin": "config", "TyingError": "config", "TiedModelMixin": "modeling"}
_IMPORT = re.compile(r"^from hf_tying(?:\.\w+)* import (?:\(([^)]*)\)|(.+))$", re.MULTILINE)


def carry_along(folder: str | Path) -> None:
    """Put the mixin's modules into `folder`, and let the copied modeling files there import them.

    Args:
        folder: where `save_pretrained` has just copied a custom class's files.
    """
    folder = Path(folder)
    copied = [path for path in folder.glob("*.py") if not path.name.startswith(_PREFIX)]
    if not any(_IMPORT.search(path.read_text(encoding="utf-8")) for path in copied):
        return
    for path in copied:
        text = path.read_text(encoding="utf-8")
        path.write_text(_IMPORT.sub(_relative, text), encoding="utf-8")
    package = resources.files(__package__)
    for module in _MODULES:
        text = package.joinpath(f"{module.replace('.', '/')}.py").read_text(encoding="utf-8")
        text = re.sub(r"from \.([\w.]+) import", lambda m: f"from .{_flat(m[1])} import", text)
        (folder / f"{_flat(module)}.py").write_text(text, encoding="utf-8")


def _flat(module: str) -> str:
    return _PREFIX + module.replace(".", "_")


def _relative(match: re.Match) -> str:
    """The import of public names, from the modules beside the file; names that are not carried stay as they are."""
    names = [name.strip() for name in (match[1] or match[2]).split(",") if name.strip()]
    lines = []
    for name in names:
        public = name.split(" as ")[0].strip()
        home = f".{_PREFIX}{_HOME[public]}" if public in _HOME else "hf_tying"
        lines.append(f"from {home} import {name}")
    return "\n".join(lines)
