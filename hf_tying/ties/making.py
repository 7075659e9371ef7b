"""What is going on when a model is made: whether `from_pretrained` makes it, and what else is being made."""

import sys

from transformers.modeling_utils import PreTrainedModel


def ties_wait() -> bool:
    """Whether `from_pretrained` is making a model, and needs every name as a parameter of its own.

    It then replaces `PreTrainedModel.tie_weights` by a function of `transformers.initialization`, which does nothing.
    """
    return PreTrainedModel.tie_weights.__module__ != PreTrainedModel.__module__


def values_wait() -> bool:
    """Whether transformers makes a model whose values come later: from a file, or, under ZeRO-3, once it is in parts.

    It then replaces `PreTrainedModel.init_weights`, which ties too, and torch's functions of initialisation.
    """
    return PreTrainedModel.init_weights.__module__ != PreTrainedModel.__module__


def models_being_made() -> list[PreTrainedModel]:
    """The models whose `__init__` is running, the innermost first. One is listed once for each running `__init__`."""
    making, frame = [], sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_name == "__init__" and code.co_argcount:
            owner = frame.f_locals.get(code.co_varnames[0])
            making += [owner] if isinstance(owner, PreTrainedModel) and hasattr(owner, "config") else []
        frame = frame.f_back
    return making
