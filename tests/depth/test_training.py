"""Gradients, factors and rates of shared layers, and an ALBERT whose class shares them."""

import copy

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
)

from hf_tying import (
    TyingError,
    assert_tied,
    share_layers,
    unroll,
)
from hf_tying.training import shared_layer_parameters
from tests.tiny import logits, tiny_inputs

from .models import parameters, plain


def test_the_gradient_of_a_block_is_the_sum_over_its_visits():
    model = share_layers(plain(), "cycle", 2)
    twin = unroll(copy.deepcopy(model))
    for each in (model, twin):
        each(**tiny_inputs(each)).loss.backward()
    for i, layer in enumerate(model.model.layers[:2]):
        expected = sum(twin.model.layers[j].mlp.up_proj.weight.grad for j in (i, i + 2))
        torch.testing.assert_close(layer.mlp.up_proj.weight.grad, expected)


@pytest.mark.parametrize(
    ("factor", "expected"), [(0.25, [0.25] * 4), ("looped", [1 / (n * 2**0.5) for n in (3, 1, 3, 3)])]
)
def test_a_residual_factor_is_that_of_what_each_layer_adds(factor, expected, tmp_path):
    model = share_layers(plain(), order=[0, 1, 0, 0], residual_factor=factor)
    assert [layer.visit_factor.item() for layer in model.model.layers] == pytest.approx(expected)
    twin = share_layers(plain(), order=[0, 1, 0, 0])
    for layer, share in zip(twin.model.layers, expected, strict=True):
        layer.register_forward_hook(lambda _, args, out, share=share: args[0] + share * (out - args[0]))
    torch.testing.assert_close(logits(model), logits(twin))
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))


def test_the_learning_rate_of_a_block_is_that_of_its_visits():
    model = share_layers(plain(), order=[0, 1, 0, 0], private=["*norm*"])
    groups = shared_layer_parameters(model, 0.6, power=1.0, weight_decay=0.1)
    rate = {id(p): group["lr"] for group in groups for p in group["params"]}
    assert len(rate) == sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    layers = model.model.layers
    found = [rate[id(layer.mlp.up_proj.weight)] for layer in layers]
    assert found == pytest.approx([0.2, 0.6, 0.2, 0.2])
    assert rate[id(layers[0].input_layernorm.weight)] == rate[id(model.lm_head.weight)] == 0.6
    assert {group["lr"] for group in shared_layer_parameters(unroll(model), 0.6)} == {0.6}
    with pytest.raises(TyingError, match="a power from 0"):
        shared_layer_parameters(model, 0.6, power=-1)


def test_an_albert_is_unshared_and_trains_with_layers_of_its_own(tmp_path):
    model = plain("albert")
    before, few = logits(model), parameters(model)
    unroll(model)
    assert torch.equal(logits(model), before) and parameters(model) > 2 * few
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert torch.equal(logits(loaded), before)
    loaded.train()(**tiny_inputs(loaded)).loss.backward()
    first, second = (group.albert_layers[0].ffn.weight.grad for group in loaded.albert.encoder.albert_layer_groups[:2])
    assert not torch.equal(first, second)
    assert_tied(share_layers(loaded, "cycle", 2))
