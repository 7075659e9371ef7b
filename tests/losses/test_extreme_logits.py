"""`tied_cross_entropy` where logits are far apart, no numbers, or of a single word."""

import math

import pytest
import torch

from hf_tying.losses import arithmetic, tied_cross_entropy

from .helpers import NAMES, error, exactly, leaf, results, watched, worst

pytestmark = pytest.mark.usefixtures("slow_half")


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}, {"logit_scale": 2.0}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_logits_whose_exponentials_overflow_take_the_walk_over_logits(dtype, options):
    hidden, weight = (torch.randn(40, 16) * 300).to(dtype), torch.randn(50, 16, dtype=dtype)
    labels = torch.randint(50, (40,))
    for fewest_rows, budget in ((1, 2000), (192, 10**6)):
        with watched(at_work=800, narrowest=4, fewest_rows=fewest_rows) as seen:
            found = results(tied_cross_entropy, hidden, weight, labels, memory_budget=budget, **options)
        assert seen["overflows"] == seen["logits"] >= 1 and not seen["exponentials"]
        expected = exactly(hidden, weight, labels, **options)
        single = dtype == torch.float32
        for name in NAMES[:3]:
            # The difference of two logits near 5000 is known to 5e-4 in float32.
            tolerance = 1e-12 if not single else 1e-6 if name == "loss" else 5e-4
            assert error(found[name], expected[name]) < tolerance


def test_only_the_chunk_of_tokens_that_overflows_takes_the_walk_over_logits():
    hidden, weight, labels = torch.randn(64, 4), torch.randn(20, 4), torch.randint(20, (64,))
    hidden[-1] = -1000 * weight[labels[-1]]
    with watched(at_work=200, narrowest=2, fewest_rows=2) as seen:
        found = results(tied_cross_entropy, hidden, weight, labels, memory_budget=1000)
    assert seen["overflows"] == seen["logits"] == 1 and seen["exponentials"] >= 3
    expected = exactly(hidden, weight, labels)
    assert error(found["hidden"][:32], expected["hidden"][:32]) < 1e-6
    assert worst(found, expected) < 5e-4  # of that one token


@pytest.mark.parametrize("walk", ["exponentials", "logits"])
def test_a_very_sure_model_has_a_tiny_loss_and_not_none(walk):
    """Softmax in float32 says probability 1, loss 0, gradient 0 from a difference of 17 on."""
    weight, labels = torch.linalg.qr(torch.randn(32, 32)).Q[:30], torch.arange(30)
    hidden = weight * torch.linspace(18, 34, 30)[:, None] + torch.randn(30, 32) / 2
    extra = (torch.cat([hidden, -100 * weight[:1]]), weight, torch.cat([labels, labels[:1]]))
    tensors = (hidden, weight, labels) if walk == "exponentials" else extra
    with watched() as seen:
        found = results(tied_cross_entropy, *tensors, reduction="none")
    assert seen[walk]
    losses, rows = found["loss"][:30], found["hidden"][:30]
    # Not from log_softmax, which has 1e-15 of the logits' size, also in float64.
    wide = leaf(hidden, torch.float64)
    logits = wide @ weight.double().T
    others = (logits - logits.diagonal()[:, None]).masked_fill(torch.eye(30, dtype=torch.bool), -torch.inf)
    expected = others.exp().sum(1).log1p()
    (gradient,) = torch.autograd.grad(expected.sum(), wide)
    assert 0 < expected.min() < 1e-13 and expected.max() < 1e-6
    assert ((losses.double() - expected).abs() <= 2e-5 * expected).all()
    assert ((rows.double() - gradient).norm(dim=1) <= 2e-5 * gradient.norm(dim=1)).all()


SOFTCAPS = [20.0, 60.0, 100.0, 1000.0]


