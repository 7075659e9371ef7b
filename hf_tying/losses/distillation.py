"""Distillation: a student learns the distribution of a teacher, from hidden states and matrices of both."""

from dataclasses import dataclass, replace

import torch

from .arithmetic import compute_dtypes
from .compilation import untraced
from .distillation_autograd import Softmaxes, collapsed_logits, most_likely, walked_divergence
from .divergences import DIVERGENCES, divergence_terms, finite
from .gradient import is_plain
from .logit_tiles import LogitSettings
from .options import CrossEntropyOptions, check_operands, check_temperature, refuse_learned, with_learned_scale
from .pending_gradients import counted_positions

# A stored teacher whose probabilities of its k words sum to more than this is not normalised.
_MOST = 1.05


@dataclass(frozen=True)
class _Side:
    """Hidden states (..., D), matrix (V, D), bias, and what the logits are."""

    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    settings: LogitSettings

    def logits(self) -> torch.Tensor:
        return self.settings.whole(self.hidden, self.weight, self.bias)

    @property
    def is_plain(self) -> bool:
        return is_plain(self.hidden) and is_plain(self.weight)


def tied_distillation(
    student_hidden: torch.Tensor,
    student_weight: torch.Tensor,
    teacher_hidden: torch.Tensor,
    teacher_weight: torch.Tensor,
    temperature: float = 1.0,
    divergence: str = "kl",
    *,
    top_k: int | None = None,
    labels: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    student_bias: torch.Tensor | None = None,
    teacher_bias: torch.Tensor | None = None,
    student_logit_scale: float | torch.Tensor | None = None,
    teacher_logit_scale: float | torch.Tensor | None = None,
    student_logit_softcap: float | None = None,
    teacher_logit_softcap: float | None = None,
    reduction: str = "mean",
    num_items_in_batch: float | torch.Tensor | None = None,
    ignore_index: int = -100,
    head_dtype: torch.dtype | None = None,
    memory_budget: int | None = None,
) -> torch.Tensor:
    """Divergence of a student's distributions from a teacher's, times the square of the temperature, without logits.

    With `p` the softmax of the teacher's logits over the temperature and `q` that of the student's, it is the sum of
    `p (log p - log q)` (`"kl"`), of `q (log q - log p)` (`"reverse_kl"`), or the mean of the divergences of `p` and of
    `q` from their own mean (`"js"`). The logits of both are computed tile by tile, twice in the forward pass and once
    in the backward pass. The teacher is a constant: it gets no gradient. Tokens that do not count take part in no
    matrix product.

    Args:
        student_hidden: (..., D), floating point; no shift is made.
        student_weight: (V, D), of the dtype of `student_hidden`, or any under autocast or with `head_dtype`. Its
            gradient is one buffer, to which `tied_embedding` adds (`hf_tying.losses.gradient`).
        teacher_hidden: (..., D'), floating point, for the same tokens.
        teacher_weight: (V, D'), over the same words. It may be the same matrix.
        temperature: number above 0 that divides the logits of both. Default 1.
        divergence: `"kl"`, `"reverse_kl"` or `"js"`. Default `"kl"`, that of the paper.
        top_k: number of words; the teacher's most likely ones are compared one by one, and all others as if they were
            one word (see `top_k_distillation`). Default `None`: all words are compared.
        labels: (...), int64; tokens whose label is `ignore_index` do not count. Default `None`: all count.
        mask: (...), bool; tokens where it is `False` do not count either. Default `None`: all count.
        student_bias: (V,), floating point.
        teacher_bias: (V,), floating point.
        student_logit_scale: factor of the products, as for `tied_log_probs`; it may be learned.
        teacher_logit_scale: the same for the teacher.
        student_logit_softcap: the cap of `cap * tanh(logits / cap)`, after the scale.
        teacher_logit_softcap: the same for the teacher.
        reduction: `"mean"` over the tokens that count, `"sum"`, or `"none"`: one value for each token. Default
            `"mean"`.
        num_items_in_batch: divisor of the sum for `"mean"`, in place of the number of tokens that count here.
        ignore_index: label of tokens that do not count. Default -100, as everywhere in transformers.
        head_dtype: dtype of the matrix products of both, as for `tied_log_probs`.
        memory_budget: most bytes of one tile of logits. Default: 4 MiB on a CPU, whose cache holds it, else 64 MiB.

    Returns:
        A scalar, or for `"none"` a tensor of the shape of the tokens; float32, or float64 for a float64 student. 0
        where no token counts.

    Raises:
        IndexError: for a label outside the vocabulary.
        ValueError: for an unknown divergence, a temperature not above 0, vocabularies of different size, tokens of
            different shape, a `top_k` outside of 1 to V, and a teacher whose hidden states require a gradient.
        RuntimeError: for mixed dtypes or devices, as for `tied_log_probs`, and in the backward pass for
            `create_graph=True`.

    Source: Hinton, Vinyals & Dean 2015, section 2: gradients shrink with the square of the temperature, which the
    factor makes up for.

    Example (the reference):
        >>> log_q = torch.log_softmax(student_hidden @ student_weight.T / temperature, dim=-1)
        >>> log_p = torch.log_softmax(teacher_hidden @ teacher_weight.T / temperature, dim=-1)
        >>> temperature**2 * (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    """
    temperature = _checked(divergence, temperature)
    if teacher_hidden.shape[:-1] != student_hidden.shape[:-1]:
        raise ValueError(
            "Expected one hidden state of the teacher for each of the student, "
            f"{tuple(student_hidden.shape[:-1])}, got {tuple(teacher_hidden.shape[:-1])}."
        )
    if teacher_weight.shape[:1] != student_weight.shape[:1]:
        raise ValueError(
            f"Expected a teacher over the same words: the student's matrix has {len(student_weight)} rows and the "
            f"teacher's {len(teacher_weight)}. Cut off rows that pad a vocabulary, in both alike."
        )
    if top_k is not None and not 1 <= top_k <= len(student_weight):
        raise ValueError(f"top_k={top_k}: expected a number of words from 1 to {len(student_weight)}, or None.")
    refuse_learned("", teacher_hidden=teacher_hidden, teacher_logit_scale=teacher_logit_scale)
    labels, ignore_index = _counting_labels(student_hidden, labels, mask, ignore_index)
    options = CrossEntropyOptions(ignore_index, reduction=reduction, num_items_in_batch=num_items_in_batch)
    settings = LogitSettings(options, temperature, head_dtype, memory_budget)
    tensors = (
        (student_hidden, student_weight, student_bias, student_logit_scale, student_logit_softcap),
        (teacher_hidden, teacher_weight, teacher_bias, teacher_logit_scale, teacher_logit_softcap),
    )
    student, teacher = (_side(*parts, labels, settings) for parts in tensors)
    if top_k is not None:
        ids, log_p = _collapsed_teacher(teacher, labels, top_k)
        return _collapsed(student, labels, ids, log_p, divergence)
    return _reduced(_divergence(student, teacher, labels, divergence), labels, settings)


