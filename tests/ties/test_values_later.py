"""A model whose values come after it is made, as under DeepSpeed ZeRO-3: transformers skips `init_weights` then."""

import pytest
import torch
from torch import nn
from transformers.initialization import no_init_weights

from hf_tying import TyingConfig, TyingError, assert_tied
from hf_tying.config import ProjectionConfig
from hf_tying.ties.relaxation import relaxation_at

from ..tiny import layer_pair, tiny_config, tiny_model, untied_model

MEMBERS = ["model.embed_tokens.weight", "lm_head.weight"]


def made_without_values(tying: TyingConfig) -> nn.Module:
    """As `_from_config` makes it: the values of each module are drawn after the whole model is made."""
    config = tiny_config("llama")
    config.tying = tying.to_dict()
    with no_init_weights():
        model = type(tiny_model("llama"))(config)
    for number, parameter in enumerate(model.parameters()):
        nn.init.constant_(parameter, float(number))
    return model


@pytest.mark.parametrize("kind", ["scale", "lora", "basis"])
def test_fresh_values_that_differ_are_tied_and_a_difference_starts_at_zero(kind):
    model = made_without_values(TyingConfig(groups={"words": {"names": MEMBERS, "relax": {"kind": kind}}}))
    difference = relaxation_at(model, MEMBERS[1])
    assert not difference.active  # whoever draws the values meets the matrix itself
    assert model.lm_head.weight is model._modules["lm_head"]._parameters["weight"]
    model.tie_weights()
    assert_tied(model)
    assert torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
    assert difference.active and not difference(model.model.embed_tokens.weight).any()


def test_values_that_are_trained_are_not_overwritten_by_the_next_call():
    model = made_without_values(TyingConfig(groups={"layers": layer_pair(untied_model("llama"))}))
    model.tie_weights()
    assert_tied(model)
    name = model.tie_groups[0].names[1]
    owner = model.get_submodule(name.rpartition(".")[0])
    owner.weight = nn.Parameter(owner.weight.detach() + 1)
    with pytest.raises(TyingError, match="would overwrite trained values"):
        model.tie_weights()


def test_a_projection_makes_no_module_on_the_meta_device(monkeypatch):
    """DeepSpeed's zero.Init would split every module of the program that is moved or cast after that."""
    devices, stock = [], nn.Linear.__init__

    def watched(self, *args, **kwargs):
        devices.append(str(kwargs.get("device")))
        stock(self, *args, **kwargs)

    monkeypatch.setattr(nn.Linear, "__init__", watched)
    model = made_without_values(TyingConfig("two_way", projection=ProjectionConfig()))
    head = model.get_output_embeddings()
    assert (head.in_features, head.out_features) == (16, 64) and repr(head)
    assert devices and "meta" not in devices
