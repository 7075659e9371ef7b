"""Adapters of PEFT train under `use_tied_loss` as without it, whichever of the two is put on first."""

import copy

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model

from hf_tying import TyingError, use_tied_loss
from hf_tying.losses import contrastive_weight_tying_loss

from ..tied_lora import QKV, tied_lora
from ..tiny import VOCAB, tiny_model, without_dropout
from .helpers import BY_BLOCKS, CWT, Seen, assert_same_step, batch, gradients, pair, step


def adapted(model, config):
    """With adapters that are not zero."""
    torch.manual_seed(4)
    peft_model = get_peft_model(model, config)
    with torch.no_grad():
        for parameter in peft_model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return without_dropout(peft_model)


BEFORE_AND_AFTER = pytest.mark.parametrize("when", ["before", "after"])


def adapted_pair(when: str, config, arch="gpt2"):
    """The stock model under an adapter, and the same with the tied loss put on before or after the adapter."""
    base = tiny_model(arch)
    stock = adapted(copy.deepcopy(base), config)
    if when == "before":
        return stock, adapted(use_tied_loss(base), config)
    return stock, use_tied_loss(adapted(base, config))


@BEFORE_AND_AFTER
@pytest.mark.parametrize("arch", ["gpt2", "t5", "bert"])
def test_lora_on_attention_trains_by_blocks(arch, when, seen):
    stock, tied = adapted_pair(when, LoraConfig(r=2, target_modules=QKV[arch]), arch)
    assert assert_same_step(tied, stock, batch(stock.base_model.model)).logits is None
    assert seen.taken() == BY_BLOCKS
    trained = [n for n, g in gradients(tied).items() if g is not None]
    assert trained and all("lora_" in name for name in trained)


@BEFORE_AND_AFTER
def test_lora_on_the_input_embedding_trains_by_blocks(when, seen):
    stock, tied = adapted_pair(when, LoraConfig(r=2, target_modules=["wte"]))
    assert assert_same_step(tied, stock, batch(stock.base_model.model)).logits is None
    assert seen.taken() == BY_BLOCKS


@BEFORE_AND_AFTER
def test_lora_on_the_head_trains_as_on_the_stock_model_and_the_log_tells_once(when, seen, told):
    stock, tied = adapted_pair(when, LoraConfig(r=2, target_modules=["c_attn", "lm_head"]))
    for _ in range(3):
        outputs = assert_same_step(tied, stock, batch(stock.base_model.model))
    assert outputs.logits.shape == (2, 7, VOCAB)
    assert seen.taken() == Seen(0, ["a sum"] * 3)
    assert len([m for m in told if "needed whole (a sum)" in m]) == 1


@BEFORE_AND_AFTER
def test_a_trained_copy_of_the_head_trains_by_blocks(when, seen):
    config = LoraConfig(r=2, target_modules=["c_attn"], modules_to_save=["lm_head"])
    stock, tied = adapted_pair(when, config)
    assert assert_same_step(tied, stock, batch(stock.base_model.model)).logits is None
    assert seen.taken() == BY_BLOCKS
    assert any("modules_to_save" in name for name, g in gradients(tied).items() if g is not None)


@BEFORE_AND_AFTER
def test_prompt_tuning_trains_by_blocks(when, seen):
    stock, tied = adapted_pair(when, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    assert assert_same_step(tied, stock, batch(stock.base_model)).logits is None
    assert seen.taken() == BY_BLOCKS
    assert [n for n, g in gradients(tied).items() if g is not None] == ["prompt_encoder.default.embedding.weight"]


@BEFORE_AND_AFTER
def test_tied_lora_trains_by_blocks(when, seen):
    base = tiny_model("llama")
    stock = without_dropout(tied_lora(copy.deepcopy(base)))
    if when == "before":
        tied = without_dropout(tied_lora(use_tied_loss(base)))
    else:
        tied = use_tied_loss(without_dropout(tied_lora(base)))
    assert assert_same_step(tied, stock, batch(base)).logits is None
    assert seen.taken() == BY_BLOCKS


def test_an_adapter_that_is_taken_off_the_head_gives_the_blocks_back(seen):
    stock, tied = pair(tiny_model("gpt2"))
    peft_model = adapted(tied, LoraConfig(r=2, target_modules=["lm_head"]))
    step(peft_model, batch(stock))
    assert seen.taken().blocks == 0
    base = peft_model.unload().requires_grad_()
    assert assert_same_step(base, stock, batch(stock)).logits is None
    assert seen.taken() == BY_BLOCKS


def contrastive_step(model, embedding):
    """The contrastive loss of a step, and that of its hidden states and of the rows of `embedding`."""
    inputs = batch(model)
    hidden = model.transformer(inputs["input_ids"], attention_mask=inputs["attention_mask"]).last_hidden_state
    expected = contrastive_weight_tying_loss(hidden[:, :-1], embedding(torch.arange(VOCAB)), inputs["labels"][:, 1:])
    return model(**inputs).loss, expected


@BEFORE_AND_AFTER
@pytest.mark.parametrize("tied", [True, False])
def test_an_objective_reads_the_embedding_that_is_trained(when, tied):
    base = tiny_model("gpt2", tie_word_embeddings=tied)
    config = LoraConfig(r=2, target_modules=["c_attn"], modules_to_save=["wte"])
    if when == "before":
        model = adapted(use_tied_loss(base, objective=CWT), config)
    else:
        model = use_tied_loss(adapted(base, config), objective=CWT)
    found, expected = contrastive_step(base, base.transformer.wte)
    assert torch.allclose(found, expected, rtol=0, atol=1e-5)
    found.backward()
    assert base.transformer.wte.modules_to_save["default"].weight.grad.any()
    with model.disable_adapter():
        found, expected = contrastive_step(base, base.transformer.wte.original_module)
    assert torch.allclose(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "config", [{"target_modules": ["wte"]}, {"target_modules": ["c_attn"], "trainable_token_indices": [3, 4]}]
)
def test_an_objective_is_refused_beside_an_adapter_of_the_embedding_until_it_is_merged(config):
    base = tiny_model("gpt2", tie_word_embeddings=False)
    model = use_tied_loss(adapted(base, LoraConfig(r=2, **config)), objective=CWT)
    with pytest.raises(TyingError, match=r"adapter \((Embedding|TrainableTokensLayer)\) is on 'transformer.wte"):
        model(**batch(base))
    model.merge_adapter()
    found, expected = contrastive_step(base, base.transformer.wte)
    assert torch.allclose(found, expected, rtol=0, atol=1e-5)
