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
