"""One gradient buffer for a matrix that is used several times: the numbers are torch's, whatever the uses are."""

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hf_tying.losses import (
    TiedEmbedding,
    arithmetic,
    embedding,
    gradient,
    reference_cross_entropy,
    tied_cross_entropy,
    tied_embedding,
)

from .helpers import error, leaf, metered
from .scenarios import SCENARIOS, both, three_way, two_losses, two_way


def assert_same(found, expected, tolerance=1e-12) -> None:
    assert (found is None) == (expected is None)
    if found is not None:
        assert found.shape == expected.shape
        difference = (found - expected).norm()
        assert difference <= tolerance * expected.norm(), float(difference)


def compare(scenario) -> None:
    ours, torchs, matrix = both()
    found, expected = leaf(matrix), leaf(matrix)
    more, same = scenario(ours, found) or [], scenario(torchs, expected) or []
    assert_same(found.grad, expected.grad)
    assert_same(ours.body.grad, torchs.body.grad)
    assert len(more) == len(same)
    for one, other in zip(more, same, strict=True):
        assert_same(one, other)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_the_gradients_are_torchs(scenario):
    compare(SCENARIOS[scenario])


@pytest.mark.parametrize("missing", ["_PASS", "_HOLDERS"])
@pytest.mark.parametrize("scenario", ["two way", "three way", "two losses", "three losses and a dense use"])
def test_without_the_private_names_of_torch_the_gradients_are_torchs(monkeypatch, scenario, missing):
    monkeypatch.setattr(gradient, missing, None)
    compare(SCENARIOS[scenario])


# --- how many matrices there are -------------------------------------------------------------------------------------


def matrices(scenario, ours=True) -> int:
    """How many matrices of the gradient's size a step allocates."""
    words, width = 1013, 32
    uses, torchs, matrix = both(torch.float32, words, width, count=16)
    weight = leaf(matrix)
    _, meter = metered(lambda: scenario(uses if ours else torchs, weight))
    assert weight.grad is not None
    return meter.allocated[words * width * 4]


@pytest.mark.parametrize(
    "scenario",
    ["two way", "three way", "two embeddings and no loss through the head", "recomputed embedding, new",
     "an embedding whose rows are used twice", "one view for all uses"],
)  # fmt: skip
def test_there_is_one_matrix_however_often_the_embedding_is_used(scenario):
    assert matrices(SCENARIOS[scenario]) == 1


@pytest.mark.parametrize("scenario, least", [("two way", 2), ("three way", 3)])
def test_torch_has_one_for_each_use(scenario, least):
    """What is counted above, where there is something to count."""
    assert matrices(SCENARIOS[scenario], ours=False) >= least


def test_each_use_has_its_own_where_the_private_names_of_torch_are_missing(monkeypatch):
    monkeypatch.setattr(gradient, "_PASS", None)
    assert matrices(three_way) >= 3


def test_a_second_loss_adds_to_the_matrix_of_the_first():
    """Both gradients are made in the forward pass; there is none for their sum."""
    assert matrices(two_losses) == 2


# --- who may look at a gradient --------------------------------------------------------------------------------------


@pytest.mark.parametrize("scenario", ["two way", "three way", "two losses"])
def test_the_hooks_of_a_matrix_run_once_with_the_whole_gradient(scenario):
    ours, torchs, matrix = both()
    weight, twin, seen = leaf(matrix), leaf(matrix), []
    SCENARIOS[scenario](torchs, twin)
    weight.register_hook(lambda grad: seen.append(grad.clone()))
    weight.register_hook(lambda grad: grad * 3)
    weight.register_post_accumulate_grad_hook(lambda weight: seen.append(weight.grad.clone()))
    SCENARIOS[scenario](ours, weight)
    assert len(seen) == 2
    assert_same(seen[0], twin.grad)
    assert_same(seen[1], twin.grad * 3)
    assert_same(weight.grad, twin.grad * 3)


