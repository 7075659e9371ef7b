"""Many training steps under `use_tied_loss` have the stock losses, and each allocates one gradient of the softmax."""

import copy

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from hf_tying import use_tied_loss

from ..forms import tied_model
from ..tiny import WIDTH, tiny_inputs, tiny_model, without_dropout
from ..tiny_translation import translation_inputs, translation_model
from .helpers import Seen, assert_same_gradients, batch, gradients, step, three_way


def curve(model, inputs, optimizer, steps=20) -> list[float]:
    """The losses of training with dropout; each run draws the same numbers."""
    torch.manual_seed(0)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    return losses


def masked(model) -> dict:
    inputs = tiny_inputs(model)
    hidden = torch.arange(7) % 3 == 0
    inputs["labels"][:, ~hidden] = -100
    inputs["input_ids"][:, hidden] = 3
    return inputs


def adamw(model):
    return torch.optim.AdamW(model.parameters(), lr=3e-3)


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.5)


@pytest.mark.parametrize("make, inputs, optimizer, tolerance", [
    (lambda: tiny_model("gpt2"), batch, adamw, 1e-4),
    (lambda: tiny_model("gpt2"), batch, sgd, 1e-4),
    (lambda: tiny_model("gpt2", dtype=torch.bfloat16), batch, adamw, 2e-2),
    (lambda: tiny_model("bert"), masked, adamw, 1e-4),
    (lambda: translation_model("marian"), translation_inputs, adamw, 1e-4),
    (three_way, translation_inputs, adamw, 1e-4),
], ids=["gpt2", "gpt2-sgd", "gpt2-bfloat16", "bert", "marian", "bert2bert"])  # fmt: skip
def test_the_loss_curve_of_twenty_steps_is_the_stock_models(make, inputs, optimizer, tolerance, seen):
    stock = make().train()
    tied = use_tied_loss(copy.deepcopy(stock))
    expected = curve(stock, inputs(stock), optimizer(stock))
    found = curve(tied, inputs(tied), optimizer(tied))
    assert seen.taken() == Seen(blocks=20)
    assert found == pytest.approx(expected, rel=tolerance)


# --- memory ----------------------------------------------------------------------------------------------------------


def allocated(run, at_least: int) -> int:
    """How many allocations of at least so many bytes there are."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = profiler.profiler.kineto_results.events()
    return sum(e.name() == "[memory]" and e.nbytes() >= at_least for e in events)


WORDS = 20_000


@pytest.mark.parametrize("arch, scheme", [("gpt2", "two_way"), ("bart", "three_way")])
def test_a_step_allocates_one_matrix_of_the_size_of_the_softmax(arch, scheme):
    stock = without_dropout(tied_model("in place", arch, scheme, vocab_size=WORDS))
    tied = use_tied_loss(copy.deepcopy(stock))
    inputs = tiny_inputs(stock, batch=1, length=8)  # logits have half the size of a gradient
    size = WORDS * WIDTH * 4
    assert allocated(lambda: step(tied, inputs), size) == 1
    assert allocated(lambda: step(stock, inputs), size) >= 3
    assert_same_gradients(gradients(tied), gradients(stock))
