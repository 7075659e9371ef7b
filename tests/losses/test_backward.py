"""The backward pass of `tied_cross_entropy`: what it is multiplied by, how often it runs, and what is trained."""

import math

import pytest
import torch

from hf_tying.losses import tied_cross_entropy, tied_embedding
from hf_tying.losses.cross_entropy import cross_entropy
from hf_tying.losses.options import CrossEntropyOptions

from .helpers import NAMES, error, exactly, leaf, metered, results, watched, worst

pytestmark = pytest.mark.usefixtures("slow_half")


def test_a_loss_multiplied_by_what_is_no_number_has_no_gradient():
    """An overflow downstream must be seen in the gradients, where a gradient scaler looks for it."""
    hidden, weight, labels = torch.randn(9, 4), torch.randn(31, 4), torch.randint(31, (9,))
    found = results(tied_cross_entropy, hidden, weight, labels, upstream=math.nan)
    assert found["hidden"].isnan().all() and found["weight"].isnan().all()


@pytest.mark.parametrize("upstream", [1 + 1e-5, 1 + 5e-7, 1 - 5e-7])
def test_in_float64_a_factor_next_to_one_is_multiplied_in(upstream):
    hidden, weight, labels = torch.randn(9, 4).double(), torch.randn(31, 4).double(), torch.randint(31, (9,))
    found = results(tied_cross_entropy, hidden, weight, labels, upstream=upstream)
    expected = exactly(hidden, weight, labels, upstream=upstream)
    assert worst(found, expected) < 1e-10


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("actual", [1 / 640, 0.3])
def test_the_factor_that_is_expected_changes_no_result(dtype, actual):
    hidden, weight, labels = torch.randn(9, 4).to(dtype), torch.randn(31, 4).to(dtype), torch.randint(31, (9,))
    options = CrossEntropyOptions(reduction="sum", upstream=1 / 640)

    def expecting(hidden, weight, labels, bias=None):
        return cross_entropy(hidden, weight, labels, bias, options)

    found = results(expecting, hidden, weight, labels, upstream=actual)
    expected = exactly(hidden, weight, labels, upstream=actual, reduction="sum")
    tolerance = 1e-6 if dtype == torch.float32 else 1e-2
    assert error(found["loss"], expected["loss"]) < 1e-6
    assert all(error(found[name], expected[name]) < tolerance for name in NAMES[1:3])


def graph(reduction="mean"):
    hidden, weight, labels = leaf(torch.randn(9, 4)), leaf(torch.randn(31, 4)), torch.randint(31, (9,))
    return hidden, weight, labels, tied_cross_entropy(hidden, weight, labels, reduction=reduction).sum()


def test_a_second_backward_pass_is_refused():
    hidden, weight, labels, loss = graph()
    loss.backward(retain_graph=True)
    assert error(weight.grad, exactly(hidden, weight, labels)["weight"]) < 1e-6
    before = weight.grad.clone()
    with pytest.raises(RuntimeError, match="second time.*Compute the loss again, or use reduction='none'"):
        loss.backward()
    assert torch.equal(weight.grad, before)


def test_the_loss_of_each_token_may_be_differentiated_twice():
    hidden, weight, labels, loss = graph("none")
    first = torch.autograd.grad(loss, [hidden, weight], retain_graph=True)
    second = torch.autograd.grad(loss, [hidden, weight])
    expected = exactly(hidden, weight, labels, reduction="none")
    for found in (first, second):
        assert error(found[0], expected["hidden"]) < 1e-6 and error(found[1], expected["weight"]) < 1e-6


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_gradient_of_the_gradient_is_refused(reduction):
    hidden, weight, labels, loss = graph(reduction)
    with pytest.raises(RuntimeError, match="create_graph=True.*reference_cross_entropy"):
        torch.autograd.grad(loss, [weight], create_graph=True)
    embedded = tied_embedding(labels, weight).sum()
    with pytest.raises(RuntimeError, match="create_graph=True.*torch.nn.functional.embedding"):
        torch.autograd.grad(embedded, [weight], create_graph=True)


# --- what is not trained ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trained", ["hidden", "weight", "bias"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("budget", [100, 3000])
def test_where_one_alone_is_trained_its_gradient_is_right_and_the_others_have_none(trained, reduction, budget):
    tensors = {"hidden": torch.randn(40, 4), "weight": torch.randn(31, 4), "bias": torch.randn(31)}
    labels = torch.randint(31, (40,))
    tensors[trained].requires_grad_()
    with watched(at_work=200, narrowest=2, fewest_rows=2) as seen:
        loss = tied_cross_entropy(
            tensors["hidden"], tensors["weight"], labels, bias=tensors["bias"], reduction=reduction,
            memory_budget=budget,
        )  # fmt: skip
        loss.sum().backward()
    assert bool(seen["tokens cut"]) == (budget == 3000)
    expected = exactly(tensors["hidden"], tensors["weight"], labels, tensors["bias"], reduction=reduction)
    for name, tensor in tensors.items():
        assert (tensor.grad is None) == (name != trained)
    assert error(tensors[trained].grad, expected[trained]) < 2e-6


@pytest.mark.parametrize("context", ["no_grad", "inference_mode", "frozen"])
def test_without_gradients_there_is_one_walk_and_the_same_loss(context):
    weight, labels = torch.randn(800, 64), torch.randint(800, (50,))
    hidden = torch.randn(50, 64)
    expected = exactly(hidden, weight, labels)["loss"]
    hidden.requires_grad_(context != "frozen"), weight.requires_grad_(context != "frozen")
    mode = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode, "frozen": torch.enable_grad}[context]
    with watched() as seen, mode():
        loss, meter = metered(lambda: tied_cross_entropy(hidden, weight, labels, memory_budget=50_000))
    assert seen["one walk"] == 1 and not seen["two walks"] and not loss.requires_grad
    assert error(loss, expected) < 1e-6
    assert meter.peak < 64 * 800 * 4
