"""`augmented_loss` against plain torch: values and gradients, whatever is tied, the options and the budget."""

import pytest
import torch
from torch.nn import functional as F

from hf_tying.losses import AugmentedLoss, arithmetic, augmented_loss, chunks, tied_embedding
from hf_tying.losses.augmented import augmented_parts, reference_augmented_loss
from hf_tying.losses.options import AugmentedSettings, CrossEntropyOptions

from .helpers import metered

NAMES = ("loss", "hidden", "weight", "bias", "embedding")


def plain(hidden, weight, labels, embedding=None, bias=None, temperature=20.0, alpha=10.0, detach_target=False,
          logit_scale=1.0, cross_entropy_weight=1.0, reduction="mean"):  # fmt: skip
    """Equations 3.1 to 3.7, a position at a time."""
    embedding = weight if embedding is None else embedding
    losses = []
    for h, y in zip(hidden.flatten(0, -2), labels.flatten().tolist(), strict=True):
        if y == -100:
            continue
        target = torch.softmax(embedding @ embedding[y] / temperature, 0)
        target = target.detach() if detach_target else target
        model = torch.softmax(logit_scale * (weight @ h) / temperature, 0)
        logits = logit_scale * (weight @ h + (0 if bias is None else bias))
        cross_entropy = -torch.log_softmax(logits, 0)[y]
        losses.append(cross_entropy_weight * cross_entropy + alpha * (target * (target / model).log()).sum())
    return sum(losses) / (len(losses) if reduction == "mean" else 1)


def results(function, hidden, weight, labels, bias=None, embedding=None, dtype=None, upstream=1.7, **options):
    """The loss, and the gradients of all that is trained."""
    leaves = [None if x is None else x.to(dtype or x.dtype).clone().requires_grad_()
              for x in (hidden, weight, bias, embedding)]  # fmt: skip
    loss = function(leaves[0], leaves[1], labels, bias=leaves[2], embedding=leaves[3], **options)
    (loss * upstream).backward()
    return dict(zip(NAMES, (loss.detach(), *(None if x is None else x.grad for x in leaves)), strict=True))


def assert_near(found, expected, tolerance):
    """Relative, in the norm."""
    for name in NAMES:
        assert (found[name] is None) == (expected[name] is None), name
        if expected[name] is not None:
            difference = (found[name].double() - expected[name].double()).norm()
            assert difference <= tolerance * expected[name].double().norm(), (name, float(difference))


def problem(tied=True, bias=True, dtype=torch.float64, words=31, width=6, shape=(3, 8)):
    tensors = {
        "hidden": torch.randn(*shape, width, dtype=dtype),
        "weight": torch.randn(words, width, dtype=dtype),
        "labels": torch.randint(words, shape),
        "bias": torch.randn(words, dtype=dtype) if bias else None,
        "embedding": None if tied else torch.randn(words, width - 2, dtype=dtype),
    }
    tensors["labels"].view(-1)[2:6] = 4  # a word that comes several times
    tensors["labels"].view(-1)[[0, 7]] = -100
    return tensors


@pytest.fixture(params=["one block", "blocks kept", "blocks computed again"])
def budget(request, monkeypatch):
    """Ways to walk over a vocabulary of 31 words."""
    if request.param == "one block":
        return None
    monkeypatch.setattr(chunks, "_NARROWEST", 5)
    monkeypatch.setattr(chunks, "_AT_WORK", {"cpu": 1000})
    return 10**6 if request.param == "blocks kept" else 0


# --- values and gradients --------------------------------------------------------------------------------------------

OPTIONS = {
    "defaults": {},
    "a low temperature": {"temperature": 0.7, "alpha": 3.0},
    "a detached target": {"temperature": 2.0, "alpha": 3.0, "detach_target": True},
    "a scale of the logits": {"temperature": 2.0, "alpha": 3.0, "logit_scale": 0.3},
    "a weight of the cross entropy": {"temperature": 2.0, "alpha": 3.0, "cross_entropy_weight": 0.4},
    "the divergence alone": {"temperature": 2.0, "alpha": 3.0, "cross_entropy_weight": 0.0},
    "the sum": {"temperature": 2.0, "alpha": 3.0, "reduction": "sum"},
}


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=[*OPTIONS])
def test_value_and_every_gradient_are_those_of_the_equations(options, tied, bias, budget):
    tensors = problem(tied, bias)
    found = results(augmented_loss, memory_budget=budget, **tensors, **options)
    assert found["loss"].dtype == torch.float64
    assert_near(found, results(plain, **tensors, **options), 1e-12)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=[*OPTIONS])
def test_the_reference_is_the_equations(options):
    for tied in (True, False):
        tensors = problem(tied)
        found = results(reference_augmented_loss, **tensors, **options)
        assert_near(found, results(plain, **tensors, **options), 1e-12)


