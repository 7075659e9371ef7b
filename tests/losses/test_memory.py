"""The memory of a training step: one gradient of the matrix, and the budget."""

import pytest
import torch
from torch.nn import functional as F

from hf_tying.losses import reference_cross_entropy, tied_cross_entropy, tied_embedding

from .helpers import metered

pytestmark = pytest.mark.usefixtures("slow_half")


N, D, V = 512, 64, 8000


def step(embedding, loss, budget=None, dtype=torch.float32):
    """Forward and backward of a model with nothing between its embedding and its head."""
    ids, labels = torch.randint(V, (N,)), torch.randint(V, (N,))
    weight = torch.randn(V, D).to(dtype).requires_grad_()
    options = {} if budget is None else {"memory_budget": budget}

    def run():
        loss(embedding(ids, weight), weight, labels, **options).backward()

    _, meter = metered(run)
    assert weight.grad is not None
    return meter


@pytest.mark.parametrize("budget", [0, 2**18, 2**20, 2**23])
def test_a_step_needs_one_gradient_of_the_matrix_and_the_budget(budget):
    meter = step(tied_embedding, tied_cross_entropy, budget)
    # With no budget a block is as narrow as blocks are.
    assert meter.peak <= V * D * 4 + max(budget, N * 128 * 4) + 6 * N * D * 4 + 2**16
    assert meter.together[V * D * 4] == 1
    if budget < V * D * 4:
        assert meter.as_large_as(V * D * 4) == 1


def test_in_half_precision_the_one_gradient_is_half_as_large():
    meter = step(tied_embedding, tied_cross_entropy, 2**20, torch.bfloat16)
    assert meter.peak <= V * D * 2 + 2**20 + 6 * N * D * 4 + 2**16
    assert meter.together[V * D * 2] == 1 and meter.as_large_as(V * D * 2) == 1


def test_the_usual_path_needs_three_gradients_of_the_matrix_and_the_logits():
    """What the meter counts where there is something to count."""
    meter = step(lambda ids, weight: F.embedding(ids, weight), reference_cross_entropy)
    assert meter.peak > 2 * V * D * 4 + 2 * N * V * 4
    assert meter.together[V * D * 4] >= 2 and meter.as_large_as(V * D * 4) >= 4


def test_the_loss_of_each_token_needs_no_more():
    meter = step(
        tied_embedding, lambda *tensors, **options: tied_cross_entropy(*tensors, reduction="none", **options).sum(),
        budget=2**20,
    )  # fmt: skip
    assert meter.peak <= V * D * 4 + 2**20 + 6 * N * D * 4 + 2**16 and meter.as_large_as(V * D * 4) == 1
