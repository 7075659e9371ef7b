"""Between head and loss something is written to: the logits are of what was there before, or the step is refused."""

import copy

import pytest
import torch
from torch.nn import functional as F

from hf_tying import TyingError, use_tied_loss

from .helpers import AL, CWT, assert_same_step, batch, cross_entropy, gradients, model_with, step


def writing(write, of_copy=False):
    """A loss with a write before it."""

    def loss(model, hidden, labels):
        logits = model.lm_head(hidden)
        logits = logits.float() if of_copy else logits
        write(model, hidden)
        return cross_entropy(logits, labels)

    return loss


def restoring(write):
    """A loss while the matrix has other values, put back for the backward pass: an EMA, a quantised forward."""

    def loss(model, hidden, labels):
        logits, weight = model.lm_head(hidden), model.lm_head.weight
        before = weight.detach().clone()
        write(weight)
        value = cross_entropy(logits, labels)
        weight.data.copy_(before)
        return value

    return loss


def by_method(model, hidden):
    hidden.mul_(0.5)


def by_operator(model, hidden):
    hidden *= 0.5


def by_item(model, hidden):
    hidden[:, 1] = 0.25


def by_a_view(model, hidden):
    hidden[:, 1:].transpose(0, 1).zero_()


def by_out(model, hidden):
    torch.mul(hidden.detach(), 0.5, out=hidden.detach())


def by_an_argument(model, hidden):
    F.relu(hidden, inplace=True)


def by_foreach(model, hidden):
    torch._foreach_mul_([hidden], 0.5)


def by_data(model, hidden):
    hidden.data.mul_(0.5)


def by_numpy(model, hidden):
    hidden.detach().numpy()[:] = 0.0


HIDDEN = (by_method, by_operator, by_item, by_a_view, by_out, by_an_argument, by_foreach, by_data, by_numpy)


@pytest.mark.parametrize("of_copy", [False, True])
@pytest.mark.parametrize("write", HIDDEN)
def test_hidden_states_written_to_after_the_head_change_no_loss(write, of_copy):
    stock = model_with(writing(write, of_copy), frozen_head=True)
    assert_same_step(use_tied_loss(copy.deepcopy(stock)), stock, batch(stock))


def data(weight):
    weight.data.mul_(0.5)


def data_replaced(weight):
    weight.data = weight.data * 0.5


MATRIX = (data, data_replaced)


@pytest.mark.parametrize("write", MATRIX)
def test_a_matrix_written_to_and_put_back_changes_no_loss(write):
    stock = model_with(restoring(write))
    assert_same_step(use_tied_loss(copy.deepcopy(stock)), stock, batch(stock))


def index_written_to(model, hidden, labels):
    logits = model.lm_head(hidden)
    chosen = torch.tensor([0, 1, 2])
    logits, kept = logits[0][chosen], labels[0, 1:4].clone()
    chosen.zero_()
    return F.cross_entropy(logits, kept)


def scale_written_to(model, hidden, labels):
    scale = torch.full((1,), 2.0, dtype=hidden.dtype)
    logits = model.lm_head(hidden) * scale
    with torch.no_grad():
        scale.zero_()
    return cross_entropy(logits, labels)


def bias_written_to(model, hidden, labels):
    bias = torch.linspace(-1, 1, model.config.vocab_size, dtype=hidden.dtype)
    logits = model.lm_head(hidden) + bias
    bias.zero_()
    return cross_entropy(logits, labels)


def test_a_bias_that_is_written_to_after_it_was_added_changes_no_loss():
    stock = model_with(bias_written_to)
    assert_same_step(use_tied_loss(copy.deepcopy(stock)), stock, batch(stock))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("loss", [index_written_to, scale_written_to])
def test_what_plain_torch_saves_and_refuses_once_it_is_written_to_is_refused(loss, tied):
    model = model_with(loss)
    outputs = use_tied_loss(model, tied)(**batch(model))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        outputs.loss.backward()


def unseen(write):
    """A write that no torch function is called for."""

    def loss(model, hidden, labels):
        logits = model.lm_head(hidden)
        with torch._C.DisableTorchFunction():
            write(model, hidden)
        return cross_entropy(logits, labels)

    return loss


@pytest.mark.parametrize("objective", [None, AL, CWT], ids=str)
def test_a_write_that_was_not_seen_to_come_is_refused_and_the_ways_out_are_ways(objective):
    model = model_with(unseen(by_method), frozen_head=True)
    use_tied_loss(model, objective=objective)
    inputs = batch(model)
    with pytest.raises(TyingError, match=r"not computed yet.*was written to since.*use_tied_loss\(model, False\)"):
        model(**inputs)
    use_tied_loss(model, False)
    step(model, inputs)
    assert any(g is not None and g.any() for g in gradients(model).values())
    after = model_with(
        lambda model, hidden, labels: (cross_entropy(model.lm_head(hidden), labels), by_method(model, hidden))[0]
    )
    assert step(use_tied_loss(after), inputs).logits is None


@pytest.mark.parametrize("objective", [AL, CWT], ids=str)
@pytest.mark.parametrize("write", [by_method, by_data])
def test_an_objective_is_refused_where_hidden_states_are_written_to_before_it_and_not_after(write, objective):
    refused = use_tied_loss(model_with(writing(write), frozen_head=True), objective=objective)
    with pytest.raises(TyingError, match="was written to since the model made them"):
        refused(**batch(refused))

    def after(model, hidden, labels):
        logits = model.lm_head(hidden * 1.0)
        value = cross_entropy(logits, labels)
        write(model, hidden)
        return value

    allowed = use_tied_loss(model_with(after, frozen_head=True), objective=objective)
    assert step(allowed, batch(allowed)).logits is None