def top_k_distillation(
    student_hidden: torch.Tensor,
    student_weight: torch.Tensor,
    teacher_log_probs: torch.Tensor,
    teacher_ids: torch.Tensor,
    temperature: float = 1.0,
    divergence: str = "kl",
    *,
    labels: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    student_bias: torch.Tensor | None = None,
    student_logit_scale: float | torch.Tensor | None = None,
    student_logit_softcap: float | None = None,
    reduction: str = "mean",
    num_items_in_batch: float | torch.Tensor | None = None,
    ignore_index: int = -100,
    head_dtype: torch.dtype | None = None,
    memory_budget: int | None = None,
) -> torch.Tensor:
    """`tied_distillation` from a teacher of which k words of each token are stored, as a server gives them.

    All other words count as one, of what is left of the probability, for the teacher and for the student. So the
    divergence is at most that over all words, and the same for k = V. Without that word a student would learn nothing
    of how much it gives to the others.

    Args:
        student_hidden: as for `tied_distillation`, like all that is not named here.
        student_weight: (V, D).
        teacher_log_probs: (..., k), natural logarithms of the teacher's probabilities **at this temperature**. What
            they leave of 1 is that of all others, and at least the rounding of the dtype.
        teacher_ids: (..., k), int64, the words, none twice for a token.
        temperature: temperature of the student, and of the factor. Default 1.
        divergence: `"kl"`, `"reverse_kl"` or `"js"`. Default `"kl"`.
        labels: see `tied_distillation`.
        mask: see `tied_distillation`.
        student_bias: see `tied_distillation`.
        student_logit_scale: see `tied_distillation`.
        student_logit_softcap: see `tied_distillation`.
        reduction: see `tied_distillation`.
        num_items_in_batch: see `tied_distillation`.
        ignore_index: see `tied_distillation`.
        head_dtype: see `tied_distillation`.
        memory_budget: see `tied_distillation`.

    Returns:
        As `tied_distillation`.

    Raises:
        IndexError: for a word outside the vocabulary.
        ValueError: for log-probabilities and words of different or wrong shape, a word twice for a token,
            probabilities that sum to more than 1, log-probabilities that require a gradient, and as
            `tied_distillation`.
        RuntimeError: as `tied_distillation`.
    """
    temperature = _checked(divergence, temperature)
    refuse_learned("", teacher_log_probs=teacher_log_probs)
    labels, ignore_index = _counting_labels(student_hidden, labels, mask, ignore_index)
    options = CrossEntropyOptions(ignore_index, reduction=reduction, num_items_in_batch=num_items_in_batch)
    settings = LogitSettings(options, temperature, head_dtype, memory_budget)
    parts = student_hidden, student_weight, student_bias, student_logit_scale, student_logit_softcap
    student = _side(*parts, labels, settings)
    ids, log_p = _stored_teacher(student, labels, teacher_log_probs, teacher_ids)
    return _collapsed(student, labels, ids, log_p, divergence)


