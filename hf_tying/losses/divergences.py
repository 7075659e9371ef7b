"""Divergences of a student's distribution q from a teacher's p, by their terms, for tiles and for whole rows alike.

| name | value | of |
|---|---|---|
| `kl` | sum of p (log p - log q) | Hinton et al. 2015 |
| `reverse_kl` | sum of q (log q - log p) | Gu et al. 2023 (MiniLLM), section 2.1 |
| `js` | half of KL(p, m) and half of KL(q, m), with m the mean of p and q | Agarwal et al. 2023 (GKD), section 2 |
"""

import math
from collections.abc import Callable

import torch

Terms = tuple[torch.Tensor, torch.Tensor]


def _kl(log_p: torch.Tensor, log_q: torch.Tensor) -> Terms:
    p = log_p.exp()
    return p * (log_p - log_q), -p


def _reverse_kl(log_p: torch.Tensor, log_q: torch.Tensor) -> Terms:
    terms = log_q.exp() * (log_q - log_p)
    return terms, terms


def _js(log_p: torch.Tensor, log_q: torch.Tensor) -> Terms:
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    pull = log_q.exp() * (log_q - log_m) / 2
    return log_p.exp() * (log_p - log_m) / 2 + pull, pull


_TERMS: dict[str, Callable[[torch.Tensor, torch.Tensor], Terms]] = {"kl": _kl, "reverse_kl": _reverse_kl, "js": _js}
DIVERGENCES = tuple(_TERMS)


def divergence_terms(name: str, log_p: torch.Tensor, log_q: torch.Tensor) -> Terms:
    """The terms of a divergence, and of what its gradient pulls at each logit of the student.

    The divergence is the sum of the first over the words. With `pull` the second, the gradient of the student's logit
    j is `pull_j - q_j * (sum of pull)`.

    Args:
        name: one of `DIVERGENCES`.
        log_p: log-probabilities of the teacher, without minus infinity (`finite`).
        log_q: log-probabilities of the student, the same.
    """
    return _TERMS[name](log_p, log_q)


def finite(log_probs: torch.Tensor) -> torch.Tensor:
    """Log-probabilities with the lowest number in place of minus infinity: of a forbidden word all products are 0."""
    return log_probs.clamp(min=torch.finfo(log_probs.dtype).min)
