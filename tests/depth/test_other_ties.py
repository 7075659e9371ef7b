"""Ties over depth beside other ties, taken off in part, and broken. (Every flow: tests/flows.)"""

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_tying import TyingConfig, TyingError, assert_tied, share_layers, tie, untie

from .models import parameters, plain

UP = "model.layers.2.mlp.up_proj.weight"


@pytest.fixture
def model():
    return share_layers(plain(), "cycle", 2)


def test_tied_embeddings_are_resized(model):
    tie(model, "two_way", init_from="target").resize_token_embeddings(70)
    assert_tied(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight and model.lm_head.weight.shape == (70, 16)
    assert model.config.tying["depth"] and model.config.tying["scheme"] == "two_way"


def test_a_part_that_is_untied_is_recorded_by_its_names(model, tmp_path):
    untie(model, [UP])
    assert_tied(model)
    assert "depth" not in model.config.tying and model.config.tying["groups"]
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_tied(loaded)
    assert parameters(loaded) == parameters(model)


def test_a_broken_tie_is_told(model):
    model.get_submodule(UP.removesuffix(".weight")).weight = torch.nn.Parameter(torch.zeros(32, 16))
    with pytest.raises(TyingError, match=UP):
        assert_tied(model)


def test_a_private_part_may_be_in_one_stack_alone():
    model = share_layers(plain("bart"), pattern="all", private=["encoder_attn*"])
    layers = model.model.decoder.layers
    assert layers[0].encoder_attn.k_proj.weight is not layers[1].encoder_attn.k_proj.weight
    assert layers[0].fc1.weight is layers[1].fc1.weight
    assert "private" not in TyingConfig.in_config(model.config).depth[0]
