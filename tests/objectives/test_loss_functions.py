"""Label smoothing and loss functions of the user are computed by blocks, or on the logits where they need them."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn import functional as F

from hf_tying import use_tied_loss

from ..tiny import VOCAB, tiny_inputs, tiny_model
from .helpers import BY_BLOCKS, Seen, assert_same_gradients, assert_same_step, batch, gpt2, gradients, pair, step

# --- label smoothing -------------------------------------------------------------------------------------------------


def test_label_smoothing_is_that_of_torch(seen):
    stock = gpt2()
    tied = use_tied_loss(copy.deepcopy(stock), label_smoothing=0.1)
    inputs = batch(stock)
    whole = stock(**{k: v for k, v in inputs.items() if k != "labels"}).logits
    expected = F.cross_entropy(whole[:, :-1].flatten(0, 1), inputs["labels"][:, 1:].flatten(), label_smoothing=0.1)
    expected.backward()
    found = step(tied, inputs).loss
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    assert abs(found.item() - stock(**inputs).loss.item()) > 1e-3
    assert_same_gradients(gradients(tied), gradients(stock))
    assert seen.taken() == BY_BLOCKS


def test_label_smoothing_is_of_training_steps_alone():
    stock = gpt2()
    tied = use_tied_loss(copy.deepcopy(stock), label_smoothing=0.5)
    for model in (stock, tied):
        model.eval()
    assert torch.equal(tied(**batch(tied)).loss, stock(**batch(stock)).loss)


def test_label_smoothing_holds_under_an_adapter_of_the_head_and_in_a_copy_of_it(seen):
    model = use_tied_loss(gpt2(), label_smoothing=0.1)
    inputs = batch(model)
    by_blocks = step(model, inputs).loss
    assert seen.taken() == BY_BLOCKS
    adapter, a_copy = dict(target_modules=["lm_head"]), dict(modules_to_save=["lm_head"])
    for config, expected in ((adapter, Seen(0, ["a sum"])), (a_copy, BY_BLOCKS)):
        head = get_peft_model(copy.deepcopy(model), LoraConfig(r=2, **{"target_modules": ["c_attn"]} | config))
        assert step(head, inputs).loss.item() == pytest.approx(by_blocks.item(), rel=1e-5)  # nothing added so far
        assert seen.taken() == expected


# --- loss functions of the user --------------------------------------------------------------------------------------


def test_a_loss_function_that_needs_the_logits_has_them_and_the_log_tells_once(seen, told):
    def mine(logits, labels, vocab_size, **kwargs):
        chances = logits[:, :-1].log_softmax(-1)
        return F.nll_loss(chances.flatten(0, 1), labels[:, 1:].flatten()) + 0.1 * logits.square().mean()

    stock, tied = pair(tiny_model("gpt2"))
    stock.loss_function = tied.loss_function = mine
    for _ in range(3):
        assert_same_step(tied, stock, batch(stock))
    now = seen.taken()
    assert now.blocks == 0 and {"log_softmax", "square"} <= set(now.whole)
    assert len([m for m in told if "needed whole (log_softmax)" in m]) == 1


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_class_weights_of_a_loss_function_go_through_the_blocks(reduction, seen):
    loss = nn.CrossEntropyLoss(weight=torch.rand(VOCAB) + 0.1, reduction=reduction, ignore_index=7)

    def mine(logits, labels, vocab_size, **kwargs):
        return loss(logits[..., :-1, :].reshape(-1, vocab_size), labels[..., 1:].reshape(-1))

    stock, tied = pair(tiny_model("gpt2"))
    stock.loss_function = tied.loss_function = mine
    inputs = tiny_inputs(stock)
    inputs["labels"][0, 2] = inputs["labels"][1, 4] = 7
    assert assert_same_step(tied, stock, inputs).logits is None
    assert seen.taken() == BY_BLOCKS


def test_a_loss_for_each_token_is_computed_by_blocks(seen):
    weights = torch.rand(14)

    def mine(logits, labels, vocab_size, **kwargs):
        return (F.cross_entropy(logits.view(-1, vocab_size), labels.view(-1), reduction="none") * weights).sum()

    stock, tied = pair(tiny_model("gpt2"))
    stock.loss_function = tied.loss_function = mine
    assert assert_same_step(tied, stock, batch(stock)).logits is None
    assert seen.taken() == BY_BLOCKS


def test_two_losses_of_the_same_logits_are_both_computed_by_blocks(seen):
    def mine(logits, labels, vocab_size, **kwargs):
        flat, words = logits.view(-1, vocab_size), labels.view(-1)
        return F.cross_entropy(flat, words) + 0.5 * F.cross_entropy(flat[2:], words[2:], label_smoothing=0.2)

    stock, tied = pair(tiny_model("gpt2"))
    stock.loss_function = tied.loss_function = mine
    assert assert_same_step(tied, stock, batch(stock)).logits is None
    assert seen.taken() == Seen(blocks=2)
