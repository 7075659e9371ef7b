"""A published adapter has two forms: LoRA in the root for everybody, Tied-LoRA beside it for users of this package."""

import inspect
import json
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftModel, get_peft_model

from hf_tying.peft import TiedLoraConfig

from ..processes import run_python
from ..tied_lora import outputs, shake, tied_lora
from ..tiny import tiny_model

FORMS = [
    "README.md",
    "adapter_config.json",
    "adapter_model.safetensors",
    "tied_lora/adapter_config.json",
    "tied_lora/adapter_model.safetensors",
]


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in Path(folder).rglob("*") if path.is_file())


def kind(folder):
    return json.loads((Path(folder) / "adapter_config.json").read_text())["peft_type"]


@pytest.fixture
def model():
    return tied_lora(tiny_model("llama"), task_type="CAUSAL_LM")


class TestSaving:
    def test_saving_writes_the_tied_form_alone_by_default(self, model, tmp_path):
        model.save_pretrained(tmp_path)
        assert files(tmp_path) == FORMS[:3]
        assert kind(tmp_path) == "TIED_LORA"

    def test_saving_writes_both_forms_when_asked(self, model, tmp_path, caplog):
        model.save_pretrained(tmp_path / "out", also_lora=True)
        assert "renewed" not in caplog.text
        assert files(tmp_path) == [f"out/{name}" for name in FORMS]
        assert (kind(tmp_path / "out"), kind(tmp_path / "out" / "tied_lora")) == ("LORA", "TIED_LORA")
        for subfolder, type_of_config in ((None, LoraConfig), ("tied_lora", TiedLoraConfig)):
            loaded = PeftModel.from_pretrained(tiny_model("llama"), tmp_path / "out", subfolder=subfolder).eval()
            assert type(loaded.peft_config["default"]) is type_of_config
            assert torch.allclose(outputs(loaded), outputs(model), atol=1e-6)

    def test_saving_writes_each_of_several_adapters_where_peft_does(self, model, tmp_path):
        model.add_adapter("second", TiedLoraConfig(r=2, target_modules=["o_proj"]))
        shake(model, 2, "second")
        model.save_pretrained(tmp_path, True, None, also_lora=True)
        assert files(tmp_path) == sorted(FORMS + [f"second/{name}" for name in FORMS[1:]])
        model.set_adapter("second")
        loaded = PeftModel.from_pretrained(tiny_model("llama"), tmp_path, subfolder="second/tied_lora").eval()
        assert torch.allclose(outputs(loaded), outputs(model), atol=1e-6)
        model.save_pretrained(tmp_path / "one", selected_adapters=["second"], also_lora=True)
        assert files(tmp_path / "one") == ["README.md"] + [f"second/{name}" for name in FORMS[1:]]

    def test_an_adapter_with_the_name_of_the_subfolder_is_refused(self, model, tmp_path):
        model.add_adapter("tied_lora", TiedLoraConfig(r=2, target_modules=["o_proj"]))
        with pytest.raises(ValueError, match="cannot be named 'tied_lora'"):
            model.save_pretrained(tmp_path / "out", also_lora=True)
        assert files(tmp_path) == []

    def test_an_error_while_saving_leaves_the_folder_as_it_was(self, model, tmp_path, monkeypatch):
        model.save_pretrained(tmp_path / "out", also_lora=True)
        before = {name: (tmp_path / name).read_bytes() for name in files(tmp_path)}
        shake(model, 5)

        def fails(*args, **kwargs):
            raise OSError("disk full")

        monkeypatch.setattr(LoraConfig, "save_pretrained", fails)
        with pytest.raises(OSError, match="disk full"):
            model.save_pretrained(tmp_path / "out", also_lora=True)
        assert {name: (tmp_path / name).read_bytes() for name in files(tmp_path)} == before

    def test_only_the_main_process_writes(self, model, tmp_path):
        model.save_pretrained(tmp_path / "out", also_lora=True, is_main_process=False)
        assert files(tmp_path) == []

    def test_other_adapters_are_saved_as_ever(self, tmp_path):
        lora = get_peft_model(tiny_model("llama"), LoraConfig(target_modules=["q_proj"]))
        lora.save_pretrained(tmp_path)
        assert files(tmp_path) == FORMS[:3]

    def test_the_wrapped_methods_have_the_signatures_of_peft(self):
        for name in ("save_pretrained", "push_to_hub"):
            method = getattr(PeftModel, name)
            assert inspect.signature(method) == inspect.signature(method.__wrapped__)


class TestTheCard:
    def test_the_card_says_how_each_form_is_loaded_and_what_is_tied(self, model, tmp_path):
        model.save_pretrained(tmp_path / "mine", also_lora=True)
        card = ModelCard((tmp_path / "mine" / "README.md").read_text())
        assert '`PeftModel.from_pretrained(base, "mine")`' in card.text
        assert '`PeftModel.from_pretrained(base, "mine", subfolder="tied_lora")`' in card.text
        assert "TL6, r = 4; 6 modules use 1 A, 3 B, 2 u, 6 v." in card.text
        assert {"lora", "tied-lora"} <= set(card.data.tags)
        assert card.data.library_name == "peft" and card.data.pipeline_tag == "text-generation"

    def test_a_card_is_kept_and_its_section_is_written_anew(self, model, tmp_path):
        model.save_pretrained(tmp_path, also_lora=True)
        card = tmp_path / "README.md"
        card.write_text(card.read_text() + "\n## What I found\n\nIt works.\n")
        model.save_pretrained(tmp_path, also_lora=True)
        text = card.read_text()
        assert text.count("## Two forms of one adapter") == 1 and "It works." in text

    def test_the_card_of_tl5_says_that_u_and_v_are_1(self, tmp_path):
        model = tied_lora(tiny_model("llama"), variant="TL5")
        model.save_pretrained(tmp_path, also_lora=True)
        assert "TL5, r = 4; 6 modules use 1 A, 3 B (u = v = 1)." in (tmp_path / "README.md").read_text()


@pytest.mark.slow
def test_the_module_is_imported_before_peft_as_well_as_after_it():
    run_python("-c", "import hf_tying.hub.adapters, peft; assert peft.PeftModel.push_to_hub.__wrapped__")
