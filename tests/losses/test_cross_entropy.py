"""`tied_cross_entropy` against plain torch: values and gradients, whatever the shape, the options and the budget."""

from collections import Counter
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import event, given
from hypothesis import strategies as st

from hf_tying.losses import arithmetic, autograd, tied_cross_entropy

from .helpers import EVERY_WAY, NAMES, error, exactly, leaf, naive, results, steady, watched, worst

pytestmark = pytest.mark.usefixtures("slow_half")

HALF = [torch.bfloat16, torch.float16]


@dataclass
class Problem:
    hidden: torch.Tensor
    weight: torch.Tensor
    labels: torch.Tensor
    options: dict = field(default_factory=dict)
    budget: int = 0
    at_work: int = 10**6
    narrowest: int = 1
    fewest_rows: int = 1

    def compared(self) -> tuple[dict, dict, Counter]:
        with watched(self.at_work, self.narrowest, self.fewest_rows) as seen:
            found = results(
                tied_cross_entropy, self.hidden, self.weight, self.labels, memory_budget=self.budget, **self.options
            )
        return found, exactly(self.hidden, self.weight, self.labels, **self.options), seen


@st.composite
def problems(draw, dtypes) -> Problem:
    dtype = draw(st.sampled_from(dtypes))
    count = draw(st.sampled_from([0, 1, 2, 3, 6, 13, 24, 40]))
    width = draw(st.sampled_from([1, 2, 4, 9]))
    words = draw(st.sampled_from([1, 2, 3, 7, 12, 31]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    spread = draw(st.sampled_from([1.0, 1.0, 3.0, 60.0])) if dtype in (torch.float32, torch.float64) else 1.0
    hidden, weight = (normal(count, width) * spread).to(dtype), normal(words, width).to(dtype)
    labels = torch.randint(words, (count,), generator=generator)
    shape = draw(st.sampled_from(["flat", "batched", "transposed", "expanded"]))
    if shape == "batched" and count % 2 == 0:
        hidden, labels = hidden.view(2, count // 2, width), labels.view(2, count // 2)
    elif shape == "transposed":
        hidden, weight = hidden.t().contiguous().t(), weight.t().contiguous().t()
    elif shape == "expanded":
        hidden = hidden[:1].expand(count, width) if count else hidden

    options = {}
    if draw(st.booleans()):
        options["ignore_index"] = draw(st.sampled_from([-100, -1, 0, words - 1, words + 5]))
    ignored = draw(st.sampled_from(["none", "some", "all", "all but one"]))
    drop = {"none": 0.0, "some": 0.4, "all": 2.0, "all but one": 2.0}[ignored]
    dropped = torch.rand(labels.shape, generator=generator) < drop
    if ignored == "all but one" and count:
        dropped.view(-1)[count // 2] = False
    labels = labels.masked_fill(dropped, options.get("ignore_index", -100))
    if draw(st.booleans()):
        options["bias"] = normal(words).to(dtype)
    if draw(st.booleans()):
        options["label_smoothing"] = draw(st.sampled_from([0.1, 0.7]))
    if draw(st.booleans()):
        weights = normal(words).abs() + 0.1
        if words > 1 and draw(st.booleans()):
            weights[int(torch.randint(words, (), generator=generator))] = 0.0
        options["class_weight"] = weights.to(torch.float64 if dtype == torch.float64 else torch.float32)
    options["reduction"] = draw(st.sampled_from(["mean", "mean", "sum", "none"]))
    if options["reduction"] == "mean":
        items = draw(st.sampled_from([None, 0, 7, torch.tensor(5), torch.tensor(2.5), torch.tensor(0)]))
        options |= {} if items is None else {"num_items_in_batch": items}
    if draw(st.booleans()):
        options["logit_scale"] = draw(st.sampled_from([0.25, 1.75]))
    if draw(st.booleans()):
        options["logit_softcap"] = draw(st.sampled_from([1.5, 30.0]))
    if options["reduction"] == "none":
        options["upstream"] = torch.rand(labels.shape, generator=generator, dtype=torch.float64).to(dtype) * 2 - 0.5
    else:
        options["upstream"] = draw(st.sampled_from([None, 1.7, -0.25]))
    return Problem(
        hidden, weight, labels, options,
        budget=draw(st.sampled_from([0, 1, 64, 300, 1000, 4000, 10**7])),
        at_work=draw(st.sampled_from([1, 64, 512, 10**6])),
        narrowest=draw(st.sampled_from([1, 2, 5])),
        fewest_rows=draw(st.sampled_from([1, 3])),
    )  # fmt: skip


def assert_close(found: dict, expected: dict, problem: Problem, loss: float, gradient: float) -> None:
    """`loss` relative; `gradient` relative in the norm. Nothing is lost against what cancels in a sum of terms."""
    hidden, weight = problem.hidden, problem.weight
    exact = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    assert found["loss"].dtype == exact and found["loss"].shape == expected["loss"].shape
    scale = problem.options.get("logit_scale", 1.0)
    # The difference of two logits is known to a rounding of the largest; below 8 that is less than the tolerance.
    largest = max(1.0, float(hidden.double().norm(dim=-1).max()) * float(weight.double().norm(dim=1).max()) * scale / 8
                  if hidden.numel() else 1.0)  # fmt: skip
    assert torch.allclose(found["loss"].double(), expected["loss"], rtol=loss * largest, atol=loss * 1e-2 * largest)
    # Of terms that cancel each other, each has its rounding: the norm of what was summed.
    terms = {"hidden": weight.double().norm(), "weight": hidden.double().norm(), "bias": torch.tensor(1.0)}
    for name, term in terms.items():
        if expected[name] is None:
            assert found[name] is None
            continue
        leaf = {"hidden": hidden, "weight": weight, "bias": problem.options.get("bias")}[name]
        assert found[name].dtype == leaf.dtype and found[name].shape == leaf.shape
        difference = (found[name].double() - expected[name]).norm()
        assert difference <= gradient * largest * (expected[name].norm() + 0.02 * scale * term), name


def test_every_loss_and_gradient_is_that_of_plain_torch_in_float64():
    seen = Counter()

    @steady(400)
    @given(problems([torch.float32, torch.float64]))
    def sweep(problem):
        found, expected, ways = problem.compared()
        for way in ways:
            event(way)
        seen.update(ways)
        single = problem.hidden.dtype == torch.float32
        assert_close(found, expected, problem, *((1e-5, 1e-5) if single else (1e-11, 1e-10)))

    sweep()
    assert {way for way, times in seen.items() if times} == EVERY_WAY


def test_in_half_precision_every_loss_and_gradient_is_near_float64():
    seen = Counter()

    @steady(200)
    @given(problems(HALF))
    def sweep(problem):
        found, expected, ways = problem.compared()
        seen.update(ways)
        # Products are exact here, and what is kept has 8 bits.
        assert_close(found, expected, problem, 1e-5, 1e-2)

    sweep()
    # Each row of the gradient is written once.
    assert {way for way, times in seen.items() if times} == EVERY_WAY - {"overflows", "logits", "tokens cut"}


def test_with_products_in_half_precision_every_loss_and_gradient_is_near_float64(monkeypatch):
    """As on a CPU that multiplies them fast, and on a GPU."""
    monkeypatch.setattr(arithmetic, "has_fast_half", lambda dtype: True)
    seen = Counter()

    @steady(200)
    @given(problems(HALF))
    def sweep(problem):
        found, expected, ways = problem.compared()
        seen.update(ways)
        assert_close(found, expected, problem, 1e-2, 3e-2)

    sweep()
    assert {way for way, times in seen.items() if times} == EVERY_WAY - {"overflows", "exponentials", "tokens cut"}


@pytest.mark.parametrize("fast_half", [False, True], ids=["products in float32", "products in half"])
@pytest.mark.parametrize("budget", [0, None], ids=["computed again", "kept"])
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_in_half_precision_gradients_are_as_near_float64_as_the_usual_path(monkeypatch, dtype, budget, fast_half):
    monkeypatch.setattr(arithmetic, "has_fast_half", lambda dtype: fast_half)
    hidden, weight = torch.randn(512, 128).to(dtype), (torch.randn(2000, 128) * 0.1).to(dtype)
    labels = torch.randint(2000, (512,))
    found = results(tied_cross_entropy, hidden, weight, labels, memory_budget=budget)
    expected, usual = exactly(hidden, weight, labels), results(naive, hidden, weight, labels)
    assert error(found["weight"], expected["weight"]) <= 1.1 * error(usual["weight"], expected["weight"])
    # Of each block a product is rounded before they are summed; the usual path rounds the sum alone.
    room = 1.5 if fast_half else 1.1
    assert error(found["hidden"], expected["hidden"]) <= room * error(usual["hidden"], expected["hidden"])
    assert error(found["loss"], expected["loss"]) <= max(1e-5, 1.1 * error(usual["loss"], expected["loss"]))


@pytest.mark.parametrize("of_weight", [torch.float16, torch.float32], ids=["float16", "autocast"])
def test_in_float16_the_gradient_of_many_tokens_overflows_no_more_than_their_mean_does(monkeypatch, of_weight):
    monkeypatch.setattr(arithmetic, "has_fast_half", lambda dtype: of_weight == torch.float32)
    hidden, weight = torch.full((8192, 4), 30.0).half(), torch.zeros(2, 4).to(of_weight)
    labels = torch.zeros(8192, dtype=torch.int64)

    def autocast(*tensors, **options):
        with torch.autocast("cpu", torch.float16, enabled=of_weight == torch.float32):
            return tied_cross_entropy(*tensors, **options)

    found, expected = results(autocast, hidden, weight, labels), exactly(hidden, weight, labels)
    assert error(found["weight"], expected["weight"]) < 1e-3


def test_in_float16_what_is_divided_by_many_tokens_keeps_its_digits(monkeypatch):
    """Gradients of the matrix in float32 from products in float16, under autocast: 1 / 10^6 is no factor for these."""
    monkeypatch.setattr(arithmetic, "has_fast_half", lambda dtype: True)
    hidden, weight, labels = torch.randn(64, 16).half(), torch.randn(300, 16) / 4, torch.randint(300, (64,))

    def autocast(*tensors, **options):
        with torch.autocast("cpu", torch.float16):
            return tied_cross_entropy(*tensors, **options)

    found = results(autocast, hidden, weight, labels, num_items_in_batch=10**6)
    expected = exactly(hidden, weight, labels, num_items_in_batch=10**6)
    assert error(found["weight"], expected["weight"]) < 2e-3


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_in_float16_a_loss_scale_keeps_gradients_that_alone_would_vanish_or_overflow(reduction):
    hidden, weight, labels = torch.randn(2048, 8).half(), torch.randn(50, 8).half(), torch.randint(50, (2048,))
    options = {"ignore_index": 1, "num_items_in_batch": 10**7, "upstream": 2.0**16}  # alone: about 10^-6
    if reduction == "sum":
        hidden, labels = hidden.abs() * 100, labels // 50  # alone: up to 10^5
        options = {"ignore_index": 1, "reduction": "sum", "upstream": 2.0**-4}
    found = results(tied_cross_entropy, hidden, weight, labels, **options)
    expected = exactly(hidden, weight, labels, **options)
    assert worst(found, expected) < 1e-3


# --- autocast --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fast_half", [False, True], ids=["products in float32", "products in half"])
@pytest.mark.parametrize("to", HALF, ids=str)
@pytest.mark.parametrize("of_hidden", [torch.float32, None], ids=["float32 hidden", "half hidden"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_under_autocast_gradients_have_the_dtypes_of_the_parameters(monkeypatch, reduction, of_hidden, to, fast_half):
    monkeypatch.setattr(arithmetic, "has_fast_half", lambda dtype: fast_half)
    hidden, weight, bias = torch.randn(40, 16).to(of_hidden or to), torch.randn(50, 16) / 3, torch.randn(50)
    labels = torch.randint(50, (40,))

    def autocast(*tensors, **options):
        with torch.autocast("cpu", to):
            return tied_cross_entropy(*tensors, **options)

    with watched(at_work=2000, narrowest=4, fewest_rows=2):
        found = results(autocast, hidden, weight, labels, bias, reduction=reduction, memory_budget=4000)
    expected = exactly(hidden, weight, labels, bias, reduction=reduction)
    assert [found[name].dtype for name in NAMES] == [torch.float32, hidden.dtype, torch.float32, torch.float32]
    assert error(found["loss"], expected["loss"]) < (2e-3 if fast_half else 1e-6)
    assert error(found["hidden"], expected["hidden"]) < (1e-2 if fast_half else 4e-3 if of_hidden is None else 1e-6)
    assert error(found["weight"], expected["weight"]) < (1e-2 if fast_half else 1e-6)
    assert error(found["bias"], expected["bias"]) < (1e-2 if fast_half else 1e-6)


@pytest.mark.parametrize("fast_half", [False, True], ids=["products in float32", "products in half"])
@pytest.mark.parametrize("of_hidden", [torch.float32, torch.bfloat16], ids=str)
def test_under_autocast_the_products_are_in_its_dtype_where_that_is_fast(monkeypatch, of_hidden, fast_half):
    """A norm before the head gives float32 under autocast, and the usual head converts it."""
    monkeypatch.setattr(arithmetic, "has_fast_half", lambda dtype: fast_half)
    dtypes, make = [], autograd.Softmax
    monkeypatch.setattr(autograd, "Softmax", lambda **given: dtypes.append(given["hidden"].dtype) or make(**given))
    hidden, weight = leaf(torch.randn(40, 16), of_hidden), leaf(torch.randn(50, 16))
    with torch.autocast("cpu", torch.bfloat16):
        tied_cross_entropy(hidden, weight, torch.randint(50, (40,)))
    assert dtypes == [torch.bfloat16 if fast_half else torch.float32]
