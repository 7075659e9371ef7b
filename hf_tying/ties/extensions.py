"""Extensions: the entries of `tying` that are not ties (`loss`, `projection`), and the modules that honour them.

The core names none of them. It reads one dict, `hf_tying.config.EXTENSIONS`, when a model is made from its config or
from a pickle (`TiedModelMixin`), and when `tie` changes a live one. An extension is a module with two functions:

    refuse_misfit(model, value)     raises a `TyingError` where `model` cannot have it; changes nothing
    honour(model, value, strict)    makes `model` as `value` says; does nothing where it is so already

`value` is the entry as the config has it. `strict=False` is for another head over the same file: extensions that it
cannot have are left out. Where an extension acts in the steps of a model, `honour` puts a mixin of its own in front of
the model's class (`classes.with_mixin`).
"""

from collections.abc import Callable
from importlib import import_module
from types import ModuleType

from transformers.modeling_utils import PreTrainedModel
from transformers.utils import logging

from ..config import EXTENSIONS, TyingConfig

logger = logging.get_logger(__name__)

# Modules that are copied along with the code of a published class, by their names in the package.
_CARRIED: dict[str, Callable[[], ModuleType]] = {}


def refuse_misfits(model: PreTrainedModel, config: TyingConfig) -> None:
    """Refuse a declaration that `model` cannot have, before anything is changed.

    Raises:
        TyingError: by the extension, with the reason.
    """
    for key, value in config.declared_extensions().items():
        if (module := _module(key)) is not None:
            module.refuse_misfit(model, value)


def honour_extensions(model: PreTrainedModel, config: TyingConfig, strict: bool = True) -> None:
    """Make `model` as the entries of `config` beside the ties say.

    Args:
        model: model to change in place.
        config: the declaration.
        strict: refuse what the model cannot have. `False` is for another head over the same file.

    Raises:
        TyingError: by the extension, with the reason.
    """
    for key, value in config.declared_extensions().items():
        if (module := _module(key, logged=strict)) is not None:
            module.honour(model, value, strict)


def _module(key: str, logged: bool = True) -> ModuleType | None:
    """The module of an extension. `None` in published code that works without it; it is logged if `logged`."""
    extension = EXTENSIONS[key]
    if carried := _CARRIED.get(extension.module):
        return carried()
    try:
        return import_module(f"hf_tying.{extension.module}")
    except ModuleNotFoundError as error:
        if extension.without is None or not (error.name or "").startswith("hf_tying"):
            raise
        if logged:
            logger.warning(f"The config declares {key!r}, which needs hf_tying: {extension.without}.")
        return None
