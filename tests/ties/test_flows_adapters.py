"""f13, f20: a PEFT adapter over a tie is merged once and right, or refused; it never corrupts the other side."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from hf_tying import TyingError, assert_tied, tie, untie
from hf_tying.peft import TiedLoraConfig

from ..forms import matrix, tied_model
from ..native_adapters import needs_native_adapters
from ..tiny import logits, tiny_inputs, tiny_model

MLP = ["transformer.h.0.mlp.c_fc.weight", "transformer.h.1.mlp.c_fc.weight"]


def adapted(model, **config):
    """`model` under a LoRA adapter that has been trained a little, so that its delta is not zero."""
    peft_model = get_peft_model(model, LoraConfig(r=2, **config))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return peft_model.eval()


def outputs(model):
    with torch.no_grad():
        return model(input_ids=torch.arange(8)[None]).logits


@pytest.mark.parametrize("targets", [["lm_head"], ["wte"]])
@pytest.mark.parametrize("merge", ["merge_and_unload", "merge_adapter"])
def test_merging_an_adapter_on_one_side_is_refused_and_changes_nothing(model, targets, merge):
    peft_model = adapted(model, target_modules=targets)
    before = outputs(peft_model)
    with pytest.raises(TyingError, match="Cannot merge.*the merged delta would change every use of it"):
        getattr(peft_model, merge)()
    assert torch.equal(outputs(peft_model), before)
    assert_tied(peft_model)


def test_merging_different_adapters_on_both_sides_is_refused(model):
    peft_model = adapted(model, target_modules=["lm_head", "wte"])
    with pytest.raises(TyingError, match="has a different one"):
        peft_model.merge_and_unload()


def test_an_adapter_on_the_head_merges_over_the_untied_base(model):
    peft_model = adapted(model, target_modules=["lm_head"])
    expected = outputs(peft_model)
    adapter = {name: p for name, p in peft_model.state_dict().items() if "lora_" in name}
    base = untie(peft_model.unload())
    again = get_peft_model(base, LoraConfig(r=2, target_modules=["lm_head"])).eval()
    again.load_state_dict(adapter, strict=False)
    merged = again.merge_and_unload()
    assert torch.allclose(outputs(merged), expected, atol=1e-5)
    assert_tied(merged)


class TestEnsureWeightTying:
    """LoRA's own tied adapters: one delta for both sides, which PEFT writes twice into the one matrix."""

    @pytest.fixture
    def peft_model(self, form):
        # PEFT knows embeddings by the name `embed_tokens`
        return adapted(tied_model(form, "llama"), target_modules=["embed_tokens"], ensure_weight_tying=True)

    def test_merging_a_lora_on_both_sides_counts_its_delta_once_and_leaves_one_parameter(self, peft_model):
        expected = outputs(peft_model)
        merged = peft_model.merge_and_unload()
        assert torch.allclose(outputs(merged), expected, atol=1e-5)
        assert_tied(merged)
        assert matrix(merged, "target") is matrix(merged, "output")

    def test_merging_and_unmerging_a_lora_on_both_sides_comes_back_to_the_start(self, peft_model):
        expected, base = outputs(peft_model), matrix(peft_model.base_model.model, "target").detach().clone()
        peft_model.merge_adapter()
        assert torch.allclose(outputs(peft_model), expected, atol=1e-5)
        peft_model.unmerge_adapter()
        assert torch.allclose(matrix(peft_model.base_model.model, "target"), base, atol=1e-6)
        assert_tied(peft_model)


def test_adapters_on_two_tied_layers_are_not_merged_into_one_matrix(form):
    model = tied_model(form, spec={"mlp": MLP}, init_from=MLP[0])
    peft_model = adapted(model, target_modules=["c_fc"])
    before = outputs(peft_model)
    with pytest.raises(TyingError, match="group 'mlp'"):
        peft_model.merge_and_unload()
    assert torch.equal(outputs(peft_model), before)


def test_adapters_elsewhere_merge_as_always(model):
    peft_model = adapted(model, target_modules=["c_attn"])
    expected = outputs(peft_model)
    merged = peft_model.merge_and_unload()
    assert torch.allclose(outputs(merged), expected, atol=1e-5)
    assert_tied(merged)


