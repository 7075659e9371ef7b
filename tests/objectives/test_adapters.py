"""Adapters of PEFT train under `use_tied_loss` as without it, whichever of the two is put on first."""

import copy

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model

from hf_tying import use_tied_loss

from ..tied_lora import QKV, tied_lora
from ..tiny import VOCAB, tiny_model, without_dropout
from .helpers import BY_BLOCKS, Seen, assert_same_step, batch, gradients, pair, step


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
def test_a_trained_copy_of_the_head_trains_as_on_the_stock_model(when):
    config = LoraConfig(r=2, target_modules=["c_attn"], modules_to_save=["lm_head"])
    stock, tied = adapted_pair(when, config)
    assert_same_step(tied, stock, batch(stock.base_model.model))
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
