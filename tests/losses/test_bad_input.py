"""Bad input of `tied_cross_entropy` and `tied_embedding` is refused as torch refuses it, before any work."""

import math

import pytest
import torch
from torch.nn import functional as F

from hf_tying.losses import (
    augmented_loss,
    contrastive_weight_tying_loss,
    tied_cross_entropy,
    tied_embedding,
    tied_log_probs,
)

from .helpers import leaf, watched

pytestmark = pytest.mark.usefixtures("slow_half")


def changed(**changes) -> dict:
    torch.manual_seed(0)
    usual = {"hidden": torch.randn(4, 3), "weight": torch.randn(5, 3), "labels": torch.tensor([0, 1, 4, 2])}
    return usual | changes


# What is changed in good input, and what is said: what was expected, and what was found.
BAD = {
    "a label beyond the vocabulary": ({"labels": torch.tensor([0, 1, 5, 2])}, "Target 5 .*expected words from 0 to 4"),
    "a negative label": ({"labels": torch.tensor([0, -100, -1, 2])}, "Target -1 .*from 0 to 4, or ignore_index=-100"),
    "the default where another is ignored": (
        {"labels": torch.tensor([0, -100, 3, 2]), "ignore_index": 3},
        "Target -100 .*or ignore_index=3",
    ),
    "too few labels": ({"labels": torch.tensor([0, 1, 4])}, r"Expected one label .*\(4,\), got .*\(3,\)"),
    "float labels": (
        {"labels": torch.tensor([0.0, 1, 4, 2])},
        "Expected labels of dtype torch.int64, got torch.float32",
    ),
    "int32 labels": (
        {"labels": torch.tensor([0, 1, 4, 2]).int()},
        "Expected labels of dtype torch.int64, got torch.int32",
    ),
    "hidden and weight of different width": (
        {"hidden": torch.randn(4, 2)},
        r"expected .*\(\.\.\., 3\).*\(5, 3\).*got \(4, 2\)",
    ),
    "hidden without a width": (
        {"hidden": torch.tensor(1.0), "labels": torch.tensor(1)},
        r"expected .*\(\.\.\., 3\).*got \(\)",
    ),
    "mixed dtypes": (
        {"hidden": torch.randn(4, 3).bfloat16()},
        "Expected .* one dtype, got torch.bfloat16 and torch.float32",
    ),
    "integer hidden": (
        {"hidden": torch.ones(4, 3).long()},
        "Expected hidden in a floating-point dtype, got torch.int64",
    ),
    "integer bias": ({"bias": torch.ones(5).long()}, "Expected bias in a floating-point dtype, got torch.int64"),
    "integer class weights": (
        {"class_weight": torch.ones(5).long()},
        "Expected class_weight in a floating-point dtype",
    ),
    "a bias for other words": ({"bias": torch.zeros(4)}, r"Expected bias of shape \(5,\), got \(4,\)"),
    "class weights for other words": (
        {"class_weight": torch.ones(4)},
        r"Expected class_weight of shape \(5,\), got \(4,\)",
    ),
    "class weights in a column": (
        {"class_weight": torch.ones(5, 1)},
        r"Expected class_weight of shape \(5,\), got \(5, 1\)",
    ),
    "an unknown reduction": ({"reduction": "avg"}, "'avg' .*expected one of .*mean.*sum.*none"),
    "a smoothing above 1": ({"label_smoothing": 1.5}, "at least 0 and below 1, got 1.5"),
    "a matrix of one dimension": ({"weight": torch.randn(3)}, r"Expected weight of shape \(V, D\), got \(3,\)"),
    "hidden on another device": (
        {"hidden": torch.randn(4, 3, device="meta")},
        "Expected hidden on the device of labels, cpu; it is on meta",
    ),
    "labels on another device": (
        {"labels": torch.ones(4, dtype=torch.int64, device="meta")},
        "on the device of labels, meta; it is on cpu",
    ),
    "a bias on another device": (
        {"bias": torch.ones(5, device="meta")},
        "Expected bias on the device of labels, cpu; it is on meta",
    ),
}
# What torch takes, or does not know.
BAD_HERE = {
    "a matrix on another device": (
        RuntimeError,
        {"weight": torch.randn(5, 3, device="meta")},
        "Expected weight on .* cpu; it is on meta",
    ),
    "labels of another shape and as many": (
        ValueError,
        {"labels": torch.ones(2, 2).long()},
        r"Expected .*\(4,\), got .*\(2, 2\)",
    ),
    "a smoothing of 1": (RuntimeError, {"label_smoothing": 1.0}, "at least 0 and below 1, got 1.0"),
    "a negative smoothing": (RuntimeError, {"label_smoothing": -0.1}, "at least 0 and below 1, got -0.1"),
    "a smoothing that is no number": (RuntimeError, {"label_smoothing": math.nan}, "at least 0 and below 1, got nan"),
    "a count of items with a sum": (
        ValueError,
        {"num_items_in_batch": 4, "reduction": "sum"},
        "num_items_in_batch .*'mean', not 'sum'",
    ),
    "a soft cap of 0": (ValueError, {"logit_softcap": 0.0}, "logit_softcap must be above 0, got 0.0"),
    "a soft cap that is no number": (
        ValueError,
        {"logit_softcap": math.nan},
        "logit_softcap must be above 0, got nan",
    ),
    "a scale for each word": (ValueError, {"logit_scale": torch.ones(5)}, r"logit_scale has the shape \(5,\): .* one"),
    "a soft cap for each word": (ValueError, {"logit_softcap": torch.ones(5)}, r"logit_softcap has the shape \(5,\)"),
    "a count for each token": (ValueError, {"num_items_in_batch": torch.ones(4)}, r"num_items.* has the shape \(4,\)"),
    "a head of whole numbers": (ValueError, {"head_dtype": torch.int32}, "head_dtype=torch.int32: .*floating-point"),
    "an unknown backend": (ValueError, {"backend": "fast"}, "'fast'.*auto.*torch"),
}


