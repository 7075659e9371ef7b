"""`diagnose` finds each planted disease by its code, and none in healthy checkpoints of all families."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model

from hf_tying import TyingConfig, tie
from hf_tying.doctor import diagnose, inspect
from hf_tying.doctor.diagnosis import CODES
from hf_tying.peft import export_to_lora
from hf_tying.report.sources import Folder, ReadError

from ..tied_lora import tied_lora
from ..tiny import ALL, FULL_SCHEME, layer_pair, tiny_model, untied_model
from .planted import PLANTED

#: They need the class, which only `diagnose` builds where nothing looks odd; or values of the whole adapter.
THOROUGH_ALONE = {"dead_tensor_in_a_layer", "wrong_width", "forms_differ", "bart_tied_once", "source_and_target_once"}
# What `inspect` refuses with the reason, as a load would.
UNREADABLE = {"entry_with_a_layer_that_is_not_there", "entry_of_no_scheme"}


@pytest.mark.parametrize("code, plant", [pytest.param(c, p, id=f"{c}-{p.__name__}") for c, p in PLANTED])
def test_a_planted_disease_is_found_with_its_consequence_and_its_mend(code, plant, tmp_path):
    plant(tmp_path / "model")
    findings = diagnose(tmp_path / "model")
    found = {finding.code: finding for finding in findings}
    assert code in found, findings
    assert len(found[code].message) > 40 and found[code].mend
    if plant.__name__ not in THOROUGH_ALONE | UNREADABLE and not code == "T012":
        assert code in {finding.code for finding in inspect(tmp_path / "model").findings}


def test_every_code_is_planted():
    assert {code for code, _ in PLANTED} == set(CODES) and len(PLANTED) >= 30


def test_the_evidence_has_rows_the_largest_difference_and_the_cosine(tmp_path):
    from .planted import one_row

    one_row(tmp_path / "model")
    (finding,) = diagnose(tmp_path / "model")
    assert "1 of 64 rows differ, largest difference 1, cosine 0." in finding.message


HEALTHY = {
    **{f"{arch} tied": lambda arch=arch: tiny_model(arch, tie_word_embeddings=True) for arch in ALL},
    **{f"{arch} untied": lambda arch=arch: untied_model(arch) for arch in ALL if arch != "t5"},
    **{
        f"{arch} {form}": lambda arch=arch, form=form: tie(
            untied_model(arch), TyingConfig(scheme=FULL_SCHEME[arch], save_format=form), init_from="target"
        )
        for arch in ALL
        for form in ("dedup", "portable")
    },
    "none": lambda: tie(untied_model("llama"), "none"),
    "t5 none": lambda: tie(untied_model("t5"), "none"),
    "bart source_target": lambda: tie(untied_model("bart"), "source_target", init_from="target"),
    "bart none": lambda: tie(untied_model("bart"), "none"),
    "layers": lambda: tie(
        (model := untied_model("llama")), TyingConfig(groups={"layers": layer_pair(model)}), init_from="mean"
    ),
    "bfloat16": lambda: tiny_model("qwen3", dtype=torch.bfloat16, tie_word_embeddings=True),
    "default flag": lambda: tiny_model("llama"),
}


@pytest.mark.parametrize("name", HEALTHY)
def test_a_healthy_checkpoint_has_no_finding(name, tmp_path):
    HEALTHY[name]().save_pretrained(tmp_path)
    assert diagnose(tmp_path) == [] == inspect(tmp_path).findings


def test_the_healthy_ones_are_many():
    assert len(HEALTHY) >= 40


def test_healthy_adapters_have_no_finding(tmp_path):
    lora = get_peft_model(tiny_model("llama"), LoraConfig(r=2, target_modules=["q_proj"]))
    lora.peft_config["default"].base_model_name_or_path = "house/base"
    lora.save_pretrained(tmp_path / "lora")
    assert diagnose(tmp_path / "lora") == []
    adapted = tied_lora(tiny_model("llama"))
    adapted.peft_config["default"].base_model_name_or_path = "house/base"
    adapted.save_pretrained(tmp_path / "both" / "tied_lora")
    export_to_lora(tmp_path / "both" / "tied_lora", tmp_path / "both")
    assert diagnose(tmp_path / "both") == []


def test_a_place_that_cannot_be_read_any_more_is_no_disease(tmp_path, monkeypatch):
    """As when the network goes while values are compared."""
    tie(untied_model("llama"), TyingConfig("two_way", save_format="portable"), init_from="target").save_pretrained(
        tmp_path
    )

    def gone(*args):
        raise ReadError("the server does not answer")

    monkeypatch.setattr(Folder, "read", gone)
    for look in (diagnose, inspect):
        with pytest.raises(ReadError, match="does not answer"):
            look(tmp_path)


def test_shards_have_the_same_findings_as_one_file(tmp_path):
    from .planted import edit, too_many_layers, two_matrices

    two_matrices(tmp_path / "one")
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(tmp_path / "one").save_pretrained(tmp_path / "shards", max_shard_size="4KB")
    edit(tmp_path / "shards", **json.loads((tmp_path / "one" / "config.json").read_text()))
    assert (tmp_path / "shards" / "model.safetensors.index.json").exists()
    one, shards = ([f.message for f in diagnose(tmp_path / kind)] for kind in ("one", "shards"))
    assert one == shards and one
    too_many_layers(tmp_path / "layers")
    assert "T022" in {finding.code for finding in diagnose(tmp_path / "layers")}
