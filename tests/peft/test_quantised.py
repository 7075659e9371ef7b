"""Tied-LoRA on quantised base models, by PEFT's own dispatch; each backend where it is installed."""

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

from ..tied_lora import outputs, tied_lora
from ..tiny import tiny_inputs, tiny_model


def quantised(backend: str, folder):
    if backend == "torchao":
        quantization = pytest.importorskip("torchao.quantization", reason="pip install torchao")
        config = TorchAoConfig(quantization.Int8WeightOnlyConfig())
    else:
        pytest.importorskip("bitsandbytes", reason="pip install bitsandbytes")
        config = BitsAndBytesConfig(load_in_8bit=backend == "bnb 8bit", load_in_4bit=backend == "bnb 4bit")
    wide = dict(hidden_size=64, intermediate_size=128)  # the backends quantise in blocks
    tiny_model("llama", **wide).save_pretrained(folder)
    return lambda: AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, device_map="cpu")


@pytest.mark.parametrize("backend", ["torchao", "bnb 8bit", "bnb 4bit"])
def test_an_adapter_on_a_quantised_model_is_trained_saved_loaded_and_merged(tmp_path, backend):
    load = quantised(backend, tmp_path / "base")
    model = tied_lora(load())
    assert model.get_model_status().quantization_backend == backend
    plain, expected = outputs(load()), outputs(model)
    model.save_pretrained(tmp_path / "adapter")
    assert torch.equal(outputs(PeftModel.from_pretrained(load(), tmp_path / "adapter").eval()), expected)
    if backend != "bnb 4bit":  # whose CPU kernels have no gradient, for LoRA neither
        model.train()(**tiny_inputs(model.get_base_model())).loss.backward()
        assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)
        model.eval()
    # What is merged is quantised again, and then only near.
    merged = outputs(model.merge_and_unload())
    assert (merged - expected).norm() < (plain - expected).norm() * (0.8 if backend == "bnb 4bit" else 0.15)
