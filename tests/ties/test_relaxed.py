"""Relaxed tie groups: exact at the start, kept through a model's life, read by stock, hardened and untied."""

import copy
import json
import pickle

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from hf_tying import (
    TyingConfig,
    assert_tied,
    gap,
    harden,
    relaxation_penalty,
    tie,
    untie,
)
from tests.tiny import logits, tiny_inputs

from .relaxed_models import GROUPS, each_group, each_kind, relaxed, trained, untouched


@each_kind
@each_group
class TestALife:
    def test_it_starts_where_the_exact_tie_is(self, place, relax):
        exact = tie(untouched(place), {"group": GROUPS[place]}, init_from=GROUPS[place][0])
        model = relaxed(place, relax)
        assert torch.equal(logits(model), logits(exact))
        assert set(gap(model)["group"].values()) == {0.0} and relaxation_penalty(model) == 0

    def test_the_first_gradient_of_the_root_is_that_of_the_exact_tie(self, place, relax):
        exact = tie(untouched(place), {"group": GROUPS[place]}, init_from=GROUPS[place][0])
        model = relaxed(place, relax)
        for each in (exact, model):
            each(**tiny_inputs(each)).loss.backward()
        root = GROUPS[place][0]
        torch.testing.assert_close(model.get_parameter(root).grad, exact.get_parameter(root).grad)

    def test_every_copy_computes_the_same(self, place, relax):
        model = trained(place, relax)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), copy.deepcopy(model).double().float()):
            assert_tied(other)
            assert torch.equal(logits(other), logits(model)) and gap(other) == gap(model)

    def test_a_file_gives_it_back(self, place, relax, tmp_path):
        model = trained(place, relax)
        model.save_pretrained(tmp_path)
        loaded = type(model).from_pretrained(tmp_path)
        assert_tied(loaded)
        assert torch.equal(logits(loaded), logits(model)) and gap(loaded) == gap(model)
        assert loaded.config.tying == model.config.tying
        with torch.no_grad():
            for parameter in loaded.parameters():
                parameter.add_(1)
        loaded.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False)
        assert_tied(loaded)
        assert torch.equal(logits(loaded), logits(model))

    def test_stock_reads_the_same_function(self, place, relax, tmp_path):
        model = trained(place, relax)
        model.save_pretrained(tmp_path)
        file = tmp_path / "config.json"
        config = json.loads(file.read_text())
        del config["tying"]  # the hook does nothing for a config without it
        file.write_text(json.dumps(config))
        stock = type(untouched(place)).from_pretrained(tmp_path)
        torch.testing.assert_close(logits(stock), logits(model), atol=1e-6, rtol=1e-5)

    def test_state_dicts_go_both_ways(self, place, relax):
        model, other = trained(place, relax), relaxed(place, relax)
        other.load_state_dict(model.state_dict())
        assert torch.equal(logits(other), logits(model))
        other = relaxed(place, relax)
        other.load_state_dict(model.state_dict(), assign=True)
        assert_tied(other)
        assert torch.equal(logits(other), logits(model))

    def test_untied_it_computes_the_same(self, place, relax):
        model = trained(place, relax)
        before, names = logits(model), list(gap(model)["group"])
        untie(model, names)
        assert_tied(model)
        torch.testing.assert_close(logits(model), before, atol=1e-6, rtol=1e-5)
        assert not gap(model) and not any("relaxation" in name for name in model.state_dict())
        assert "relax" not in json.dumps(model.config.tying)

    def test_hardened_it_is_the_exact_tie_of_its_root(self, place, relax):
        model = trained(place, relax)
        exact = tie(untouched(place), {"group": GROUPS[place]}, init_from=GROUPS[place][0])
        exact.load_state_dict(model.state_dict(), strict=False)
        assert harden(model) is model
        assert_tied(model)
        assert torch.equal(logits(model), logits(exact))
        assert model.config.tying["version"] == 1 and model.config.tying["groups"] == exact.config.tying["groups"]
        assert getattr(model.config, "tie_word_embeddings", None) == getattr(exact.config, "tie_word_embeddings", None)


@each_kind
@pytest.mark.parametrize("place", ["llama", "gpt2", "bert"])
def test_a_resize_keeps_the_difference_of_each_word(place, relax):
    model = trained(place, relax)
    before, distance = logits(model), gap(model)
    rows = before.shape[-1]
    for size in (rows + 6, rows):
        model.resize_token_embeddings(size)
        assert_tied(model)
        assert logits(model).shape[-1] == size
        if "bound" not in relax:  # a bound is a share of a norm, which has other rows now
            torch.testing.assert_close(logits(model)[..., :rows], before, atol=1e-6, rtol=1e-5)
    assert gap(model)["group"] == pytest.approx(distance["group"], rel=1e-4)


@each_kind
def test_the_flag_says_untied_and_the_file_has_whole_values(relax, tmp_path):
    model = trained("llama", relax)
    assert model.config.tie_word_embeddings is False
    assert model.config.tying["version"] == 2 and model.config.tying["save_format"] == "portable"
    model.save_pretrained(tmp_path)
    file = load_file(tmp_path / "model.safetensors")
    assert torch.equal(file["lm_head.weight"], model.lm_head.weight)
    assert torch.equal(file["model.embed_tokens.weight"], model.get_parameter("model.embed_tokens.weight"))


def test_dedup_has_the_root_and_the_differences_alone(tmp_path):
    names = GROUPS["llama"]
    declared = TyingConfig(groups={"group": {"names": names, "relax": {"kind": "scale"}}}, save_format="dedup")
    model = tie(untouched("llama"), declared, init_from=names[0])
    model.get_parameter("lm_head.weight_relaxation.offset").data.fill_(0.5)
    model.save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded), logits(model))
