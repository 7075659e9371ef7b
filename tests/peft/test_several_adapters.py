"""Several Tied-LoRA adapters in one model: active, trained, deleted and mixed in a batch as PEFT does it."""

import pytest
import torch

from hf_tying.peft import TiedLoraConfig

from ..tied_lora import QKV, layers_of, outputs, shake, tied_lora, two_adapters
from ..tiny import tiny_inputs, tiny_model


def of_adapter(model, name):
    model.set_adapter(name)
    return outputs(model)


class TestSeveralAdapters:
    def test_each_adapter_is_active_alone_and_both_add_up(self):
        model = two_adapters()
        first, second = of_adapter(model, "default"), of_adapter(model, "second")
        with model.disable_adapter():
            assert torch.equal(outputs(model), outputs(tiny_model("llama")))
        assert not torch.allclose(first, second, atol=1e-3)
        model.base_model.set_adapter(["default", "second"])
        both = outputs(model)
        assert torch.allclose(outputs(model.merge_and_unload()), both, atol=1e-5)

    def test_only_the_active_adapter_is_trained(self):
        model = two_adapters()
        for name, other in (("second", "default"), ("default", "second")):
            model.set_adapter(name)
            trained = [key for key, parameter in model.named_parameters() if parameter.requires_grad]
            assert trained and all(f".{name}" in key and f".{other}." not in key for key in trained)
            assert model.get_model_status().active_adapters == [name]
            assert model.get_model_status().requires_grad == {name: True, other: False}

    def test_no_adapter_is_trained_while_adapters_are_off(self, model):
        with model.disable_adapter():
            assert not any(parameter.requires_grad for parameter in model.parameters())
        assert {name.partition("tied_lora_")[2][:1] for name, p in model.named_parameters() if p.requires_grad} == set(
            "ABuv"
        )

    def test_a_deleted_adapter_leaves_nothing(self):
        model = two_adapters()
        first = of_adapter(model, "default")
        model.delete_adapter("second")
        assert not [name for name, _ in model.named_modules() if "second" in name.split(".")]
        assert not [slot for slot in next(iter(layers_of(model).values()))._matrices[0].slots if slot[0] == "second"]
        assert torch.equal(outputs(model), first)

    def test_every_sample_of_a_batch_may_have_its_own_adapter(self):
        model = two_adapters()
        names = ["default", "second", "__base__", "second"]
        inputs = {name: value.repeat(2, 1) for name, value in tiny_inputs(model.get_base_model()).items()}
        with torch.no_grad():
            mixed = model(**inputs, adapter_names=names).logits
            for name in ("default", "second"):
                model.set_adapter(name)
                rows = [row for row, of_row in enumerate(names) if of_row == name]
                assert torch.allclose(mixed[rows], model(**inputs).logits[rows], atol=1e-6)
            with model.disable_adapter():
                assert torch.allclose(mixed[2], model(**inputs).logits[2], atol=1e-6)

    @pytest.mark.parametrize("arch", ["llama", "marian"])
    def test_a_beam_search_repeats_the_adapters_of_the_samples(self, arch):
        model = tied_lora(tiny_model(arch))
        model.add_adapter("second", TiedLoraConfig(r=2, target_modules=QKV[arch]))
        shake(model, 5, "second")
        inputs = {name: value for name, value in tiny_inputs(model.get_base_model()).items() if name != "labels"}
        search = dict(num_beams=3, max_new_tokens=4, min_new_tokens=4)
        mixed = model.generate(**inputs, adapter_names=["second", "default"], **search)
        for row, name in enumerate(["second", "default"]):
            model.set_adapter(name)
            assert torch.equal(model.generate(**inputs, **search)[row], mixed[row])

    def test_unknown_adapter_names_a_wrong_number_of_them_and_training_are_refused(self):
        model, inputs = two_adapters(), tiny_inputs(tiny_model("llama"))
        with pytest.raises(ValueError, match="non-existing adapter.*third"):
            model(**inputs, adapter_names=["third", "default"])
        with pytest.raises(ValueError, match="number of inputs, but got 3 and 2"):
            model(**inputs, adapter_names=["default"] * 3)
        with pytest.raises(ValueError, match="training mode"):
            model.train()(**inputs, adapter_names=["default"] * 2)
