"""Relaxed groups that cannot be are refused, with the way out."""

import pytest
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from hf_tying import (
    TyingConfig,
    TyingError,
    gap,
    harden,
    tie,
    untie,
)

from .relaxed_models import GROUPS, KINDS, relaxed, trained, untouched


class TestRefusals:
    def test_a_file_without_the_root(self, tmp_path):
        trained("llama", KINDS["lora"]).save_pretrained(tmp_path)
        tensors = load_file(tmp_path / "model.safetensors")
        del tensors["model.embed_tokens.weight"]
        save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(TyingError, match="its root 'model.embed_tokens.weight' is not there"):
            AutoModelForCausalLM.from_pretrained(tmp_path)
        with pytest.raises(TyingError, match="is not there"):
            relaxed("llama", KINDS["lora"]).load_state_dict(tensors, strict=False)

    def test_another_relaxation_of_the_same_name_and_its_ways_out(self):
        model = relaxed("llama", KINDS["scale"])
        other = {"group": {"names": GROUPS["llama"], "relax": KINDS["lora"]}}
        with pytest.raises(TyingError, match="Call harden"):
            tie(model, other)
        assert gap(tie(harden(model), other)) == {"group": {"lm_head.weight": 0.0}}

    def test_another_head(self):
        model = relaxed("llama", KINDS["scale"])
        with pytest.raises(TyingError, match="is relaxed"):
            model.set_output_embeddings(nn.Linear(16, 64, bias=False))
        untie(model).set_output_embeddings(nn.Linear(16, 64, bias=False))

    def test_a_low_rank_of_a_vector(self):
        names = ["model.layers.0.input_layernorm.weight", "model.layers.1.input_layernorm.weight"]
        with pytest.raises(TyingError, match="Use the kind 'scale'"):
            tie(untouched("llama"), {"norms": {"names": names, "relax": {"kind": "lora"}}}, init_from=names[0])
        tie(untouched("llama"), {"norms": {"names": names, "relax": {"kind": "scale"}}}, init_from=names[0])

    @pytest.mark.parametrize(
        "value",
        [
            {"kind": "other"}, {"kind": ["scale"]}, {}, 3, {"kind": "lora", "rank": 0},
            {"kind": "lora", "rank": 10**9},
            {"kind": "lora", "rank": True}, {"kind": "scale", "rank": 2}, {"kind": "scale", "bound": float("nan")},
            {"kind": "scale", "bound": -1}, {"kind": "lora", "init": "other"}, {"kind": "basis", "filters": 1.5},
        ],
        ids=str,
    )  # fmt: skip
    def test_settings(self, value):
        with pytest.raises(TyingError, match="expected"):
            TyingConfig(groups={"group": {"names": ["a", "b"], "relax": value}})

    def test_other_keys_of_a_group(self):
        with pytest.raises(TyingError, match='parameter names, or a dict {"names"'):
            TyingConfig(groups={"group": {"names": ["a", "b"], "relaxed": {"kind": "scale"}}})

    def test_an_older_version_says_so(self):
        entry = TyingConfig(groups={"group": {"names": ["a", "b"], "relax": {"kind": "scale"}}}).to_dict()
        assert entry["version"] == 2 and TyingConfig.from_dict(entry).to_dict() == entry
        with pytest.raises(TyingError, match="reads up to version 2"):
            TyingConfig.from_dict({**entry, "version": 3})
