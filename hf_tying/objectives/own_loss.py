"""Models that compute the mean of their losses themselves, which `Trainer` does not recognise."""

import inspect
from typing import TypeVar

from torch import nn

from ..ties.verify import unwrapped

Model = TypeVar("Model", bound=nn.Module)

#: Names in a `forward` that computes a cross entropy itself.
_OWN = ("CrossEntropyLoss", "cross_entropy", "loss_fct")


def averages_own_loss(model: nn.Module) -> bool:
    """Whether `model` takes `num_items_in_batch` and does not divide by it.

    The `forward` of such a model has `**kwargs` and a cross entropy of its own, and not the `loss_function` of
    transformers, which divides: BART, T5, BERT, `EncoderDecoderModel`. The names in its code tell. A class outside of
    transformers that names `num_items_in_batch` is taken to divide by it.

    Args:
        model: a `PreTrainedModel`, alone or within a wrapper.
    """
    cls = type(unwrapped(model))
    if all(p.kind != p.VAR_KEYWORD for p in inspect.signature(cls.forward).parameters.values()):
        return False
    names: set[str] = set()
    for owner in cls.__mro__:
        if "forward" not in vars(owner):
            continue
        code = getattr(inspect.unwrap(vars(owner)["forward"]), "__code__", None)
        found = (
            {n for n in (*code.co_names, *code.co_varnames, *code.co_consts) if isinstance(n, str)} if code else set()
        )
        is_stock = owner.__module__.startswith("transformers.")
        if "loss_function" in found or ("num_items_in_batch" in found and not is_stock):
            return False
        names |= found
        if is_stock:
            break
    return any(own in name for own in _OWN for name in names)


def set_accepts_loss_kwargs(model: Model) -> Model:
    """Tell `Trainer` that `model` gives the mean of its losses, where it does (`averages_own_loss`).

    `Trainer` takes any model with `**kwargs` for one that divides its loss by the items of a whole update, over all
    steps of accumulation and all processes. It silently multiplies the gradient of a model that does not by their
    number. `accepts_loss_kwargs = False` on the model prevents that. `Trainer` reads it when it is made: call this
    before. A value that is there already stays.

    Returns:
        The same model.

    Example:
        >>> Trainer(model=set_accepts_loss_kwargs(model), args=args, train_dataset=data).train()
    """
    inner = unwrapped(model)
    if not hasattr(inner, "accepts_loss_kwargs") and averages_own_loss(inner):
        vars(inner)["accepts_loss_kwargs"] = False
    return model
