"""Settings and models that cannot be shared are refused before anything is changed."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, RwkvConfig, RwkvForCausalLM

from hf_tying import (
    TyingConfig,
    TyingError,
    assert_tied,
    fold,
    share_layers,
    unroll,
)
from tests.tiny import untied_model

from .models import plain


class TestRefusals:
    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({}, "either a pattern"), ({"pattern": "cycel", "unique": 2}, "nearest names are 'cycle'"),
            ({"pattern": "cycle"}, "from 1 to 4"), ({"pattern": "cycle", "unique": 5}, "from 1 to 4"),
            ({"pattern": "sandwich", "unique": 2}, "unique=3"), ({"order": [0, 1]}, "has 2 layers, and '.*' has 4"),
            ({"order": [0, 1, 2, 3, 2]}, "grow=True"), ({"order": [0, 1, -1, 0]}, "numbers from 0"),
            ({"order": [0, 1, 1, 0], "grow": True}, "at least once"), ({"pattern": "all", "grow": True}, "needs"),
            ({"pattern": "all", "private": ["*nrom*"]}, "matches nothing"),
            ({"pattern": "all", "private": [3]}, "matches nothing"),
            ({"pattern": ["cycle"], "unique": 2}, "Unknown pattern"),
            ({"pattern": "all", "init": "mean"}, "expected one of first"),
            ({"pattern": "all", "init": "svd"}, "relax="),
            ({"pattern": "all", "init": "svd", "relax": {"kind": "scale"}}, "into a low rank"),
            ({"pattern": "all", "relax": {"rank": 0}}, "whole number"),
            *(({"pattern": "all", "residual_factor": factor}, "above 0, or 'looped'") for factor in (0, "loop", True)),
            ({"order": [0, 1, 2, 3, 3], "grow": True, "residual_factor": 0.5}, "no residual_factor"),
            ({"pattern": "all", "stack": "encoder"}, "no stack of layers 'encoder'"),
        ],
        ids=str,
    )  # fmt: skip
    def test_settings(self, settings, message):
        model = plain()
        before = {name: value.clone() for name, value in model.state_dict().items()}
        with pytest.raises(TyingError, match=message):
            share_layers(model, **settings)
        assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
        assert getattr(model.config, "tying", None) is None and model.config.num_hidden_layers == 4

    def test_layers_of_different_kinds_are_named_with_what_fits(self):
        model = plain()
        wide = untied_model("llama").model.layers[0]
        wide.mlp.up_proj = torch.nn.Linear(16, 64, bias=False)
        model.model.layers[0] = wide
        with pytest.raises(TyingError, match="Layers 0 and 2 .* one block.*Layers like layer 0: .0.*sandwich"):
            share_layers(model, "cycle", 2)
        share_layers(model, "sandwich")

    def test_shared_twice_and_the_way_out(self):
        model = share_layers(plain(), "cycle", 2)
        with pytest.raises(TyingError, match="unroll"):
            share_layers(model, "sequence", 2)
        assert_tied(share_layers(unroll(model), "sequence", 2))

    def test_nothing_to_unroll_or_to_fold(self):
        for change in (unroll, fold):
            with pytest.raises(TyingError, match="share_layers"):
                change(plain())

    def test_visits_that_were_trained_apart_are_not_folded(self):
        model = unroll(share_layers(plain(), "cycle", 2))
        model.model.layers[2].mlp.up_proj.weight.data.add_(0.1)
        with pytest.raises(TyingError, match="differ by more than a shared block can"):
            fold(model)
        assert_tied(share_layers(model, "cycle", 2, init="average"))

    @pytest.mark.parametrize(
        "depth",
        [3, [3], [{}], [{"path": "a"}], [{"path": "a", "order": [0]}], [{"path": "a", "order": [0, "1"]}],
         [{"path": "a", "order": [0] * 20_000}], [{"path": "a", "order": [0, 0], "other": 1}],
         [{"path": "a", "order": [0, 0]}] * 2, [{"path": "a", "order": [0, 0], "relax": {"kind": "x"}}],
         [{"path": "a", "order": [0, 0], "private": [1]}], [{"path": "a", "order": [0, 0], "damped": ["x"]}]],
        ids=lambda value: str(value)[:40],
    )  # fmt: skip
    def test_entries(self, depth):
        with pytest.raises(TyingError):
            TyingConfig(depth=depth)

    def test_a_file_with_another_number_of_layers(self, tmp_path):
        share_layers(plain(), "cycle", 2).save_pretrained(tmp_path)
        with pytest.raises(TyingError, match="4 layers of '.*layers', and the model has 3"):
            AutoModelForCausalLM.from_pretrained(tmp_path, num_hidden_layers=3)


def test_matrices_that_a_model_divides_by_their_layer_are_not_shared():
    """RWKV does so in evaluation, in place: two visits would divide one matrix twice."""
    sizes = {"vocab_size": 64, "hidden_size": 16, "attention_hidden_size": 16, "num_hidden_layers": 4}
    with pytest.raises(TyingError, match="rescale_every=0"):
        share_layers(RwkvForCausalLM(RwkvConfig(**sizes, rescale_every=2)), pattern="sequence", unique=2)
    model = share_layers(RwkvForCausalLM(RwkvConfig(**sizes, rescale_every=0)), pattern="sequence", unique=2)
    ids = torch.randint(64, (2, 5))
    assert torch.equal(model.eval()(ids).logits, unroll(copy.deepcopy(model))(ids).logits)
