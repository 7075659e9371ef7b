"""Extensions: the entries of `tying` that are not ties (`loss`, `projection`), and the modules that honour them.

The core knows none of them. It consults one dict, `hf_tying.config.EXTENSIONS`, where a model is made from its config
or from a pickle (`TiedModelMixin`), and where `tie` changes a live one. An extension is a module with two functions:

    refuse_misfit(model, value)     raises a `TyingError` where `model` cannot have it; changes nothing
    honour(model, value, strict)    makes `model` as `value` says; does nothing where it is so already

`value` is the entry as the config has it. `strict=False` is for another head over the same file: what it cannot have
is left out. Where an extension acts in the steps of a model, `honour` puts a mixin of its own in front of the model's
class (`classes.with_mixin`).
"""

from collections.abc import Callable
from importlib import import_module
from types import ModuleType

from transformers.modeling_utils import PreTrainedModel
from transformers.utils import logging

from ..config import EXTENSIONS, TyingConfig

logger = logging.get_logger(__name__)

# In the code of a published class: the modules that are carried along, by their names in the package.
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
        if (module := _module(key, told=strict)) is not None:
            module.honour(model, value, strict)


def _module(key: str, told: bool = True) -> ModuleType | None:
    """The module of an extension. `None` in published code that works without it; logged if `told`."""
    extension = EXTENSIONS[key]
    if carried := _CARRIED.get(extension.module):
        return carried()
    try:
        return import_module(f"hf_tying.{extension.module}")
    except ModuleNotFoundError as error:
        if extension.without is None or not (error.name or "").startswith("hf_tying"):
            raise
        if told:
            logger.warning(f"The config declares {key!r}, which needs hf_tying: {extension.without}.")
        return None
