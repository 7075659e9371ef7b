"""A Tied-LoRA adapter is saved and loaded, by PEFT and by transformers."""

import pytest
import torch
from peft import PeftModel
from peft.functional import inject_adapter_in_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from hf_tying.peft import TiedLoraConfig

from ..native_adapters import needs_native_adapters
from ..processes import run_python
from ..tied_lora import QKV, layers_of, outputs, shake, shares_its_factors, tied_lora, tiny_classifier
from ..tiny import tiny_inputs, tiny_model

ARCHS = ["llama", "gpt2", "bert", "t5", "marian"]


class TestSavingAndLoading:
    @pytest.mark.parametrize("arch", ARCHS)
    @pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
    def test_a_loaded_adapter_is_the_saved_one_and_shares_what_it_shared(self, tmp_path, arch, low_cpu_mem_usage):
        model = tied_lora(tiny_model(arch), alpha=3)
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(tiny_model(arch), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage).eval()
        assert torch.equal(outputs(loaded), outputs(model))
        assert shares_its_factors(loaded)

    def test_the_file_has_a_and_b_once_and_the_vectors_of_all_layers_as_rows(self, tmp_path):
        model = tied_lora(tiny_model("llama", num_hidden_layers=11))
        model.save_pretrained(tmp_path)
        saved = load_file(tmp_path / "adapter_model.safetensors")
        start = "base_model.model.tied_matrices.tied_lora_"
        shapes = {name.removeprefix(start): tuple(value.shape) for name, value in saved.items()}
        assert shapes == {
            "A.self_attn-qkv-16": (4, 16),
            **{f"B.self_attn-{name}-16": (16, 4) for name in ("q_proj", "k_proj", "v_proj")},
            "u.self_attn-qkv-4": (11, 4),
            **{f"v.self_attn-{name}-16": (11, 16) for name in ("q_proj", "k_proj", "v_proj")},
        }
        # Row 10 is layer 10, not the one after layer 1.
        v = layers_of(model)["model.layers.10.self_attn.q_proj"].tied_lora_v["default"].weight
        assert torch.equal(saved[f"{start}v.self_attn-q_proj-16"][10], v)

    def test_a_fresh_process_gets_the_same_logits(self, tmp_path, model):
        model.save_pretrained(tmp_path)
        script = (
            "import sys, torch, hf_tying; from peft import PeftModel; from tests.tied_lora import outputs; "
            "from tests.tiny import tiny_model; "
            "torch.save(outputs(PeftModel.from_pretrained(tiny_model('llama'), sys.argv[1]).eval()), sys.argv[2])"
        )
        run_python("-c", script, tmp_path, tmp_path / "logits")
        assert torch.equal(torch.load(tmp_path / "logits"), outputs(model))

    def test_the_classifier_of_a_classification_task_is_saved_with_it(self, tmp_path):
        model = tied_lora(tiny_classifier("bert"), task_type="SEQ_CLS")
        with torch.no_grad():
            model.base_model.model.classifier.modules_to_save["default"].weight.normal_()
        inputs = {name: value for name, value in tiny_inputs(model.get_base_model()).items() if name != "labels"}
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(tiny_classifier("bert"), tmp_path).eval()
        assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)

    @pytest.mark.parametrize("bias", ["all", "tied_lora_only"])
    def test_trained_biases_are_saved_with_it(self, tmp_path, bias):
        model = tied_lora(tiny_model("bert"), bias=bias)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("query.base_layer.bias"):
                    assert parameter.requires_grad
                    parameter.normal_()
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(tiny_model("bert"), tmp_path).eval()
        assert torch.equal(outputs(loaded), outputs(model))

    def test_an_adapter_named_like_a_module_or_a_factor_is_saved_and_loaded(self, tmp_path):
        model = tied_lora(tiny_model("llama"), adapter_name="q_proj")
        shake(model, 1, "q_proj")
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(tiny_model("llama"), tmp_path / "q_proj", adapter_name="self_attn").eval()
        assert torch.equal(outputs(loaded), outputs(model))

    def test_a_root_that_runs_its_children_in_a_row_gets_no_further_child(self, tmp_path):
        def sequence():
            torch.manual_seed(0)
            return torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.ReLU(), torch.nn.Linear(8, 8))

        model = tied_lora(sequence(), r=2, target_modules=["0", "2"], share_by="shape")
        x = torch.randn(3, 6)
        expected = model(x)
        model.save_pretrained(tmp_path)
        assert torch.equal(PeftModel.from_pretrained(sequence(), tmp_path)(x), expected)
        assert torch.allclose(model.merge_and_unload()(x), expected, atol=1e-6)


def test_offloaded_layers_get_their_adapter_from_the_disk(tmp_path, monkeypatch, model):
    monkeypatch.chdir(tmp_path)  # PEFT writes what it offloads below the working directory
    tiny_model("llama").save_pretrained(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu",
              "model.rotary_emb": "cpu", "lm_head": "cpu"}  # fmt: skip
    offload = dict(offload_folder=str(tmp_path / "offload"))
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", device_map=places, **offload)
    places = {f"base_model.model.{name}": place for name, place in places.items()}
    places["base_model.model.tied_matrices"] = "cpu"
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter", device_map=places, **offload).eval()
    assert layers_of(loaded)["model.layers.1.self_attn.q_proj"].tied_lora_v["default"].weight.is_meta
    assert torch.equal(outputs(loaded), outputs(model))
    assert torch.allclose(outputs(loaded.merge_and_unload()), outputs(model), atol=1e-5)


class TestTransformersOwnAdapters:
    @needs_native_adapters
    def test_an_adapter_is_added_saved_loaded_switched_off_and_deleted(self, tmp_path):
        model = tiny_model("llama")
        model.add_adapter(TiedLoraConfig(r=4, target_modules=QKV["llama"]), "mine")
        shake(model, 1, "mine")
        expected = outputs(model)
        model.save_pretrained(tmp_path)
        loaded = tiny_model("llama")
        loaded.load_adapter(tmp_path, "other")
        assert torch.equal(outputs(loaded), expected) and shares_its_factors(loaded, "other")
        assert not any(parameter.requires_grad for parameter in loaded.parameters() if parameter.is_leaf)
        loaded.disable_adapters()
        assert torch.equal(outputs(loaded), outputs(tiny_model("llama")))
        loaded.enable_adapters()
        assert torch.equal(outputs(loaded), expected)
        loaded.delete_adapter("other")
        assert torch.equal(outputs(loaded), outputs(tiny_model("llama")))
        through_peft = PeftModel.from_pretrained(tiny_model("llama"), tmp_path).eval()
        assert torch.equal(outputs(through_peft), expected)

    def test_from_pretrained_of_the_adapters_folder_gives_base_and_adapter(self, tmp_path, model):
        tiny_model("llama").save_pretrained(tmp_path / "base")
        for config in model.peft_config.values():
            config.base_model_name_or_path = str(tmp_path / "base")
        model.save_pretrained(tmp_path / "adapter")
        assert torch.equal(outputs(AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")), outputs(model))

    def test_injection_into_a_plain_module_works(self, model):
        base = inject_adapter_in_model(TiedLoraConfig(r=4, target_modules=QKV["llama"]), tiny_model("llama"))
        shake(base)
        assert torch.equal(outputs(base), outputs(model))
