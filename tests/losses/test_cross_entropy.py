"""`tied_cross_entropy` against plain torch: values and gradients, whatever the shape, the options and the budget."""

import gc
import math
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import HealthCheck, event, example, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from hf_tying.losses import (
    TiedCrossEntropy,
    TiedEmbedding,
    autograd,
    chunks,
    reference_cross_entropy,
    softmax,
    tied_cross_entropy,
    tied_embedding,
)
from hf_tying.losses.cross_entropy import cross_entropy
from hf_tying.losses.options import Options

NAMES = ("loss", "hidden", "weight", "bias")
has_fast_half = autograd._has_fast_half


@pytest.fixture(autouse=True)
def _any_cpu(monkeypatch):
    """The same way on every CPU. Tests of the other one say so."""
    monkeypatch.setattr(autograd, "_has_fast_half", lambda dtype: False)


def steady(examples: int) -> settings:
    slow = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture]
    return settings(max_examples=examples, derandomize=True, database=None, deadline=None, suppress_health_check=slow)


# --- what is compared ------------------------------------------------------------------------------------------------


def leaf(tensor, dtype=None):
    return None if tensor is None else tensor.detach().to(dtype or tensor.dtype).clone().requires_grad_()


def results(function, hidden, weight, labels, bias=None, upstream=None, **options) -> dict[str, torch.Tensor | None]:
    """The loss, and the gradients of all that is trained. `upstream` is what the loss is multiplied by afterwards."""
    leaves = [leaf(hidden), leaf(weight), leaf(bias)]
    loss = function(leaves[0], leaves[1], labels, bias=leaves[2], **options)
    (loss if upstream is None else loss * upstream).sum().backward()
    return dict(zip(NAMES, (loss.detach(), *(x if x is None else x.grad for x in leaves)), strict=True))


def exactly(hidden, weight, labels, bias=None, class_weight=None, **options) -> dict[str, torch.Tensor | None]:
    """The same in plain torch in float64, from the inputs as they were rounded."""
    wide = [None if x is None else x.double() for x in (hidden, weight, bias, class_weight)]
    return results(reference_cross_entropy, wide[0], wide[1], labels, wide[2], class_weight=wide[3], **options)


def naive(hidden, weight, labels, bias=None):
    """The usual path of a model in half precision: logits in its dtype, the loss in float32."""
    return F.cross_entropy(F.linear(hidden, weight, bias).float(), labels)


def error(found, expected) -> float:
    """Relative, in the norm."""
    return float((found.double() - expected).norm() / expected.norm())


def worst(found: dict, expected: dict) -> float:
    """The largest relative error of the loss and the gradients; infinite where one is no number."""
    errors = [error(found[name], expected[name]) for name in NAMES if expected[name] is not None]
    return max(math.inf if math.isnan(each) else each for each in errors)


@contextmanager
def watched(at_work=None, narrowest=128, fewest_rows=chunks.FEWEST_ROWS):
    """Count which ways through the walk are gone; with constants small enough for small shapes to go many."""
    seen = Counter()
    plan_chunks, places, finish = autograd.plan_chunks, softmax._Memory.places, softmax.Logits.finish
    exponentials = softmax.Exponentials.finish

    def planned(*args, **kwargs):
        plan = plan_chunks(*args, **kwargs)
        seen["two walks" if kwargs["gradients"] else "one walk"] += 1
        if kwargs["gradients"]:
            seen["tokens cut" if len(plan.tokens) > 1 else "tokens whole"] += 1
        seen["words cut"] += len(plan.blocks) > 1
        return plan

    def placed(memory, plan, rows):
        found = places(memory, plan, rows)
        for place in found:
            if place is None:
                seen["computed again"] += 1
            elif not memory.is_borrowed(place):
                seen["in the buffer"] += 1
            else:
                count, width = rows.stop - rows.start, memory.borrowed.shape[1]
                seen["in its own rows" if count <= width else "one after the other"] += 1
        return found

    def logits(values):
        seen["logits"] += 1
        return finish(values)

    def exponents(values):
        fits = exponentials(values)
        seen["exponentials" if fits else "overflows"] += 1
        return fits

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(autograd, "plan_chunks", planned)
        patch.setattr(softmax._Memory, "places", placed)
        patch.setattr(softmax.Logits, "finish", logits)
        patch.setattr(softmax.Exponentials, "finish", exponents)
        if at_work is not None:
            patch.setattr(chunks, "_AT_WORK", {"cpu": at_work})
        patch.setattr(chunks, "_NARROWEST", narrowest)
        patch.setattr(chunks, "FEWEST_ROWS", fewest_rows)
        yield seen


