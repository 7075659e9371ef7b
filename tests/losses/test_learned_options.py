"""Options that are tensors: a learned one has its gradient or is refused, one that is written to is not misread."""

from itertools import product

import pytest
import torch
from torch.nn import functional as F

from hf_tying.losses import (
    arithmetic,
    augmented_loss,
    contrastive_weight_tying_loss,
    reference_cross_entropy,
    tied_cross_entropy,
    tied_distillation,
    tied_log_probs,
)
from hf_tying.losses.augmented import reference_augmented_loss

from .helpers import error, leaf

pytestmark = pytest.mark.usefixtures("slow_half")


def plain_contrastive(hidden, weight, labels, temperature):
    return F.cross_entropy(hidden @ weight[labels].T / temperature, torch.arange(len(labels)))


def problem(dtype=torch.float64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    labels = torch.tensor([1, 1, 2, 3, 5, 5, 5, 7, 8])
    return torch.randn(9, 6, dtype=dtype), torch.randn(23, 6, dtype=dtype), labels


# --- learned ---------------------------------------------------------------------------------------------------------

#: This package's loss, plain torch's, and the option.
GIVEN = {
    "cross entropy": (tied_cross_entropy, reference_cross_entropy, "logit_scale"),
    "cross entropy with a bias": (
        lambda *x, **o: tied_cross_entropy(*x, bias=torch.linspace(-1, 1, 23).double(), **o),
        lambda *x, **o: reference_cross_entropy(*x, bias=torch.linspace(-1, 1, 23).double(), **o),
        "logit_scale",
    ),
    "of each token": (
        lambda *x, **o: tied_cross_entropy(*x, reduction="none", **o).square().mean(),
        lambda *x, **o: reference_cross_entropy(*x, reduction="none", **o).square().mean(),
        "logit_scale",
    ),
    "augmented": (augmented_loss, reference_augmented_loss, "logit_scale"),
    "contrastive": (contrastive_weight_tying_loss, plain_contrastive, "temperature"),
}


@pytest.mark.parametrize("shape", [(), (1,)], ids=str)
@pytest.mark.parametrize("trained", [True, False], ids=["all trained", "it alone"])
@pytest.mark.parametrize("name", GIVEN)
def test_a_learned_scale_or_temperature_gets_its_gradient(name, trained, shape):
    hidden, weight, labels = problem()
    *losses, option = GIVEN[name]
    results = []
    for loss in losses:
        learned = torch.full(shape, 2.0, dtype=torch.float64, requires_grad=True)
        tensors = [leaf(x) if trained else x for x in (hidden, weight)]
        value = loss(*tensors, labels, **{option: learned})
        value.backward()
        results.append([value.detach(), learned.grad, *(x.grad for x in tensors)])
    for found, expected in zip(*results, strict=True):
        assert (found is None) == (expected is None)
        assert found is None or found.shape == expected.shape and error(found, expected) < 1e-10


OF_ONE_MATRIX = {
    "cross entropy": lambda *x, **o: tied_cross_entropy(*x, reduction="none", **o),
    "log-probabilities": lambda *x, **o: tied_log_probs(*x, **o).log_probs,
    "distillation": lambda hidden, weight, labels, bias, logit_scale, **o: tied_distillation(
        hidden,
        weight,
        hidden.detach(),
        weight,
        labels=labels,
        student_bias=bias,
        teacher_bias=bias,
        student_logit_scale=logit_scale,
        **o,
    ),
}


@pytest.mark.parametrize("fast_half, options", [(False, {}), (True, {"head_dtype": torch.float32})], ids=str)
@pytest.mark.parametrize("name", OF_ONE_MATRIX)
def test_a_learned_scale_rounds_no_more_than_a_number_does(monkeypatch, name, fast_half, options):
    """Hidden states of half precision that are multiplied by it are not rounded to that again."""
    monkeypatch.setattr(arithmetic, "has_fast_half", lambda dtype: fast_half)
    hidden, weight, labels = problem(torch.bfloat16)
    options = {"bias": torch.randn(23).bfloat16(), **options}
    learned = OF_ONE_MATRIX[name](hidden, weight, labels, logit_scale=torch.tensor(0.3).requires_grad_(), **options)
    number = OF_ONE_MATRIX[name](hidden, weight, labels, logit_scale=0.3, **options)
    torch.testing.assert_close(learned.detach(), number, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", OF_ONE_MATRIX)
def test_a_forbidden_word_has_no_part_in_the_gradient_of_a_learned_scale(name):
    hidden, weight, labels = problem()
    bias = torch.randn(23, dtype=torch.float64)
    bias[22] = -torch.inf
    found = []
    for words in (23, 22):
        scale = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
        OF_ONE_MATRIX[name](hidden, weight[:words], labels, bias=bias[:words], logit_scale=scale).sum().backward()
        found.append(scale.grad)
    assert found[0].isfinite() and (name == "distillation" or found[1] != 0)
    torch.testing.assert_close(*found)


def test_a_learned_temperature_has_a_gradient_of_zero_where_no_position_counts():
    learned = torch.tensor(2.0, requires_grad=True)
    hidden, weight, labels = problem()
    contrastive_weight_tying_loss(hidden, weight, labels.new_full((9,), -100), temperature=learned).backward()
    assert learned.grad == 0


REFUSED = {
    "logit_softcap": (tied_cross_entropy, 2.0, reference_cross_entropy),
    "class_weight": (tied_cross_entropy, torch.linspace(0.1, 1, 23).double(), None),
    "num_items_in_batch": (tied_cross_entropy, 9.0, None),
    "label_smoothing": (tied_cross_entropy, 0.1, None),
    "temperature": (augmented_loss, 5.0, reference_augmented_loss),
    "gamma": (augmented_loss, 0.5, reference_augmented_loss),
    "alpha": (augmented_loss, 0.5, reference_augmented_loss),
    "cross_entropy_weight": (augmented_loss, 0.5, reference_augmented_loss),
}


@pytest.mark.parametrize("option", REFUSED)
def test_any_other_option_that_is_learned_is_refused_and_the_ways_out_are_ways(option):
    loss, value, reference = REFUSED[option]
    hidden, weight, labels = problem()
    learned = torch.as_tensor(value).clone().requires_grad_()
    with pytest.raises(ValueError, match=rf"{option} is a tensor that requires a gradient.*{option}\.detach\(\)") as e:
        loss(hidden, leaf(weight), labels, **{option: learned})
    detached = loss(hidden, leaf(weight), labels, **{option: learned.detach()})
    assert detached.requires_grad
    with torch.no_grad():
        assert torch.equal(loss(hidden, weight, labels, **{option: learned}), detached.detach())
    assert (reference is not None) == ("gives it one" in str(e.value))
    if reference is not None:
        assert reference.__name__ in str(e.value)
        plain = reference(hidden, weight, labels, **{option: learned})
        plain.backward()
        assert error(plain.detach(), detached.detach()) < 1e-6
        step = 1e-6
        above, below = (
            reference(hidden, weight, labels, **{option: learned.detach().double() + sign * step}) for sign in (1, -1)
        )
        assert learned.grad.item() == pytest.approx(float(above - below) / (2 * step), rel=1e-4)


# --- written to between forward and backward -------------------------------------------------------------------------

#: A way to reduce, and the dtype: for each token, and with a matrix in float16, the backward pass makes gradients.
LATE = {"of each token": ("none", torch.float32), "float16": ("mean", torch.float16)}


def loss_and_options(loss, reduction, dtype, with_items=False):
    hidden, weight, labels = problem(dtype)
    options = {"class_weight": torch.linspace(0.1, 1, 23)}
    if with_items:
        options["num_items_in_batch"] = torch.tensor(9.0)
    weight = leaf(weight)
    value = loss(hidden, weight, labels, reduction=reduction, **options)
    return value.sum(), weight, {"labels": labels, **options}


def plain(hidden, weight, labels, class_weight, reduction, num_items_in_batch=None):
    value = F.cross_entropy(F.linear(hidden, weight).float(), labels, class_weight, reduction=reduction)
    return value if num_items_in_batch is None else value / num_items_in_batch


@pytest.mark.parametrize("loss", [tied_cross_entropy, plain])
@pytest.mark.parametrize("written, late", [
    *product(("labels", "class_weight"), LATE), ("num_items_in_batch", "float16"),
])  # fmt: skip
def test_what_the_backward_pass_reads_is_not_read_once_it_is_written_to(written, late, loss):
    reduction, dtype = LATE[late]
    value, _, options = loss_and_options(loss, reduction, dtype, with_items=written == "num_items_in_batch")
    options[written].mul_(0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


@pytest.mark.parametrize("written", ["labels", "class_weight", "num_items_in_batch"])
def test_gradients_made_in_the_forward_pass_are_of_what_was_there_then(written):
    gradients = []
    for change in (False, True):
        torch.manual_seed(0)
        value, weight, options = loss_and_options(tied_cross_entropy, "mean", torch.float32, with_items=True)
        if change:
            options[written].mul_(0)
        value.backward()
        gradients.append(weight.grad)
    assert gradients[0].any() and torch.equal(*gradients)
