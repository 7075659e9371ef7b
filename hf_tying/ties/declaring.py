"""The argument `tying` of `from_pretrained`: the declaration for this load, in place of the one in the file."""

import copy
from collections.abc import Callable
from typing import Any

from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel

from ..config import TyingConfig, entry_of
from .depth_groups import VARIANT, needs_this_package

# Arguments that find the files. `from_pretrained` of a config takes only these.
_HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder", "proxies")
# Arguments of the model's `from_pretrained` that are also fields of configs.
_OF_THE_MODEL = ("attn_implementation", "dtype", "name_or_path", "quantization_config", "torch_dtype", "state_dict")


def from_pretrained(
    wrapped: Callable[..., Any], cls: type[PreTrainedModel], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> PreTrainedModel:
    """Load a model by `PreTrainedModel.from_pretrained`, with the declaration `tying` in its config.

    Args:
        wrapped: the stock method, bound to the class.
        cls: class of the model.
        args: positional arguments of the call.
        kwargs: keywords of the call. `tying` is anything that `TyingConfig.of` takes, or `None` for no entry.

    Returns:
        The loaded model.

    Raises:
        TyingError: for a `tying` that cannot be read.
    """
    if "tying" not in kwargs:
        return wrapped(*args, **kwargs)
    given = dict(kwargs)
    tying = given.pop("tying")
    entry = None if tying is None else TyingConfig.of(tying).to_dict()
    config = given.pop("config", None)
    if isinstance(config, PreTrainedConfig):
        config = copy.deepcopy(config)
    else:
        path: Any = config or (args[0] if args else given.get("pretrained_model_name_or_path"))
        config = cls.config_class.from_pretrained(path, **{k: given[k] for k in _HUB_ARGUMENTS if k in given})
        for key in [key for key in given if hasattr(config, key) and key not in _OF_THE_MODEL]:
            setattr(config, key, given.pop(key))
    config.tying = entry
    return wrapped(*args, config=config, **given)


def shared_variant(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    """The `variant` of the weights file, where the config says that stock loaders would misread it; else `None`.

    Args:
        args: positional arguments of `from_pretrained`, which has found no file of the usual name.
        kwargs: keywords of that call.
    """
    if kwargs.get("variant") is not None:
        return None
    config: Any = kwargs.get("config")
    if not isinstance(config, PreTrainedConfig):
        path: Any = config or (args[0] if args else kwargs.get("pretrained_model_name_or_path"))
        try:
            config, _ = PreTrainedConfig.get_config_dict(path, **{k: kwargs[k] for k in _HUB_ARGUMENTS if k in kwargs})
        except OSError:
            return None
    return VARIANT if needs_this_package(TyingConfig.from_dict(entry_of(config))) else None
