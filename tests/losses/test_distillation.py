"""`tied_distillation` and `top_k_distillation` against plain torch: values, gradients, precision, memory, refusals."""

import pytest
import torch
from torch.nn import functional as F

from hf_tying.losses import tied_distillation, tied_embedding, top_k_distillation

from .helpers import error, leaf, metered

pytestmark = pytest.mark.usefixtures("slow_half")
DIVERGENCES = ("kl", "reverse_kl", "js")
every_divergence = pytest.mark.parametrize("divergence", DIVERGENCES)
TOKENS, WORDS = 17, 29


def problem(seed=0, dtype=torch.float64, tokens=TOKENS, widths=(5, 7), words=WORDS):
    """Hidden states and matrix of a student and of a teacher, and labels of which some are ignored."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    labels = torch.randint(words, (tokens,), generator=generator)
    labels[:: 4 + seed % 3] = -100
    sides = [part for width in widths for part in (normal(tokens, width), normal(words, width))]
    return *sides, labels, (normal(words), normal(words))


def whole(hidden, weight, bias=None, scale=None, cap=None):
    logits = F.linear(hidden.double(), weight.double(), None if bias is None else bias.double())
    logits = logits if scale is None else logits * scale
    return logits if cap is None else cap * torch.tanh(logits / cap)


def plain(p, q, divergence):
    """By torch.distributions, of probabilities."""
    kl = torch.distributions.kl_divergence
    p, q = (torch.distributions.Categorical(probs=each) for each in (p, q))
    if divergence == "js":
        m = torch.distributions.Categorical(probs=(p.probs + q.probs) / 2)
        return (kl(p, m) + kl(q, m)) / 2
    return kl(p, q) if divergence == "kl" else kl(q, p)


def expected(student, teacher, labels, divergence, temperature=1.0):
    """Of logits: the mean over the tokens that count."""
    p, q = ((logits / temperature).softmax(-1) for logits in (teacher, student))
    return temperature**2 * plain(p, q, divergence)[labels != -100].mean()


def collapsed(logits, ids, temperature=1.0):
    """Probabilities of a few words, and of the rest."""
    chosen = (logits / temperature).softmax(-1).gather(-1, ids)
    return torch.cat([chosen, 1 - chosen.sum(-1, keepdim=True)], -1)


OPTIONS = [
    {},
    {"temperature": 2.5},
    {"temperature": 0.6, "bias": True, "scale": (0.7, 1.4), "cap": (2.0, 3.0)},
]


@every_divergence
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("block_bytes", [None, 8, 300, 1500])
def test_values_and_gradients_are_those_of_whole_logits(divergence, options, block_bytes):
    *sides, labels, biases = problem(len(options))
    biases = biases if options.get("bias") else (None, None)
    scales, caps, temperature = (options.get(name, d) for name, d in
                                 (("scale", (None, None)), ("cap", (None, None)), ("temperature", 1.0)))  # fmt: skip
    tensors = [leaf(x) for x in (*sides[:2], biases[0]) if x is not None]
    found = tied_distillation(
        *tensors[:2], *sides[2:], temperature, divergence, labels=labels, memory_budget=block_bytes,
        student_bias=tensors[2] if len(tensors) > 2 else None, teacher_bias=biases[1], student_logit_scale=scales[0],
        teacher_logit_scale=scales[1], student_logit_softcap=caps[0], teacher_logit_softcap=caps[1],
    )  # fmt: skip
    student = whole(*tensors[:2], *(tensors[2:] or [None]), scales[0], caps[0])
    wanted = expected(student, whole(*sides[2:], biases[1], scales[1], caps[1]), labels, divergence, temperature)
    torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-12)
    for ours, theirs in zip(torch.autograd.grad(found, tensors), torch.autograd.grad(wanted, tensors), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


@every_divergence
@pytest.mark.parametrize("top_k", [None, 4])
def test_gradcheck(divergence, top_k):
    *sides, labels, (bias, _) = problem(1, tokens=3, widths=(2, 3), words=7)

    def loss(hidden, weight, bias):
        return tied_distillation(
            hidden, weight, *sides[2:], 1.7, divergence, top_k=top_k, labels=labels, student_bias=bias,
            memory_budget=30,
        )  # fmt: skip

    assert torch.autograd.gradcheck(loss, [leaf(x) for x in (*sides[:2], bias)])


@every_divergence
@pytest.mark.parametrize("k", [1, 3, 11])
@pytest.mark.parametrize("block_bytes", [None, 8, 300])
class TestTopK:
    def test_other_words_count_as_one(self, divergence, k, block_bytes):
        *sides, labels, _ = problem(2)
        tensors = [leaf(x) for x in sides[:2]]
        options = {"labels": labels, "memory_budget": block_bytes}
        found = tied_distillation(*tensors, *sides[2:], 1.4, divergence, top_k=k, **options)
        teacher = whole(*sides[2:])
        ids = teacher.topk(k, -1).indices
        p, q = collapsed(teacher, ids, 1.4), collapsed(whole(*tensors), ids, 1.4)
        wanted = 1.4**2 * plain(p, q, divergence)[labels != -100].mean()
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-10)
        theirs = torch.autograd.grad(wanted, tensors)
        for ours, their in zip(torch.autograd.grad(found, tensors), theirs, strict=True):
            torch.testing.assert_close(ours, their, rtol=1e-7, atol=1e-10)
        assert found <= tied_distillation(*tensors, *sides[2:], 1.4, divergence, **options)

    def test_a_stored_teacher_is_the_same(self, divergence, k, block_bytes):
        *sides, labels, _ = problem(3)
        log_probs, ids = (whole(*sides[2:]) / 1.4).log_softmax(-1).topk(k, -1)
        options = {"labels": labels, "memory_budget": block_bytes}
        found = top_k_distillation(*sides[:2], log_probs, ids, 1.4, divergence, **options)
        wanted = tied_distillation(*sides, 1.4, divergence, top_k=k, **options)
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-10)


@every_divergence
def test_all_words_one_by_one_are_all_words(divergence):
    *sides, labels, _ = problem(4)
    wanted = tied_distillation(*sides, 1.4, divergence, labels=labels)
    torch.testing.assert_close(tied_distillation(*sides, 1.4, divergence, top_k=WORDS, labels=labels), wanted)
    log_probs, ids = (whole(*sides[2:]) / 1.4).log_softmax(-1).topk(WORDS, -1)
    torch.testing.assert_close(top_k_distillation(*sides[:2], log_probs, ids, 1.4, divergence, labels=labels), wanted)


@every_divergence
@pytest.mark.parametrize("excess", [0.0, 0.04])
def test_a_stored_teacher_that_leaves_nothing_of_its_rounded_sum(divergence, excess):
    *sides, labels, _ = problem(4, torch.float32)
    log_probs, ids = (4 * whole(*sides[2:])).log_softmax(-1).topk(5, -1)
    log_probs = log_probs.float() - log_probs.float().logsumexp(-1, keepdim=True) + excess
    hidden = leaf(sides[0])
    loss = top_k_distillation(hidden, sides[1], log_probs, ids, 1.0, divergence, labels=labels)
    q = collapsed(whole(hidden, sides[1]), ids)
    p = torch.cat([log_probs.exp(), torch.full((TOKENS, 1), torch.finfo(torch.float32).eps)], -1).double()
    wanted = plain(p / p.sum(-1, keepdim=True), q, divergence)[labels != -100].mean()
    assert float(loss.detach()) == pytest.approx(float(wanted.detach()), rel=0.1)
    assert torch.autograd.grad(loss, hidden)[0].isfinite().all()


@every_divergence
@pytest.mark.parametrize("top_k", [None, 3])
class TestTokens:
    def test_of_a_token_that_does_not_count_nothing_is_read(self, divergence, top_k):
        *sides, labels, _ = problem(5)
        mask = torch.arange(TOKENS) % 3 > 0
        counted = mask & (labels != -100)
        hidden = leaf(sides[0])
        broken = sides[2].masked_fill(~counted[:, None], torch.nan)
        found = tied_distillation(
            hidden, sides[1], broken, sides[3], 2.0, divergence, top_k=top_k, labels=labels, mask=mask
        )
        wanted = tied_distillation(
            sides[0][counted], sides[1], sides[2][counted], sides[3], 2.0, divergence, top_k=top_k
        )
        torch.testing.assert_close(found, wanted)
        (gradient,) = torch.autograd.grad(found, hidden)
        assert not gradient[~counted].any() and gradient[counted].abs().sum(-1).all()

    def test_reductions(self, divergence, top_k):
        *sides, labels, _ = problem(6)
        options = {"top_k": top_k, "labels": labels}
        each = tied_distillation(*sides, 1.0, divergence, reduction="none", **options)
        assert each.shape == labels.shape and not each[labels == -100].any()
        torch.testing.assert_close(tied_distillation(*sides, 1.0, divergence, reduction="sum", **options), each.sum())
        mean = tied_distillation(*sides, 1.0, divergence, **options)
        torch.testing.assert_close(mean, each.sum() / (labels != -100).sum())
        for items in (40, torch.tensor(40)):
            given = tied_distillation(*sides, 1.0, divergence, num_items_in_batch=items, **options)
            torch.testing.assert_close(given, each.sum() / 40)

    def test_without_labels_any_ignore_index_leaves_all_tokens(self, divergence, top_k):
        *sides, _, _ = problem(6)
        for mask in (None, torch.arange(TOKENS) % 3 > 0):
            options = {"top_k": top_k, "mask": mask}
            wanted = tied_distillation(*sides, 1.0, divergence, **options)
            assert wanted > 0
            assert tied_distillation(*sides, 1.0, divergence, ignore_index=0, **options).equal(wanted)

    def test_where_none_counts_the_loss_is_zero_and_can_be_trained_on(self, divergence, top_k):
        *sides, labels, _ = problem(6)
        hidden = leaf(sides[0])
        for items in (None, 0, torch.tensor(0)):
            loss = tied_distillation(
                hidden, *sides[1:], 1.0, divergence, top_k=top_k, labels=torch.full_like(labels, -100),
                num_items_in_batch=items,
            )  # fmt: skip
            assert loss == 0 and not torch.autograd.grad(loss, hidden)[0].any()

    def test_no_tokens_at_all(self, divergence, top_k):
        *sides, _, _ = problem(7, tokens=4)
        hidden = leaf(sides[0][:0])
        loss = tied_distillation(hidden, sides[1], sides[2][:0], sides[3], 1.0, divergence, top_k=top_k)
        assert loss == 0 and torch.autograd.grad(loss, hidden)[0].shape == (0, 5)

    def test_any_leading_shape(self, divergence, top_k):
        *sides, _, _ = problem(7, tokens=12)
        flat = tied_distillation(*sides, 1.0, divergence, top_k=top_k, reduction="none")
        shaped = [side.view(2, 1, 6, -1) if len(side) == 12 else side for side in sides]
        found = tied_distillation(*shaped, 1.0, divergence, top_k=top_k, reduction="none")
        torch.testing.assert_close(found, flat.view(2, 1, 6))


@every_divergence
def test_a_student_like_its_teacher_has_nothing_to_learn(divergence):
    *sides, _, _ = problem(8, torch.float32)
    hidden = leaf(sides[0])
    loss = tied_distillation(hidden, sides[1], sides[0], sides[1], 3.0, divergence)
    assert abs(float(loss.detach())) < 1e-6 and float(torch.autograd.grad(loss, hidden)[0].abs().max()) < 1e-6


@every_divergence
@pytest.mark.parametrize("top_k", [None, 5])
def test_forbidden_words_have_no_part(divergence, top_k):
    *sides, labels, biases = problem(9)
    kept = [word for word in range(WORDS) if word not in (7, 20)]
    for bias in biases:
        bias[[7, 20]] = -torch.inf
    hidden, bias = leaf(sides[0]), leaf(biases[0])
    options = {"top_k": top_k, "mask": labels != -100}
    found = tied_distillation(
        hidden, *sides[1:], 1.0, divergence, student_bias=bias, teacher_bias=biases[1], memory_budget=300, **options
    )
    fewer = leaf(sides[0])
    wanted = tied_distillation(
        fewer, sides[1][kept], sides[2], sides[3][kept], 1.0, divergence, student_bias=biases[0][kept],
        teacher_bias=biases[1][kept], **options,
    )  # fmt: skip
    torch.testing.assert_close(found, wanted)
    ours, into_bias = torch.autograd.grad(found, (hidden, bias))
    torch.testing.assert_close(ours, torch.autograd.grad(wanted, fewer)[0])
    assert not into_bias[[7, 20]].any()


@every_divergence
@pytest.mark.parametrize("top_k", [None, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_precision_is_that_of_the_inputs(divergence, top_k, dtype):
    *sides, labels, _ = problem(10, dtype, tokens=60, widths=(16, 24), words=300)
    tensors = [leaf(x) for x in sides[:2]]
    options = {"labels": labels, "top_k": top_k}
    found = tied_distillation(*tensors, *sides[2:], 2.0, divergence, memory_budget=4000, **options)
    exact = [leaf(x.double()) for x in sides[:2]]
    wanted = tied_distillation(*exact, *(x.double() for x in sides[2:]), 2.0, divergence, **options)
    assert found.dtype == torch.float32 and error(found.detach(), wanted.detach()) < 1e-5
    for ours, theirs in zip(torch.autograd.grad(found, tensors), torch.autograd.grad(wanted, exact), strict=True):
        assert error(ours, theirs) < max(torch.finfo(dtype).eps, 1e-5)


def test_sides_of_different_dtype():
    *sides, labels, _ = problem(11, torch.float32)
    teacher = [x.bfloat16() for x in sides[2:]]
    found = tied_distillation(*sides[:2], *teacher, 1.0, labels=labels)
    torch.testing.assert_close(found, tied_distillation(*sides[:2], *(x.float() for x in teacher), 1.0, labels=labels))
    double = tied_distillation(*(x.double() for x in sides[:2]), *teacher, 1.0, labels=labels)
    assert double.dtype == torch.float64


@every_divergence
@pytest.mark.parametrize("top_k", [None, 8])
def test_a_step_has_one_gradient_of_the_matrix_and_no_logits(divergence, top_k):
    tokens, width, words, budget = 256, 32, 6000, 2**16
    *sides, labels, _ = problem(12, torch.float32, tokens, (width, width), words)
    matrix = leaf(sides[1])
    ids = labels.clamp(min=0)

    def run():
        hidden = tied_embedding(ids, matrix)
        tied_distillation(
            hidden, matrix, *sides[2:], 2.0, divergence, labels=labels, top_k=top_k, memory_budget=budget
        ).backward()

    _, meter = metered(run)
    gradient = words * width * 4
    assert meter.as_large_as(gradient) == 1
    assert meter.peak <= gradient + 10 * budget + 8 * tokens * width * 4 + 2**16 < tokens * words * 4 / 2


@every_divergence
@pytest.mark.parametrize("top_k", [None, 3])
def test_transforms_are_those_of_plain_torch(divergence, top_k):
    *sides, labels, _ = problem(13, tokens=6)
    counted = labels != -100
    teacher = whole(*sides[2:])
    ids = teacher.topk(3, -1).indices

    def ours(hidden, weight):
        return tied_distillation(hidden, weight, *sides[2:], 1.5, divergence, top_k=top_k, labels=labels)

    def theirs(hidden, weight):
        student = whole(hidden, weight)
        pair = [(x / 1.5).softmax(-1) if top_k is None else collapsed(x, ids, 1.5) for x in (teacher, student)]
        return 1.5**2 * (plain(*pair, divergence) * counted).sum() / counted.sum()

    for transform in (
        lambda loss: torch.func.grad(loss, argnums=(0, 1))(*sides[:2]),
        lambda loss: torch.func.jvp(loss, tuple(sides[:2]), tuple(map(torch.ones_like, sides[:2]))),
        lambda loss: torch.func.hessian(loss)(*sides[:2]),
    ):
        torch.testing.assert_close(transform(ours), transform(theirs), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("top_k, name", [(None, "tied_distillation"), (3, "top_k_distillation")])
def test_a_second_derivative_is_refused(top_k, name):
    *sides, labels, _ = problem(14)
    loss = tied_distillation(leaf(sides[0]), *sides[1:], 1.0, top_k=top_k, labels=labels)
    with pytest.raises(RuntimeError, match=f"{name} has no gradient of its gradient"):
        loss.backward(create_graph=True)


def test_a_learned_scale_gets_its_gradient():
    *sides, labels, _ = problem(15)
    scales = [torch.tensor(0.7, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    tied_distillation(*sides, 1.0, labels=labels, student_logit_scale=scales[0]).backward()
    expected(whole(*sides[:2]) * scales[1], whole(*sides[2:]), labels, "kl").backward()
    torch.testing.assert_close(scales[0].grad, scales[1].grad)


def test_a_teacher_gets_no_gradient():
    *sides, labels, _ = problem(16)
    teacher = leaf(sides[3])  # a trained matrix, of a teacher that ran under no_grad
    for top_k in (None, 3):
        loss = tied_distillation(leaf(sides[0]), sides[1], sides[2], teacher, 1.0, top_k=top_k, labels=labels)
        loss.backward()
        assert teacher.grad is None


ONE = torch.zeros(TOKENS, 2)


@pytest.mark.parametrize(
    "wrong, error_class, message",
    [
        ({"divergence": "hellinger"}, ValueError, "expected one of 'kl', 'reverse_kl', 'js'"),
        ({"temperature": 0.0}, ValueError, "temperature=0.0: expected a number above 0"),
        ({"top_k": 0}, ValueError, "top_k=0: expected a number of words from 1 to 29"),
        ({"top_k": WORDS + 1}, ValueError, "from 1 to 29"),
        ({"teacher_hidden": torch.zeros(3, 7)}, ValueError, r"for each of the student, \(17,\), got \(3,\)"),
        ({"teacher_weight": torch.zeros(31, 7)}, ValueError, "29 rows and the teacher's 31"),
        ({"teacher_hidden": torch.zeros(TOKENS, 7, requires_grad=True)}, ValueError, "teacher_hidden.detach()"),
        ({"teacher_hidden": torch.zeros(TOKENS, 6)}, RuntimeError, "cannot be multiplied"),
        ({"mask": torch.ones(TOKENS)}, ValueError, "mask of dtype torch.bool"),
        ({"labels": torch.full((TOKENS,), WORDS)}, IndexError, "expected words from 0 to 28"),
        ({"reduction": "max"}, ValueError, "not a valid value for reduction"),
        ({"student_logit_softcap": -1.0}, ValueError, "logit_softcap must be above 0"),
    ],
)
def test_bad_input_is_refused_before_any_work(wrong, error_class, message):
    *sides, _, _ = problem(17, torch.float32)
    names = ("student_hidden", "student_weight", "teacher_hidden", "teacher_weight")
    with pytest.raises(error_class, match=message):
        tied_distillation(**dict(zip(names, sides, strict=True)) | wrong)


@pytest.mark.parametrize(
    "wrong, error_class, message",
    [
        ({"teacher_ids": torch.zeros(TOKENS, 3, dtype=torch.int64)}, ValueError, r"of shape \(17, 'k'\)"),
        ({"teacher_ids": ONE}, ValueError, "the ids of dtype torch.int64"),
        ({"teacher_ids": ONE.long()}, ValueError, "a word twice"),
        ({"teacher_ids": ONE.long() + torch.tensor([0, WORDS])}, IndexError, "Word 29 is out of bounds"),
        ({"teacher_log_probs": ONE}, ValueError, "sum to 2: expected at most 1"),
        ({"teacher_log_probs": (ONE - 1).requires_grad_()}, ValueError, "teacher_log_probs.detach()"),
    ],
)
def test_a_bad_stored_teacher_is_refused_before_any_work(wrong, error_class, message):
    *sides, _, _ = problem(17, torch.float32)
    stored = {"teacher_log_probs": ONE - 1, "teacher_ids": ONE.long() + torch.arange(2)}
    top_k_distillation(*sides[:2], **stored)
    with pytest.raises(error_class, match=message):
        top_k_distillation(*sides[:2], **stored | wrong)
