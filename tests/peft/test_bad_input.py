"""Tied-LoRA refuses what cannot work with the cause and the way out, and leaves the model as it was."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.hotswap import hotswap_adapter
from safetensors.torch import load_file, save_file

from hf_tying.peft import TiedLoraConfig

from ..tied_lora import QKV, layers_of, outputs, tied_lora
from ..tiny import tiny_model


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (dict(r=0), "r=0.*at least 1"),
        (dict(r=2.5), "r=2.5.*integer"),
        (dict(dropout=1.0), "dropout=1.0.*probability"),
        (dict(variant="TL3"), "variant='TL3': expected TL5 or TL6.*leave variant out and set"),
        (dict(variant="TL5", train_u=True), "train_u=True contradicts variant='TL5'"),
        (dict(variant="TL6", tie_B=False), "tie_B=False contradicts variant='TL6'"),
        (dict(train_A=False, train_B=False, train_u=False, train_v=False), "Nothing would be trained"),
        (dict(share_by="name"), "share_by='name': expected one of 'module', 'shape', 'all'"),
        (dict(bias="lora_only"), "bias='lora_only': expected 'none', 'all' or 'tied_lora_only'"),
        (dict(layer_groups=[0, 1]), "expected lists of indices"),
        (dict(layer_groups=[[0, 1], [1]]), "layer 1 is in more than one group"),
        (dict(layer_groups=7), "layer_groups=7: expected lists of indices"),
        (dict(layer_groups=[["0"], [1]]), "expected lists of indices"),
        (dict(target_modules=".*q_proj", layers_to_transform=[0]), "regular expression can name the layers"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        TiedLoraConfig(**config)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (dict(target_modules=["q_prj"]), "q_prj.*not found.*nearest names in the model:.*q_proj"),
        (dict(target_modules=["attention"]), "not found.*Modules that can be adapted: .*down_proj"),
        (dict(target_modules=["q_proj", "input_layernorm"]), "'model.layers.0.input_layernorm'.*is not supported"),
        (dict(target_modules=["q_proj"], r=17), "r=17 is more than any adapted module has.*q_proj.*has rank 16"),
        (dict(target_modules=["q_proj"], layer_groups=[[0]]), "does not say with which layers layer 1 shares"),
        (dict(target_modules=["q_proj"], qkv_modules=["query"]), "none of the adapted modules.*q_proj.*leave qkv_mod"),
    ],
)
def test_what_does_not_fit_the_model_is_refused_before_it_is_touched(config, message):
    model = tiny_model("llama")
    with pytest.raises(ValueError, match=f"(?s){message}"):
        get_peft_model(model, TiedLoraConfig(**({"r": 4} | config)))
    assert not layers_of(model) and not hasattr(model, "tied_matrices")
    assert torch.equal(outputs(model), outputs(tiny_model("llama")))

    adapted = tied_lora(model)
    before = outputs(adapted)
    with pytest.raises(ValueError, match=f"(?s){message}"):
        adapted.add_adapter("second", TiedLoraConfig(**({"r": 4} | config)))
    assert list(adapted.peft_config) == ["default"] and torch.equal(outputs(adapted), before)
    assert all(list(layer.uses) == ["default"] for layer in layers_of(adapted).values())


def test_a_second_adapter_of_a_name_and_another_type_beside_it_are_refused():
    model = tied_lora(tiny_model("llama"))
    before = outputs(model)
    with pytest.raises(ValueError, match="'default' already exists"):
        model.add_adapter("default", TiedLoraConfig(r=2, target_modules=QKV["llama"]))
    with pytest.raises(ValueError, match="different peft types"):
        model.add_adapter("other", LoraConfig(r=2, target_modules=QKV["llama"]))
    assert torch.equal(outputs(model), before)


class TestAFileThatDoesNotFit:
    START = "base_model.model.tied_matrices.tied_lora_"
    A = START + "A.self_attn-qkv-16"

    @pytest.fixture
    def folder(self, tmp_path):
        tied_lora(tiny_model("llama")).save_pretrained(tmp_path)
        return tmp_path

    def change(self, folder, change):
        state = load_file(folder / "adapter_model.safetensors")
        change(state)
        save_file(state, folder / "adapter_model.safetensors")

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda state: state.pop(TestAFileThatDoesNotFit.A), r"A\.self_attn-qkv-16 \[4, 16\] is missing"),
            (lambda state: state.update({TestAFileThatDoesNotFit.START + "A.x": torch.ones(2)}), "A.x has no place"),
            (
                lambda state: state.update({TestAFileThatDoesNotFit.A: torch.ones(4, 8)}),
                r"size mismatch for tied_lora_A\.self_attn-qkv-16: \[4, 8\] in the file, \[4, 16\] in the model",
            ),
            (
                lambda state: state.update({TestAFileThatDoesNotFit.START + "u.self_attn-qkv-4": torch.ones(3, 4)}),
                r"size mismatch for tied_lora_u\.self_attn-qkv-4: \[3, 4\] in the file, \[2, 4\]",
            ),
        ],
    )
    def test_a_file_that_does_not_fit_is_refused_by_every_loader_and_the_model_is_as_it_was(
        self, folder, change, message
    ):
        self.change(folder, change)
        model = tiny_model("llama")
        for load in (lambda: PeftModel.from_pretrained(model, folder), lambda: model.load_adapter(folder)):
            with pytest.raises(RuntimeError, match=message):
                load()
            assert not layers_of(model) and not getattr(model, "_hf_peft_config_loaded", False)
            assert all(parameter.requires_grad for parameter in model.parameters())
        adapted = tied_lora(model)
        before = outputs(adapted)
        with pytest.raises(RuntimeError, match=message):
            adapted.load_adapter(folder, "second")
        assert list(adapted.peft_config) == ["default"] and torch.equal(outputs(adapted), before)

    def test_a_file_of_a_deeper_or_a_wider_model_is_refused(self, folder):
        for changes in (dict(num_hidden_layers=3), dict(hidden_size=32)):
            model = tiny_model("llama", **changes)
            with pytest.raises(RuntimeError, match="does not fit.*a base model of the same shape"):
                PeftModel.from_pretrained(model, folder)
            assert not layers_of(model)

    def test_a_file_for_layers_of_other_names_is_refused_where_their_order_is_not_known(self, tmp_path):
        def towers(*names):
            torch.manual_seed(0)
            blocks = [
                torch.nn.ModuleList(torch.nn.ModuleDict({"attn": torch.nn.Linear(6, 6)}) for _ in range(2))
                for _ in names
            ]
            return torch.nn.ModuleDict(dict(zip(names, blocks, strict=True)))

        for before, after in ((("visual", "text"), ("visual", "zz_text")), (("text",), ("zz_text",))):
            folder = tmp_path / "_".join(before)
            model = towers(*before)
            tied_lora(model, r=2, target_modules=["attn"]).save_pretrained(folder)
            if len(before) == 1:
                loaded = PeftModel.from_pretrained(towers(*after), folder)
                row = layers_of(loaded)["zz_text.1.attn"].get_delta_weight("default")
                assert torch.equal(row, layers_of(model)["text.1.attn"].get_delta_weight("default"))
            else:
                with pytest.raises(RuntimeError, match="not known which row is whose; export it to LoRA"):
                    PeftModel.from_pretrained(towers(*after), folder)
                # Not even where the new names are told: the rows are in the order of the old ones.
                with pytest.raises(RuntimeError, match="not known which row is whose; export it to LoRA"):
                    PeftModel.from_pretrained(towers(*after), folder, key_mapping={"^text": "zz_text"})

    def test_a_file_without_its_list_of_modules_is_refused_by_transformers(self, folder):
        path = folder / "adapter_config.json"
        config = json.loads(path.read_text())
        config["adapted_modules"] = None
        path.write_text(json.dumps(config))
        with pytest.raises(ValueError, match="no adapted_modules.*adapter_config.json that was saved"):
            tiny_model("llama").load_adapter(folder)


class TestClosedListsOfPeft:
    def test_the_refusal_of_a_hotswap_names_the_export(self, tmp_path):
        model = tied_lora(tiny_model("llama"))
        model.save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="swaps LoRA adapters only.*export_to_lora"):
            hotswap_adapter(model, str(tmp_path), adapter_name="default")

    def test_the_refusal_of_a_mixed_model_names_the_export(self):
        with pytest.raises(ValueError, match="mixed=True.*export_to_lora"):
            get_peft_model(tiny_model("llama"), TiedLoraConfig(r=2, target_modules=QKV["llama"]), mixed=True)
