"""`find_layers`: the layer of a module is the repeated part of the model, wherever the model is held."""

import logging

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import SwinConfig, SwinModel

from hf_tying.peft import TiedLoraConfig
from hf_tying.peft.layers import Place, find_layers

from ..tied_lora import QKV, layers_of
from ..tiny import tiny_model

SQUARE = ("linear", 8, 8)
OUTSIDE = (None, None)


def places(names: dict[str, tuple] | list[str], pattern=None) -> list[tuple]:
    names = names if isinstance(names, dict) else dict.fromkeys(names, SQUARE)
    return [(place.layer, place.index, place.inside) for place in find_layers(names, pattern).values()]


class TestNames:
    @pytest.mark.parametrize(
        ("names", "expected"),
        [
            (["h.0.q", "h.1.q"], [("h.0", 0, "q"), ("h.1", 1, "q")]),
            (["models.0.h.0.q", "models.0.h.1.q"], [("models.0.h.0", 0, "q"), ("models.0.h.1", 1, "q")]),
            (["0.m.h.3.a.q", "0.m.h.4.a.q"], [("0.m.h.3", 3, "a.q"), ("0.m.h.4", 4, "a.q")]),
            (["layer_0.q", "layer_1.q"], [("layer_0", 0, "q"), ("layer_1", 1, "q")]),
            (["block2.q.0", "block10.q.0"], [("block2", 2, "q.0"), ("block10", 10, "q.0")]),
            (["h.0", "h.1"], [("h.0", 0, "h"), ("h.1", 1, "h")]),
            (["0", "1"], [("0", 0, "layer"), ("1", 1, "layer")]),
            (["h.0.experts.0.w", "h.0.experts.1.w", "h.1.experts.0.w"],
             [("h.0", 0, "experts.0.w"), ("h.0", 0, "experts.1.w"), ("h.1", 1, "experts.0.w")]),
            (["h.0.experts.0.w", "h.0.experts.1.w"], [("h.0.experts.0", 0, "w"), ("h.0.experts.1", 1, "w")]),
            (["h.0.q", "h.0.k"], [("h.0", 0, "q"), ("h.0", 0, "k")]),
            (["fc1", "fc2"], [(*OUTSIDE, "fc1"), (*OUTSIDE, "fc2")]),
            (["a.w1", "a.w3"], [(*OUTSIDE, "a.w1"), (*OUTSIDE, "a.w3")]),
            (["conv1.q", "conv1.k"], [(*OUTSIDE, "conv1.q"), (*OUTSIDE, "conv1.k")]),
            (["_orig_mod.h.0.q", "_orig_mod.h.1.q"], [("h.0", 0, "q"), ("h.1", 1, "q")]),
            (["enc.block.0.layer.1.q", "enc.block.1.layer.1.q", "dec.block.0.layer.2.q"],
             [("enc.block.0", 0, "layer.1.q"), ("enc.block.1", 1, "layer.1.q"), ("dec.block.0", 0, "layer.2.q")]),
        ],
        ids=lambda value: str(value)[:30],
    )  # fmt: skip
    def test_the_layer_ends_with_the_number_of_the_outermost_repeated_part(self, names, expected):
        assert places(names) == expected

    def test_parts_of_another_size_are_no_repetition(self):
        stages = {f"s.{stage}.b.{block}.q": ("linear", 8 << stage, 8) for stage in (0, 1) for block in (0, 1)}
        assert places(stages)[1:3] == [("s.0.b.1", 1, "q"), ("s.1.b.0", 0, "q")]
        alike = dict.fromkeys(stages, SQUARE)
        assert places(alike)[1:3] == [("s.0", 0, "b.1.q"), ("s.1", 1, "b.0.q")]

    def test_a_pattern_says_otherwise(self):
        names = ["m.0.h.3.q", "m.1.h.3.q", "m.0.other.q"]
        assert places(names, "h") == [("m.0.h.3", 3, "q"), ("m.1.h.3", 3, "q"), (*OUTSIDE, "m.0.other.q")]
        assert places(names, ["none", "m"])[0] == ("m.0", 0, "h.3.q")
        assert places(["m.h.2.h.3.q"], "h") == [("m.h.2", 2, "h.3.q")]  # the outer one of two lists of that name
        assert find_layers({}, "h") == {} and Place(None, None, "q") == find_layers({"q": SQUARE})["q"]


