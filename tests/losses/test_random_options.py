"""`tied_log_probs` and `tied_distillation` with any options at once, at any shape, against plain torch in float64.

`SWEEPS` problems of each are drawn (`make test-upstream`: some thousand).
"""

import math
import os
import random
from dataclasses import dataclass, field

import pytest
import torch
from torch.nn import functional as F

from hf_tying.losses import arithmetic, tied_distillation, tied_log_probs

SEEDS = range(int(os.environ.get("SWEEPS", "40")))
DIFFERENTIABLE = ("log_probs", "entropy", "logsumexp", "mean_logits")
#: Most error of a value and of a gradient, relative to the largest value or 1: of exact products, and of half ones.
LIMITS = {
    torch.float64: (1e-9, 1e-9),
    torch.float32: (2e-5, 5e-5),
    torch.bfloat16: (2e-5, 2e-2),
    torch.float16: (2e-5, 4e-3),
}
IN_HALF = (6e-2, 6e-2)


@dataclass
class Drawn:
    """Operands of a softmax, and its options; `forbidden` is a word whose bias is minus infinity."""

    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    labels: torch.Tensor
    fast_half: bool
    temperature: float = 1.0
    scale: float | torch.Tensor | None = None
    cap: float | None = None
    forbidden: int | None = None
    options: dict = field(default_factory=dict)

    def trained(self) -> list[torch.Tensor]:
        tensors = self.hidden, self.weight, self.bias, self.scale
        return [x for x in tensors if isinstance(x, torch.Tensor)]

    def exact(self) -> "Drawn":
        """The same in float64, each tensor a leaf of its own."""
        wide = [x.detach().double().requires_grad_() if isinstance(x, torch.Tensor) else x
                for x in (self.hidden, self.weight, self.bias, self.scale)]  # fmt: skip
        return Drawn(*wide[:3], self.labels, False, self.temperature, wide[3], self.cap)

    def logits(self) -> torch.Tensor:
        bias = torch.zeros(len(self.weight), dtype=self.weight.dtype) if self.bias is None else self.bias
        infinite = bias.isinf()  # 0 times infinity would be the gradient of the scale
        logits = F.linear(self.hidden, self.weight, bias.masked_fill(infinite, 0.0))
        logits = (logits if self.scale is None else logits * self.scale).masked_fill(infinite, -torch.inf)
        logits = logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)
        return logits / self.temperature

    @property
    def limits(self) -> tuple[float, float]:
        in_half = self.fast_half and self.hidden.dtype.itemsize == 2 and "head_dtype" not in self.options
        return IN_HALF if in_half else LIMITS[self.hidden.dtype]


def drawn(seed: int) -> Drawn:
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    words, width = rng.choice([1, 2, 3, 7, 31, 60]), rng.choice([1, 3, 8])
    shape = rng.choice([(), (1,), (0,), (6,), (13,), (2, 3), (2, 0), (3, 1, 4)])
    dtype = rng.choice([torch.float64, torch.float32, torch.bfloat16, torch.float16])

    def normal(*sizes: int, factor: float = 1.0) -> torch.Tensor:
        values = (factor * torch.randn(*sizes, generator=generator, dtype=torch.float64)).to(dtype)
        layout = rng.randrange(3)
        if layout == 1 and len(sizes) > 1:
            values = values.transpose(-1, -2).contiguous().transpose(-1, -2)
        elif layout == 2:
            values = torch.stack([values, values], -1)[..., 0]
        return values.requires_grad_()

    labels = torch.randint(words, shape, generator=generator)
    labels[torch.rand(shape, generator=generator) < rng.choice([0.0, 0.4, 1.0])] = -100
    found = Drawn(
        normal(*shape, width), normal(words, width, factor=rng.choice([1, 1, 20])), None, labels, seed % 2 == 1
    )
    if rng.random() < 0.5:
        found.bias = normal(words)
        if words > 2 and rng.random() < 0.5:
            found.forbidden = rng.randrange(words)
            with torch.no_grad():
                found.bias[found.forbidden] = -torch.inf
            labels[labels == found.forbidden] = (found.forbidden + 1) % words
    found.temperature = rng.choice([1.0, 1.0, 0.3, 0.7, 5.0])
    learned = torch.tensor(rng.choice([0.3, 2.0]), dtype=torch.promote_types(dtype, torch.float32), requires_grad=True)
    found.scale = rng.choice([None, 0.3, 2.0, learned])
    if found.forbidden is None:  # a cap makes a forbidden word possible
        found.cap = rng.choice([None, None, 1.0, 30.0, 100.0])
    if rng.random() < 0.5:
        found.options["memory_budget"] = rng.choice([1, 8, 100, 1000])
    if dtype.itemsize == 2 and rng.random() < 0.5:
        found.options["head_dtype"] = torch.float32
    return found


def assert_close(found: torch.Tensor, expected: torch.Tensor, limit: float, what: str) -> None:
    assert found.shape == expected.shape, what
    if not found.numel():
        return
    found, expected = found.double(), expected.double()
    apart = torch.where(found == expected, 0.0, (found - expected).abs()).max().item()
    finite = expected[expected.isfinite()].abs()
    assert apart <= limit * max(1.0, finite.max().item() if len(finite) else 1.0), (what, found, expected)


