"""`names_of`: every name of a parameter, whatever stands around the model or inside of it."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from transformers.models.gpt2.modeling_gpt2 import GPT2Block

import hf_tying
from hf_tying import names_of, tie, untie

from ..forms import tied_model
from ..native_adapters import needs_native_adapters
from ..tiny import tiny_model

WTE, HEAD = "transformer.wte.weight", "lm_head.weight"


class Wrapped(nn.Module):
    """As DistributedDataParallel and DeepSpeed keep a model."""

    def __init__(self, module):
        super().__init__()
        self.module = module


def compiled_inside(model):
    model.transformer.wte = torch.compile(model.transformer.wte)
    return model


def checkpointed(model):
    apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, (nn.Embedding, GPT2Block)))
    return model


def adapter_added(model):
    model.add_adapter(LoraConfig(r=2, target_modules=["wte", "c_attn"]))
    return model


#: A wrapper, and how names begin in it.
WRAPPERS = {
    "none": (lambda model: model, ""),
    "DDP": (Wrapped, "module."),
    "DDP of PEFT": (
        lambda m: Wrapped(get_peft_model(m, LoraConfig(target_modules=["wte"]))),
        "module.base_model.model.",
    ),
    "PEFT": (lambda model: get_peft_model(model, LoraConfig(target_modules=["lm_head"])), "base_model.model."),
    "add_adapter": (adapter_added, ""),
    "torch.compile": (torch.compile, ""),
    "torch.compile inside": (compiled_inside, ""),
    "activation checkpointing": (checkpointed, ""),
}


in_every_wrapper = pytest.mark.parametrize(
    "wrap,start",
    [
        pytest.param(*wrapper, id=name, marks=[needs_native_adapters] if name == "add_adapter" else [])
        for name, wrapper in WRAPPERS.items()
    ],
)


@in_every_wrapper
@pytest.mark.parametrize("root", [WTE, HEAD])
def test_every_name_of_a_tied_parameter_the_root_first(wrap, start, root):
    model = tie(tiny_model("gpt2", tie_word_embeddings=False), [root, {WTE: HEAD, HEAD: WTE}[root]], init_from=root)
    parameter = model.lm_head.weight
    assert names_of(wrap(model), parameter) == [f"{start}{root}", f"{start}{HEAD if root == WTE else WTE}"]


@in_every_wrapper
def test_a_stock_tied_model_has_the_same_names(wrap, start):
    model = tiny_model("gpt2")
    assert {*names_of(wrap(model), model.lm_head.weight)} == {f"{start}{WTE}", f"{start}{HEAD}"}


def test_one_name_where_nothing_is_tied_and_none_for_what_is_not_in_the_model(model):
    assert names_of(model, model.transformer.wpe.weight) == ["transformer.wpe.weight"]
    assert names_of(model, nn.Parameter(model.lm_head.weight.detach())) == []
    untie(model)
    assert names_of(model, model.lm_head.weight) == [HEAD]


def test_every_parameter_that_is_listed_answers_with_the_name_of_the_list(form):
    model = tied_model(form, "bart", "three_way")
    for name, parameter in model.named_parameters():
        assert name in names_of(model, parameter)


def test_it_is_public():
    assert hf_tying.names_of is names_of and "names_of" in hf_tying.__all__
