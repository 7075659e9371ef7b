"""Outputs under `use_tied_loss` are the stock ones, except for the logits of a training step."""

import inspect

import pytest
import torch

from ..tiny import VOCAB, tiny_inputs, tiny_model
from .helpers import BY_BLOCKS, Seen, assert_same_step, batch, gradients, pair, step


def test_generation_is_the_stock_models():
    stock, tied = pair(tiny_model("gpt2"))
    ids = tiny_inputs(stock)["input_ids"]
    how = dict(max_new_tokens=5, num_beams=2, do_sample=False)
    for mode in (True, False):
        assert torch.equal(*(model.train(mode).generate(ids, **how) for model in (stock, tied)))


@pytest.mark.parametrize("arch", ["gpt2", "bert", "t5"])
def test_all_outputs_but_those_of_a_training_step_have_logits(arch, seen):
    stock, tied = pair(tiny_model(arch))
    inputs = batch(stock)
    unlabelled = dict(inputs, labels=None)
    if arch == "t5":
        unlabelled["decoder_input_ids"] = inputs["input_ids"]

    def same_everywhere(inputs):
        expected, found = stock(**inputs), tied(**inputs)
        assert torch.equal(found.logits, expected.logits) and found.keys() == expected.keys()
        return found

    assert same_everywhere(unlabelled).logits.requires_grad  # in training mode, but without labels
    with torch.no_grad():
        same_everywhere(inputs)
    stock.eval(), tied.eval()
    assert same_everywhere(inputs).loss.requires_grad
    assert seen.taken() == Seen()
    tied.train()
    assert tied(**inputs).logits is None


def test_labels_can_be_given_by_position(seen):
    stock, tied = pair(tiny_model("bert"))
    ids, labels = batch(stock)["input_ids"], batch(stock)["labels"]
    place = list(inspect.signature(stock.forward).parameters).index("labels")
    outputs = tied(ids, *[None] * (place - 1), labels)
    assert outputs.logits is None and seen.taken() == BY_BLOCKS
    assert outputs.loss.item() == pytest.approx(stock(input_ids=ids, labels=labels).loss.item(), rel=1e-5)
    assert torch.equal(tied(ids, None).logits, stock(ids, None).logits) and seen.taken() == Seen()


@pytest.mark.parametrize("arch", ["gpt2", "bert", "t5"])
def test_an_output_tuple_has_none_in_the_place_of_the_logits(arch, seen):
    stock, tied = pair(tiny_model(arch))
    inputs = batch(stock) | {"return_dict": False}
    expected, found = stock(**inputs), tied(**inputs)
    assert isinstance(found, tuple) and len(found) == len(expected)
    assert found[1] is None and expected[1].shape[-1] == VOCAB
    assert found[0].item() == pytest.approx(expected[0].item(), rel=1e-5)
    assert [type(value) for value in found[2:]] == [type(value) for value in expected[2:]]
    assert seen.taken() == BY_BLOCKS


def test_outputs_of_a_training_step_lack_nothing_but_the_logits():
    stock, tied = pair(tiny_model("gpt2"))
    inputs = batch(stock) | {"output_hidden_states": True}
    expected, found = stock(**inputs), tied(**inputs)
    assert type(found) is type(expected)
    assert set(found.keys()) == set(expected.keys()) - {"logits"}
    assert all(torch.equal(a, b) for a, b in zip(found.hidden_states, expected.hidden_states, strict=True))


def test_a_loss_without_any_label_is_zero(seen):
    stock, tied = pair(tiny_model("gpt2"))
    inputs = batch(stock)
    inputs["labels"].fill_(-100)
    assert stock(**inputs).loss.isnan()
    assert step(tied, inputs).loss.item() == 0 and seen.taken() == BY_BLOCKS
    assert all(g is not None and torch.count_nonzero(g) == 0 for g in gradients(tied).values())


def test_new_rows_of_a_resize_take_part_in_the_loss(seen):
    stock, tied = pair(tiny_model("gpt2"))
    step(tied, batch(tied))
    seen.taken()
    for model in (stock, tied):
        torch.manual_seed(3)
        model.resize_token_embeddings(VOCAB + 6, mean_resizing=False)
    inputs = batch(stock)
    inputs["labels"][:, -1] = inputs["input_ids"][:, -1] = VOCAB + 5
    assert assert_same_step(tied, stock, inputs).logits is None
    assert seen.taken() == BY_BLOCKS
    assert tied.get_parameter("lm_head.weight").grad[VOCAB + 5].abs().sum() > 0