EVERY_WAY = {"one walk", "two walks", "tokens cut", "tokens whole", "words cut", "computed again", "in the buffer",
             "in its own rows", "one after the other", "exponentials", "overflows", "logits"}  # fmt: skip


# --- the sweep -------------------------------------------------------------------------------------------------------


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


HALF = [torch.bfloat16, torch.float16]


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


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_a_cpu_is_asked_whether_it_multiplies_half_precision_fast(monkeypatch, dtype):
    assert has_fast_half(dtype) in (True, False)
    monkeypatch.setattr(torch.ops, "mkldnn", object())  # a build without
    assert has_fast_half(dtype) is False


def test_with_products_in_half_precision_every_loss_and_gradient_is_near_float64(monkeypatch):
    """As on a CPU that multiplies them fast, and on a GPU."""
    monkeypatch.setattr(autograd, "_has_fast_half", lambda dtype: True)
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
    monkeypatch.setattr(autograd, "_has_fast_half", lambda dtype: fast_half)
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
    monkeypatch.setattr(autograd, "_has_fast_half", lambda dtype: of_weight == torch.float32)
    hidden, weight = torch.full((8192, 4), 30.0).half(), torch.zeros(2, 4).to(of_weight)
    labels = torch.zeros(8192, dtype=torch.int64)

    def autocast(*tensors, **options):
        with torch.autocast("cpu", torch.float16, enabled=of_weight == torch.float32):
            return tied_cross_entropy(*tensors, **options)

    found, expected = results(autocast, hidden, weight, labels), exactly(hidden, weight, labels)
    assert error(found["weight"], expected["weight"]) < 1e-3


def test_in_float16_what_is_divided_by_many_tokens_keeps_its_digits(monkeypatch):
    """Gradients of the matrix in float32 from products in float16, under autocast: 1 / 10^6 is no factor for these."""
    monkeypatch.setattr(autograd, "_has_fast_half", lambda dtype: True)
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


# --- logits far apart, and those that are no numbers -----------------------------------------------------------------


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
    monkeypatch.setattr(autograd, "_has_fast_half", lambda dtype: fast_half)
    labels = torch.zeros(9, dtype=torch.int64)
    found = results(
        tied_cross_entropy, torch.randn(9, 4).to(dtype), torch.randn(1, 4).to(dtype), labels, torch.randn(1), **options
    )
    assert not any(value.any() for value in found.values())


# --- what the backward pass brings -----------------------------------------------------------------------------------


def test_a_loss_multiplied_by_what_is_no_number_has_no_gradient():
    """An overflow downstream must be seen in the gradients, where a gradient scaler looks for it."""
    hidden, weight, labels = torch.randn(9, 4), torch.randn(31, 4), torch.randint(31, (9,))
    found = results(tied_cross_entropy, hidden, weight, labels, upstream=math.nan)
    assert found["hidden"].isnan().all() and found["weight"].isnan().all()


