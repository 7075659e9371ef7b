"""FSDP2 through Accelerate: a parameter of several modules lies in one unit.

Accelerate makes a unit of each layer, and one of the final norm, the input embedding and the head. FSDP2 gathers and
frees each unit by itself, so two of them cannot have one parameter, and torch refuses that: for an encoder-decoder,
for BERT, for layers that share a matrix. Here every tie goes to the root: what holds some names of a group and not all
is no unit of its own. The root stays gathered through a step, as does the unit that Accelerate makes of the
embeddings, so they need no more memory there.
"""

import functools
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import nn
from transformers.utils import logging

from ..ties.groups import groups_held
from ..ties.slots import find_parameter
from ..ties.verify import assert_tied

logger = logging.get_logger(__name__)
_kept_whole: ContextVar[nn.Module | None] = ContextVar("module whose ties go to the root unit", default=None)


def prepare_model(wrapped: Callable, args: tuple, kwargs: dict) -> nn.Module:
    """Around `accelerate.accelerator.fsdp2_prepare_model`: the ties of a model are kept, and checked."""
    outer = kwargs["model"] if "model" in kwargs else args[1]
    models = _tied_models(outer)
    if not models:
        return wrapped(*args, **kwargs)
    with _in_the_root(outer):
        prepared = wrapped(*args, **kwargs)
    for model in models:
        assert_tied(model)
    return prepared


def wrap_policy(wrapped: Callable, args: tuple, kwargs: dict) -> Callable[[nn.Module], bool] | None:
    """Around `fsdp2_prepare_auto_wrap_policy`: while a model is sharded, what holds a part of a tie is no unit.

    Accelerate asks for the same policy to choose the layers whose activations are checkpointed: that stays as it is.
    """
    policy, model = wrapped(*args, **kwargs), _kept_whole.get()
    if policy is None or model is None:
        return policy
    everywhere, paths = _uses(model), {id(module): path for path, module in model.named_modules()}

    @functools.wraps(policy)
    def whole(module: nn.Module) -> bool:
        if not policy(module):
            return False
        torn = [key for key, count in _uses(module).items() if count < everywhere.get(key, 0)]
        if torn:
            held = ((each, group) for each in _tied_models(model) for group in groups_held(each))
            group = next((group.name for each, group in held if id(find_parameter(each, group.root)) in torn), None)
            logger.info(
                f"FSDP2: {paths.get(id(module), type(module).__name__)!r} is no unit of its own, since it holds some "
                f"names of {'a tie' if group is None else f'group {group!r}'} and not all: it stays in the root's."
            )
        return not torn

    return whole


def _tied_models(module: nn.Module) -> list[nn.Module]:
    """The outermost modules with ties of this package in `module`: itself, or what it holds or wraps."""
    if vars(module).get("tie_groups"):
        return [module]
    return [model for child in module.children() for model in _tied_models(child)]


@contextmanager
def _in_the_root(outer: nn.Module) -> Iterator[None]:
    """Inside this context Accelerate finds no embeddings to make a unit of, and the policy keeps ties whole."""
    names = ("get_input_embeddings", "get_output_embeddings")
    token = _kept_whole.set(outer)
    for name in names:
        vars(outer)[name] = lambda: None
    try:
        yield
    finally:
        for name in names:
            vars(outer).pop(name, None)
        _kept_whole.reset(token)


def _uses(module: nn.Module) -> Counter[int]:
    """How many slots in `module` hold each parameter, by its identity."""
    return Counter(id(p) for each in module.modules() for p in each._parameters.values() if p is not None)