KEEPERS = {
    "a list": lambda kept: lambda inputs, outputs: kept.append(inputs[1]),
    "another gradient": lambda kept: lambda inputs, outputs: setattr(kept[0], "grad", inputs[1]),
    "a view": lambda kept: lambda inputs, outputs: kept.append(inputs[1].view(-1)),
}


# One more cannot be told from autograd's own hold, as the docstring of `losses.gradient` says: a hook that makes this
# the `grad` of another tensor, beside a further dense use of the matrix.
@pytest.mark.parametrize(
    ("keeper", "dense"), [(k, d) for k in KEEPERS for d in (False, True) if (k, d) != ("another gradient", True)]
)
def test_a_gradient_that_somebody_keeps_is_not_written_to_and_none_is_lost(keeper, dense):
    """A hook of the loss sees the gradient of the head alone, and may keep it."""
    ours, torchs, matrix = both()
    found, expected, gradients = leaf(matrix), leaf(matrix), []
    for uses, weight in ((ours, found), (torchs, expected)):
        kept = [torch.zeros_like(weight)]
        hidden = uses.hidden(uses.embed(uses.ids, weight))
        loss = uses.loss(hidden, weight, uses.labels)
        if uses is ours:
            loss.grad_fn.register_hook(KEEPERS[keeper](kept))
        (loss + (weight.pow(2).sum() if dense else 0)).backward()
        if uses is torchs:
            head = leaf(matrix)
            uses.loss(hidden.detach(), head, uses.labels).backward()
            gradients.append(head.grad)
        else:
            gradients.append(kept[-1] if len(kept) > 1 else kept[0].grad)
    assert_same(found.grad, expected.grad)
    assert_same(gradients[0].view(-1), gradients[1].view(-1))


def test_nothing_is_kept_alive_after_a_step():
    ours, _, matrix = both()
    weight = leaf(matrix)
    two_way(ours, weight)
    held = weakref.ref(weight.grad)
    weight.grad = None
    assert held() is None
    matrix_gone = weakref.ref(weight)
    del weight
    gc.collect()
    assert matrix_gone() is None


def test_a_gradient_is_that_of_its_own_matrix():
    """Two matrices of one shape in one backward pass."""
    ours, torchs, matrix = both()
    found = [leaf(matrix), leaf(matrix + 1)]
    expected = [leaf(matrix), leaf(matrix + 1)]
    for uses, (first, second) in ((ours, found), (torchs, expected)):
        hidden = uses.hidden(uses.embed(uses.ids, first) + uses.embed(uses.more, second))
        (uses.loss(hidden, first, uses.labels) + uses.loss(hidden, second, uses.labels)).backward()
    for one, other in zip(found, expected, strict=True):
        assert_same(one.grad, other.grad)


# --- padding, half precision, scaling --------------------------------------------------------------------------------


@pytest.mark.parametrize("padding", [3, -1, -11])
def test_the_row_of_the_padding_has_the_gradient_of_the_head_alone(padding):
    ours, torchs, matrix = both()
    row = padding % 11
    ours.ids[::2] = torchs.ids[::2] = row
    found, expected, head, alone = leaf(matrix), leaf(matrix), leaf(matrix), leaf(matrix)
    for uses, weight in ((ours, found), (torchs, expected)):
        rows = uses.embed(uses.ids, weight, padding)
        uses.loss(uses.hidden(rows), weight, uses.labels).backward()
    assert_same(found.grad, expected.grad)
    ours.loss(ours.hidden(matrix[ours.ids]), head, ours.labels).backward()
    assert_same(found.grad[row], head.grad[row])
    ours.embed(ours.ids, alone, padding).sum().backward()
    assert not alone.grad[row].any() and alone.grad.any()


