"""`export_to_lora` refuses what has no export with the cause and the way out, and leaves the folder as it was."""

import json
import os

import pytest
from peft import LoraConfig, get_peft_model

from hf_tying.peft import export_to_lora

from ..tied_lora import tied_lora
from ..tiny import tiny_model


def base():
    return tiny_model("llama", num_key_value_heads=1)


class TestRefused:
    @pytest.fixture
    def saved(self, tmp_path):
        tied_lora(base()).save_pretrained(tmp_path / "tied")
        return tmp_path / "tied"

    def test_a_lora_adapter_is_refused(self, tmp_path):
        model = get_peft_model(base(), LoraConfig(target_modules=["q_proj"]))
        model.save_pretrained(tmp_path / "lora")
        for source in (model, tmp_path / "lora"):
            with pytest.raises(ValueError, match="a LoRA adapter already"):
                export_to_lora(source, tmp_path / "out")
        assert os.listdir(tmp_path) == ["lora"]

    def test_an_adapter_of_another_type_is_refused(self, saved, tmp_path):
        config = json.loads((saved / "adapter_config.json").read_text())
        for kind, message in {
            "IA3": "of type IA3: expected TIED_LORA",
            "NEW": "'NEW', which is not a known type",
        }.items():
            (saved / "adapter_config.json").write_text(json.dumps(config | {"peft_type": kind}))
            with pytest.raises(ValueError, match=message):
                export_to_lora(saved, tmp_path / "out")

    def test_a_model_without_the_adapter_is_refused(self, tmp_path):
        with pytest.raises(ValueError, match="no adapter 'default'. It has none"):
            export_to_lora(base(), tmp_path / "out")
        with pytest.raises(ValueError, match="no adapter 'other'. It has 'default'"):
            export_to_lora(tied_lora(base()), tmp_path / "out", "other")

    @pytest.mark.parametrize("missing", ["adapter_config.json", "adapter_model.safetensors"])
    def test_a_missing_file_is_named(self, saved, tmp_path, missing):
        (saved / missing).unlink()
        with pytest.raises(ValueError, match=missing):
            export_to_lora(saved, tmp_path / "out")

    def test_a_broken_settings_file_is_refused(self, saved, tmp_path):
        (saved / "adapter_config.json").write_text("{")
        with pytest.raises(ValueError, match="cannot be read"):
            export_to_lora(saved, tmp_path / "out")

    def test_a_broken_file_is_refused(self, saved, tmp_path):
        weights = saved / "adapter_model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-9])
        with pytest.raises(ValueError, match="truncated or corrupted"):
            export_to_lora(saved, tmp_path / "out")

    @pytest.mark.parametrize("entry", [{"A": "a"}, ["a"], None])
    def test_settings_that_were_written_by_hand_are_refused(self, saved, tmp_path, entry):
        config = json.loads((saved / "adapter_config.json").read_text())
        config["adapted_modules"] = {"model.layers.0.self_attn.q_proj": entry}
        (saved / "adapter_config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match="not as they were saved"):
            export_to_lora(saved, tmp_path / "out")

    def test_tensors_that_are_not_those_of_the_settings_are_refused(self, saved, tmp_path):
        config = json.loads((saved / "adapter_config.json").read_text())
        config["adapted_modules"].popitem()
        (saved / "adapter_config.json").write_text(json.dumps(config))
        with pytest.raises(RuntimeError, match="rows for"):
            export_to_lora(saved, tmp_path / "out")
        assert not (tmp_path / "out").exists()

    def test_a_merged_adapter_is_refused_until_it_is_unmerged(self, tmp_path):
        model = tied_lora(base())
        model.merge_adapter()
        with pytest.raises(ValueError, match="unmerge_adapter"):
            export_to_lora(model, tmp_path / "out")
        model.unmerge_adapter()
        export_to_lora(model, tmp_path / "out")

    def test_the_folder_of_the_tied_form_is_refused_as_the_place_of_the_export(self, saved, tmp_path):
        before = {path.name: path.read_bytes() for path in saved.iterdir()}
        with pytest.raises(ValueError, match="which the export would replace"):
            export_to_lora(saved, saved)
        (tmp_path / "file").touch()
        with pytest.raises(ValueError, match="is a file"):
            export_to_lora(saved, tmp_path / "file")
        assert {path.name: path.read_bytes() for path in saved.iterdir()} == before

    def test_arguments_of_the_other_kind_of_source_are_refused(self, saved, tmp_path):
        with pytest.raises(ValueError, match="subfolder='mine'"):
            export_to_lora(saved, tmp_path / "out", adapter_name="mine")
        with pytest.raises(ValueError, match="only of a path"):
            export_to_lora(tied_lora(base()), tmp_path / "out", revision="main")