class Held(nn.Module):
    def __init__(self):
        super().__init__()
        self.models = nn.ModuleList([tiny_model("llama", num_hidden_layers=4)])

    def forward(self, x):
        return self.models[0](x).logits


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        for i, layer in enumerate(tiny_model("llama", num_hidden_layers=4).model.layers):
            self.add_module(f"layer_{i}", layer)


def adapted(model, **config):
    torch.manual_seed(0)
    return get_peft_model(model, TiedLoraConfig(**({"r": 4, "target_modules": QKV["llama"]} | config)))


def sizes(model) -> list[int]:
    return [parameter.numel() for parameter in model.parameters() if parameter.requires_grad]


class TestModels:
    @pytest.mark.parametrize("outer", [Held, Named])
    def test_a_model_shares_the_same_wherever_it_is_held(self, outer):
        assert sorted(sizes(adapted(outer()))) == sorted(sizes(adapted(tiny_model("llama", num_hidden_layers=4))))

    def test_the_modules_of_a_list_share(self):
        model = adapted(nn.Sequential(nn.ModuleList([nn.Linear(16, 16) for _ in range(6)])), target_modules=r"0\.\d+")
        assert sorted(sizes(model)) == sorted([4 * 16, 16 * 4, *[4] * 6, *[16] * 6])

    def test_stages_of_a_swin_share_each_among_its_blocks(self):
        config = SwinConfig(image_size=32, patch_size=4, embed_dim=16, depths=[2, 3], num_heads=[2, 2], window_size=4)
        model = adapted(SwinModel(config), target_modules=["q_proj", "k_proj", "v_proj"])
        names = {(layer.uses["default"].names.A, layer.uses["default"].names.B) for layer in layers_of(model).values()}
        assert len(layers_of(model)) == 15 and len(names) == 6

    def test_layers_are_chosen_and_grouped_by_the_same_numbers(self):
        model = adapted(Held(), layers_to_transform=[1, 3], layer_groups=[[0, 1], [2, 3]])
        found = {name.split(".")[4] for name in layers_of(model)}
        assert found == {"1", "3"} and len({layer.uses["default"].names.A for layer in layers_of(model).values()}) == 2
        assert {name.split(".")[4] for name in layers_of(adapted(Held(), layers_to_transform=2))} == {"2"}

    def test_a_module_that_is_named_whole_is_meant_whatever_its_layer(self):
        layers = "models.0.model.layers"
        targets = [f"{layers}.3.mlp.up_proj", "q_proj"]
        model = adapted(Held(), layers_to_transform=[1], target_modules=targets)
        assert sorted(layers_of(model)) == [f"{layers}.1.self_attn.q_proj", f"{layers}.3.mlp.up_proj"]

    @pytest.mark.parametrize(
        ("model", "config", "told"),
        [
            (lambda: tiny_model("llama"), {}, False),
            (lambda: tiny_model("llama"), {"layers_pattern": "none"}, True),
            (lambda: tiny_model("llama"), {"layers_pattern": "none", "tie_A": False, "tie_B": False}, False),
            (lambda: nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 8)), {"target_modules": ["0", "1"]}, True),
            (lambda: nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 8)), {"target_modules": ["0"]}, False),
        ],
    )
    def test_an_adapter_that_shares_nothing_is_told(self, model, config, told, caplog):
        with caplog.at_level(logging.WARNING, logger="hf_tying"):
            adapted(model(), **config)
        assert ("no two layers share a factor" in caplog.text) is told