def assert_gradients_close(found, ours: Drawn, expected, theirs: Drawn, limit: float) -> None:
    """Of two scalars; a gradient that is not there is one of 0."""
    pairs = zip(ours.trained(), theirs.trained(), strict=True)
    for number, (own, exact) in enumerate(pairs):
        (wanted,) = torch.autograd.grad(expected, exact, retain_graph=True, materialize_grads=True)
        (got,) = torch.autograd.grad(found, own, retain_graph=True, materialize_grads=True)
        assert got.dtype == own.dtype
        assert_close(got, wanted, limit, f"gradient {number}")


@pytest.mark.parametrize("seed", SEEDS)
def test_outputs_of_each_token(seed, monkeypatch):
    problem, rng = drawn(seed), random.Random(~seed)
    monkeypatch.setattr(arithmetic, "has_fast_half", lambda dtype: problem.fast_half)
    names = [name for name in DIFFERENTIABLE if rng.random() < 0.7] or ["entropy"]
    if problem.forbidden is not None and "mean_logits" in names:
        names[names.index("mean_logits")] = "log_sum_sq_probs"  # that mean is minus infinity
    found = tied_log_probs(
        problem.hidden, problem.weight, problem.labels, problem.bias, [*names, "top1"],
        temperature=problem.temperature, logit_scale=problem.scale, logit_softcap=problem.cap, **problem.options,
    )  # fmt: skip
    exact = problem.exact()
    logits, counted = exact.logits(), problem.labels != -100
    places, log_probs = problem.labels.clamp(min=0)[..., None], logits.log_softmax(-1)
    finite = log_probs.clamp(min=torch.finfo(torch.float64).min)
    expected = {
        "log_probs": log_probs.gather(-1, places)[..., 0],
        "entropy": -(finite.exp() * finite).sum(-1),
        "logsumexp": logits.logsumexp(-1),
        "mean_logits": logits.mean(-1),
        "log_sum_sq_probs": (2 * log_probs.detach()).logsumexp(-1),
    }
    totals = [torch.zeros((), requires_grad=True)] * 2
    for number, name in enumerate(names, 2):
        each = getattr(found, name), torch.where(counted, expected[name], 0.0)
        assert_close(each[0].detach(), each[1].detach(), problem.limits[0], name)
        totals = [total + (x * number).sum() for total, x in zip(totals, each, strict=True)]
    if problem.hidden.dtype == torch.float64:
        assert found.top1.equal(counted & (logits.argmax(-1) == places[..., 0]))
    assert_gradients_close(totals[0], problem, totals[1], exact, problem.limits[1] * sum(range(2, 2 + len(names))))


@pytest.mark.parametrize("seed", SEEDS)
def test_distillation(seed, monkeypatch):
    problem, rng, generator = drawn(seed), random.Random(~seed), torch.Generator().manual_seed(~seed)
    monkeypatch.setattr(arithmetic, "has_fast_half", lambda dtype: problem.fast_half)
    words, dtype, temperature = len(problem.weight), problem.hidden.dtype, problem.temperature
    hidden, weight, bias = (
        torch.randn(*sizes, generator=generator, dtype=torch.float64).to(dtype)
        for sizes in ((*problem.labels.shape, 4), (words, 4), (words,))
    )
    if problem.forbidden is not None:
        bias[problem.forbidden] = -torch.inf
    teacher = Drawn(hidden, weight, bias, problem.labels, False, temperature, rng.choice([None, 0.5]))
    divergence, reduction = rng.choice(["kl", "reverse_kl", "js"]), rng.choice(["mean", "sum", "none"])
    top_k = rng.choice([None, None, 1, min(3, words), words])
    found = tied_distillation(
        problem.hidden, problem.weight, hidden, weight, temperature, divergence, top_k=top_k, labels=problem.labels,
        student_bias=problem.bias, teacher_bias=bias, student_logit_scale=problem.scale,
        teacher_logit_scale=teacher.scale, student_logit_softcap=problem.cap, reduction=reduction, **problem.options,
    )  # fmt: skip
    exact = problem.exact()
    logits = [side.logits() for side in (teacher.exact(), exact)]
    if top_k is not None:
        few = logits[0].topk(top_k, -1).indices
        rest = [x.scatter(-1, few, -torch.inf).logsumexp(-1, keepdim=True) for x in logits]
        logits = [torch.cat([x.gather(-1, few), r], -1) for x, r in zip(logits, rest, strict=True)]
    log_p, log_q = (x.log_softmax(-1).clamp(min=torch.finfo(torch.float64).min) for x in logits)
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    terms = {
        "kl": lambda: log_p.exp() * (log_p - log_q),
        "reverse_kl": lambda: log_q.exp() * (log_q - log_p),
        "js": lambda: (log_p.exp() * (log_p - log_m) + log_q.exp() * (log_q - log_m)) / 2,
    }
    counted = problem.labels != -100
    expected = temperature**2 * torch.where(counted, terms[divergence]().sum(-1), 0.0)
    if reduction != "none":
        expected = expected.sum() / (counted.sum().clamp(min=1) if reduction == "mean" else 1)
    limits = [5 * max(temperature, 1.0) * limit for limit in problem.limits]
    assert_close(found.detach(), expected.detach(), limits[0], "loss")
    assert_gradients_close(found.sum(), problem, expected.sum(), exact, limits[1])