def refused(kind: type[Exception], changes: dict, message: str) -> None:
    given = changed(**changes)
    trained = [x for x in given.values() if torch.is_tensor(x) and x.is_floating_point()]
    trained = [x.requires_grad_() for x in trained]
    with watched() as seen, pytest.raises(kind, match=message):
        tied_cross_entropy(**given)
    assert not seen and all(x.grad is None for x in trained)


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_by_the_exception_that_torch_raises(case):
    changes, message = BAD[case]
    with pytest.raises(Exception) as torchs:
        given = changed(**changes)
        logits = F.linear(given["hidden"], given["weight"], given.get("bias"))
        options = {
            "weight": given.get("class_weight"),
            "ignore_index": given.get("ignore_index", -100),
            "reduction": given.get("reduction", "mean"),
            "label_smoothing": given.get("label_smoothing", 0.0),
        }
        F.cross_entropy(logits.reshape(-1, logits.shape[-1]), given["labels"].reshape(-1), **options)  # fmt: skip
    refused(torchs.type, changes, message)


@pytest.mark.parametrize("case", BAD_HERE)
def test_what_torch_takes_or_does_not_know_is_refused(case):
    refused(*BAD_HERE[case])


@pytest.mark.parametrize("loss", [tied_log_probs, augmented_loss, contrastive_weight_tying_loss])
def test_a_temperature_for_each_token_is_refused(loss):
    with pytest.raises(ValueError, match=r"temperature has the shape \(4, 1\): expected one number"):
        loss(**changed(), temperature=torch.ones(4, 1))


def test_an_id_outside_the_vocabulary_is_refused_by_the_embedding():
    weight = leaf(torch.randn(5, 3))
    for ids in ([0, 5], [0, -1]):
        with pytest.raises(IndexError):
            tied_embedding(torch.tensor(ids), weight)
    with pytest.raises(RuntimeError, match="[Ii]nt|[Ll]ong"):
        tied_embedding(torch.tensor([0.0, 1.0]), weight)