@pytest.mark.parametrize("upstream", [1 + 1e-5, 1 + 5e-7, 1 - 5e-7])
def test_in_float64_a_factor_next_to_one_is_multiplied_in(upstream):
    hidden, weight, labels = torch.randn(9, 4).double(), torch.randn(31, 4).double(), torch.randint(31, (9,))
    found = results(tied_cross_entropy, hidden, weight, labels, upstream=upstream)
    expected = exactly(hidden, weight, labels, upstream=upstream)
    assert worst(found, expected) < 1e-10


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("actual", [1 / 640, 0.3])
def test_the_factor_that_is_expected_changes_no_result(dtype, actual):
    hidden, weight, labels = torch.randn(9, 4).to(dtype), torch.randn(31, 4).to(dtype), torch.randint(31, (9,))
    options = Options(reduction="sum", upstream=1 / 640)

    def expecting(hidden, weight, labels, bias=None):
        return cross_entropy(hidden, weight, labels, bias, options)

    found = results(expecting, hidden, weight, labels, upstream=actual)
    expected = exactly(hidden, weight, labels, upstream=actual, reduction="sum")
    tolerance = 1e-6 if dtype == torch.float32 else 1e-2
    assert error(found["loss"], expected["loss"]) < 1e-6
    assert all(error(found[name], expected[name]) < tolerance for name in NAMES[1:3])


def graph(reduction="mean"):
    hidden, weight, labels = leaf(torch.randn(9, 4)), leaf(torch.randn(31, 4)), torch.randint(31, (9,))
    return hidden, weight, labels, tied_cross_entropy(hidden, weight, labels, reduction=reduction).sum()


def test_a_second_backward_pass_is_refused():
    hidden, weight, labels, loss = graph()
    loss.backward(retain_graph=True)
    assert error(weight.grad, exactly(hidden, weight, labels)["weight"]) < 1e-6
    before = weight.grad.clone()
    with pytest.raises(RuntimeError, match="second time.*Compute the loss again, or use reduction='none'"):
        loss.backward()
    assert torch.equal(weight.grad, before)


def test_the_loss_of_each_token_may_be_differentiated_twice():
    hidden, weight, labels, loss = graph("none")
    first = torch.autograd.grad(loss, [hidden, weight], retain_graph=True)
    second = torch.autograd.grad(loss, [hidden, weight])
    expected = exactly(hidden, weight, labels, reduction="none")
    for found in (first, second):
        assert error(found[0], expected["hidden"]) < 1e-6 and error(found[1], expected["weight"]) < 1e-6


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_gradient_of_the_gradient_is_refused(reduction):
    hidden, weight, labels, loss = graph(reduction)
    with pytest.raises(RuntimeError, match="create_graph=True.*reference_cross_entropy"):
        torch.autograd.grad(loss, [weight], create_graph=True)
    embedded = tied_embedding(labels, weight).sum()
    with pytest.raises(RuntimeError, match="create_graph=True.*torch.nn.functional.embedding"):
        torch.autograd.grad(embedded, [weight], create_graph=True)


# --- what is not trained ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trained", ["hidden", "weight", "bias"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("budget", [100, 3000])
def test_where_one_alone_is_trained_its_gradient_is_right_and_the_others_have_none(trained, reduction, budget):
    tensors = {"hidden": torch.randn(40, 4), "weight": torch.randn(31, 4), "bias": torch.randn(31)}
    labels = torch.randint(31, (40,))
    tensors[trained].requires_grad_()
    with watched(at_work=200, narrowest=2, fewest_rows=2) as seen:
        loss = tied_cross_entropy(
            tensors["hidden"], tensors["weight"], labels, bias=tensors["bias"], reduction=reduction,
            memory_budget=budget,
        )  # fmt: skip
        loss.sum().backward()
    assert bool(seen["tokens cut"]) == (budget == 3000)
    expected = exactly(tensors["hidden"], tensors["weight"], labels, tensors["bias"], reduction=reduction)
    for name, tensor in tensors.items():
        assert (tensor.grad is None) == (name != trained)
    assert error(tensors[trained].grad, expected[trained]) < 2e-6


