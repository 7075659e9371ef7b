"""`add_weighted_adapter`: one adapter that is the weighted sum of others."""

import pytest
import torch
from peft import PeftModel
from transformers.utils import logging

from hf_tying.peft import TiedLoraConfig

from ..tied_lora import QKV, dense_updates, layers_of, outputs, shake, tied_lora
from ..tiny import tiny_model


def two_adapters(arch="llama", second=None, **config):
    model = tied_lora(tiny_model(arch), alpha=6, adapter_name="first", **config)
    model.add_adapter(
        "second", TiedLoraConfig(**({"r": 2, "alpha": 3, "target_modules": QKV[arch]} | (second or config)))
    )
    shake(model, 2, "second")
    shake(model, 1, "first")
    return model.eval()


def weighted(model, weights):
    updates = {}
    for name, weight in weights.items():
        for module, layer in layers_of(model).items():
            if name in layer.uses:
                a, b = layer.get_lora_factors(name)
                updates[module] = updates.get(module, 0) + weight * (b @ a).detach()
    return updates


def of(model, name):
    return {m: (b @ a).detach() for m, layer in layers_of(model).items() for a, b in [layer.get_lora_factors(name)]}


def distance(first, second):
    assert first.keys() == second.keys()
    square = sum(((first[name] - second[name]) ** 2).sum() for name in first)
    return (square / sum((update**2).sum() for update in first.values())).sqrt().item()


class TestSideBySide:
    @pytest.mark.parametrize("arch", ["llama", "gpt2", "bert"])
    @pytest.mark.parametrize("config", [{"variant": "TL5"}, {"train_v": False}], ids=["TL5", "with u"])
    def test_adapters_without_v_are_added_exactly_side_by_side(self, arch, config, tmp_path):
        model = two_adapters(arch, **config)
        expected = weighted(model, {"first": 0.7, "second": -1.3})
        model.add_weighted_adapter(["first", "second"], [0.7, -1.3], "both", combination_type="cat")
        assert model.peft_config["both"].r == sum(model.peft_config[name].r for name in ("first", "second"))
        assert distance(expected, of(model, "both")) < 1e-6
        model.set_adapter("both")
        model.save_pretrained(tmp_path, selected_adapters=["both"])
        again = PeftModel.from_pretrained(tiny_model(arch), tmp_path / "both").eval()
        assert torch.allclose(outputs(again), outputs(model), atol=1e-6)
        assert distance(expected, dense_updates(again)) < 1e-6

    def test_an_adapter_with_u_and_one_without_are_added_exactly(self):
        model = two_adapters(train_v=False, second={"variant": "TL5", "target_modules": QKV["llama"], "r": 3})
        expected = weighted(model, {"first": 2, "second": 1})
        model.add_weighted_adapter(["first", "second"], [2, 1], "both", combination_type="cat")
        assert distance(expected, of(model, "both")) < 1e-6

    def test_a_sum_side_by_side_is_refused_with_v_or_with_other_ties(self):
        model = two_adapters()
        with pytest.raises(ValueError, match="a v each.*combination_type='fit'"):
            model.add_weighted_adapter(["first", "second"], [1, 1], "both", combination_type="cat")
        model.add_weighted_adapter(["first"], [2], "twice", combination_type="cat")
        assert distance(weighted(model, {"first": 2}), of(model, "twice")) < 1e-6
        for second in ({"tie_A": False, "train_v": False}, {"target_modules": ["q_proj"], "train_v": False}):
            model = two_adapters(train_v=False, second={"target_modules": QKV["llama"]} | second)
            with pytest.raises(ValueError, match="do not share the same"):
                model.add_weighted_adapter(["first", "second"], [1, 1], "both", combination_type="cat")
            assert list(model.peft_config) == ["first", "second"]

    def test_a_sum_side_by_side_is_refused_if_its_rank_is_too_high(self):
        model = two_adapters(r=10, variant="TL5")
        with pytest.raises(ValueError, match="r=20 is more than"):
            model.add_weighted_adapter(["first", "second"], [1, 1], "both", combination_type="cat")
        assert list(model.peft_config) == ["first", "second"]


class TestFitted:
    def test_a_multiple_of_one_adapter_is_fitted_exactly(self):
        model = two_adapters()
        model.add_weighted_adapter(["second"], [-2.5], "other")
        assert distance(weighted(model, {"second": -2.5}), of(model, "other")) < 1e-5
        assert not any(parameter.requires_grad for name, parameter in model.named_parameters() if ".other" in name)

    def test_a_fitted_sum_has_the_error_that_is_logged(self, tmp_path, caplog, monkeypatch):
        model = two_adapters()
        expected = weighted(model, {"first": 1, "second": 0.5})
        monkeypatch.setattr(logging.get_logger("hf_tying"), "propagate", True)
        model.add_weighted_adapter(["first", "second"], [1, 0.5], "both", iterations=50)
        assert model.peft_config["both"].r == 4
        error = distance(expected, of(model, "both"))
        assert 1e-3 < error < 0.9
        assert f"{error:.2%}" in caplog.text
        model.set_adapter("both")
        model.save_pretrained(tmp_path, selected_adapters=["both"])
        again = PeftModel.from_pretrained(tiny_model("llama"), tmp_path / "both").eval()
        assert torch.allclose(outputs(again), outputs(model), atol=1e-6)
        model.add_weighted_adapter(["first", "second"], [1, 0.5], "larger", r=8, iterations=50)
        assert distance(expected, of(model, "larger")) < error

    def test_adapters_on_other_modules_are_added(self):
        model = two_adapters(second={"target_modules": ["o_proj"], "r": 3})
        expected = weighted(model, {"first": 1, "second": 1})
        assert len(expected) == 8
        model.add_weighted_adapter(["first", "second"], [1, 1], "both", r=4)
        # Of its norm. A missing term is a good part of 1; rounding was 2.6e-5 on the slowest instruction set.
        assert distance(expected, of(model, "both")) < 1e-3


class TestRefused:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ((["first", "third"], [1, 1], "both"), "Adapter third does not exist"),
            ((["first", "second"], [1], "both"), "2 adapters and 1 weights"),
            (([], [], "both"), "0 adapters"),
            ((["first", "second"], [1, float("nan")], "both"), "finite"),
            ((["first", "second"], [1, 1], "second"), "already"),
            ((["first", "second"], [1, 1], "both", "svd"), "Invalid combination_type: 'svd'"),
            ((["first", "second"], [1, 1], "both", "fit", 17), "r=17 is more than"),
            ((["first", "second"], [1, 1], "both", "cat", 3), "r=3 with combination_type='cat'"),
        ],
    )
    def test_wrong_arguments_are_refused_and_the_model_is_as_it_was(self, arguments, message):
        model = two_adapters()
        before = {name: value.clone() for name, value in model.state_dict().items()}
        with pytest.raises(ValueError, match=message):
            model.add_weighted_adapter(*arguments)
        after = model.state_dict()
        assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
        assert list(model.peft_config) == ["first", "second"]
