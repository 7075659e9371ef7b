"""PEFT learns of Tied-LoRA: the entries in its tables, and what it and transformers do not do for a guest."""

from inspect import signature

from peft import PeftConfig
from peft.utils import load_peft_weights
from wrapt import when_imported, wrap_function_wrapper

from .config import TiedLoraConfig, TiedPeftType
from .files import from_file
from .model import PREFIX, TiedLoraModel


def register(mapping) -> None:
    """Put `TIED_LORA` into PEFT's tables, as its `register_peft_method` does for the types that its enum has.

    Args:
        mapping: the module `peft.mapping`.
    """
    mapping.PEFT_TYPE_TO_CONFIG_MAPPING[TiedPeftType.TIED_LORA] = TiedLoraConfig
    mapping.PEFT_TYPE_TO_TUNER_MAPPING[TiedPeftType.TIED_LORA] = TiedLoraModel
    mapping.PEFT_TYPE_TO_PREFIX_MAPPING[TiedPeftType.TIED_LORA] = PREFIX
    when_imported("peft.peft_model")(_hook_offload)
    when_imported("transformers.integrations.peft")(
        lambda module: wrap_function_wrapper(module, "PeftAdapterMixin.load_adapter", _load_by_transformers)
    )


def _load_by_transformers(wrapped, model, args, kwargs):
    """transformers reads an adapter's file without asking PEFT, so it is given what PEFT would read from it."""
    bound = signature(wrapped).bind(*args, **kwargs)
    given = bound.arguments
    path, config, state = (given.get(name) for name in ("peft_model_id", "peft_config", "adapter_state_dict"))
    hub = dict(getattr(given.get("load_config"), "download_kwargs", None) or {}) | (given.get("adapter_kwargs") or {})
    hub |= {name: kwargs[name] for name in ("revision", "token", "subfolder") if kwargs.get(name) is not None}
    if config is None and path is not None:
        try:
            config = PeftConfig.from_pretrained(path, **hub)
        except (OSError, ValueError, KeyError, TypeError):
            return wrapped(*args, **kwargs)  # which says what is wrong
    if getattr(config, "peft_type", None) != TiedPeftType.TIED_LORA:
        return wrapped(*args, **kwargs)
    state = load_peft_weights(path, device="cpu", **hub) if state is None else state
    given |= {"peft_config": config, "adapter_state_dict": from_file(state, config)}
    return wrapped(*bound.args, **bound.kwargs)


def _hook_offload(peft_model) -> None:
    if hasattr(peft_model.PeftModel, "_update_offload"):  # private: without it, an adapter is not offloaded to a disk
        wrap_function_wrapper(peft_model, "PeftModel._update_offload", _with_weights_of_layers)


def _with_weights_of_layers(wrapped, model, args, kwargs):
    """PEFT puts an adapter's weights beside those of the offloaded layers, by the layers' names in its file."""
    offload_index, weights = args
    for config in model.peft_config.values():
        if config.peft_type == TiedPeftType.TIED_LORA:
            weights = from_file(weights, config)
    return wrapped(offload_index, weights, **kwargs)