@pytest.mark.parametrize("context", ["no_grad", "inference_mode", "frozen"])
def test_without_gradients_there_is_one_walk_and_the_same_loss(context):
    weight, labels = torch.randn(800, 64), torch.randint(800, (50,))
    hidden = torch.randn(50, 64)
    expected = exactly(hidden, weight, labels)["loss"]
    hidden.requires_grad_(context != "frozen"), weight.requires_grad_(context != "frozen")
    mode = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode, "frozen": torch.enable_grad}[context]
    with watched() as seen, mode():
        loss, meter = metered(lambda: tied_cross_entropy(hidden, weight, labels, memory_budget=50_000))
    assert seen["one walk"] == 1 and not seen["two walks"] and not loss.requires_grad
    assert error(loss, expected) < 1e-6
    assert meter.peak < 64 * 800 * 4


# --- memory ----------------------------------------------------------------------------------------------------------


@dataclass
class Meter:
    """Bytes above the start, at most; and of each size how many allocations there were, and were alive at once."""

    peak: int
    together: Counter
    allocated: Counter

    def as_large_as(self, size: int) -> int:
        return sum(count for each, count in self.together.items() if each >= size)


def metered(run) -> tuple[object, Meter]:
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = run()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    alive, together, allocated, total, peak = Counter(), Counter(), Counter(), 0, 0
    for change in (e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())):
        total += change
        peak = max(peak, total)
        alive[abs(change)] += 1 if change > 0 else -1
        together[abs(change)] = max(together[abs(change)], alive[abs(change)])
        allocated[change] += 1
    return result, Meter(peak, together, allocated)


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