def test_a_stock_model_that_this_package_does_not_hold_merges_as_without_it():
    stock = tiny_model("gpt2", tie_word_embeddings=False)
    peft_model = adapted(stock, target_modules=["lm_head"])
    expected = outputs(peft_model)
    assert torch.allclose(outputs(peft_model.merge_and_unload()), expected, atol=1e-5)


class TestModulesToSave:
    @pytest.mark.parametrize("name", ["lm_head", "wte"])
    def test_a_trained_copy_of_one_side_is_told_after_the_merge_and_settled_by_untie(self, model, name, tmp_path):
        peft_model = get_peft_model(model, LoraConfig(r=2, target_modules=["c_attn"], modules_to_save=[name])).eval()
        copy = next(p for n, p in peft_model.named_parameters() if "modules_to_save" in n)
        with torch.no_grad():
            copy.add_(0.1)
        expected = outputs(peft_model)
        merged = peft_model.merge_and_unload()
        assert torch.allclose(outputs(merged), expected, atol=1e-5)
        with pytest.raises(TyingError, match="to keep both: untie"):
            merged.save_pretrained(tmp_path / "out")
        untie(merged).save_pretrained(tmp_path / "out")
        assert torch.allclose(outputs(merged), expected, atol=1e-5)

    def test_a_trained_copy_of_both_sides_is_merged_and_stays_tied(self, form):
        config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens"], ensure_weight_tying=True)
        peft_model = get_peft_model(tied_model(form, "llama"), config).eval()
        with torch.no_grad():
            next(p for n, p in peft_model.named_parameters() if "modules_to_save" in n).add_(0.1)
        expected = outputs(peft_model)
        merged = peft_model.merge_and_unload()
        assert torch.allclose(outputs(merged), expected, atol=1e-5)
        assert_tied(merged)


def test_trainable_tokens_leave_the_tie_alone(model):
    peft_model = get_peft_model(model, LoraConfig(r=2, target_modules=["c_attn"], trainable_token_indices=[3, 5]))
    assert_tied(peft_model.merge_and_unload())


def test_an_adapter_trains_saves_and_reloads_over_a_tied_base(model, tmp_path):
    peft_model = get_peft_model(model, LoraConfig(r=2, target_modules=["c_attn"])).train()
    optimizer = torch.optim.AdamW([p for p in peft_model.parameters() if p.requires_grad], lr=0.01)
    peft_model(**tiny_inputs(model)).loss.backward()
    optimizer.step()
    peft_model.save_pretrained(tmp_path)
    expected = outputs(peft_model.eval())
    base = peft_model.unload()
    assert_tied(base)
    assert torch.allclose(outputs(PeftModel.from_pretrained(base, tmp_path).eval()), expected, atol=1e-6)


@pytest.mark.parametrize("config", [LoraConfig, TiedLoraConfig])
def test_a_peft_that_transformers_finds_too_old_is_refused_as_on_a_stock_model(model, config, monkeypatch):
    monkeypatch.setattr("transformers.integrations.peft.MIN_PEFT_VERSION", "999")
    before, expected = model.state_dict().keys(), logits(model)
    for each in (tiny_model("gpt2"), model):
        with pytest.raises(ValueError, match="The version of PEFT.*999"):
            each.add_adapter(config(r=2, target_modules=["c_attn"]))
        assert not hasattr(each, "peft_config")
    assert model.state_dict().keys() == before and torch.equal(logits(model), expected)
    assert_tied(model)


@needs_native_adapters
def test_transformers_own_adapter_loading_works_on_a_tied_model(model, tmp_path):
    model.add_adapter(LoraConfig(r=2, target_modules=["c_attn"]), adapter_name="a")
    assert_tied(model)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    model.delete_adapter("a")
    model.load_adapter(tmp_path, adapter_name="b")
    assert torch.allclose(logits(model), expected, atol=1e-6)


@pytest.mark.parametrize("act", [lambda m: tie(m, "two_way"), untie], ids=["tie", "untie"])
def test_tie_and_untie_say_what_they_will_not_do_to_an_adapted_model(model, act):
    peft_model = adapted(model, target_modules=["c_attn"])
    for target in (peft_model, peft_model.base_model.model):
        with pytest.raises(TyingError, match="carries adapters.*before get_peft_model"):
            act(target)
