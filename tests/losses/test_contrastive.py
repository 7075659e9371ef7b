"""`contrastive_weight_tying_loss` against plain torch in float64, and what it does not compute."""

import logging as stdlib_logging
import math

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from hf_tying.losses import ContrastiveWeightTyingLoss, contrastive, contrastive_weight_tying_loss, embedding

from ..processes import run_script

WORDS, WIDTH = 11, 6


@pytest.fixture
def told():
    messages = []
    handler = stdlib_logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logger = stdlib_logging.getLogger("hf_tying")
    logger.addHandler(handler)
    contrastive._warned.clear()
    yield messages
    logger.removeHandler(handler)


def problem(shape=(3, 7), words=WORDS, dtype=torch.float64):
    """Hidden states, a matrix and labels: some words more than once, some never, some labels ignored."""
    hidden = torch.randn(*shape, WIDTH, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(words, WIDTH, dtype=torch.float64).to(dtype).requires_grad_()
    labels = torch.randint(words - 2, shape)
    labels.view(-1)[::4] = -100
    return hidden, weight, labels


def counted(hidden, labels, ignore_index=-100):
    return hidden[labels != ignore_index], labels[labels != ignore_index]


def by_position(hidden, weight, labels, temperature=1.0, ignore_index=-100):
    """The paper's formula, position by position: the words of the batch, each as often as it stands there."""
    hidden, words = counted(hidden, labels, ignore_index)
    losses = []
    for state, word in zip(hidden, words, strict=True):
        exponentials = [((state @ weight[other]) / temperature).exp() for other in words]
        losses.append(-(((state @ weight[word]) / temperature).exp() / sum(exponentials)).log())
    return torch.stack(losses)


def among(words, hidden, weight, labels):
    """Cross entropy over `words`, a list of different ones."""
    hidden, labels = counted(hidden, labels)
    products = hidden @ weight[words].T
    return F.cross_entropy(products, torch.tensor([words.index(label) for label in labels.tolist()]))


def assert_same(found, expected, hidden, weight, rtol=1e-10):
    assert torch.allclose(found, expected, rtol=rtol)
    for a, b in zip(torch.autograd.grad(found, (hidden, weight)), torch.autograd.grad(expected, (hidden, weight)),
                    strict=True):  # fmt: skip
        assert b.abs().max() > 0
        assert torch.allclose(a, b, rtol=rtol, atol=rtol)


@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_the_batch_is_the_papers_formula(temperature):
    hidden, weight, labels = problem()
    loss = contrastive_weight_tying_loss(hidden, weight, labels, temperature=temperature)
    assert_same(loss, by_position(hidden, weight, labels, temperature).mean(), hidden, weight)


def test_the_batch_is_the_docstrings_reference():
    hidden, weight, labels = problem()
    states, words = counted(hidden, labels)
    products = states @ F.embedding(words, weight).T / 0.7
    expected = F.cross_entropy(products, torch.arange(len(words)))
    assert_same(contrastive_weight_tying_loss(hidden, weight, labels, temperature=0.7), expected, hidden, weight)


def test_unique_words_are_a_softmax_over_the_words_of_the_batch():
    hidden, weight, labels = problem()
    words = sorted(set(labels[labels != -100].tolist()))
    assert 1 < len(words) < (labels != -100).sum()
    loss = contrastive_weight_tying_loss(hidden, weight, labels, negatives="unique")
    assert_same(loss, among(words, hidden, weight, labels), hidden, weight)


def test_sampled_words_are_further_ones_each_once():
    hidden, weight, labels = problem(words=40)
    labels = torch.where(labels == -100, labels, labels % 9)
    words = sorted(set(labels[labels != -100].tolist()))
    chosen = contrastive._candidates(
        labels[labels != -100], 40, "sampled", 5, torch.Generator().manual_seed(3)
    ).words.tolist()
    assert chosen[: len(words)] == words and len(set(chosen)) == len(chosen) == len(words) + 5
    loss = contrastive_weight_tying_loss(
        hidden, weight, labels, negatives="sampled", num_sampled=5, generator=torch.Generator().manual_seed(3)
    )
    assert_same(loss, among(chosen, hidden, weight, labels), hidden, weight)


def test_all_words_sampled_is_the_whole_softmax():
    hidden, weight, labels = problem()
    loss = contrastive_weight_tying_loss(hidden, weight, labels, negatives="sampled", num_sampled=1000)
    assert_same(loss, among(list(range(WORDS)), hidden, weight, labels), hidden, weight)


def test_words_of_the_batch_are_found_before_sampled_ones_that_are_smaller():
    hidden, weight, labels = problem()
    labels = torch.where(labels == -100, labels, WORDS - 1 - labels % 3)
    loss = contrastive_weight_tying_loss(hidden, weight, labels, negatives="sampled", num_sampled=1000)
    assert_same(loss, among(list(range(WORDS)), hidden, weight, labels), hidden, weight)


def test_every_word_outside_the_batch_is_sampled_as_often_as_the_others():
    batch, often = torch.tensor([1, 1, 4]), torch.zeros(8)
    for _ in range(600):
        often[contrastive._candidates(batch, 8, "sampled", 2, None).words[2:]] += 1
    assert often[[1, 4]].tolist() == [0, 0]
    assert (often[[0, 2, 3, 5, 6, 7]] - 200).abs().max() < 60  # five standard deviations


def test_without_the_targets_gradient_the_hidden_states_have_the_same_one():
    hidden, weight, labels = problem()
    loss = contrastive_weight_tying_loss(hidden, weight, labels, stop_gradient=True)
    found = torch.autograd.grad(loss, (hidden, weight), allow_unused=True)
    expected = torch.autograd.grad(by_position(hidden, weight, labels).mean(), hidden)[0]
    assert found[1] is None and torch.allclose(found[0], expected) and expected.abs().max() > 0


@pytest.mark.parametrize("negatives", ["batch", "unique"])
@pytest.mark.parametrize("items", [7, torch.tensor(7)])
def test_the_sum_and_what_it_is_divided_by(negatives, items):
    hidden, weight, labels = problem()
    loss = contrastive_weight_tying_loss(hidden, weight, labels, negatives=negatives)
    summed = contrastive_weight_tying_loss(hidden, weight, labels, negatives=negatives, reduction="sum")
    by_seven = contrastive_weight_tying_loss(hidden, weight, labels, negatives=negatives, num_items_in_batch=items)
    assert_same(summed, loss * (labels != -100).sum(), hidden, weight)
    assert_same(by_seven, contrastive_weight_tying_loss(
        hidden, weight, labels, negatives=negatives, reduction="sum") / 7, hidden, weight)  # fmt: skip


def test_another_label_is_ignored_and_minus_100_is_a_word_no_more():
    hidden, weight, labels = problem()
    labels = labels.masked_fill(labels == -100, 3)
    loss = contrastive_weight_tying_loss(hidden, weight, labels, ignore_index=3)
    assert_same(loss, by_position(hidden, weight, labels, ignore_index=3).mean(), hidden, weight)
    with pytest.raises(IndexError, match="-100"):
        contrastive_weight_tying_loss(hidden, weight, labels.masked_fill(labels == 3, -100), ignore_index=3)


def test_products_beyond_the_range_of_exp_are_a_log_sum_exp():
    hidden, weight, labels = problem(dtype=torch.float32)
    loss = contrastive_weight_tying_loss(hidden * 300, weight, labels)
    expected = contrastive_weight_tying_loss(hidden.double() * 300, weight.double(), labels)
    assert 100 < loss.item() < math.inf and loss.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("negatives", ["batch", "unique"])
def test_bfloat16_is_summed_in_float32(negatives):
    hidden, weight, labels = problem((40, 20), words=300, dtype=torch.bfloat16)
    loss = contrastive_weight_tying_loss(hidden, weight, labels, negatives=negatives)
    exact = contrastive_weight_tying_loss(hidden.double(), weight.double(), labels, negatives=negatives)
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(exact.item(), rel=2e-3)
    found, expected = (torch.autograd.grad(value, (hidden, weight)) for value in (loss, exact))
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == torch.bfloat16 and (a.double() - b.double()).norm() < 0.01 * b.double().norm()


def test_autocast_takes_float32_embeddings_and_bfloat16_states():
    hidden, weight, labels = problem(dtype=torch.float32)
    states = hidden.bfloat16()
    exact = contrastive_weight_tying_loss(states.double(), weight.double(), labels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = contrastive_weight_tying_loss(states, weight, labels)
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(exact.item(), rel=1e-2)
    assert torch.autograd.grad(loss, weight)[0].dtype == torch.float32


@pytest.mark.parametrize("negatives", ["batch", "unique"])
@pytest.mark.parametrize("how_many", [0, 1])
def test_one_position_or_none_is_zero_and_said_once(negatives, how_many, told):
    hidden, weight, labels = problem()
    labels = torch.full_like(labels, -100)
    labels.view(-1)[:how_many] = 4
    for _ in range(2):
        loss = contrastive_weight_tying_loss(hidden, weight, labels, negatives=negatives)
    found = torch.autograd.grad(loss, (hidden, weight))
    assert loss.item() == 0 and all(torch.count_nonzero(gradient) == 0 for gradient in found)
    labels.view(-1)[: 1 - how_many] = 4  # another number of them, of which is told no more
    contrastive_weight_tying_loss(hidden, weight, labels, negatives=negatives)
    assert len(told) == 1 and f"{how_many} positions that count" in told[0]


def test_one_word_again_and_again_has_the_log_of_its_number():
    hidden, weight, _ = problem()
    loss = contrastive_weight_tying_loss(hidden, weight, torch.full(hidden.shape[:-1], 4))
    assert loss.item() == pytest.approx(math.log(21))
    assert all(gradient.abs().max() < 1e-12 for gradient in torch.autograd.grad(loss, (hidden, weight)))


def test_states_that_are_not_finite_do_no_harm_where_nothing_counts():
    hidden, weight, labels = problem()
    states = torch.full_like(hidden, math.inf).requires_grad_()
    loss = contrastive_weight_tying_loss(states, weight, torch.full_like(labels, -100))
    assert loss.item() == 0 and torch.autograd.grad(loss, states)[0].abs().max() == 0


def test_nothing_is_multiplied_by_the_vocabulary():
    """Three products (one forward, two backward) of positions that count by different words, whatever V is."""
    states, words = 24, 5
    hidden = torch.randn(states, WIDTH, requires_grad=True)
    labels = torch.arange(states) % words
    counts = []
    for vocabulary in (WORDS, 50_000):
        weight = torch.randn(vocabulary, WIDTH, requires_grad=True)
        with FlopCounterMode(display=False) as flops:
            contrastive_weight_tying_loss(hidden, weight, labels).backward()
        counts.append(flops.get_total_flops())
    product = 2 * states * words * WIDTH
    assert 3 * product <= counts[0] == counts[1] < 4 * product


def test_the_embedding_has_one_gradient_for_both_of_its_roles(monkeypatch):
    claimed = embedding.claimed_gradient
    taken = []
    monkeypatch.setattr(embedding, "claimed_gradient", lambda weight: taken.append(claimed(weight)) or taken[-1])
    _, weight, labels = problem(dtype=torch.float32)
    ids = torch.randint(WORDS, labels.shape)
    hidden = torch.tanh(embedding.tied_embedding(ids, weight))
    found = torch.autograd.grad(contrastive_weight_tying_loss(hidden, weight, labels), weight)[0]
    assert [gradient is not None for gradient in taken] == [False, True]
    expected = torch.autograd.grad(by_position(torch.tanh(weight[ids]), weight, labels).mean(), weight)[0]
    assert torch.allclose(found, expected, atol=1e-6)


def test_the_module_has_the_options():
    hidden, weight, labels = problem()
    module = ContrastiveWeightTyingLoss(negatives="unique", temperature=0.5, reduction="sum")
    expected = contrastive_weight_tying_loss(
        hidden, weight, labels, negatives="unique", temperature=0.5, reduction="sum"
    )
    assert torch.equal(module(hidden, weight, labels), expected)
    assert "negatives='unique'" in repr(module)
    with pytest.raises(ValueError, match="temperature"):
        ContrastiveWeightTyingLoss(temperature=0)


@pytest.mark.parametrize(
    "options, what",
    [
        ({"negatives": "all"}, "'batch', 'unique', 'sampled'"),
        ({"negatives": "sampled"}, "expected a number for 'sampled'"),
        ({"num_sampled": 3}, "None for the others"),
        ({"negatives": "sampled", "num_sampled": 0}, "1 or more"),
        ({"temperature": 0.0}, "above 0"),
        ({"temperature": math.nan}, "above 0"),
        ({"reduction": "none"}, "'mean' or 'sum'"),
        ({"reduction": "sum", "num_items_in_batch": 3}, "num_items_in_batch"),
    ],
)
def test_wrong_options_are_refused(options, what):
    with pytest.raises(ValueError, match=what):
        contrastive_weight_tying_loss(*problem(), **options)


def test_wrong_tensors_are_refused():
    hidden, weight, labels = problem()
    with pytest.raises(ValueError, match="one label for each hidden state"):
        contrastive_weight_tying_loss(hidden, weight, labels[:, 1:])
    with pytest.raises(IndexError, match="out of bounds"):
        contrastive_weight_tying_loss(hidden, weight[:3], labels)
    with pytest.raises(RuntimeError, match="one dtype"):
        contrastive_weight_tying_loss(hidden.float(), weight, labels)
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        contrastive_weight_tying_loss(hidden[..., :-1], weight, labels)


# --- two processes ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def results() -> dict:
    return run_script("two_processes_contrastive.py", processes=2)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("case", ["even", "uneven", "one process has none", "unique", "the mean of Trainer"])
def test_gathered_the_gradient_is_that_of_one_process_with_the_whole_batch(results, case):
    assert results[case]["apart"] < 1e-12 < 0.01 < results[case]["not gathered"]
    assert results[case]["loss"] < 1e-12


@pytest.mark.timeout(300)
def test_a_model_under_ddp_trains_as_one_process_does(results):
    assert results["a model"]["drift"] < 1e-5 < 1e-2 < results["a model"]["moved"]
