"""Put a mixin in front of the class of a live model, and take it off: how ties and extensions act in a model."""

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, SupportsIndex

from transformers.modeling_utils import PreTrainedModel

# The base of a mixin: a type checker sees the methods of the model in front of which the mixin stands.
if TYPE_CHECKING:
    MixinBase = PreTrainedModel
else:
    MixinBase = object


@functools.cache
def with_mixin(mixin: type[PreTrainedModel], cls: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """`cls` with `mixin` in front, under the same name, so that `architectures` in the file stays the same."""

    def reduce(self: PreTrainedModel, protocol: SupportsIndex) -> tuple[Any, ...]:
        # Pickle finds classes by name, and under this name it would find the stock class.
        stock = type(self)
        mixins = mixins_of(stock)
        for each in mixins:
            stock = without_mixin(each, stock)
        return _revive, (stock, *reversed(mixins)), object.__reduce_ex__(self, protocol)[2]

    body = {
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
        "__reduce_ex__": reduce,
        "_mixin": mixin,
        "_stock_class": cls,
    }
    if "forward" in vars(mixin):  # Trainer and PEFT read what a forward takes from its signature
        body["forward"] = functools.update_wrapper(_passed_on(mixin.forward), cls.forward)
    return type(cls.__name__, (mixin, cls), body)


def mixins_of(cls: type) -> list[type[PreTrainedModel]]:
    """The mixins that `with_mixin` has put in front of `cls`, the last one first."""
    own = vars(cls)
    return [own["_mixin"], *mixins_of(own["_stock_class"])] if "_mixin" in own else []


def without_mixin(mixin: type[PreTrainedModel], cls: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """`cls` without the `mixin` that `with_mixin` put in front of it."""
    front, stock = vars(cls)["_mixin"], vars(cls)["_stock_class"]
    return stock if front is mixin else with_mixin(front, without_mixin(mixin, stock))


def _passed_on(method: Callable) -> Callable:
    return lambda self, *args, **kwargs: method(self, *args, **kwargs)


def _revive(stock: type[PreTrainedModel], *mixins: type[PreTrainedModel]) -> PreTrainedModel:
    """Make the object of a pickle. Pickles find this function by its name in this module, so it must stay here."""
    for mixin in mixins:
        stock = with_mixin(mixin, stock)
    return stock.__new__(stock)