# --- operands --------------------------------------------------------------------------------------------------------


def _checked(divergence: str, temperature: float) -> float:
    if divergence not in DIVERGENCES:
        raise ValueError(f"Unknown divergence {divergence!r}: expected one of {', '.join(map(repr, DIVERGENCES))}.")
    return check_temperature(temperature)


def _counting_labels(
    hidden: torch.Tensor, labels: torch.Tensor | None, mask: torch.Tensor | None, ignore_index: int
) -> tuple[torch.Tensor, int]:
    """One label for each token, and the one of those that do not count."""
    if labels is None:  # the word 0 stands for all, also where that is the one to ignore
        labels, ignore_index = torch.zeros(hidden.shape[:-1], dtype=torch.int64, device=hidden.device), -100
    if mask is None:
        return labels, ignore_index
    if mask.dtype != torch.bool or mask.shape != labels.shape:
        raise ValueError(
            f"Expected mask of dtype torch.bool and shape {tuple(labels.shape)}, got {mask.dtype} and "
            f"{tuple(mask.shape)}."
        )
    return labels.masked_fill(~mask, ignore_index), ignore_index


def _side(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    logit_scale: float | torch.Tensor | None,
    logit_softcap: float | None,
    labels: torch.Tensor,
    settings: LogitSettings,
) -> _Side:
    options = replace(settings.options, logit_scale=logit_scale, logit_softcap=logit_softcap)
    check_operands(hidden, weight, labels, bias, options, one_dtype=settings.head_dtype is None)
    hidden, bias, options = with_learned_scale(hidden, weight, bias, options, settings.head_dtype)
    products, _ = compute_dtypes(hidden, weight, settings.head_dtype)
    return _Side(hidden, weight, bias, replace(settings, options=options, head_dtype=products))


