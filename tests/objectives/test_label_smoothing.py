"""Label smoothing that a model asks for itself, beside the one of `use_tied_loss`."""

import pytest
import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from hf_tying import TyingError, use_tied_loss
from hf_tying.objectives.step_loss import LossSettings
from hf_tying.objectives.tied_softmax import TiedSoftmax

from .helpers import batch, cross_entropy, model_with


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


@pytest.mark.parametrize("deferred", [True, False])
def test_a_metric_that_the_model_computes_without_gradients_is_not_smoothed(deferred):
    torch.manual_seed(0)
    matrix = torch.nn.Parameter(torch.randn(11, 6))
    hidden, labels = torch.randn(5, 6), torch.tensor([1, 4, -100, 10, 0])
    with TiedSoftmax(matrix, LossSettings(label_smoothing=0.3), defers=deferred) as softmax:
        logits = F.linear(hidden, matrix)
        with torch.no_grad():
            metric = F.cross_entropy(logits, labels)
        assert not softmax.loss.was_asked
        loss = F.cross_entropy(logits, labels)
    assert softmax.loss.was_asked
    for found, smoothing in ((metric, 0.0), (loss, 0.3)):
        expected = F.cross_entropy(hidden @ matrix.T, labels, label_smoothing=smoothing)
        assert torch.allclose(found, expected, rtol=0, atol=1e-5)


def test_a_loss_that_is_recomputed_outside_of_the_step_is_refused_and_not_smoothed_in_one_of_its_passes():
    def loss(model, hidden, labels):
        return checkpoint(lambda hidden: cross_entropy(model.lm_head(hidden), labels), hidden, use_reentrant=True)

    model = use_tied_loss(model_with(loss), label_smoothing=0.1)
    with pytest.raises(TyingError, match="label_smoothing=0.1 of use_tied_loss took no part"):
        model(**batch(model)).loss.backward()
