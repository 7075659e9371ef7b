"""The one hook into transformers: stock classes honour a `tying` entry of their config.

`AutoModelForCausalLM.from_pretrained(path)` then gives a tied model or a `TyingError`, never a silently untied one.
For a config without the entry nothing is changed. The hook is set when transformers' modules are imported, before or
after this package, so that `import hf_tying` stays light.
"""

import functools
from importlib import import_module

from wrapt import when_imported, wrap_function_wrapper


def install() -> None:
    """Arrange for the hook; called once, by `import hf_tying`."""
    when_imported("transformers.modeling_utils")(_hook_models)
    when_imported("peft.tuners.tuners_utils")(_hook_adapters)
    when_imported("peft")(_hook_peft)
    when_imported("transformers.models.auto.configuration_auto")(_hook_auto_config)
    when_imported("transformers.models.auto.tokenization_auto")(_hook_auto_tokenizer)


# Our classes are registered with the Auto classes at their first use, and not when those are imported: then the stock
# modules that ours build on may be only half there.


def _hook_auto_config(configuration_auto) -> None:
    for method in ("from_pretrained", "for_model"):
        wrap_function_wrapper(configuration_auto, f"AutoConfig.{method}", _with_our_models)


def _with_our_models(wrapped, instance, args, kwargs):
    from . import models

    for family in models.FAMILIES:
        import_module(f"{models.__name__}.{family}")
    return wrapped(*args, **kwargs)


def _hook_auto_tokenizer(tokenization_auto) -> None:
    wrap_function_wrapper(tokenization_auto, "AutoTokenizer.from_pretrained", _with_our_tokenizer)


def _with_our_tokenizer(wrapped, instance, args, kwargs):
    from .vocabularies import tokenizer as joint_tokenizer

    joint_tokenizer.register()
    return wrapped(*args, **kwargs)


def _hook_models(modeling_utils) -> None:
    stock = modeling_utils.PreTrainedModel
    stock.post_init = _honour_entry(stock.post_init)
    if "_load_pretrained_model" in vars(stock):  # private: without it, two errors below are transformers' own
        stock._load_pretrained_model = staticmethod(_guard_loading(stock._load_pretrained_model))


def _honour_entry(stock_post_init):
    @functools.wraps(stock_post_init)
    def post_init(self):
        if not _declares_ties(self):
            return stock_post_init(self)
        from .ties.modeling import TiedModelMixin, tied_class

        if isinstance(self, TiedModelMixin):
            return stock_post_init(self)
        self.__class__ = tied_class(type(self))
        self._post_init_tied(functools.partial(stock_post_init, self))

    return post_init


def _declares_ties(model) -> bool:
    """A `tying` entry in the config, or a model inside that has been put under the mixin by its own."""
    if getattr(model.config, "tying", None) is not None:
        return True
    return any("tie_groups" in vars(module) for module in model.modules())


def _guard_loading(stock_load):
    @functools.wraps(stock_load)
    def _load_pretrained_model(model, state_dict, checkpoint_files, load_config, *args, **kwargs):
        if not hasattr(model, "tie_groups"):
            return stock_load(model, state_dict, checkpoint_files, load_config, *args, **kwargs)
        from .ties.headers import refuse_broken, refuse_split

        refuse_split(model.tie_groups, getattr(load_config, "device_map", None))
        refuse_broken(checkpoint_files)
        return stock_load(model, state_dict, checkpoint_files, load_config, *args, **kwargs)

    return _load_pretrained_model


def _hook_adapters(tuners_utils) -> None:
    from .peft import merging

    merging.guard(tuners_utils.BaseTuner)


def _hook_peft(peft) -> None:
    try:
        from .peft import registration
    except ImportError as error:  # a PEFT that is not in the tested range must not fail for all its other adapters
        from transformers.utils import logging

        logging.get_logger(__name__).warning(f"Tied-LoRA is not available with peft {peft.__version__}: {error}")
        return
    registration.register(peft.mapping)
