"""PEFT learns of Tied-LoRA: the entries in its tables, and what it and transformers do not do for a guest."""

import inspect

import torch
from huggingface_hub import hf_hub_download
from peft import PeftConfig, load_peft_weights
from wrapt import when_imported, wrap_function_wrapper

from . import publish
from .config import TiedLoraConfig, TiedPeftType
from .model import PREFIX, TiedLoraModel
from .plan import check_file
from .tensor_names import from_file

_HUB_ARGUMENTS = inspect.signature(hf_hub_download).parameters.keys() - {"repo_id", "filename"}


def register(mapping) -> None:
    """Put `TIED_LORA` into PEFT's tables, as its `register_peft_method` does for the types that its enum has.

    Args:
        mapping: the module `peft.mapping`.
    """
    mapping.PEFT_TYPE_TO_CONFIG_MAPPING[TiedPeftType.TIED_LORA] = TiedLoraConfig
    mapping.PEFT_TYPE_TO_TUNER_MAPPING[TiedPeftType.TIED_LORA] = TiedLoraModel
    mapping.PEFT_TYPE_TO_PREFIX_MAPPING[TiedPeftType.TIED_LORA] = PREFIX
    for module, name, wrapper in _WRAPPERS:
        when_imported(module)(lambda found, name=name, wrapper=wrapper: _wrap(found, name, wrapper))


def _wrap(module, name: str, wrapper) -> None:
    """Some of what is wrapped is private: without it, errors are PEFT's own, and nothing is offloaded to a disk."""
    owner, _, method = name.rpartition(".")
    if hasattr(getattr(module, owner) if owner else module, method):
        wrap_function_wrapper(module, name, wrapper)


def is_tied(config) -> bool:
    """Is this the config of a Tied-LoRA adapter?"""
    return getattr(config, "peft_type", None) == TiedPeftType.TIED_LORA


# A file that does not fit its model is refused while the model is still as it was.


def _from_pretrained(wrapped, cls, args, kwargs):
    given = inspect.signature(wrapped).bind(*args, **kwargs).arguments
    hub = given.get("kwargs", {})
    _check(given.get("model"), given.get("model_id"), given.get("config"), given.get("key_mapping"), hub)
    return wrapped(*args, **kwargs)


def _load_adapter(wrapped, model, args, kwargs):
    given = inspect.signature(wrapped).bind(*args, **kwargs).arguments
    if given.get("adapter_name") not in model.peft_config:
        base, hub = model.get_base_model(), given.get("kwargs", {})
        _check(base, given.get("model_id"), None, given.get("key_mapping"), hub)
    return wrapped(*args, **kwargs)


def _check(model, path, config, key_mapping, kwargs: dict) -> None:
    hub = {name: value for name, value in kwargs.items() if name in _HUB_ARGUMENTS}
    config = config or _config_at(path, hub)
    if is_tied(config) and isinstance(model, torch.nn.Module) and not kwargs.get("ignore_mismatched_sizes"):
        check_file(config, model, load_peft_weights(path, device="cpu", key_mapping=key_mapping, **hub))


def _config_at(path, hub: dict) -> PeftConfig | None:
    try:
        return PeftConfig.from_pretrained(path, **hub)
    except (OSError, ValueError, KeyError, TypeError):
        return None  # the stock method, which goes on, says what is wrong


def _load_by_transformers(wrapped, model, args, kwargs):
    """transformers reads an adapter's file without asking PEFT, so it is given what PEFT would read from it."""
    bound = inspect.signature(wrapped).bind(*args, **kwargs)
    given = bound.arguments
    path, config, state = (given.get(name) for name in ("peft_model_id", "peft_config", "adapter_state_dict"))
    hub = dict(getattr(given.get("load_config"), "download_kwargs", None) or {}) | (given.get("adapter_kwargs") or {})
    hub |= {name: value for name, value in kwargs.items() if name in _HUB_ARGUMENTS and value is not None}
    config = config or _config_at(path, hub)
    if not is_tied(config):
        return wrapped(*args, **kwargs)
    state = load_peft_weights(path, device="cpu", **hub) if state is None else state
    check_file(config, model, state)
    given |= {"peft_config": config, "adapter_state_dict": from_file(state, config)}
    return wrapped(*bound.args, **bound.kwargs)


def _update_offload(wrapped, model, args, kwargs):
    """PEFT puts an adapter's weights beside those of the offloaded layers, by the layers' names in its file."""
    offload_index, weights = args
    for config in model.peft_config.values():
        if is_tied(config):
            weights = from_file(weights, config)
    return wrapped(offload_index, weights, **kwargs)


# What PEFT does for closed lists of adapters only.


def _hotswap(wrapped, instance, args, kwargs):
    if any(is_tied(config) for config in (*args, *kwargs.values())):
        raise ValueError(
            "PEFT swaps LoRA adapters only. Export this one, which is exact: hf_tying.peft.export_to_lora(adapter, "
            "out); load the export, and swap exports of the same rank."
        )
    return wrapped(*args, **kwargs)


def _mixed(wrapped, instance, args, kwargs):
    if any(is_tied(config) for config in (*args, *kwargs.values())):
        raise ValueError(
            "A PeftMixedModel (mixed=True) takes adapters of a fixed list of types, and Tied-LoRA is not among them. "
            "Export this one, which is exact, and mix the LoRA: hf_tying.peft.export_to_lora(adapter, out)."
        )
    return wrapped(*args, **kwargs)


_WRAPPERS = (
    ("peft.peft_model", "PeftModel.from_pretrained", _from_pretrained),
    ("peft.peft_model", "PeftModel.load_adapter", _load_adapter),
    ("peft.peft_model", "PeftModel._update_offload", _update_offload),
    ("peft.peft_model", "PeftModel.save_pretrained", publish.save_pretrained),
    ("peft.peft_model", "PeftModel.push_to_hub", publish.push_to_hub),
    ("peft.mixed_model", "_check_config_compatible", _mixed),
    ("peft.utils.hotswap", "check_hotswap_configs_compatible", _hotswap),
    ("transformers.integrations.peft", "PeftAdapterMixin.load_adapter", _load_by_transformers),
)
