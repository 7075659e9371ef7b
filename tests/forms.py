"""The two forms of a tied model, which must behave alike: a class made tied by `tie`, and a class over the mixin."""

import torch
from transformers import PreTrainedModel

from hf_tying import TiedModelMixin, TyingConfigMixin, tie

from .tiny import tiny_config, tiny_model

FORMS = ["in place", "class form"]


def class_form(stock: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """`class Tied<Stock>(TiedModelMixin, Stock)` with a config class over the config mixin."""
    config_class = type(f"Tied{stock.config_class.__name__}", (TyingConfigMixin, stock.config_class), {})
    return type(
        f"Tied{stock.__name__}", (TiedModelMixin, stock), {"config_class": config_class, "__module__": __name__}
    )


def tied_model(form: str, arch: str = "gpt2", spec="two_way", init_from="target", **changes) -> PreTrainedModel:
    """A tied tiny model in evaluation mode; both forms have the same weights."""
    in_place = tiny_model(arch, **{"tie_word_embeddings": False, **changes})
    stock = type(in_place)
    tie(in_place, spec, init_from=init_from)
    if form == "in place":
        return in_place
    cls = class_form(stock)
    fields = tiny_config(arch, **changes).to_dict() | {"tying": in_place.config.tying}
    fields.pop("model_type")
    model = cls(cls.config_class(**fields | {"tie_word_embeddings": in_place.config.tie_word_embeddings}))
    with torch.no_grad():
        ours = dict(model.named_parameters())
        for name, parameter in in_place.named_parameters():
            ours[name].copy_(parameter)
    return model.eval()


def reload(model: PreTrainedModel, folder, **kwargs) -> PreTrainedModel:
    """`from_pretrained` with the class that a user would write for this form."""
    cls = type(model)
    if "tie" in cls.__module__ or cls.__module__ == __name__:
        return cls.from_pretrained(folder, **kwargs)
    return stock_class(model).from_pretrained(folder, **kwargs)


def stock_class(model: PreTrainedModel) -> type[PreTrainedModel]:
    """The transformers class under either form."""
    return next(cls for cls in type(model).__mro__ if cls is not type(model) and issubclass(cls, PreTrainedModel))


def matrix(model: PreTrainedModel, role: str) -> torch.nn.Parameter:
    """The parameter of a role."""
    return matrices(model)[role]


def matrices(model: PreTrainedModel) -> dict[str, torch.nn.Parameter]:
    """The parameter of each role that the model has."""
    from hf_tying.ties.anatomy import roles
    from hf_tying.ties.slots import find_parameter

    return {role: find_parameter(model, found.name) for role, found in roles(model).items()}


def picklable(model) -> bool:
    """The class form here is made on the fly, which pickle cannot find by name; a user's class lies in a module."""
    return type(model).__module__.startswith("transformers.")
