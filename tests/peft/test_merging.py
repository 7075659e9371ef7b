"""Tied-LoRA adapters are merged into the base weights, beside ties and never into one."""

import pytest
import torch
from peft import get_peft_model

from hf_tying import assert_tied, tie
from hf_tying.peft import TiedLoraConfig

from ..tied_lora import layers_of, outputs, tied_lora
from ..tiny import tiny_inputs, tiny_model

ARCHS = ["llama", "gpt2", "bert", "t5", "marian"]


class TestMerging:
    @pytest.mark.parametrize("arch", ARCHS)
    @pytest.mark.parametrize("safe_merge", [False, True])
    def test_a_merged_model_is_a_base_model_with_the_same_logits(self, arch, safe_merge):
        model = tied_lora(tiny_model(arch), alpha=6)
        expected = outputs(model)
        merged = model.merge_and_unload(safe_merge=safe_merge)
        assert torch.allclose(outputs(merged), expected, atol=1e-5)
        assert {name for name, _ in merged.named_parameters()} == {
            name for name, _ in tiny_model(arch).named_parameters()
        }
        assert not hasattr(merged, "peft_config")

    def test_unmerging_gives_the_base_weights_back(self, model):
        expected = outputs(model)
        weight = layers_of(model)["model.layers.0.self_attn.q_proj"].get_base_layer().weight
        before = weight.clone()
        model.merge_adapter()
        assert not torch.allclose(weight, before, atol=1e-3) and torch.allclose(outputs(model), expected, atol=1e-5)
        model.unmerge_adapter()
        assert torch.allclose(weight, before, atol=1e-6) and torch.allclose(outputs(model), expected, atol=1e-5)

    def test_a_safe_merge_of_a_broken_adapter_changes_nothing(self, model):
        layer = layers_of(model)["model.layers.0.self_attn.q_proj"]
        before = layer.get_base_layer().weight.clone()
        layer.tied_lora_v["default"].weight.data[3] = torch.inf
        with pytest.raises(ValueError, match="NaNs detected"):
            layer.merge(safe_merge=True)
        assert torch.equal(layer.get_base_layer().weight, before) and not layer.merged

    def test_an_embedding_is_merged_and_its_padding_row_stays(self):
        base = tiny_model("llama", tie_word_embeddings=False)
        pad = base.model.embed_tokens.weight[0].clone()
        config = TiedLoraConfig(r=4, target_modules=["embed_tokens", "lm_head"])
        model = get_peft_model(base, config)
        inputs = tiny_inputs(base)
        inputs["input_ids"][:, 0] = base.config.pad_token_id
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1)
        for _ in range(3):
            optimizer.zero_grad()
            model.train()(**inputs).loss.backward()
            optimizer.step()
        expected = outputs(model.eval())
        merged = model.merge_and_unload()
        assert torch.allclose(outputs(merged), expected, atol=1e-5)
        assert torch.equal(merged.model.embed_tokens.weight[0], pad)

    @pytest.mark.parametrize("targets", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]])
    @pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings")
    def test_a_merge_over_a_tie_of_the_base_model_is_refused_and_changes_nothing(self, targets):
        model = tied_lora(tiny_model("llama", tie_word_embeddings=True), target_modules=targets)
        expected = outputs(model)
        for merge in (model.merge_adapter, model.merge_and_unload):
            with pytest.raises(ValueError, match="Cannot merge.*untie first"):
                merge()
        assert torch.equal(outputs(model), expected)

    def test_a_merge_beside_a_tie_of_the_base_model_keeps_the_tie(self):
        model = tied_lora(tie(tiny_model("llama", tie_word_embeddings=False), "two_way", init_from="target"))
        expected = outputs(model)
        merged = model.merge_and_unload()
        assert_tied(merged)
        assert torch.allclose(outputs(merged), expected, atol=1e-5)