def test_a_given_embedding_that_is_the_softmax_matrix_is_a_tied_one():
    tensors = problem()
    weight = tensors.pop("weight").requires_grad_()
    hidden, labels = tensors["hidden"], tensors["labels"]
    gradients = []
    for embedding in (weight, None):
        (gradient,) = torch.autograd.grad(augmented_loss(hidden, weight, labels, embedding=embedding), weight)
        gradients.append(gradient)
    assert torch.equal(*gradients)


def test_without_a_weight_of_the_divergence_the_loss_is_the_cross_entropy():
    tensors = problem(tied=False)
    found = results(augmented_loss, alpha=0.0, **tensors)

    def cross_entropy(hidden, weight, labels, bias, embedding):
        return F.cross_entropy(F.linear(hidden, weight, bias).flatten(0, 1), labels.flatten()) + 0 * embedding.sum()

    assert_near(found, results(cross_entropy, **tensors), 1e-12)


def test_alpha_is_gamma_times_the_temperature_and_gamma_is_a_half_unless_given():
    tensors = problem()
    for options, alpha in (({}, 10.0), ({"temperature": 4.0}, 2.0), ({"temperature": 4.0, "gamma": 1.5}, 6.0)):
        given = options | {"alpha": alpha}
        given.pop("gamma", None)
        assert torch.equal(augmented_loss(**tensors, **options), augmented_loss(**tensors, **given))


def test_at_a_high_temperature_the_gradient_is_that_of_the_difference_of_the_products():
    """tau^2 |V| times the divergence: its gradient with respect to the logits is W h - L u, each up to its mean."""
    words, temperature = 31, 1e4
    embedding, labels = torch.randn(words, 5, dtype=torch.float64), torch.randint(words, (9,))
    logits = torch.randn(9, words, dtype=torch.float64, requires_grad=True)
    # With the identity for W, hidden states are the logits.
    loss = augmented_loss(
        logits, torch.eye(words, dtype=torch.float64), labels, embedding=embedding, temperature=temperature,
        alpha=temperature**2 * words, cross_entropy_weight=0.0, reduction="sum",
    )  # fmt: skip
    loss.backward()
    difference = logits.detach() - embedding[labels] @ embedding.t()
    expected = difference - difference.mean(1, keepdim=True)
    assert (logits.grad - expected).norm() < 2e-3 * expected.norm()


def test_of_large_logits_no_digit_is_lost_and_nothing_overflows():
    tensors = problem(dtype=torch.float32, bias=False)
    tensors["weight"] *= 2000
    options = {"temperature": 2.0, "alpha": 3.0}
    found, expected = (results(augmented_loss, dtype=dtype, **tensors, **options)
                       for dtype in (torch.float32, torch.float64))  # fmt: skip
    assert_near(found, expected, 1e-4)
    assert expected["loss"] > 20_000


def test_only_what_is_trained_has_a_gradient():
    tensors = problem(tied=False)
    expected = results(plain, **tensors, upstream=1.0)
    for name in NAMES[1:]:
        leaf = tensors[name].clone().requires_grad_()
        loss = augmented_loss(**tensors | {name: leaf})
        loss.backward()
        assert torch.allclose(leaf.grad, expected[name], rtol=1e-10, atol=1e-13)
    with torch.no_grad():
        assert not augmented_loss(**tensors | {"hidden": tensors["hidden"].requires_grad_()}).requires_grad


def test_a_detached_target_gives_the_embedding_nothing():
    tensors = problem(tied=False)
    assert results(augmented_loss, detach_target=True, **tensors)["embedding"] is None


def test_the_parts_are_the_loss_and_a_cross_entropy_without_gradient():
    tensors = problem()
    tensors["hidden"].requires_grad_()
    total, cross_entropy = augmented_parts(**tensors, settings=AugmentedSettings(cross_entropy_weight=0.25))
    logits = F.linear(tensors["hidden"], tensors["weight"], tensors["bias"])
    assert torch.allclose(cross_entropy, F.cross_entropy(logits.flatten(0, 1), tensors["labels"].flatten()))
    assert torch.equal(total, augmented_loss(**tensors, cross_entropy_weight=0.25))
    assert total.requires_grad and not cross_entropy.requires_grad


def test_an_option_of_the_cross_entropy_that_the_augmented_loss_does_not_have_is_refused():
    for option in ({"label_smoothing": 0.1}, {"logit_softcap": 30.0}, {"class_weight": torch.ones(31)}):
        with pytest.raises(ValueError, match="has no label_smoothing, logit_softcap or class_weight"):
            augmented_parts(**problem(), settings=AugmentedSettings(), options=CrossEntropyOptions(**option))


