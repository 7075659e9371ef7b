"""Configs that several live models share. A model whose ties change gets a config of its own first.

Two models made from one config object (student and teacher, an ensemble) share it. The entry that `tie` writes for one
of them would be in the config of the other too, and the file of that one would be read wrongly.
"""

import copy
from weakref import WeakSet

from torch.utils.weak import WeakIdKeyDictionary
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel

# The live models that were made with each config.
_models_of: WeakIdKeyDictionary = WeakIdKeyDictionary()


def remember_config(model: PreTrainedModel) -> None:
    """Note that `model` is made with its config. Nothing is changed."""
    _models_of.setdefault(model.config, WeakSet()).add(model)


def own_config(model: PreTrainedModel) -> None:
    """Give `model` a copy of its config, unless no other live model can have the same.

    The modules inside get the copies of their configs too. Models inside this one and around it do not count as other
    models: they keep sharing a config, so that each sees what is written to it.
    """
    known = _models_of.get(model.config) or ()
    others = [other for other in known if other is not model]
    if model in known:
        if not others:
            return
        inside = {id(module) for module in model.modules()}
        others = [
            other for other in others if id(other) not in inside and all(m is not model for m in other.modules())
        ]
        if not others:
            return
    copies: dict[int, object] = {}
    copy.deepcopy(model.config, copies)
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if isinstance(value, PreTrainedConfig) and id(value) in copies:
                setattr(module, name, copies[id(value)])
        if isinstance(module, PreTrainedModel):
            remember_config(module)
