"""A vocabulary that is split over processes against plain torch on one: started by `run_script`."""

import itertools

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn import functional as F

from hf_tying.losses import tied_log_probs
from hf_tying.losses.log_probs import OUTPUTS
from hf_tying.losses.options import CrossEntropyOptions
from hf_tying.losses.split_vocabulary import split_cross_entropy
from hf_tying.losses.vocabulary_part import VocabularyPart
from tests.processes import run_cases


def problem(words: int, bias: bool, ignored: int) -> tuple:
    """Hidden states of 400 tokens, matrix, bias, labels, and a generator of more."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()  # noqa: E731
    hidden, weight, b = draw(4, 100, 6), draw(words, 6), draw(words) if bias else None
    labels = torch.randint(words, (4, 100), generator=generator)
    labels.view(-1)[:ignored] = -100
    return hidden, weight, b, labels, generator


def own_words(words: int) -> slice:
    each = -(-words // dist.get_world_size())
    start = min(each * dist.get_rank(), words)
    return slice(start, min(start + each, words))


def largest(got, wanted) -> float:
    return max((a - w).abs().max().item() for a, w in zip(got, wanted, strict=True) if w.numel())


def compared(words: int, bias: bool, block_bytes: int | None = None, ignored: int = 3, **options) -> dict:
    """Loss and gradients, largest differences."""
    hidden, weight, b, labels, generator = problem(words, bias, ignored)
    settings = CrossEntropyOptions(**options)
    logits = (hidden @ weight.T + (0 if b is None else b)) * (settings.logit_scale or 1.0)
    if settings.logit_softcap:
        logits = settings.logit_softcap * torch.tanh(logits / settings.logit_softcap)
    flat = {"label_smoothing": settings.label_smoothing, "reduction": settings.reduction}
    expected = F.cross_entropy(logits.view(-1, words), labels.view(-1), **flat).nan_to_num()
    upstream = torch.rand(expected.shape, generator=generator, dtype=torch.float64)
    parameters = [hidden, weight, *([b] if bias else [])]
    gradients = torch.autograd.grad((expected * upstream).sum(), parameters)

    own = own_words(words)
    parts = [hidden.detach().requires_grad_(), weight.detach()[own].requires_grad_()]
    part_bias = b.detach()[own].requires_grad_() if bias else None
    part = VocabularyPart(dist.group.WORLD, own.start, words)
    loss = split_cross_entropy(parts[0], parts[1], labels, part_bias, settings, part, block_bytes)
    (loss.view(-1) * upstream.view(-1)).sum().backward()
    wanted = [gradients[0], gradients[1][own], *([gradients[2][own]] if bias else [])]
    got = [parts[0].grad, parts[1].grad, *([part_bias.grad] if bias else [])]
    return {"loss": largest([loss.view(-1)], [expected.view(-1)]), "gradient": largest(got, wanted)}


def tokens(
    words: int = 10, bias: bool = True, ignored: int = 3, dtype=torch.float64, replicated=False, whole=False, **options
) -> dict:
    """Every output of `tied_log_probs` on a DTensor, and gradients, largest differences from one process.

    With `whole` all numbers are, so that many logits are equal: of those the first one is the most likely.
    """
    hidden, weight, b, labels, generator = problem(words, bias, ignored)
    parameters = [hidden, weight, *([b] if bias else [])]
    parameters = [(x.detach().round() if whole else x.detach()).to(dtype).requires_grad_() for x in parameters]
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    split = [distribute_tensor(x.detach(), mesh, [Shard(0)]).requires_grad_() for x in parameters[1:]]
    seen = parameters[0].detach().requires_grad_()
    given = [DTensor.from_local(x, mesh, [Replicate()]) for x in (seen, labels)] if replicated else [seen, labels]
    one = tied_log_probs(*parameters[:2], labels, *parameters[2:], outputs=OUTPUTS, **options)
    found = tied_log_probs(given[0], split[0], given[1], *split[1:], outputs=OUTPUTS, **options)
    values = [[getattr(each, name).double() for name in OUTPUTS] for each in (found, one)]
    upstream = torch.rand(len(OUTPUTS), 4, 100, generator=generator)
    for each in values:
        sum((x * u).sum() for x, u in zip(each, upstream, strict=True) if x.requires_grad).backward()
    got = [seen.grad, *(x.grad.to_local() for x in split)]
    own = own_words(words)
    wanted = [parameters[0].grad, *(x.grad[own] for x in parameters[1:])]
    likely = one.top1.float().mean().item()
    return {"values": largest(*values), "gradient": largest(got, wanted), "top1": likely}


def refusals() -> dict:
    """What is said of operands that cannot be split, by what is wrong with them."""
    hidden, weight, b, labels, _ = problem(10, True, 3)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    split = distribute_tensor(weight.detach(), mesh, [Shard(0)])
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    calls = {
        "other labels": lambda: tied_log_probs(hidden, split, labels.roll(dist.get_rank())),
        "other tokens": lambda: tied_log_probs(hidden[: 1 + dist.get_rank()], split, labels[: 1 + dist.get_rank()]),
        "trained whole bias": lambda: tied_log_probs(hidden, split, labels, b),
        "split hidden": lambda: tied_log_probs(distribute_tensor(hidden, mesh, [Shard(1)]), split, labels),
        "scale": lambda: tied_log_probs(hidden, split, labels, b.detach(), logit_scale=scale),
        "transform": lambda: torch.func.grad(lambda h: tied_log_probs(h, split, labels).log_probs.sum())(hidden),
    }
    found = {}
    for name, call in calls.items():
        try:
            call()
            found[name] = "no error"
        except RuntimeError as error:
            found[name] = str(error)
    return found


CASES = {
    f"{words}, {bias}, {reduction}": lambda words=words, bias=bias, reduction=reduction: compared(
        words, bias, reduction=reduction
    )
    for words, bias, reduction in itertools.product((10, 7), (True, False), ("mean", "sum", "none"))
}
CASES |= {
    "smoothed": lambda: compared(10, True, label_smoothing=0.2),
    "scaled": lambda: compared(10, True, logit_scale=0.3),
    "capped": lambda: compared(10, True, logit_softcap=2.0, logit_scale=0.5, label_smoothing=0.1),
    "in tiles": lambda: compared(10, True, block_bytes=80, label_smoothing=0.1),
    "no words for the last": lambda: compared(3, True) if dist.get_world_size() == 4 else compared(1, True),
    "all ignored": lambda: compared(10, True, ignored=400),
}
CASES |= {
    "tokens": tokens,
    "tokens, 7 words without bias": lambda: tokens(7, False),
    "tokens, capped": lambda: tokens(logit_softcap=2.0, logit_scale=0.5, temperature=0.7),
    "tokens, in tiles": lambda: tokens(memory_budget=80),
    "tokens, no words for the last": lambda: tokens(3 if dist.get_world_size() == 4 else 1),
    "tokens, equal logits": lambda: tokens(whole=True),
    "tokens, replicated": lambda: tokens(replicated=True),
    "tokens, float32": lambda: tokens(dtype=torch.float32),
    "tokens, all ignored": lambda: tokens(ignored=400),
    "refusals": refusals,
}

if __name__ == "__main__":
    run_cases(CASES)
