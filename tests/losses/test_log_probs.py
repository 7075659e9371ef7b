"""`tied_log_probs` against plain torch: values and gradients, whatever the shape, the options and the tiles."""

import itertools
import math

import pytest
import torch
from torch.nn import functional as F

from hf_tying.losses import TokenLogProbs, tied_cross_entropy, tied_embedding, tied_log_probs
from hf_tying.losses.log_probs import OUTPUTS

from .helpers import error, leaf

DIFFERENTIABLE = ("log_probs", "entropy", "logsumexp", "mean_logits")
pytestmark = pytest.mark.usefixtures("slow_half")


def plain(hidden, weight, labels, bias=None, *, temperature=1.0, logit_scale=None, logit_softcap=None):
    """All outputs by name, from whole logits in float64."""
    logits = F.linear(hidden.double(), weight.double(), None if bias is None else bias.double())
    if logit_scale is not None:
        logits = logits * logit_scale
    if logit_softcap is not None:
        logits = logit_softcap * torch.tanh(logits / logit_softcap)
    logits = logits / temperature
    counted = labels != -100
    places = labels.masked_fill(~counted, 0)
    log_probs = logits.log_softmax(-1)
    found = {
        "log_probs": log_probs.gather(-1, places[..., None])[..., 0],
        "entropy": torch.distributions.Categorical(logits=logits).entropy(),
        "top1": logits.argmax(-1) == places,
        "logsumexp": logits.logsumexp(-1),
        "mean_logits": logits.mean(-1),
        "log_sum_sq_probs": log_probs.detach().exp().square().sum(-1).log(),
    }
    return {name: torch.where(counted, value, torch.zeros_like(value)) for name, value in found.items()}


def problem(seed, dtype=torch.float64, tokens=23, width=5, words=31, with_bias=True):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    labels = torch.randint(words, (tokens,), generator=generator)
    labels[:: 4 + seed % 3] = -100
    return normal(tokens, width), normal(words, width), labels, normal(words) if with_bias else None


def gradients(outputs, tensors, names=DIFFERENTIABLE):
    """Of a sum of the outputs, each token and each output by a factor of its own."""
    total = 0.0
    for number, name in enumerate(names, 1):
        value = outputs[name] if isinstance(outputs, dict) else getattr(outputs, name)
        total = (
            total + (value * torch.linspace(-number, 1.5, value.numel(), dtype=value.dtype).view(value.shape)).sum()
        )
    return torch.autograd.grad(total, tensors)


