"""Cross entropy of a vocabulary that is split over processes, against torch's: started by `run_script`."""

import itertools

import torch
import torch.distributed as dist
from torch.nn import functional as F

from hf_tying.losses.options import CrossEntropyOptions
from hf_tying.losses.split_vocabulary import split_cross_entropy
from tests.processes import run_cases


def compared(words: int, bias: bool, memory_budget: int | None = None, ignored: int = 3, **options) -> dict:
    """Loss and gradients, largest differences, of 400 tokens."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()  # noqa: E731
    hidden, weight, b = draw(4, 100, 6), draw(words, 6), draw(words) if bias else None
    labels = torch.randint(words, (4, 100), generator=generator)
    labels.view(-1)[:ignored] = -100
    settings = CrossEntropyOptions(**options)
    logits = (hidden @ weight.T + (0 if b is None else b)) * (settings.logit_scale or 1.0)
    if settings.logit_softcap:
        logits = settings.logit_softcap * torch.tanh(logits / settings.logit_softcap)
    flat = {"label_smoothing": settings.label_smoothing, "reduction": settings.reduction}
    expected = F.cross_entropy(logits.view(-1, words), labels.view(-1), **flat).nan_to_num()
    upstream = torch.rand(expected.shape, generator=generator, dtype=torch.float64)
    parameters = [hidden, weight, *([b] if bias else [])]
    gradients = torch.autograd.grad((expected * upstream).sum(), parameters)

    each = -(-words // dist.get_world_size())
    start = min(each * dist.get_rank(), words)
    own = slice(start, min(start + each, words))
    parts = [hidden.detach().requires_grad_(), weight.detach()[own].requires_grad_()]
    part_bias = b.detach()[own].requires_grad_() if bias else None
    loss = split_cross_entropy(
        parts[0], parts[1], labels, part_bias, settings, dist.group.WORLD, start, words, memory_budget
    )
    (loss.view(-1) * upstream.view(-1)).sum().backward()
    wanted = [gradients[0], gradients[1][own], *([gradients[2][own]] if bias else [])]
    got = [parts[0].grad, parts[1].grad, *([part_bias.grad] if bias else [])]
    apart = max((a - w).abs().max().item() for a, w in zip(got, wanted, strict=True) if w.numel())
    return {"loss": (loss.view(-1) - expected.view(-1)).abs().max().item(), "gradient": apart, "rows": len(parts[1])}


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
    "in chunks": lambda: compared(10, True, memory_budget=1, label_smoothing=0.1),
    "no words for the last": lambda: compared(3, True) if dist.get_world_size() == 4 else compared(1, True),
    "all ignored": lambda: compared(10, True, ignored=400),
}

if __name__ == "__main__":
    run_cases(CASES)
