"""`DeferredLogits` answer, change and train as the real logits do."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hf_tying.objectives.deferred_logits import DeferredLogits
from hf_tying.objectives.step_loss import LossSettings
from hf_tying.objectives.tied_softmax import TiedSoftmax

from .helpers import BY_BLOCKS, WORDS, deferred, same


@dataclass
class Operation:
    """`apply` makes logits of other logits, whose shape before the words is `lead` then; `keeps`: it is noted down."""

    name: str
    apply: Callable
    lead: list[int]
    keeps: bool = True


def some_operation(chance: Random, lead: list[int], before: set[str]) -> Operation:
    """What forward passes do with their logits, of the shape `(*lead, WORDS)`; `before`: what was done so far."""
    capped, stepped = "tanh" in before, before & {"tanh", "scale", "quotient", "tensor"}
    kinds = ["flatten", "view", "float", "double", "half", "contiguous", "scale", "quotient", "tensor", "bias"]
    kinds += [] if capped else ["tanh"]
    kinds += ["slice", "mask", "choose"] if lead[0] > 1 else []
    kinds += ["one", "split", "last", "dots", "mask of two"] if len(lead) > 1 and lead[0] > 1 else []
    kind = chance.choice(kinds)
    count, rest = torch.Size(lead).numel(), lead[1:]
    factor = chance.choice([0.5, 2.0, 3] if capped else [0.5, 2.0, 3, -0.75])
    rows = torch.randn(chance.choice([(WORDS,), (1, WORDS)]))
    mask = torch.rand(lead[: 2 if kind == "mask of two" else 1]) < 0.6
    shape = chance.choice([(-1, WORDS), ([count, WORDS],), (torch.Size([count, WORDS]),), (count, -1)])
    tanh = chance.choice([torch.tanh, lambda x: x.tanh()])
    apply, after = {
        "flatten": (lambda x: x.reshape(*shape), [count]),
        "view": (lambda x: x.contiguous().view(*shape), [count]),
        "split": (lambda x: x.reshape(*lead[::-1], WORDS), lead[::-1]),
        "float": (lambda x: x.float(), lead),
        "double": (lambda x: x.to(torch.float64), lead),
        "half": (lambda x: x.to(dtype=torch.bfloat16), lead),
        "contiguous": (lambda x: x.contiguous(), lead),
        "scale": (lambda x: factor * x, lead),
        "quotient": (lambda x: x / factor, lead),
        "tensor": (lambda x: x * torch.tensor(float(factor)), lead),
        "bias": (lambda x: x + rows, lead),
        "tanh": (lambda x: tanh(x), lead),
        "slice": (lambda x: x[1:], [lead[0] - 1, *rest]),
        "mask": (lambda x: x[mask], [int(mask.sum()), *rest]),
        "mask of two": (lambda x: x[mask], [int(mask.sum()), *rest[1:]]),
        "choose": (lambda x: x[torch.tensor([0, 1, 0])], [3, *rest]),
        "one": (lambda x: x[-1], rest),
        "last": (lambda x: x[:, :-1], [lead[0], *[size - 1 for size in rest[:1]], *rest[1:]]),
        "dots": (lambda x: x[..., :-1, :], [*lead[:-1], lead[-1] - 1]),
    }[kind]
    return Operation(kind, apply, after, keeps=not (kind == "bias" and stepped))


def operations(chance: Random, lead: list[int]) -> list[Operation]:
    """Up to six, one after the other."""
    done = []
    for _ in range(chance.randint(0, 6)):
        if 0 not in lead:
            done.append(some_operation(chance, lead, {operation.name for operation in done}))
            lead = done[-1].lead
    return done


def results_of(side, done: list[Operation], at_last: str, options: dict) -> list[torch.Tensor | None]:
    """What comes out at last, and the gradients."""
    logits, leaves = side
    for operation in done:
        logits = operation.apply(logits)
    if at_last == "logits":
        value = logits * torch.linspace(0.5, 1.5, WORDS)
    else:
        flat = logits.float().reshape(-1, WORDS)
        labels = torch.arange(len(flat)) * 5 % WORDS
        labels[1::3] = -100
        value = F.cross_entropy(flat, labels, reduction=at_last, **options)
    value.sum().backward()
    return [value.detach(), *(None if x is None else x.grad for x in leaves)]


@pytest.mark.parametrize("at_last", ["mean", "sum", "none", "logits"])
def test_operations_in_any_order_give_what_they_give_on_real_logits(at_last, seen):
    chance, ways = Random(at_last), Counter()
    for number in range(200):
        torch.manual_seed(number)
        shape = chance.choice([(2, 5), (3,), (1, 1), (2, 3, 2), (3, 2, 2), (5, 2), (1, 4)])
        done = operations(chance, list(shape))
        names, kept = [operation.name for operation in done], all(operation.keeps for operation in done)
        ways.update(names), ways.update([kept])
        sides = deferred(*shape, bias=chance.random() < 0.5)
        options = {
            "label_smoothing": chance.choice([0.0, 0.2]),
            "weight": chance.choice([None, torch.rand(WORDS)]),
        }
        found, expected = (results_of(side, done, at_last, options) for side in sides)
        assert (seen.taken().whole == []) == (kept and at_last != "logits"), names
        rounded = 0.05 if "half" in names else 2e-5
        for ours, real in zip(found, expected, strict=True):
            assert (ours is None) == (real is None)
            if real is not None and real.numel() and not expected[0].isnan().any():  # the mean of nothing
                assert ours.shape == real.shape
                apart = (ours.double() - real.double()).abs().max()
                assert apart <= rounded * max(float(real.abs().max()), 1e-3), (number, names, options)
    assert len(ways) == 21 and min(ways.values()) >= 4, ways


def test_deferred_logits_answer_what_a_tensor_is_asked():
    other = torch.zeros(2, dtype=torch.float64)
    for number, ask in enumerate((
        lambda x: x.shape, lambda x: x.size(), lambda x: x.size(-1), lambda x: x.size(0), lambda x: x.ndim,
        lambda x: x.dim(), lambda x: len(x), lambda x: x.device, lambda x: x.dtype, lambda x: x.numel(),
        lambda x: x.to(torch.bfloat16).dtype, lambda x: x.to(other).dtype, lambda x: x.requires_grad,
        lambda x: x.to("cpu", torch.float64).dtype, lambda x: x.to("cpu").dtype, lambda x: x[0].shape,
        lambda x: x.float().dtype, lambda x: x.to(torch.float64).float().dtype, lambda x: x[:, -1].shape,
        lambda x: x.view(-1, WORDS).shape, lambda x: (x + torch.ones(WORDS, dtype=torch.float64)).dtype,
        lambda x: (x + torch.ones(WORDS, dtype=torch.bfloat16)).dtype, lambda x: (x * 2).dtype,
        lambda x: (x[0] + torch.ones(1, 1, WORDS)).shape, lambda x: torch.tanh(x).shape,
    )):  # fmt: skip
        (logits, _), (real, _) = deferred(2, 5)
        assert ask(logits) == ask(real), number


@pytest.mark.parametrize("grad", [True, False])
def test_deferred_logits_require_a_gradient_if_they_were_made_with_one(grad):
    with torch.set_grad_enabled(grad):
        (logits, _), (real, _) = deferred(2, 5)
    assert isinstance(logits, DeferredLogits) and logits.requires_grad is real.requires_grad is grad


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_under_autocast_they_have_the_dtype_of_the_real_logits(dtype):
    with torch.autocast("cpu", torch.bfloat16):
        (logits, _), (real, _) = deferred(2, 5, dtype=dtype)
    assert logits.dtype == real.dtype == (torch.float64 if dtype == torch.float64 else torch.bfloat16)


def test_two_sizes_to_be_inferred_are_refused_as_by_torch():
    for logits, _ in deferred(2, 5):
        with pytest.raises(RuntimeError, match="only one dimension can be inferred"):
            logits.reshape(-1, 10, -1)


@pytest.mark.parametrize("names, by_blocks", [
    ((), True), (("view",), True), (("transpose",), False), (("probabilities",), False), (("words",), False),
    (("bytes",), False),
])  # fmt: skip
def test_only_a_loss_of_words_is_computed_by_blocks(names, by_blocks, seen):
    losses, probabilities = [], torch.rand(6, WORDS).softmax(-1)
    for logits, _ in deferred(6):
        labels = torch.arange(6)
        if "view" in names:
            logits = logits.view(2, 3, WORDS).view(6, WORDS)
        if "transpose" in names:
            logits, labels = logits.view(2, 3, WORDS).transpose(1, 2), labels.view(2, 3)
        if "probabilities" in names:
            labels = probabilities
        if "bytes" in names:
            labels = labels.to(torch.uint8)
        if "words" in names:
            logits = logits[:, :9]
        losses.append(F.cross_entropy(logits, labels))
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-5)
    now = seen.taken()
    assert (now == BY_BLOCKS) if by_blocks else (now.blocks == 0 and now.whole)


def test_a_summed_loss_is_right_whatever_number_of_items_divides_it():
    for items in (5, torch.tensor(5), 0, torch.tensor(0)):
        results = []
        for logits, leaves in deferred(6, num_items=items):
            loss = F.cross_entropy(logits, torch.arange(6), reduction="sum") / 3
            loss.backward()
            results.append([loss.detach(), *(x.grad for x in leaves)])
        assert all(same(a, b, 1e-5) for a, b in zip(*results, strict=True)), items


def test_only_a_product_with_the_softmax_matrix_is_deferred():
    weight, other = nn.Parameter(torch.randn(WORDS, 4)), nn.Parameter(torch.randn(WORDS, 4))
    with TiedSoftmax(weight, LossSettings()):
        assert type(F.linear(torch.randn(3, 4), other)) is torch.Tensor
        assert type(F.linear(torch.randn(3, 4), weight)) is DeferredLogits
        assert type(F.linear(torch.randn(3, 4), weight.view_as(weight))) is DeferredLogits
    assert type(F.linear(torch.randn(3, 4), weight)) is torch.Tensor


def test_a_lookup_in_the_softmax_matrix_keeps_the_options_of_its_embedding():
    weight = nn.Parameter(torch.randn(WORDS, 4))
    ids = torch.tensor([[1, 2, 2], [3, 1, 0]])
    for options in ({}, dict(padding_idx=2), dict(scale_grad_by_freq=True), dict(max_norm=0.5), dict(sparse=True)):
        results = []
        for softmax in (True, False):
            parameter = nn.Parameter(weight.detach().clone())
            if softmax:
                with TiedSoftmax(parameter, LossSettings()):
                    rows = F.embedding(ids, parameter, **options)
            else:
                rows = F.embedding(ids, parameter, **options)
            (rows * torch.arange(1.0, 5)).sum().backward()
            results.append((rows.detach(), parameter.grad.to_dense()))
        assert all(same(a, b) for a, b in zip(*results, strict=True)), options


def test_a_learnt_scale_of_the_logits_has_its_gradient():
    gradients = []
    for logits, _ in deferred(6):
        scale = torch.ones(1, requires_grad=True)
        F.cross_entropy(logits * scale, torch.arange(6)).backward()
        gradients.append(scale.grad)
    assert same(*gradients) and gradients[1].abs() > 1e-3


@pytest.mark.parametrize("copied", [
    lambda x: x * 2, lambda x: x / 2, lambda x: x.tanh(), lambda x: x + torch.ones(WORDS),
    lambda x: x.to(torch.float64), lambda x: x[torch.ones(2, 5, dtype=torch.bool)], lambda x: x[[0]],
    lambda x: x[:, :-1].contiguous(), lambda x: (x.view(-1, WORDS) * 3)[1:],
], ids=["scale", "quotient", "tanh", "bias", "cast", "mask", "rows", "contiguous", "long ago"])  # fmt: skip
def test_a_copy_made_before_a_write_keeps_its_values(copied):
    values = []
    for logits, _ in deferred(2, 5):
        earlier = copied(logits)
        logits[..., 0] = 5.0
        losses = F.cross_entropy(earlier.reshape(-1, WORDS), torch.zeros(earlier.shape[:-1].numel()).long())
        values.append((earlier.sum(0).detach(), losses.detach()))
    assert all(same(a, b, 1e-5) for a, b in zip(*values, strict=True))


@pytest.mark.parametrize("shared", [
    lambda x: x.view(-1, WORDS), lambda x: x[:, :-1], lambda x: x[1], lambda x: x.float(),
    lambda x: x.contiguous(), lambda x: x.to("cpu"),
], ids=["view", "slice", "row", "float", "contiguous", "to"])  # fmt: skip
def test_a_write_is_seen_by_all_that_share_its_memory(shared):
    values = []
    for logits, _ in deferred(2, 5):
        later = shared(logits)
        shared(logits)[..., 0] = 5.0
        loss = F.cross_entropy(shared(logits).reshape(-1, WORDS)[:5], torch.arange(5))
        values.append((loss.detach(), logits.sum(0).detach(), later.sum(0).detach()))
    assert all(same(a, b, 1e-5) for a, b in zip(*values, strict=True))


def test_deferred_logits_refuse_to_be_iterated_over_and_say_what_to_do():
    (logits, _), _ = deferred(2, 5)
    for act in (list, tuple, lambda x: [*x], lambda x: [row for row in x]):
        with pytest.raises(TypeError, match=r"not iterable.*use_tied_loss\(model, False\)"):
            act(logits)


def test_the_softmax_matrix_can_be_given_by_keyword():
    weight, hidden = nn.Parameter(torch.randn(WORDS, 4)), torch.randn(3, 4)
    with TiedSoftmax(weight, LossSettings()):
        logits = F.linear(input=hidden, weight=weight)
    assert same(torch.as_tensor(logits.softmax(-1)), F.linear(hidden, weight).softmax(-1))