def _stored_teacher(
    student: _Side, labels: torch.Tensor, log_probs: torch.Tensor, ids: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Words (..., k), and log-probabilities (..., k + 1) of them and of the rest."""
    k = log_probs.shape[-1] if log_probs.dim() else 0
    if log_probs.shape != ids.shape or log_probs.shape[:-1] != labels.shape or not k or ids.dtype != torch.int64:
        raise ValueError(
            f"Expected teacher_log_probs and teacher_ids of shape {(*labels.shape, 'k')}, the ids of dtype "
            f"torch.int64, got {tuple(log_probs.shape)} and {tuple(ids.shape)}, {ids.dtype}."
        )
    counted = labels != student.settings.options.ignore_index
    wrong = ids[counted][(ids[counted] < 0) | (ids[counted] >= len(student.weight))]
    if len(wrong):
        raise IndexError(f"Word {int(wrong[0])} is out of bounds: expected words from 0 to {len(student.weight) - 1}.")
    ordered = ids[counted].sort(-1).values
    if (ordered[:, 1:] == ordered[:, :-1]).any():
        raise ValueError("teacher_ids has a word twice for one token: expected each once.")
    exact = torch.promote_types(log_probs.dtype, torch.float32)
    total = log_probs.to(exact).exp().sum(-1)
    if (largest := float(total[counted].max() if counted.any() else 0)) > _MOST:
        raise ValueError(
            f"The probabilities of a token's {k} words sum to {largest:.3g}: expected at most 1. teacher_log_probs "
            "are logarithms of probabilities at this temperature, not logits."
        )
    rest = (1 - total).clamp(min=torch.finfo(exact).eps).log()
    if k == len(student.weight):
        rest = torch.full_like(rest, -torch.inf)  # no other word
    return ids, torch.cat([log_probs.to(exact), rest[..., None]], -1)


# --- the divergences -------------------------------------------------------------------------------------------------


@untraced
def _divergence(student: _Side, teacher: _Side, labels: torch.Tensor, divergence: str) -> torch.Tensor:
    """That of each token, (...), over all words."""
    teacher = replace(teacher, hidden=teacher.hidden.detach(), weight=teacher.weight.detach())
    if not (student.is_plain and teacher.is_plain):
        log_p, log_q = (finite(side.logits().log_softmax(-1)) for side in (teacher, student))
        return divergence_terms(divergence, log_p, log_q)[0].sum(-1)
    both = Softmaxes(
        teacher.hidden, teacher.weight, teacher.bias, teacher.settings, student.settings, divergence=divergence
    )
    positions = counted_positions(labels.reshape(-1), student.settings.options.ignore_index)
    return walked_divergence(student.hidden, student.weight, student.bias, positions, both)


@untraced
@torch.no_grad()
def _collapsed_teacher(teacher: _Side, labels: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The teacher's k most likely words (..., k), and log-probabilities (..., k + 1) of them and of the rest."""
    if not teacher.is_plain:
        ids = teacher.logits().topk(k, -1).indices
    else:
        positions = counted_positions(labels.reshape(-1), teacher.settings.options.ignore_index)
        parts = teacher.hidden, teacher.weight, teacher.bias, positions
        found = most_likely(*parts, k, teacher.settings)
        ids = found.new_zeros(labels.numel(), k)
        ids[slice(None) if positions is None else positions] = found
        ids = ids.view(*labels.shape, k)
    return ids, _collapsed_log_probs(teacher, labels, ids)


@untraced
def _collapsed_log_probs(side: _Side, labels: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of the words `ids` (..., k), and of all others together, (..., k + 1); 0 where ignored."""
    if not side.is_plain:
        logits = side.logits()
        others = logits.scatter(-1, ids, -torch.inf).logsumexp(-1, keepdim=True)
        return torch.cat([logits.gather(-1, ids), others], -1).log_softmax(-1)
    positions = counted_positions(labels.reshape(-1), side.settings.options.ignore_index)
    flat = ids.reshape(labels.numel(), ids.shape[-1])
    counted = flat if positions is None else flat[positions]
    found = collapsed_logits(side.hidden, side.weight, side.bias, positions, counted, side.settings).log_softmax(-1)
    if positions is not None:
        found = found.new_zeros(len(flat), found.shape[-1]).index_put((positions,), found)
    return found.view(*labels.shape, found.shape[-1])


def _collapsed(
    student: _Side, labels: torch.Tensor, ids: torch.Tensor, log_p: torch.Tensor, divergence: str
) -> torch.Tensor:
    """The loss over the words `ids` (..., k) and the rest, given the teacher's log-probabilities of them."""
    log_q = _collapsed_log_probs(student, labels, ids)
    terms, _ = divergence_terms(divergence, finite(log_p.to(log_q.dtype)), finite(log_q))
    return _reduced(terms.sum(-1), labels, student.settings)


def _reduced(tokens: torch.Tensor, labels: torch.Tensor, settings: LogitSettings) -> torch.Tensor:
    """The loss, of the divergence of each token; 0 for those that do not count."""
    options = settings.options
    counted = labels != options.ignore_index
    tokens = torch.where(counted, tokens, torch.zeros_like(tokens)) * settings.temperature**2
    if options.reduction == "none":
        return tokens
    if options.reduction == "sum":
        return tokens.sum()
    items = counted.sum() if options.num_items_in_batch is None else options.num_items_in_batch
    items = torch.as_tensor(items, device=tokens.device)
    return tokens.sum() / items.masked_fill(items == 0, 1)
