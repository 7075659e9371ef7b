"""Modules of version 0.1 by their old names, for pickles and imports that were written with them.

`torch.save(model)` stores the classes of a model by module and name. A module that has moved is found by its old name,
and has the names of the modules to which its contents have moved. Nothing is imported before its first use.
"""

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

#: From each old name below the package to where its contents are now.
MOVED: dict[str, tuple[str, ...]] = {
    "alignment": ("diagnostics.geometry",),
    "data.joint_tokenizer": ("vocabularies.tokenizer",),
    "data.joint_vocabulary": ("vocabularies.joint", "vocabularies.conventions"),
    "data.vocabularies": ("vocabularies.join", "vocabularies.rows"),
    "deferred_logits": ("objectives.deferred_logits", "objectives.tied_softmax", "objectives.step_loss"),
    "embeddings": ("ties.resizing",),
    "files": ("ties.headers",),
    "groups": ("ties.groups", "ties.anatomy"),
    "lazy": ("_lazy",),
    "loading": ("ties.checkpoint",),
    "losses.projection": ("projection.penalty",),
    "modeling": ("ties.modeling", "ties.classes"),
    "parameters": ("ties.slots",),
    "peft.files": ("peft.tensor_names",),
    "peft.folder": ("peft.adapter_folder",),
    "peft.product": ("peft.scaled_linear",),
    "peft.report": ("report.on_adapters",),
    "projecting": ("projection.model",),
    "record": ("ties.record",),
    "remote_code": ("ties.remote_code",),
    "tied_loss": ("objectives.tied_loss", "objectives.tied_loss_mixin"),
    "training.objectives": ("training.arguments",),
    "tying": ("ties.tying",),
    "verify": ("ties.verify",),
    "vocabulary": ("ties.vocabulary",),
}
_PACKAGE = __name__.rpartition(".")[0]


class _Finder(MetaPathFinder, Loader):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        old = fullname.removeprefix(f"{_PACKAGE}.")
        return ModuleSpec(fullname, self) if old != fullname and old in MOVED else None

    def create_module(self, spec: ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        homes = MOVED[module.__name__.removeprefix(f"{_PACKAGE}.")]

        def __getattr__(name: str) -> Any:
            if name.startswith("__"):  # asked by `inspect` of every module, also while the homes are half imported
                raise AttributeError(name)
            for home in homes:
                found = import_module(f"{_PACKAGE}.{home}")
                if hasattr(found, name):
                    return getattr(found, name)
            raise AttributeError(
                f"module {module.__name__!r} has moved to {' and '.join(f'{_PACKAGE}.{home}' for home in homes)}, and "
                f"there is no {name!r}"
            )

        module.__getattr__ = __getattr__


def install() -> None:
    """Install the finder of old names, as the last one, so that it is asked only for modules that do not exist."""
    sys.meta_path.append(_Finder())
