"""Words that a bias of minus infinity forbids, and class weights of 0: as finite as in torch, and of its values."""

import math
from itertools import product

import pytest
import torch

from hf_tying.losses import augmented_loss, reference_cross_entropy, tied_cross_entropy
from hf_tying.losses.augmented import reference_augmented_loss

from .helpers import NAMES, results, watched

pytestmark = pytest.mark.usefixtures("slow_half")

WORDS = 13
#: Which words are forbidden; labels are 0 to 8.
FORBIDDEN = {
    "none": [],
    "no target": [10, 11],
    "one target": [3],
    "a target and another": [3, 10],
    "two targets": [3, 4],
    "all but one target": [w for w in range(WORDS) if w != 3],
    "all": list(range(WORDS)),
}
CLASSES = {
    "alike": None,
    "all zero": torch.zeros(WORDS, dtype=torch.float64),
    "zero for some targets": torch.ones(WORDS, dtype=torch.float64).index_fill(0, torch.arange(4, 7), 0.0),
    "of either sign, in all nothing": torch.tensor([1.0, -1.0] * 6 + [0.0], dtype=torch.float64),
}
OPTIONS = {"plain": {}, "smoothed": {"label_smoothing": 0.1}, "capped": {"logit_softcap": 5.0}}


def problem(forbidden: str) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    hidden, weight, bias = (
        torch.randn(*n, dtype=torch.float64, generator=generator) for n in ((9, 4), (WORDS, 4), (WORDS,))
    )
    bias[FORBIDDEN[forbidden]] = -torch.inf
    return hidden, weight, torch.arange(9), bias


def assert_as_in_torch(found, expected):
    for name in NAMES:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-8, atol=1e-10, equal_nan=True)


@pytest.mark.parametrize("way", ["one block", "many blocks", "far apart"])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("classes", CLASSES)
@pytest.mark.parametrize("forbidden", FORBIDDEN)
def test_losses_and_gradients_are_those_of_torch(forbidden, classes, options, way):
    for reduction, cut in product(("none", "sum"), (False, True)):
        hidden, weight, labels, bias = problem(forbidden)
        if way == "far apart":  # the walk over logits
            hidden[8] *= 300
        given = dict(OPTIONS[options], reduction=reduction, class_weight=CLASSES[classes])
        keep = torch.arange(9) != 3 if cut and reduction == "none" else None  # the infinite one left out
        upstream = None if keep is None else keep.double()
        with watched(at_work=64 if way == "many blocks" else 10**6, narrowest=2, fewest_rows=1):
            found = results(tied_cross_entropy, hidden, weight, labels, bias, upstream, **given)
        expected = results(reference_cross_entropy, hidden, weight, labels, bias, upstream, **given)
        assert_as_in_torch(found, expected)


@pytest.mark.parametrize("forbidden", FORBIDDEN)
def test_the_augmented_loss_is_that_of_plain_torch(forbidden):
    found = results(augmented_loss, *problem(forbidden))
    expected = results(reference_augmented_loss, *problem(forbidden))
    assert math.isfinite(found["loss"]) == (forbidden in ("none", "no target"))
    assert_as_in_torch(found, expected)