def test_the_module_is_the_function():
    tensors = problem(tied=False)
    options = dict(temperature=3.0, gamma=0.25, detach_target=True, reduction="sum", cross_entropy_weight=0.5)
    module = AugmentedLoss(**options)
    assert torch.equal(module(**tensors), augmented_loss(**tensors, **options))
    assert "temperature=3.0" in repr(module)


# --- what is counted -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("items", [7, torch.tensor(7), 0, torch.tensor(0)], ids=repr)
def test_the_sum_is_divided_by_the_items_that_are_given(items):
    tensors = problem()
    found = results(augmented_loss, num_items_in_batch=items, **tensors)
    divisor = max(int(items), 1)
    assert_near(found, results(lambda *a, **k: plain(*a, reduction="sum", **k) / divisor, **tensors), 1e-12)
    assert_near(found, results(reference_augmented_loss, num_items_in_batch=items, **tensors), 1e-12)


@pytest.mark.parametrize("empty", [True, False], ids=["no token", "all ignored"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_where_no_label_counts_the_loss_is_0_and_so_are_the_gradients(tied, empty):
    tensors = problem(tied)
    if empty:
        tensors["hidden"], tensors["labels"] = tensors["hidden"][:0], tensors["labels"][:0]
    tensors["labels"] = torch.full_like(tensors["labels"], -100)
    found = results(augmented_loss, **tensors)
    assert all(value is None or not value.any() for value in found.values())
    assert found["weight"] is not None and found["hidden"].shape == tensors["hidden"].shape


def test_an_ignored_position_may_hold_anything():
    tensors = problem()
    expected = results(augmented_loss, **tensors)
    tensors["hidden"].view(-1, 6)[0] = float("nan")
    found = results(augmented_loss, **tensors)
    assert not found["hidden"].view(-1, 6)[0].any()
    assert_near(found, expected, 1e-14)


# --- half precision --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fast_half", [False, True], ids=["products in float32", "products in half"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("way", ["bfloat16", "float16", "autocast bfloat16", "autocast float16"])
def test_in_half_precision_values_and_gradients_are_near_float64(monkeypatch, way, tied, fast_half):
    monkeypatch.setattr(arithmetic, "has_fast_half", lambda dtype: fast_half)
    half = getattr(torch, way.split()[-1])
    tensors = problem(tied, dtype=torch.float32, words=300, width=32, shape=(64,))
    autocast = way.startswith("autocast")
    for name in ("hidden", "weight", "embedding", "bias"):
        if tensors[name] is not None and (name == "hidden" or not autocast):
            tensors[name] = tensors[name].to(half)

    def run(*args, **kwargs):
        with torch.autocast("cpu", half, enabled=autocast):
            return augmented_loss(*args, **kwargs)

    options = {"temperature": 5.0, "alpha": 20.0, "upstream": 2.0**14 if half == torch.float16 else 1.0}
    found = results(run, **tensors, **options)
    expected = results(augmented_loss, dtype=torch.float64, **tensors, **options)
    assert found["loss"].dtype == torch.float32
    assert found["weight"].dtype == tensors["weight"].dtype and found["hidden"].dtype == half
    assert_near(found, expected, 0.01)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_in_float16_a_token_of_very_many_items_does_not_vanish_under_a_loss_scale(monkeypatch, tied):
    monkeypatch.setattr(arithmetic, "has_fast_half", lambda dtype: True)
    tensors = problem(tied, dtype=torch.float16, words=300, width=32, shape=(64,))
    options = {"temperature": 5.0, "num_items_in_batch": 10**5, "upstream": 2.0**16}
    found, expected = (
        results(augmented_loss, dtype=dtype, **tensors, **options) for dtype in (torch.float16, torch.float64)
    )
    assert_near(found, expected, 0.01)


# --- memory ----------------------------------------------------------------------------------------------------------

N, D, V = 256, 64, 4000


def step(function, embedding, dtype=torch.float32, **options):
    ids, labels = torch.randint(V, (N,)), torch.randint(V, (N,))
    weight = torch.randn(V, D).to(dtype).requires_grad_()
    _, meter = metered(lambda: function(embedding(ids, weight), weight, labels, **options).backward())
    return meter.peak, meter.together


@pytest.mark.parametrize("budget", [0, 2**19, 2**21])
def test_a_step_needs_one_gradient_of_the_matrix_and_the_budget(budget):
    peak, together = step(augmented_loss, tied_embedding, memory_budget=budget)
    # With no budget blocks are as narrow as they get. N labels here are almost as many words.
    assert peak <= V * D * 4 + max(budget, 8 * N * 128 * 4) + 8 * N * D * 4 + 2**17
    assert together[V * D * 4] == 1
    assert max(together) < N * V * 4


def test_the_usual_path_needs_matrices_of_all_words_and_positions():
    """What the meter counts where there is something to count."""
    peak, together = step(reference_augmented_loss, lambda ids, weight: F.embedding(ids, weight))
    assert peak > 4 * N * V * 4 and together[V * D * 4] >= 2


def test_in_half_precision_the_one_gradient_is_half_as_large():
    peak, together = step(augmented_loss, tied_embedding, torch.bfloat16, memory_budget=2**20)
    assert together[V * D * 2] == 1 and max(together) == V * D * 2
    assert peak <= V * D * 2 + 8 * N * 128 * 4 + 8 * N * D * 4 + 2**17


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_with_the_embedding_in_the_graph_the_gradient_is_the_sum_in_one_buffer(tied):
    ids, labels = torch.randint(300, (40,)), torch.randint(300, (40,))
    found, expected = [], []
    for lookup, loss, gradients in (
        (tied_embedding, augmented_loss, found),
        (F.embedding, reference_augmented_loss, expected),
    ):
        torch.manual_seed(1)
        embedding = torch.randn(300, 8, dtype=torch.float64, requires_grad=True)
        weight = embedding if tied else torch.randn(300, 8, dtype=torch.float64, requires_grad=True)
        returned = []
        embedding.register_hook(returned.append)
        hidden = lookup(ids, embedding).tanh()
        loss(hidden, weight, labels, embedding=embedding, temperature=3.0).backward()
        gradients.extend([embedding.grad, weight.grad])
        assert len(returned) == 1
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, other, rtol=1e-10, atol=1e-14)


# --- what is refused -------------------------------------------------------------------------------------------------


def test_a_second_backward_pass_and_a_gradient_of_the_gradient_are_refused():
    tensors = problem()
    tensors["hidden"].requires_grad_()
    loss = augmented_loss(**tensors)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="through augmented_loss a second time"):
        loss.backward()
    with pytest.raises(RuntimeError, match="no gradient of its gradient"):
        torch.autograd.grad(augmented_loss(**tensors), tensors["hidden"], create_graph=True)


