"""What a block starts as, from the layers that become its visits."""

import copy

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
)

from hf_tying import (
    assert_tied,
    fold,
    gap,
    share_layers,
    unroll,
)
from tests.tiny import logits

from .models import plain


class TestInitialValues:
    NAME = "self_attn.q_proj.weight"

    def values(self, model):
        return [layer.self_attn.q_proj.weight.detach().clone() for layer in model.model.layers]

    @pytest.mark.parametrize("init", ["first", "average", "stepwise"])
    def test_are_those_of_the_layers(self, init):
        model = plain()
        old = self.values(model)
        new = self.values(share_layers(model, "cycle", 2, init=init))
        expected = {
            "first": [old[0], old[1]],
            "average": [(old[0] + old[2]) / 2, (old[1] + old[3]) / 2],
            "stepwise": [old[0], old[3]],
        }[init]
        for found, wanted in zip(new, expected * 2, strict=True):
            torch.testing.assert_close(found, wanted)

    def test_a_higher_rank_is_nearer_and_the_full_one_is_the_model(self):
        stock, errors = plain(), []
        for rank in (1, 4, 16):
            model = share_layers(
                copy.deepcopy(stock), "cycle", 2, init="svd", relax={"rank": rank}, private=["*norm*"]
            )
            pairs = zip(self.values(stock)[2:], model.model.layers[2:], strict=True)
            errors.append(max((old - layer.self_attn.q_proj.weight).norm().item() for old, layer in pairs))
        assert errors == sorted(errors, reverse=True) and errors[1] < errors[0]
        torch.testing.assert_close(logits(model), logits(stock), atol=1e-4, rtol=0)

    def test_a_relaxed_model_is_saved_unrolled_and_folded(self, tmp_path):
        model = share_layers(plain(), "cycle", 2, init="svd", relax={"rank": 3}, private=["*norm*"])
        before, distance = logits(model), gap(model)
        model.save_pretrained(tmp_path)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert torch.equal(logits(loaded), before) and gap(loaded) == distance
        assert loaded.config.tying["depth"][0]["relax"] == {"kind": "lora", "rank": 3}
        unroll(model)
        torch.testing.assert_close(logits(model), before, atol=1e-6, rtol=0)
        fold(model)
        assert_tied(model)
        torch.testing.assert_close(logits(model), before, atol=1e-5, rtol=0)
