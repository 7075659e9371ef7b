"""`tying_report` of Tied-LoRA adapters: each shared factor is a group, in a model and in a folder."""

import copy
import json

import pytest
from peft import LoraConfig, get_peft_model

from hf_tying import TyingError, tying_report
from hf_tying.peft import export_to_lora

from ..tied_lora import QKV, layers_of, tied_lora, two_adapters
from ..tiny import tiny_model


@pytest.fixture
def model():
    return tied_lora(tiny_model("llama"))


class TestTheReport:
    def test_the_report_on_a_model_shows_each_shared_factor_with_its_modules(self):
        groups = {group.name: group for group in tying_report(two_adapters()).groups}
        a = groups["default: A self_attn-qkv-16"]
        assert len(a.names) == 6 and a.actual and a.shape == [4, 16] and a.parameters_saved == 5 * 4 * 16
        assert groups["second: B mlp-down_proj-16"].names == [f"model.layers.{i}.mlp.down_proj" for i in range(2)]
        assert groups["default: u model-layers-1-self_attn-qkv"].names == [
            f"model.layers.1.self_attn.{name}_proj" for name in "qkv"
        ]

    def test_the_report_on_a_model_says_that_a_factor_is_no_longer_one(self, model):
        layer = layers_of(model)["model.layers.1.self_attn.k_proj"]
        layer.uses["default"].places["B"] = {"own": copy.deepcopy(layer.uses["default"].B)}, "own"
        groups = {group.name: group for group in tying_report(model).groups}
        assert not groups["default: B self_attn-k_proj-16"].actual
        assert groups["default: B self_attn-q_proj-16"].actual

    def test_the_report_on_a_folder_is_that_on_the_model(self, tmp_path, model):
        model.save_pretrained(tmp_path)
        live = {group.name.removeprefix("default: "): group for group in tying_report(model).groups}
        report = tying_report(tmp_path)
        assert report.architecture == "Tied-LoRA TL6" and report.parameters == 360
        for group in report.groups:
            assert sorted(group.names) == sorted(live[group.name].names) and group.in_file == group.names[:1]
            assert (
                group.shape == live[group.name].shape and group.parameters_saved == live[group.name].parameters_saved
            )
        assert len(report.groups) == len(live)

    def test_an_adapter_of_another_type_shares_nothing(self, tmp_path):
        get_peft_model(tiny_model("llama"), LoraConfig(r=2, target_modules=QKV["llama"])).save_pretrained(tmp_path)
        report = tying_report(tmp_path)
        assert (report.architecture, report.groups, report.parameters) == ("LoRA", [], 2 * 3 * (2 * 16 + 2 * 16))

    def test_both_forms_are_one_report(self, tmp_path, model):
        model.save_pretrained(tmp_path / "tied_lora")
        export_to_lora(tmp_path / "tied_lora", tmp_path)
        report = tying_report(tmp_path)
        assert report.groups == tying_report(tmp_path / "tied_lora").groups and report.groups
        assert "LoRA" in report.architecture and report.parameters > 360

    @pytest.mark.parametrize(
        "changes", [{"r": -1}, {"r": {}}, {"r": 10**9}, {"peft_type": 5}, {"adapted_modules": [1]},
                    {"adapted_modules": {"a": {"A": 5}}}, {"adapted_modules": {"model.layers.\u00b2.q": {}}}],
        ids=str,
    )  # fmt: skip
    def test_settings_of_wrong_types_are_named(self, tmp_path, model, changes):
        model.save_pretrained(tmp_path)
        path = tmp_path / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
        with pytest.raises(TyingError, match="adapter_config.json"):
            tying_report(tmp_path)