OPTIONS = [
    {},
    {"temperature": 0.6},
    {"logit_scale": 0.3, "temperature": 2.0},
    {"logit_softcap": 2.0, "logit_scale": 1.5, "temperature": 0.7},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("block_bytes", [None, 8, 100, 1000])
@pytest.mark.parametrize("with_bias", [True, False])
def test_values_and_gradients_are_those_of_whole_logits(options, block_bytes, with_bias):
    hidden, weight, labels, bias = problem(len(options), with_bias=with_bias)
    tensors = [leaf(x) for x in (hidden, weight, bias) if x is not None]
    trained_bias = tensors[2] if with_bias else None
    found = tied_log_probs(*tensors[:2], labels, trained_bias, OUTPUTS, memory_budget=block_bytes, **options)
    expected = plain(*tensors[:2], labels, *tensors[2:], **options)
    for name, value in expected.items():
        torch.testing.assert_close(getattr(found, name), value, rtol=1e-11, atol=1e-11)
    for ours, theirs in zip(gradients(found, tensors), gradients(expected, tensors), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("names", [n for k in (1, 2) for n in itertools.combinations(DIFFERENTIABLE, k)], ids=str)
def test_gradients_of_some_of_the_outputs(names):
    hidden, weight, labels, _ = problem(3)
    tensors = [leaf(hidden), leaf(weight)]
    found = gradients(tied_log_probs(*tensors, labels, outputs=DIFFERENTIABLE, memory_budget=200), tensors, names)
    expected = gradients(plain(*tensors, labels), tensors, names)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("shape", [(), (6,), (2, 3), (2, 1, 3)], ids=str)
def test_any_leading_shape(shape):
    hidden, weight = torch.randn(*shape, 4, dtype=torch.float64), torch.randn(9, 4, dtype=torch.float64)
    labels = torch.arange(len(hidden.view(-1, 4))).view(shape)
    found = tied_log_probs(hidden, weight, labels, outputs=OUTPUTS)
    for name, value in plain(hidden, weight, labels).items():
        torch.testing.assert_close(getattr(found, name), value)


def test_what_is_not_asked_for_is_none():
    hidden, weight, labels, _ = problem(0)
    usual = tied_log_probs(hidden, weight, labels)
    assert [name for name in OUTPUTS if getattr(usual, name) is not None] == [
        *("log_probs", "entropy", "top1", "logsumexp"),
    ]
    assert tied_log_probs(hidden, weight, labels, outputs=["log_probs"]).entropy is None
    only = tied_log_probs(hidden, weight, labels, outputs="logsumexp")
    assert only.log_probs is None and only.logsumexp is not None
    assert TokenLogProbs() == TokenLogProbs(None, None, None, None, None, None)


def test_ignored_labels_give_zero_and_no_gradient():
    hidden, weight, labels, _ = problem(1)
    hidden, ignored = leaf(hidden), labels == -100
    found = tied_log_probs(hidden, weight, labels, outputs=OUTPUTS)
    for name in OUTPUTS:
        assert not getattr(found, name)[ignored].any()
    (gradient,) = gradients(found, [hidden])
    assert not gradient[ignored].any() and gradient[~ignored].abs().sum(-1).all()
    nothing = tied_log_probs(hidden, weight, torch.full_like(labels, -100), outputs=OUTPUTS)
    (gradient,) = gradients(nothing, [hidden])  # an all-masked batch can be trained on
    assert not gradient.any()


def test_of_equal_logits_the_first_word_is_the_most_likely():
    weight = torch.tensor([[0.0], [1.0], [1.0], [0.5], [1.0]])
    hidden, labels = torch.ones(5, 1), torch.arange(5)
    for block_bytes in (None, 4, 8, 12, 40):
        found = tied_log_probs(hidden, weight, labels, outputs=("top1",), memory_budget=block_bytes).top1
        assert found.tolist() == [False, True, False, False, False]


def test_forbidden_words_have_no_part_and_no_gradient():
    hidden, weight, labels, bias = problem(2)
    bias[7], labels[labels == 7] = -torch.inf, 8
    bias[20], labels[labels == 20] = -torch.inf, 21
    kept = [word for word in range(len(weight)) if word not in (7, 20)]
    tensors = [leaf(hidden), leaf(weight), leaf(bias)]
    found = tied_log_probs(*tensors[:2], labels, tensors[2], DIFFERENTIABLE, memory_budget=150)
    fewer = [leaf(hidden), leaf(weight[kept]), leaf(bias[kept])]
    moved = torch.tensor([-100 if word == -100 else kept.index(word) for word in labels.tolist()])
    expected = plain(*fewer[:2], moved, fewer[2])
    names = ("log_probs", "entropy", "logsumexp")  # the mean of all logits is minus infinity
    for name in names:
        torch.testing.assert_close(getattr(found, name), expected[name])
    ours, theirs = gradients(found, tensors, names), gradients(expected, fewer, names)
    torch.testing.assert_close(ours[0], theirs[0])
    torch.testing.assert_close(ours[1][kept], theirs[1])
    assert not ours[1][[7, 20]].any() and not ours[2][[7, 20]].any()


def test_a_forbidden_label_is_infinitely_improbable():
    hidden, weight, labels, bias = problem(2)
    labels[1], bias[7] = 7, -torch.inf
    assert tied_log_probs(hidden, weight, labels.index_fill(0, torch.tensor(1), 7), bias).log_probs[1] == -torch.inf


def test_a_sure_model_keeps_its_digits():
    """In float32 `1 - p` of a label that is sure is 0; its log-probability and entropy are not."""
    hidden, weight, rest = torch.tensor([[1.0]]), torch.tensor([[30.0], [0.0]]), math.exp(-30)
    found = tied_log_probs(hidden, weight, torch.tensor([0]), outputs=("log_probs", "entropy"))
    assert float(found.log_probs) == pytest.approx(-math.log1p(rest), rel=1e-5, abs=0)
    assert float(found.entropy) == pytest.approx(math.log1p(rest) + 30 * rest / (1 + rest), rel=1e-5, abs=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_precision_is_that_of_the_inputs(dtype):
    hidden, weight, labels, _ = problem(5, dtype, tokens=60, width=16, words=300)
    tensors = [leaf(hidden), leaf(weight)]
    found = tied_log_probs(*tensors, labels, outputs=DIFFERENTIABLE, memory_budget=4000)
    exact = [leaf(x.double()) for x in (hidden, weight)]
    expected = plain(*exact, labels)
    for name in DIFFERENTIABLE:
        assert getattr(found, name).dtype == torch.float32
        assert error(getattr(found, name).detach(), expected[name].detach()) < 1e-6
    for ours, theirs in zip(gradients(found, tensors), gradients(expected, exact), strict=True):
        assert error(ours, theirs) < max(torch.finfo(dtype).eps, 3e-6)


def test_a_float32_head_over_a_half_precision_tie(monkeypatch):
    """Also where this CPU multiplies bfloat16 fast: the products are in float32 because they are asked for."""
    monkeypatch.setattr("hf_tying.losses.arithmetic.has_fast_half", lambda dtype: True)
    hidden, weight, labels, _ = problem(6, torch.bfloat16, tokens=60, width=64, words=300)
    expected = plain(hidden, weight, labels)["log_probs"]
    wide = tied_log_probs(hidden, weight, labels, head_dtype=torch.float32).log_probs
    assert error(wide, expected) < 1e-6 < error(tied_log_probs(hidden, weight, labels).log_probs, expected)
    mixed = tied_log_probs(hidden.float(), weight, labels, head_dtype=torch.float32).log_probs
    torch.testing.assert_close(mixed, wide)
    with pytest.raises(RuntimeError, match="of one dtype"):
        tied_log_probs(hidden.float(), weight, labels)


def test_it_is_the_cross_entropy_of_each_token():
    hidden, weight, labels, bias = problem(7, torch.float32)
    losses = tied_cross_entropy(hidden, weight, labels, bias=bias, reduction="none")
    torch.testing.assert_close(-tied_log_probs(hidden, weight, labels, bias).log_probs, losses, rtol=1e-5, atol=1e-6)


def test_a_tied_matrix_has_one_gradient(monkeypatch):
    from hf_tying.losses import embedding

    added = []
    claimed_gradient = embedding.claimed_gradient

    def seen(weight):
        added.append(claimed_gradient(weight) is not None)
        return claimed_gradient(weight)

    monkeypatch.setattr(embedding, "claimed_gradient", seen)
    _, matrix, labels, _ = problem(8)
    ids = labels.clamp(min=0)

    def through(embed, log_probs):
        weight = leaf(matrix)
        log_probs(torch.tanh(embed(ids, weight)), weight).sum().backward()
        return weight.grad

    ours = through(tied_embedding, lambda hidden, weight: tied_log_probs(hidden, weight, labels).log_probs)
    theirs = through(F.embedding, lambda hidden, weight: plain(hidden, weight, labels)["log_probs"])
    torch.testing.assert_close(ours, theirs)
    assert added == [True]


def test_a_learned_scale_gets_its_gradient():
    hidden, weight, labels, bias = problem(9)
    scales = [torch.tensor(0.7, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    found = tied_log_probs(hidden, weight, labels, bias, DIFFERENTIABLE, logit_scale=scales[0])
    (ours,) = gradients(found, [scales[0]])
    (theirs,) = gradients(plain(hidden, weight, labels, bias, logit_scale=scales[1]), [scales[1]])
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_transforms_are_those_of_plain_torch(name):
    hidden, weight, labels, bias = problem(10)

    def ours(hidden, weight, bias):
        return getattr(tied_log_probs(hidden, weight, labels, bias, OUTPUTS), name).square().sum()

    def theirs(hidden, weight, bias):
        return plain(hidden, weight, labels, bias)[name].square().sum()

    tensors = hidden, weight, bias
    directions = tuple(torch.ones_like(x) for x in tensors)
    for transform in (
        lambda loss: torch.func.grad(loss, argnums=(0, 1, 2))(*tensors),
        lambda loss: torch.func.jvp(loss, tensors, directions),
        lambda loss: torch.func.hessian(loss)(*tensors),
        lambda loss: torch.func.vmap(loss)(*(torch.stack([x, 2 * x]) for x in tensors)),
    ):
        torch.testing.assert_close(transform(ours), transform(theirs))


def test_a_second_derivative_is_refused():
    hidden, weight, labels, _ = problem(11)
    total = tied_log_probs(leaf(hidden), weight, labels).log_probs.sum()
    with pytest.raises(RuntimeError, match="no gradient of its gradient.*log_softmax"):
        total.backward(create_graph=True)


@pytest.mark.parametrize(
    "wrong, error_class, message",
    [
        ({"outputs": ("log_probs", "rank")}, ValueError, "expected one or more of log_probs, entropy"),
        ({"outputs": ()}, ValueError, "expected one or more of"),
        ({"temperature": 0.0}, ValueError, "temperature=0.0: expected a number above 0"),
        ({"temperature": torch.ones((), requires_grad=True)}, ValueError, "logit_scale=1 / temperature"),
        ({"logit_softcap": -1.0}, ValueError, "logit_softcap must be above 0"),
        ({"labels": torch.tensor([31])}, ValueError, "one label for each hidden state"),
        ({"labels": torch.full((23,), 31)}, IndexError, "expected words from 0 to 30"),
        ({"bias": torch.zeros(3, dtype=torch.float64)}, RuntimeError, r"bias of shape \(31,\)"),
        ({"weight": torch.zeros(31, 4, dtype=torch.float64)}, RuntimeError, "cannot be multiplied"),
    ],
)
def test_bad_input_is_refused_before_any_work(wrong, error_class, message):
    hidden, weight, labels, _ = problem(12)
    with pytest.raises(error_class, match=message):
        tied_log_probs(**{"hidden": hidden, "weight": weight, "labels": labels, **wrong})
