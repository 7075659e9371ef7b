"""What no other test would notice: the default budget of bytes, and sums of half-precision rows."""

import pytest
import torch

from hf_tying.losses import tied_cross_entropy, tied_embedding
from hf_tying.losses.chunks import MIB, default_budget


@pytest.mark.parametrize(
    ("vocabulary", "width", "itemsize", "expected"),
    [
        (100, 16, 4, 16 * MIB),  # a small matrix: the least
        (32 * MIB, 1, 1, 32 * MIB),  # as many bytes as the gradient has
        (20_000, 600, 4, 48_000_000),
        (64 * MIB, 1, 1, 64 * MIB),
        (100 * MIB, 1, 2, 64 * MIB),  # no more than that
        (512 * MIB, 1, 1, 64 * MIB),
        (1024 * MIB, 1, 1, 128 * MIB),  # or an eighth of it
        (262_144, 1152, 4, 262_144 * 1152 * 4 // 8),
    ],
)
def test_the_default_budget_follows_the_gradient_of_the_matrix(vocabulary, width, itemsize, expected):
    assert default_budget(vocabulary, width, itemsize) == expected


@pytest.mark.parametrize(("dtype", "most"), [(torch.bfloat16, 2**8), (torch.float16, 2**11)])
@pytest.mark.parametrize("claimed", [False, True])
def test_rows_of_one_word_are_summed_in_float32_and_rounded_once(dtype, most, claimed):
    """One more than `most` ones: a sum in half precision stays at `most`."""
    weight = torch.zeros(8, 4, dtype=dtype, requires_grad=True)
    ids = torch.full((most + 2,), 3)
    loss = tied_embedding(ids, weight).sum(dtype=torch.float32)
    if claimed:  # the gradient of the softmax is there before, and the rows are added to it
        labels = torch.tensor([1, 2])
        loss = loss + tied_cross_entropy(torch.zeros(2, 4, dtype=dtype, requires_grad=True), weight, labels)
    loss.backward()
    assert torch.equal(weight.grad[3], torch.full((4,), float(most + 2)).to(dtype))
    assert weight.grad[3, 0] > most and not weight.grad[[0, 1, 2, 4, 5, 6, 7]].any()