@pytest.mark.parametrize("with_head", [False, True], ids=["alone", "with a head"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_in_half_precision_the_rows_of_a_frequent_word_are_summed_in_float32(dtype, with_head):
    weight, ids, factor = torch.randn(5, 8).to(dtype), torch.randint(3, (4096,)), (torch.rand(4096, 8) / 64).to(dtype)
    hidden, labels = torch.randn(16, 8).to(dtype), torch.randint(5, (16,))
    twins = leaf(weight), leaf(weight), leaf(weight, torch.float64)
    for each, embed, loss in zip(
        twins,
        (tied_embedding, F.embedding, F.embedding),
        (tied_cross_entropy, reference_cross_entropy, reference_cross_entropy),
        strict=True,
    ):
        rows = embed(ids, each) * factor.to(each.dtype)
        # As large as what the embedding brings, and before it in the backward pass.
        head = loss(hidden.to(each.dtype), each, labels) * 200 if with_head else 0
        (rows.sum() + head).backward()
    ours, usual = (error(each.grad, twins[2].grad) for each in twins[:2])
    # Rounded once, and where the head has given its gradient before, twice.
    assert ours <= usual and ours < (2e-3 if dtype == torch.bfloat16 else 2.5e-4) * (1 + with_head)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("of_ids", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("count", [0, 40])
def test_ids_of_either_integer_dtype_are_taken_as_torch_takes_them(count, of_ids, dtype):
    weight, ids = torch.randn(5, 8).to(dtype), torch.randint(5, (count,)).to(of_ids)
    found, expected = leaf(weight), leaf(weight, torch.float64)
    tied_embedding(ids, found, padding_idx=1).square().sum().backward()
    F.embedding(ids, expected, padding_idx=1).square().sum().backward()
    assert_same(found.grad.double(), expected.grad, 1e-6 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("fast_half", [False, True], ids=["products in float32", "products in half"])
def test_a_gradient_scaler_finds_the_unscaled_gradients(monkeypatch, fast_half):
    monkeypatch.setattr(arithmetic, "has_fast_half", lambda dtype: fast_half)
    ours, torchs, matrix = both(torch.float32, count=40)
    weight, twin = leaf(matrix), leaf(matrix, torch.float64)
    torchs.body = leaf(torchs.body, torch.float64)
    two_way(torchs, twin)
    optimizer = torch.optim.SGD([weight, ours.body], lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    with torch.autocast("cpu", torch.float16):
        loss = ours.two_way(weight)
    scaler.scale(loss).backward()
    assert error(weight.grad, twin.grad * 2.0**12) < 5e-3
    scaler.unscale_(optimizer)
    assert error(weight.grad, twin.grad) < 5e-3 and error(ours.body.grad, torchs.body.grad) < 5e-3
    before = weight.detach().clone()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**12
    assert error(before - weight.detach(), twin.grad * 0.1) < 5e-3


# --- models ----------------------------------------------------------------------------------------------------------


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = TiedEmbedding(11, 4, padding_idx=0)
        self.body = nn.Linear(4, 4)

    def forward(self, ids, labels):
        return tied_cross_entropy(torch.tanh(self.body(self.embedding(ids))), self.embedding.weight, labels)


def saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda model: pickle.loads(pickle.dumps(model)), "torch.save": saved}


@pytest.mark.parametrize("copied", COPIES)
def test_a_model_that_has_been_trained_can_be_copied_and_trained_on(copied):
    ids, labels = torch.randint(11, (9,)), torch.randint(11, (9,))
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(ids, labels).backward()
    optimizer.step()
    optimizer.zero_grad()
    copies = [COPIES[copied](model)]
    loss = model(ids, labels)
    copies.append(COPIES[copied](model))  # while a graph is alive
    loss.backward()
    for each in copies:
        assert each.embedding.weight is not model.embedding.weight and each.embedding.weight.grad is None
        each(ids, labels).backward()
        assert torch.equal(each.embedding.weight, model.embedding.weight)
        assert torch.equal(each.embedding.weight.grad, model.embedding.weight.grad)


def test_an_embedding_that_is_not_trained_is_torchs(monkeypatch):
    """No graph, no hook, nothing of this package in inference."""
    monkeypatch.setattr(embedding, "_TiedEmbedding", None)
    model, ids = Model(), torch.randint(11, (9,))
    with torch.no_grad():
        assert torch.equal(model.embedding(ids), F.embedding(ids, model.embedding.weight))
    model.embedding.weight.requires_grad_(False)
    assert not model.embedding(ids).requires_grad