@pytest.mark.parametrize("cap", SOFTCAPS)
def test_a_soft_cap_of_any_size_has_the_gradient_of_plain_torch_where_the_model_is_sure(cap):
    """Gemma 2 has 30 and 50; 1000 is next to none."""
    hidden, weight = torch.randn(12, 16) * 30, torch.randn(20, 16)
    labels = (hidden @ weight.T).argmax(1)
    found = results(tied_cross_entropy, hidden, weight, labels, logit_softcap=cap, reduction="sum")
    expected = exactly(hidden, weight, labels, logit_softcap=cap, reduction="sum")
    assert worst(found, expected) < 1e-4


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("cut", [False, True], ids=["one block", "many blocks"])
def test_a_token_that_is_no_number_has_no_loss_and_the_others_have_theirs(value, cut):
    hidden, weight, labels = torch.randn(9, 4), torch.randn(31, 4), torch.randint(31, (9,))
    hidden[4, 2] = value
    with watched(at_work=64 if cut else 10**6, narrowest=2, fewest_rows=1):
        found = results(
            tied_cross_entropy, hidden, weight, labels, reduction="none", memory_budget=1000 if cut else None
        )
    expected = exactly(hidden, weight, labels, reduction="none")
    assert expected["loss"].isnan().tolist() == [i == 4 for i in range(9)]
    for name in NAMES[:3]:
        assert torch.allclose(found[name].double(), expected[name], rtol=1e-4, atol=1e-6, equal_nan=True)


def test_a_token_with_one_infinite_logit_that_of_its_target_has_no_loss():
    """In plain torch it has none: the largest logit is subtracted, and infinity less infinity is no number."""
    hidden, weight = torch.tensor([[math.inf, 0.0]]), torch.tensor([[1.0, 1.0], [-1.0, 1.0]])
    labels = torch.tensor([0])
    assert exactly(hidden, weight, labels)["loss"].isnan()
    assert results(tied_cross_entropy, hidden, weight, labels)["loss"].isnan()


@pytest.mark.parametrize("value", [math.nan, math.inf], ids=str)
def test_a_token_that_is_no_number_and_is_ignored_changes_nothing(value):
    hidden, weight, labels = torch.randn(9, 4), torch.randn(31, 4), torch.randint(31, (9,))
    labels[4] = -100
    expected = exactly(hidden, weight, labels)
    hidden[4, 2] = value
    found = results(tied_cross_entropy, hidden, weight, labels)
    assert worst(found, expected) < 1e-6
    assert not found["hidden"][4].any()


@pytest.mark.parametrize("walk", ["exponentials", "logits"])
def test_a_word_forbidden_by_its_bias_is_never_expected(walk):
    hidden, weight, labels, bias = torch.randn(9, 4), torch.randn(31, 4), torch.arange(9), torch.randn(31)
    bias[10:12] = -torch.inf
    if walk == "logits":
        hidden[0] *= 1000
    with watched() as seen:
        found = results(tied_cross_entropy, hidden, weight, labels, bias)
    assert seen[walk] == 1
    expected = exactly(hidden, weight, labels, bias)
    assert worst(found, expected) < (1e-6 if walk == "exponentials" else 1e-4)
    assert not found["weight"][10:12].any() and not found["bias"][10:12].any()


@pytest.mark.parametrize("walk", ["exponentials", "logits"])
def test_a_word_forbidden_by_its_bias_that_is_the_target_has_an_infinite_loss(walk):
    """And finite gradients: in plain torch its probability is 0, and what is expected is 1."""
    hidden, weight, labels, bias = torch.randn(9, 4), torch.randn(31, 4), torch.arange(9), torch.randn(31)
    bias[3] = -torch.inf
    if walk == "logits":
        hidden[0] *= 1000
    found = results(tied_cross_entropy, hidden, weight, labels, bias, reduction="none")
    expected = exactly(hidden, weight, labels, bias, reduction="none")
    assert expected["loss"].isinf().tolist() == [i == 3 for i in range(9)]
    for name in NAMES:
        assert torch.allclose(found[name].double(), expected[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("fast_half", [False, True])
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.5}, {"logit_softcap": 2.0}], ids=str)
def test_a_vocabulary_of_one_word_has_no_loss_and_no_gradient(monkeypatch, options, fast_half, dtype):
    monkeypatch.setattr(arithmetic, "has_fast_half", lambda dtype: fast_half)
    labels = torch.zeros(9, dtype=torch.int64)
    found = results(
        tied_cross_entropy, torch.randn(9, 4).to(dtype), torch.randn(1, 4).to(dtype), labels, torch.randn(1), **options
    )
    assert not any(value.any() for value in found.values())
