"""Label smoothing that a model asks for itself, beside the one of `use_tied_loss`."""

import pytest
import torch
from torch.nn import functional as F

from hf_tying.objectives.step_loss import LossSettings
from hf_tying.objectives.tied_softmax import TiedSoftmax


@pytest.mark.parametrize("own", [0.0, 0.3])
@pytest.mark.parametrize("ours", [0.0, 0.1])
@pytest.mark.parametrize("deferred", [True, False])
def test_what_the_model_asks_for_counts_before_what_use_tied_loss_has(own, ours, deferred):
    torch.manual_seed(0)
    matrix = torch.nn.Parameter(torch.randn(11, 6, dtype=torch.float64))
    hidden, labels = torch.randn(5, 6, dtype=torch.float64, requires_grad=True), torch.tensor([1, 4, -100, 10, 0])
    with TiedSoftmax(matrix, LossSettings(label_smoothing=ours), defers=deferred) as softmax:
        found = F.cross_entropy(F.linear(hidden, matrix), labels, label_smoothing=own)
    assert softmax.deferred is deferred
    expected = F.cross_entropy(hidden @ matrix.T, labels, label_smoothing=own or ours)
    assert torch.allclose(found, expected, rtol=0, atol=1e-12)
    gradients = [torch.autograd.grad(loss, (hidden, matrix)) for loss in (found, expected)]
    assert all(torch.allclose(a, b, rtol=0, atol=1e-12) for a, b in zip(*gradients, strict=True))