REFUSED = {
    "temperature 0": ({"temperature": 0.0}, ValueError, "temperature=0.0: expected a number above 0"),
    "temperature below": ({"temperature": -1}, ValueError, "temperature=-1"),
    "temperature nan": ({"temperature": float("nan")}, ValueError, "temperature=nan"),
    "alpha": ({"alpha": -0.1}, ValueError, "alpha=-0.1: expected 0 or more"),
    "gamma": ({"gamma": -0.1}, ValueError, "gamma=-0.1: expected 0 or more"),
    "alpha and gamma": ({"alpha": 1.0, "gamma": 0.5}, ValueError, "alpha=1.0 and gamma=0.5 are both given"),
    "none": ({"reduction": "none"}, ValueError, "'none' is not a valid value for reduction: expected 'mean' or 'sum'"),
    "items": ({"reduction": "sum", "num_items_in_batch": 3}, ValueError, "num_items_in_batch divides"),
    "rows": ({"embedding": torch.randn(30, 6).double()}, ValueError, "a row for each of the 31 words .* got \\(30, 6"),
    "dims": ({"embedding": torch.randn(31).double()}, ValueError, "a row for each"),
    "dtype": ({"embedding": torch.randn(31, 6)}, RuntimeError, "Expected embedding like weight, in torch.float64"),
    "label": ({"labels": torch.full((3, 8), 31)}, IndexError, "Target 31 is out of bounds"),
    "width": ({"hidden": torch.randn(3, 8, 5).double()}, RuntimeError, "cannot be multiplied"),
}


@pytest.mark.parametrize(("change", "kind", "message"), REFUSED.values(), ids=[*REFUSED])
def test_wrong_use_is_refused(change, kind, message):
    with pytest.raises(kind, match=message):
        augmented_loss(**problem() | change)


def test_the_module_refuses_at_once():
    with pytest.raises(ValueError, match="temperature=0"):
        AugmentedLoss(temperature=0)


def test_between_two_compiled_graphs_the_loss_runs_as_it_is():
    tensors = problem()

    def run(hidden, weight, labels, bias, embedding):
        return augmented_loss(hidden * 2, weight, labels, bias=bias, embedding=embedding) * 3

    expected = results(run, **tensors)
    compiled = results(torch.compile(run, backend="eager"), **tensors)
    assert_near(compiled, expected, 1e-12)


def test_words_that_a_bias_forbids_may_be_the_first_blocks(budget):
    tensors = problem()
    tensors["bias"][:12] = -torch.inf
    tensors["labels"] = torch.where(tensors["labels"] == -100, -100, 12 + tensors["labels"] % 19)
    expected = results(plain, **tensors)
    assert all(value is None or value.isfinite().all() for value in expected.values())
    assert_near(results(augmented_loss, **tensors, memory_budget=budget), expected, 1e-12)
