"""From Trainer to the stock reader: Tied-LoRA trains on tied models of four families, and its export is the same."""

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from transformers import Trainer, TrainingArguments

from hf_tying.peft import TiedLoraConfig, export_to_lora

from ..processes import run_python
from ..tied_lora import QKV, outputs
from ..tiny import shared_names, tiny_inputs, tiny_model

FAMILIES = ["llama", "gpt2", "bert", "marian"]


def tied_model(arch):
    return tiny_model(arch, tie_word_embeddings=True)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Each family, trained by Trainer: its folder, and its logits."""
    found = {}
    for arch in FAMILIES:
        folder = tmp_path_factory.mktemp(arch)
        base = tied_model(arch)
        inputs = tiny_inputs(base, batch=8)
        rows = [{name: value[row].tolist() for name, value in inputs.items()} for row in range(8)]
        model = get_peft_model(base, TiedLoraConfig(r=4, target_modules=QKV[arch]))
        arguments = TrainingArguments(
            folder / "run", max_steps=6, per_device_train_batch_size=4, learning_rate=0.03, use_cpu=True, report_to=[],
            disable_tqdm=True, save_strategy="no",
        )  # fmt: skip
        trainer = Trainer(model, arguments, train_dataset=Dataset.from_list(rows))
        trainer.train()
        trainer.save_model(folder / "tied")
        export_to_lora(model.eval(), folder / "lora")
        found[arch] = folder, model, outputs(model)
    return found


@pytest.fixture(scope="module")
def stock(trained, tmp_path_factory):
    """The logits of the exports in a process that has PEFT and not this package."""
    script = (
        "import sys, torch\n"
        "from peft import PeftModel\n"
        "from tests.tiny import logits, tiny_model\n"
        "found = {}\n"
        "for arch, folder in zip(sys.argv[2::2], sys.argv[3::2]):\n"
        "    model = PeftModel.from_pretrained(tiny_model(arch, tie_word_embeddings=True), folder)\n"
        "    found[arch] = logits(model.base_model.model)\n"
        "assert not any(name.partition('.')[0] == 'hf_tying' for name in sys.modules)\n"
        "torch.save(found, sys.argv[1])\n"
    )
    out = tmp_path_factory.mktemp("stock") / "logits"
    folders = [str(part) for arch in FAMILIES for part in (arch, trained[arch][0] / "lora")]
    run_python("-c", script, out, *folders)
    return torch.load(out)


@pytest.mark.parametrize("arch", FAMILIES)
class TestATiedModel:
    def test_a_tied_model_is_trained_and_its_tie_stays(self, trained, arch):
        _, model, logits = trained[arch]
        assert not torch.allclose(logits, outputs(tied_model(arch)), atol=1e-3)
        assert shared_names(model.get_base_model()) == shared_names(tied_model(arch)) != []

    def test_a_tied_model_gets_its_adapter_back(self, trained, arch):
        folder, _, logits = trained[arch]
        loaded = PeftModel.from_pretrained(tied_model(arch), folder / "tied").eval()
        assert torch.equal(outputs(loaded), logits)

    def test_a_tied_model_is_merged_with_the_same_logits(self, trained, arch):
        folder, _, logits = trained[arch]
        merged = PeftModel.from_pretrained(tied_model(arch), folder / "tied").merge_and_unload(safe_merge=True)
        assert torch.allclose(outputs(merged), logits, atol=1e-5)
        assert shared_names(merged) == shared_names(tied_model(arch))

    def test_a_tied_model_has_the_same_logits_with_the_export_in_stock_peft(self, trained, stock, arch):
        assert torch.allclose(stock[arch], trained[arch][2], atol=1e-6)
