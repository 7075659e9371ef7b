"""The tied softmax under `torch.compile`."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from hf_tying.losses import reference_cross_entropy, tied_cross_entropy, tied_embedding, tied_log_probs

from ..processes import run_python
from .helpers import error, leaf, watched

pytestmark = pytest.mark.usefixtures("slow_half")


def test_a_compiled_step_has_the_same_numbers_and_no_warning(recwarn):
    def forward(embedding, loss, ids, weight, labels):
        hidden = torch.tanh(embedding(ids, weight)) * 2
        return loss(hidden, weight, labels, label_smoothing=0.1) * 3

    ids, labels, weight = torch.randint(31, (2, 9)), torch.randint(31, (2, 9)), torch.randn(31, 4)
    twin = leaf(weight, torch.float64)
    expected = forward(F.embedding, reference_cross_entropy, ids, twin, labels)
    expected.backward()
    torch._dynamo.reset()
    compiled = torch.compile(forward, backend="aot_eager")
    for _ in range(2):
        ours = leaf(weight)
        with watched() as seen:
            loss = compiled(tied_embedding, tied_cross_entropy, ids, ours, labels)
        loss.backward()
        assert seen["two walks"] == 1
        assert error(loss.detach(), expected.detach()) < 1e-6 and error(ours.grad, twin.grad) < 1e-6
    torch._dynamo.reset()
    assert not [str(each.message) for each in recwarn if "hf_tying" in f"{each.filename} {each.message}"
                or "cross_entropy" in str(each.message)]  # fmt: skip


LOSSES = {"cross entropy": tied_cross_entropy, "log-probabilities": lambda *args: tied_log_probs(*args).log_probs}
every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)


@every_loss
def test_where_one_graph_is_asked_for_the_way_out_is_told(loss, monkeypatch):
    """Not by a compilation that fails: after one torch counts one more reference to each argument, in all frames."""
    told = []
    monkeypatch.setattr(torch.compiler, "is_dynamo_compiling", lambda: True)
    monkeypatch.setattr(torch._dynamo, "graph_break", lambda msg: told.append(msg))
    loss(torch.randn(9, 4), torch.randn(31, 4), torch.arange(9))
    assert len(told) == 1 and "compile without fullgraph=True" in told[0]


class Scored(torch.nn.Module):
    def __init__(self, loss):
        super().__init__()
        self.loss, self.weight = loss, torch.nn.Parameter(torch.randn(31, 4))

    def forward(self, hidden, labels):
        return self.loss(hidden, self.weight, labels)


@every_loss
def test_a_loss_is_exported(loss):
    model, inputs = Scored(loss), (torch.randn(9, 4), torch.arange(9))
    exported = torch.export.export(model, inputs, strict=False).module()
    assert torch.allclose(exported(*inputs), model(*inputs), rtol=0, atol=1e-5)


@pytest.mark.parametrize("without_values", ["meta", FakeTensorMode], ids=["meta", "fake"])
@every_loss
def test_a_loss_of_tensors_without_values_has_its_shape(loss, without_values):
    with torch.device("meta") if without_values == "meta" else without_values():
        tensors = torch.randn(9, 4, requires_grad=True), torch.randn(31, 4), torch.zeros(9, dtype=torch.int64)
        found = loss(*tensors)
        found.sum().backward()
    assert found.shape == loss(torch.randn(9, 4), torch.randn(31, 4), torch.arange(9)).shape
    assert tensors[0].grad.shape == (9, 4)


def test_a_loss_imports_no_compiler_and_is_not_traced_by_one_imported_later():
    code = """
import sys, torch
from hf_tying.losses import autograd, tied_cross_entropy

def traced(*args, make=autograd.counted_positions):
    print(torch.compiler.is_compiling())
    return make(*args)

autograd.counted_positions = traced
tensors = torch.randn(9, 4), torch.randn(31, 4), torch.randint(31, (9,))
expected = tied_cross_entropy(*tensors)
print("torch._dynamo" in sys.modules)
found = torch.compile(lambda *tensors: tied_cross_entropy(*tensors) * 2, backend="eager")(*tensors)
print(torch.equal(found, expected * 2))
"""
    assert run_python("-c", code).stdout.split() == ["False", "False", "False", "True"]
