"""The losses and the embedding as modules are the functions."""

import pytest
import torch
from torch.nn import functional as F

from hf_tying.losses import (
    ProjectionPenalty,
    TiedCrossEntropy,
    TiedEmbedding,
    projection_penalty,
    reference_cross_entropy,
    tied_cross_entropy,
    tied_embedding,
)

from .helpers import NAMES, leaf, results, watched

pytestmark = pytest.mark.usefixtures("slow_half")


def test_the_module_is_the_function():
    hidden, weight, labels = torch.randn(9, 4), torch.randn(31, 4), torch.randint(31, (9,))
    bias, classes = torch.randn(31), torch.rand(31)
    options = {"ignore_index": int(labels[2]), "label_smoothing": 0.1, "reduction": "sum", "logit_scale": 0.5,
               "logit_softcap": 3.0, "memory_budget": 500}  # fmt: skip
    module = TiedCrossEntropy(**options)
    for name, value in options.items():
        assert f"{name}={value!r}" in repr(module)
    found = results(lambda *x, bias: module(*x, bias, classes), hidden, weight, labels, bias)
    expected = results(tied_cross_entropy, hidden, weight, labels, bias, class_weight=classes, **options)
    assert all(torch.equal(found[name], expected[name]) for name in NAMES)
    assert "backend='torch'" in repr(TiedCrossEntropy(backend="torch")) and "None" not in repr(TiedCrossEntropy())
    assert not list(module.parameters())
    found = TiedCrossEntropy()(hidden, weight, labels, num_items_in_batch=90)
    assert torch.allclose(found, F.cross_entropy(hidden @ weight.T, labels) / 10)


@pytest.mark.parametrize("padding", [None, 3, -1])
def test_the_embedding_module_is_the_function_and_torchs(padding):
    module = TiedEmbedding(7, 4, padding_idx=padding)
    usual = torch.nn.Embedding(7, 4, padding_idx=padding)
    usual.load_state_dict(module.state_dict())
    ids = torch.tensor([[0, 3, 3], [6, 0, 1]])
    factor = torch.randn(2, 3, 4)
    weight = leaf(module.weight)
    assert module.padding_idx == usual.padding_idx and torch.equal(module(ids), usual(ids))
    for out in (module(ids), usual(ids), tied_embedding(ids, weight, padding)):
        (out * factor).sum().backward()
    assert torch.allclose(module.weight.grad, usual.weight.grad) and torch.equal(module.weight.grad, weight.grad)


@pytest.mark.parametrize("option", [{"max_norm": 1.0}, {"scale_grad_by_freq": True}, {"sparse": True}], ids=str)
def test_an_embedding_with_another_kind_of_gradient_is_refused(option):
    with pytest.raises(ValueError, match=f"TiedEmbedding does not know {next(iter(option))}"):
        TiedEmbedding(7, 4, **option)
    assert TiedEmbedding(7, 4, **{name: type(value)() for name, value in option.items()}).weight.shape == (7, 4)


def test_a_module_refuses_what_its_function_does_not_take():
    with pytest.raises(TypeError, match="smoothing"):
        TiedCrossEntropy(smoothing=0.1)
    with pytest.raises(TypeError, match="bias"):
        TiedCrossEntropy(bias=torch.randn(31))
    tensors = torch.randn(9, 4), torch.randn(31, 4), torch.randint(31, (9,))
    with pytest.raises(TypeError, match="at most 6 arguments"):
        TiedCrossEntropy()(*tensors, None, None, None, "sum")


def test_a_penalty_pickled_by_version_0_1_has_its_options():
    module, projection = ProjectionPenalty.__new__(ProjectionPenalty), torch.randn(3, 3)
    module.__setstate__({**vars(torch.nn.Module()), "norm": "fro", "strength": 0.3})
    assert torch.equal(module(projection), projection_penalty(projection, norm="fro", strength=0.3))


class Marked(torch.Tensor):
    """Any subclass of a tensor, as sharding and quantisation make them."""


def test_a_matrix_of_a_kind_that_is_not_torchs_own_goes_the_usual_way():
    hidden, labels = torch.randn(9, 4), torch.randint(31, (9,))
    plain = torch.randn(31, 4)
    weight = plain.as_subclass(Marked).requires_grad_()
    with watched() as seen:
        loss = tied_cross_entropy(tied_embedding(labels, weight) + hidden, weight, labels)
    assert not seen
    loss.backward()
    twin = leaf(plain)
    reference_cross_entropy(F.embedding(labels, twin) + hidden, twin, labels).backward()
    assert torch.allclose(weight.grad.as_subclass(torch.Tensor), twin.grad, atol=1e-6)
