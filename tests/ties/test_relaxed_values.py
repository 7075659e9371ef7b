"""What a relaxed member is: its kind's formula, its bound, its penalty, its start, its LoRA."""

import copy

import pytest
import torch
from peft import PeftModel

from hf_tying import (
    TyingError,
    gap,
    harden,
    relaxation_penalty,
    tie,
    untie,
)
from hf_tying.config import RELAXATIONS
from hf_tying.peft import export_to_lora
from hf_tying.ties.relaxation import KINDS as CLASSES
from tests.tiny import logits

from .relaxed_models import GROUPS, KINDS, relaxed, trained, untouched


@pytest.mark.parametrize("kind", RELAXATIONS)
def test_a_setting_that_is_left_out_has_the_default_that_the_config_names(kind):
    model = relaxed("llama", {"kind": kind})
    held = model.lm_head.weight_relaxation
    relax = {"kind": kind, "bound": None, **RELAXATIONS[kind]}
    tie(model, {"group": {"names": GROUPS["llama"], "relax": relax}})
    assert type(held) is CLASSES[kind] and model.lm_head.weight_relaxation is held
    assert held.settings | RELAXATIONS[kind] == {"kind": kind, **RELAXATIONS[kind]}


def test_each_kind_is_its_formula():
    root = untouched("llama").get_parameter("model.embed_tokens.weight")
    for kind, relax in KINDS.items():
        model = trained("llama", relax)
        root = model.get_parameter("model.embed_tokens.weight")
        parts = dict(model.lm_head.weight_relaxation.named_parameters())
        if kind == "scale":
            expected = torch.diag(1 + parts["offset"]) @ root
        elif kind == "basis":
            own, first, second = parts["coefficients"]
            expected = (1 + own) * root + first * parts["filters"][0] + second * parts["filters"][1]
        else:
            difference = parts["lora_B"] @ parts["lora_A"]
            most = relax.get("bound", float("inf")) * root.norm()
            expected = root + difference * min(1, most / difference.norm())
        torch.testing.assert_close(model.lm_head.weight, expected)


def test_a_bound_is_never_passed():
    model = relaxed("llama", {"kind": "scale", "bound": 0.1})
    offset = model.get_parameter("lm_head.weight_relaxation.offset")
    for value, expected in ((0.05, 0.05), (0.1, 0.1), (7.0, 0.1)):
        offset.data.fill_(value)
        assert gap(model)["group"]["lm_head.weight"] == pytest.approx(expected, rel=1e-5)


def test_a_bounded_difference_of_a_zero_matrix_is_zero():
    model = untouched("llama")
    for name in GROUPS["llama"]:
        model.get_parameter(name).data.zero_()
    tie(model, {"group": {"names": GROUPS["llama"], "relax": KINDS["bounded"]}})
    assert not model.lm_head.weight.any()


def test_a_group_has_the_name_that_was_given_last():
    model = tie(untouched("llama"), "two_way", init_from="target")
    tie(model, {"mine": {"names": GROUPS["llama"], "relax": KINDS["scale"]}})
    assert list(gap(model)) == ["mine"]


def test_the_penalty_is_the_squared_gap_and_leaves_the_root_alone():
    model = trained("llama", KINDS["lora"])
    penalty = relaxation_penalty(model)
    assert penalty.item() == pytest.approx(gap(model)["group"]["lm_head.weight"] ** 2, rel=1e-5)
    penalty.backward()
    assert model.get_parameter("model.embed_tokens.weight").grad is None
    assert model.get_parameter("lm_head.weight_relaxation.lora_B").grad.norm() > 0
    assert relaxation_penalty(untouched("llama")) == 0


class TestValuesThatDiffer:
    NAMES = ("model.embed_tokens.weight", "lm_head.weight")

    def model(self):
        return untie(untouched("llama"))

    def differing(self):
        model = self.model()
        torch.nn.init.normal_(model.lm_head.weight)
        return model

    def test_need_a_choice_as_everywhere(self):
        with pytest.raises(TyingError, match="init_from="):
            tie(self.differing(), {"group": {"names": [*self.NAMES], "relax": {"kind": "scale"}}})

    def test_are_approximated_better_by_a_higher_rank_and_met_by_the_full_one(self):
        stock, errors = self.differing(), []
        for rank in (1, 4, 8, 16):
            relax = {"kind": "lora", "rank": rank, "init": "svd"}
            model = tie(copy.deepcopy(stock), {"group": {"names": [*self.NAMES], "relax": relax}}, init_from="target")
            residual = stock.lm_head.weight - stock.model.embed_tokens.weight
            best = torch.linalg.svdvals(residual.double())[rank:].norm().item()
            found = (model.lm_head.weight - stock.lm_head.weight).double().norm().item()
            assert found == pytest.approx(best, rel=1e-4, abs=1e-4)
            errors.append(found)
        assert errors == sorted(errors, reverse=True)
        torch.testing.assert_close(logits(model), logits(stock), atol=1e-4, rtol=0)

    def test_of_whole_layers_are_met_by_the_full_rank(self):
        stock = untouched("llama")
        for name, parameter in stock.named_parameters():
            if "layers.1" in name and parameter.ndim == 1:
                parameter.data.copy_(stock.get_parameter(name.replace("layers.1", "layers.0")))
        relax = {"kind": "lora", "rank": 32, "init": "svd"}
        layers = ["model.layers.0", "model.layers.1"]
        model = tie(copy.deepcopy(stock), {"layers": {"names": layers, "relax": relax}}, init_from="model.layers.0")
        torch.testing.assert_close(logits(model), logits(stock), atol=1e-4, rtol=0)
        assert all("norm" not in name for group in gap(model).values() for name in group)  # vectors are tied exactly


class TestAsLora:
    @pytest.mark.parametrize("root", [0, 1], ids=["head relaxed", "embedding relaxed"])
    def test_stock_peft_computes_the_same_over_the_exact_tie(self, root, tmp_path):
        names = GROUPS["llama"][root:] + GROUPS["llama"][:root]
        model = relaxed("llama", KINDS["lora"], names)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter)
        export_to_lora(model, tmp_path / "adapter")
        base = harden(copy.deepcopy(model))
        assert not torch.allclose(logits(base), logits(model), atol=1e-3)
        adapted = PeftModel.from_pretrained(base, tmp_path / "adapter")
        torch.testing.assert_close(logits(adapted), logits(model), atol=1e-5, rtol=1e-5)

    @pytest.mark.parametrize("kind", ["scale", "basis", "bounded"])
    def test_another_kind_is_refused_before_anything_is_written(self, kind, tmp_path):
        with pytest.raises(TyingError, match="expected the weight of a Linear or an Embedding, relaxed by 'lora'"):
            export_to_lora(relaxed("llama", KINDS[kind]), tmp_path / "adapter")
        assert not (tmp_path / "adapter").exists()
