"""Deferred logits are the model's own, in the modes of autograd and autocast in which it made them."""

import copy
from contextlib import nullcontext

import pytest
import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from hf_tying import use_tied_loss

from .helpers import assert_same_gradients, assert_same_step, batch, cross_entropy, gradients, model_with, step


def looked_at(context, look):
    """The logits are looked at first in a context, and then the loss is computed of them."""

    def loss(model, hidden, labels):
        logits = model.lm_head(hidden)
        with context():
            model.seen = look(logits, labels)
        return cross_entropy(logits, labels) + 0.1 * hidden.square().mean()

    return loss


def a_teacher(model, hidden, labels):
    with torch.no_grad():
        teacher = model.lm_head(hidden) * 0.5
    logits = model.lm_head(hidden)
    divergence = F.kl_div(logits.log_softmax(-1), teacher.softmax(-1), reduction="batchmean")
    return cross_entropy(logits, labels) + divergence


def a_loss_of_logits_made_without_gradients(model, hidden, labels):
    with torch.no_grad():
        before = model.lm_head(hidden) * 0.5
    return cross_entropy(model.lm_head(hidden), labels) + 0.3 * cross_entropy(before, labels)


def a_copy_made_without_gradients(model, hidden, labels):
    logits = model.lm_head(hidden)
    with torch.no_grad():
        before = logits.float() * 0.5
    return cross_entropy(logits, labels) + 0.3 * cross_entropy(before, labels)


def a_loss_without_gradients_beside(model, hidden, labels):
    logits = model.lm_head(hidden)
    with torch.no_grad():
        weight = cross_entropy(logits, labels)
    return cross_entropy(logits, labels) * weight


def a_head_with_gradients_within_none(model, hidden, labels):
    with torch.no_grad(), torch.enable_grad():
        logits = model.lm_head(hidden)
    return cross_entropy(logits, labels)


def a_head_frozen_for_the_loss(model, hidden, labels):
    logits = model.lm_head(hidden)
    model.lm_head.weight.requires_grad_(False)
    loss = cross_entropy(logits, labels)
    model.lm_head.weight.requires_grad_(True)
    return loss


def a_head_under_vmap(model, hidden, labels):
    return cross_entropy(torch.func.vmap(model.lm_head)(hidden), labels)


def a_learned_temperature(model, hidden, labels):
    return cross_entropy(model.lm_head(hidden) / hidden.mean().exp(), labels)


def recomputed(reentrant, with_loss):
    """The head, or the head and its loss, under gradient checkpointing."""

    def loss(model, hidden, labels):
        if with_loss:
            head_and_loss = lambda hidden: cross_entropy(model.lm_head(hidden), labels)  # noqa: E731
            return checkpoint(head_and_loss, hidden, use_reentrant=reentrant)
        return cross_entropy(checkpoint(model.lm_head, hidden, use_reentrant=reentrant), labels)

    return loss


def accuracy(logits, labels):
    return (logits[:, :-1].argmax(-1) == labels[:, 1:]).float().mean()


def entropy_of_a_copy(logits, labels):
    logs = logits.float().log_softmax(-1)
    return -(logs.exp() * logs).sum(-1).mean()


MODES = {
    f"{look.__name__} under {context.__name__}": looked_at(context, look)
    for look in (accuracy, entropy_of_a_copy, cross_entropy)
    for context in (torch.no_grad, torch.inference_mode, nullcontext)
} | {
    each.__name__: each
    for each in (
        a_teacher,
        a_loss_of_logits_made_without_gradients,
        a_copy_made_without_gradients,
        a_loss_without_gradients_beside,
        a_head_with_gradients_within_none,
        a_head_frozen_for_the_loss,
        a_head_under_vmap,
        a_learned_temperature,
    )
}
MODES |= {
    f"{'head and loss' if with_loss else 'head'} recomputed, {'old' if reentrant else 'new'}": recomputed(
        reentrant, with_loss
    )
    for reentrant in (True, False)
    for with_loss in (True, False)
}


@pytest.mark.parametrize("name", MODES)
def test_gradients_flow_where_the_model_made_its_logits_with_them_and_nowhere_else(name):
    stock = model_with(MODES[name])
    assert_same_step(use_tied_loss(copy.deepcopy(stock)), stock, batch(stock))


def autocast_head(inside, outside, whole):
    """The head in one state of autocast, the loss in another."""

    def loss(model, hidden, labels):
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            logits = model.lm_head(hidden.bfloat16() if inside else hidden)
        with torch.autocast("cpu", torch.bfloat16, enabled=outside):
            model.dtype_seen = logits.dtype
            return cross_entropy(logits.float(), labels) + (0 * logits.sum() if whole else 0)

    return loss


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("inside, outside", [(True, False), (False, True), (True, True)])
def test_the_product_is_in_the_autocast_of_the_head(inside, outside, whole):
    stock = model_with(autocast_head(inside, outside, whole), dtype=torch.float32)
    tied = use_tied_loss(copy.deepcopy(stock))
    inputs = batch(stock)
    expected, found = step(stock, inputs), step(tied, inputs)
    assert tied.dtype_seen == stock.dtype_seen == (torch.bfloat16 if inside else torch.float32)
    assert found.loss.item() == pytest.approx(expected.loss.item(), rel=1e-3 if inside else 1e-6)
    rounded = {"rtol": 2e-2, "atol": 2e-2} if inside else {}
    assert_same_gradients(gradients(tied), gradients(stock), **rounded)
