"""Wrappers for functions of PEFT and transformers that know only built-in adapter types, so that Tied-LoRA works.

`hf_tying.hook` lists the functions that they wrap. A file that does not fit its model is refused before the model is
changed.

Each wrapper has the arguments of wrapt: the wrapped function, the object that it is bound to, and the arguments of the
call.
"""

import inspect
import os
from collections.abc import Callable
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from peft import PeftConfig, PeftModel, load_peft_weights
from transformers import PreTrainedModel

from .config import is_tied_lora
from .plan import check_adapter_file
from .tensor_names import state_from_file

_HUB_ARGUMENTS = inspect.signature(hf_hub_download).parameters.keys() - {"repo_id", "filename"}


def from_pretrained(
    wrapped: Callable[..., Any], cls: type[PeftModel], args: tuple, kwargs: dict[str, Any]
) -> PeftModel:
    """Wrap `PeftModel.from_pretrained`, and check the adapter's file against the model first.

    Raises:
        RuntimeError: the file does not fit the model.
    """
    given = inspect.signature(wrapped).bind(*args, **kwargs).arguments
    hub = given.get("kwargs", {})
    _check(given.get("model"), given.get("model_id"), given.get("config"), given.get("key_mapping"), hub)
    return wrapped(*args, **kwargs)


def load_adapter(wrapped: Callable[..., Any], model: PeftModel, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Wrap `PeftModel.load_adapter`, and check the file against the base model first.

    If the model already has an adapter of this name, its settings are used, and not those of the file.

    Raises:
        RuntimeError: the file does not fit the model.
    """
    given = inspect.signature(wrapped).bind(*args, **kwargs).arguments
    base, hub = model.get_base_model(), given.get("kwargs", {})
    _check(base, given.get("model_id"), model.peft_config.get(given["adapter_name"]), given.get("key_mapping"), hub)
    return wrapped(*args, **kwargs)


def _check(
    model: Any,
    path: str | os.PathLike | None,
    config: PeftConfig | None,
    key_mapping: dict[str, str] | None,
    kwargs: dict,
) -> None:
    hub = {name: value for name, value in kwargs.items() if name in _HUB_ARGUMENTS}
    config = config or _config_at(path, hub)
    if is_tied_lora(config) and isinstance(model, torch.nn.Module) and not kwargs.get("ignore_mismatched_sizes"):
        renamed = getattr(model, "_checkpoint_conversion_mapping", {}) if key_mapping is None else key_mapping
        check_adapter_file(config, model, load_peft_weights(path, device="cpu", **hub), renamed)


def _config_at(path: str | os.PathLike | None, hub: dict) -> PeftConfig | None:
    try:
        return PeftConfig.from_pretrained(path, **hub)
    except (OSError, ValueError, KeyError, TypeError):
        return None  # the stock method reads it next, and raises its own error


def load_natively(wrapped: Callable[..., Any], model: PreTrainedModel, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Wrap `PeftAdapterMixin.load_adapter`: check the file, and pass on its tensors by their names in a model.

    transformers reads an adapter's file without PEFT, which would convert the names.

    Raises:
        RuntimeError: the file does not fit the model.
    """
    bound = inspect.signature(wrapped).bind(*args, **kwargs)
    given = bound.arguments
    path, config, state = (given.get(name) for name in ("peft_model_id", "peft_config", "adapter_state_dict"))
    hub = dict(getattr(given.get("load_config"), "download_kwargs", None) or {}) | (given.get("adapter_kwargs") or {})
    hub |= {name: value for name, value in kwargs.items() if name in _HUB_ARGUMENTS and value is not None}
    config = config or _config_at(path, hub)
    if not is_tied_lora(config):
        return wrapped(*args, **kwargs)
    state = load_peft_weights(path, device="cpu", **hub) if state is None else state
    check_adapter_file(config, model, state)
    given |= {"peft_config": config, "adapter_state_dict": state_from_file(state, config)}
    return wrapped(*bound.args, **bound.kwargs)


def update_offload(wrapped: Callable[..., Any], model: PeftModel, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Wrap `PeftModel._update_offload`, and pass on an adapter's tensors by their names in a model.

    PEFT stores an adapter's weights beside those of the offloaded layers, by the names of the layers.
    """
    offload_index, weights = args
    for config in model.peft_config.values():
        if is_tied_lora(config):
            weights = state_from_file(weights, config)
    return wrapped(offload_index, weights, **kwargs)


# PEFT swaps and mixes only adapters of a fixed list of types.


def refuse_hotswap(wrapped: Callable[..., Any], instance: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Wrap `check_hotswap_configs_compatible`, and refuse Tied-LoRA with a way out.

    Raises:
        ValueError: a config is one of Tied-LoRA.
    """
    if any(is_tied_lora(config) for config in (*args, *kwargs.values())):
        raise ValueError(
            "PEFT swaps LoRA adapters only. Export this one, which is exact: hf_tying.peft.export_to_lora(adapter, "
            "out); load the export, and swap exports of the same rank."
        )
    return wrapped(*args, **kwargs)


def refuse_mixed_model(wrapped: Callable[..., Any], instance: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Wrap `_check_config_compatible` of a `PeftMixedModel`, and refuse Tied-LoRA with a way out.

    Raises:
        ValueError: a config is one of Tied-LoRA.
    """
    if any(is_tied_lora(config) for config in (*args, *kwargs.values())):
        raise ValueError(
            "A PeftMixedModel (mixed=True) takes adapters of a fixed list of types, and Tied-LoRA is not among them. "
            "Export this one, which is exact, and mix the LoRA: hf_tying.peft.export_to_lora(adapter, out)."
        )
    return wrapped(*args, **kwargs)