# --- autocast --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fast_half", [False, True], ids=["products in float32", "products in half"])
@pytest.mark.parametrize("to", HALF, ids=str)
@pytest.mark.parametrize("of_hidden", [torch.float32, None], ids=["float32 hidden", "half hidden"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_under_autocast_gradients_have_the_dtypes_of_the_parameters(monkeypatch, reduction, of_hidden, to, fast_half):
    monkeypatch.setattr(autograd, "_has_fast_half", lambda dtype: fast_half)
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
    monkeypatch.setattr(autograd, "_has_fast_half", lambda dtype: fast_half)
    dtypes, make = [], autograd.Softmax
    monkeypatch.setattr(autograd, "Softmax", lambda **given: dtypes.append(given["hidden"].dtype) or make(**given))
    hidden, weight = leaf(torch.randn(40, 16), of_hidden), leaf(torch.randn(50, 16))
    with torch.autocast("cpu", torch.bfloat16):
        tied_cross_entropy(hidden, weight, torch.randint(50, (40,)))
    assert dtypes == [torch.bfloat16 if fast_half else torch.float32]


# --- the plan --------------------------------------------------------------------------------------------------------


@st.composite
def shapes(draw) -> dict:
    exact = draw(st.sampled_from([4, 8]))
    gradients = draw(st.booleans())
    return {
        "tokens": draw(st.sampled_from([0, 1, 191, 192, 193, 400]) | st.integers(0, 70_000)),
        "width": draw(st.sampled_from([1, 64, 768]) | st.integers(1, 5000)),
        "vocabulary": draw(st.sampled_from([1, 127, 128, 129, 50257]) | st.integers(1, 300_000)),
        "itemsize": draw(st.sampled_from([2, exact])),
        "exact_itemsize": exact,
        "budget": draw(st.sampled_from([0, 1, 2**20, 2**26]) | st.integers(0, 2**32)),
        "gradients": gradients,
        "matrix_gradient": gradients and draw(st.booleans()),
        "device": draw(st.sampled_from(["cpu", "cuda"])),
    }


def covers(slices, stop: int) -> bool:
    ends = [0, *(part.stop for part in slices)]
    return ends[-1] == stop and all(s.start == e < s.stop for s, e in zip(slices, ends, strict=False))


@steady(300)
@given(shapes())
@example({"tokens": 26178, "width": 4054, "vocabulary": 207327, "itemsize": 4, "exact_itemsize": 4,
          "budget": 217732848, "gradients": True, "matrix_gradient": True, "device": "cpu"})  # fmt: skip
def test_a_plan_covers_all_tokens_and_words_once_and_keeps_to_its_budget(shape):
    half, budget, exact = shape["itemsize"] == 2, shape["budget"], shape["exact_itemsize"]
    plan = chunks.plan_chunks(**shape, accumulates=not half)
    assert covers(plan.tokens, shape["tokens"]) and covers(plan.blocks, shape["vocabulary"])
    rows = max((part.stop - part.start for part in plan.tokens), default=0)
    at_work = plan.longest_block * exact
    if budget >= 2 * rows * min(chunks._NARROWEST, shape["vocabulary"]) * exact:
        assert plan.buffer * shape["itemsize"] + at_work <= budget
    else:  # a block of the fewest words, and whatever is left
        assert at_work <= max(rows * chunks._NARROWEST * exact, 2)
        assert plan.buffer * shape["itemsize"] <= budget
    assert at_work <= max(64 * 2**20, rows * chunks._NARROWEST * exact)
    if not shape["gradients"]:
        assert plan.buffer == 0
        assert at_work <= max(budget // 2, chunks._NARROWEST * exact)  # however many the tokens are
        return
    event(f"{min(len(plan.tokens), 3)} chunks")
    if half:
        assert len(plan.tokens) <= 1
    if len(plan.tokens) > 1:
        first, *others = (part.stop - part.start for part in plan.tokens)
        assert first >= chunks.FEWEST_ROWS
        assert len(others) == 1 or min(others) >= chunks.FEWEST_ROWS // 2  # of an even split
        # Cut only where it saves computing: all values have a place.
        own = shape["width"] if shape["matrix_gradient"] else 0
        assert (first - own) * shape["vocabulary"] <= plan.buffer
        assert max(others) * shape["vocabulary"] <= 1.05 * plan.buffer


@pytest.mark.parametrize("matrix_gradient", [True, False])
def test_tokens_are_cut_where_their_values_do_not_fit_and_not_into_too_few_rows(matrix_gradient):
    shape = {"width": 64, "vocabulary": 8000, "itemsize": 4, "exact_itemsize": 4, "gradients": True, "device": "cpu"}

    def plan(budget, accumulates):
        return chunks.plan_chunks(
            2000, **shape, budget=budget, matrix_gradient=matrix_gradient, accumulates=accumulates
        ).tokens

    budgets = [rows * 8000 * 4 for rows in range(0, 2400, 20)]
    cut = [budget for budget in budgets if len(plan(budget, True)) > 1]
    # From the first budget that has room for a chunk to the last that has none for all, without a gap.
    assert cut == [budget for budget in budgets if cut[0] <= budget <= cut[-1]]
    assert budgets[0] < cut[0] and cut[-1] < budgets[-1]
    at_work = chunks._AT_WORK["cpu"]
    copies = 3 * 2000 * 64 * 4 / 32_000  # of the hidden states, in rows of values
    assert chunks.FEWEST_ROWS <= (cut[0] - at_work) / 32_000 <= chunks.FEWEST_ROWS + 20 + copies
    assert 2000 - 64 - 20 <= (cut[-1] - at_work) / 32_000 <= 2000 + copies
    assert all(len(plan(budget, False)) == 1 for budget in budgets)
    counts = [len(plan(budget, True)) for budget in cut]
    assert counts == sorted(counts, reverse=True) and counts[0] >= 9 and counts[-1] == 2


# --- the modules -----------------------------------------------------------------------------------------------------


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


# --- bad input -------------------------------------------------------------------------------------------------------


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


def test_an_id_outside_the_vocabulary_is_refused_by_the_embedding():
    weight = leaf(torch.randn(5, 3))
    for ids in ([0, 5], [0, -1]):
        with pytest.raises(IndexError):
            tied_embedding(torch.tensor(ids), weight)
    with pytest.raises(RuntimeError, match="[Ii]nt|[Ll]ong"):
        tied_embedding(torch.tensor([0.0, 1.0]), weight)


# --- torch.compile ---------------------------------------------------------------------------------------------------


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
