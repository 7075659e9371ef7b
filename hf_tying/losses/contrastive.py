"""`contrastive_weight_tying_loss` (CWT): the words of the batch stand in for the vocabulary."""

import logging
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from .cross_entropy import cross_entropy
from .embedding import tied_embedding
from .modules import LossModule
from .options import CrossEntropyOptions, check_operands, refuse_several

logger = logging.getLogger(__name__)

NEGATIVES = ("batch", "unique", "sampled")


def contrastive_weight_tying_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    negatives: str = "batch",
    num_sampled: int | None = None,
    temperature: float | torch.Tensor = 1.0,
    stop_gradient: bool = False,
    gather: bool = False,
    ignore_index: int = -100,
    reduction: str = "mean",
    num_items_in_batch: float | torch.Tensor | None = None,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Contrastive loss (CWT): each position's word against the other words of the batch, by their input embeddings.

    The rows of the candidates are looked up by `tied_embedding`, so that in a model that reads with `weight` its
    gradient is one buffer, and the products are those of a `tied_cross_entropy` over these rows alone: K positions by
    U different words instead of K by V. A word that stands n times in the batch is multiplied once; where the
    objective counts it n times, log n is added to its product, which is the same sum of exponentials.

    Args:
        hidden: hidden states, (..., D), floating point. No shift is made: `hidden[i]` predicts `labels[i]`.
        weight: input embedding, (V, D), of the dtype of `hidden`, or of any dtype under autocast.
        labels: labels, hidden.shape[:-1], int64: words from 0 to V - 1, or `ignore_index`. In a masked language model
            only masked positions count.
        negatives: words that each position's word is compared with.
            `"batch"`, the choice of the paper and the default: the words of all positions that count, each as often as
            it occurs, including other occurrences of the position's own word. A word that occurs n times cannot have a
            loss below log n.
            `"unique"`: each different word of the batch once.
            `"sampled"`: each different word of the batch once, and `num_sampled` more, drawn uniformly and without
            replacement among the words that are not in the batch. No word is its own negative.
        num_sampled: number of sampled words, for `"sampled"` only. Fewer where the vocabulary has fewer others.
        temperature: divisor of the products. Default 1. It may be learned: a tensor of one element gets its
            gradient.
        stop_gradient: whether the rows of `weight` get no gradient from this loss, and learn as inputs alone. Default
            `False`.
        gather: whether the words of all processes are candidates. Default `False`. Only their ids are exchanged:
            `weight` is the same in all processes, as it is under DistributedDataParallel, and each adds its own
            positions' gradient to every row. So the mean over processes that DDP takes is the gradient of one process
            with the whole batch. Every process must call this as often as the others; how many positions count may
            differ. Without a process group, or in a group of one, nothing is done. `"sampled"` words are each
            process's own.
        ignore_index: value of labels that are left out. Default -100, as everywhere in transformers.
        reduction: `"mean"` over the positions that count, or `"sum"`. With `gather` the mean is the sum of the own
            losses by the mean number of positions in a process: its mean over processes is that over all positions.
        num_items_in_batch: divisor of the sum for `"mean"`, as `Trainer` gives it. Default `None`.
        generator: generator of the samples. Default: torch's own of the device.

    Returns:
        A scalar; float32, or float64 for float64 inputs. 0, with a gradient of zero, where no position counts, or one
        alone; that is logged once.

    Raises:
        IndexError: for a label outside the vocabulary.
        ValueError: for unknown negatives or reduction, labels of another shape, a temperature that is not above 0,
            `num_sampled` without `"sampled"` or the other way round.
        RuntimeError: for mixed dtypes or devices, or `hidden` and `weight` of different width.

    Source: Godey et al. 2023, "Headless Language Models" (arXiv 2309.08351), section 3. Their code divides
    exponentials; here it is a log-sum-exp, of the same value where theirs does not overflow.

    Example (the reference, for `"batch"`):
        >>> hidden, words = hidden[labels != -100], labels[labels != -100]
        >>> products = hidden @ F.embedding(words, weight).T / temperature
        >>> F.cross_entropy(products, torch.arange(len(words)))
    """
    _check(hidden, weight, labels, negatives, num_sampled, temperature, ignore_index, reduction, num_items_in_batch)
    counted = labels.reshape(-1) != ignore_index
    own = labels.reshape(-1)[counted]
    batch, processes = (_of_all_processes(own), dist.get_world_size()) if gather and _is_many() else (own, 1)
    candidates = _candidates(batch, len(weight), negatives, num_sampled or 0, generator)
    if len(candidates.words) < 2:
        _warn_once(
            f"A batch of the contrastive loss has {len(batch)} positions that count, of {len(candidates.words)} "
            "different words: there is nothing to tell apart, and its gradient is zero. Give larger batches, or mask "
            "more."
        )
    if len(own) == 0:
        exact = torch.float64 if torch.float64 in (hidden.dtype, weight.dtype) else torch.float32
        nothing = (torch.as_tensor(x).reshape(-1)[:0].sum() for x in (hidden, weight, temperature))
        return sum(nothing, torch.zeros((), dtype=exact, device=hidden.device)).to(exact)
    rows = tied_embedding(candidates.words, weight.detach() if stop_gradient else weight)
    targets = torch.searchsorted(candidates.words[: candidates.of_batch], own)
    items: float | torch.Tensor | None = num_items_in_batch
    if reduction == "mean" and items is None:
        items = batch.shape[0] / processes  # unlike `len`, not a constant for torch.jit.trace
    options = CrossEntropyOptions(reduction=reduction, num_items_in_batch=items, logit_scale=1 / temperature)
    log_counts = bias = None
    if negatives == "batch":  # each as often as it occurs; the bias is divided by the temperature, too
        log_counts = candidates.counts.to(torch.float64 if rows.dtype == torch.float64 else torch.float32).log()
        bias = temperature * log_counts
    labels = torch.full_like(counted, -100, dtype=torch.int64).masked_scatter(counted, targets)
    loss = cross_entropy(hidden, rows, labels.view(hidden.shape[:-1]), bias, options)
    if log_counts is None:
        return loss
    least = log_counts[targets].sum().to(loss.dtype)  # the position's own word is one of the n alike, not all of them
    if items is not None:
        items = torch.as_tensor(items, device=least.device)
        least = least / items.masked_fill(items == 0, 1)
    return loss + least


class ContrastiveWeightTyingLoss(LossModule):
    """`contrastive_weight_tying_loss` as a module: it is made with the options, and called with the tensors.

    The arguments are the keywords of `contrastive_weight_tying_loss` except `num_items_in_batch` and `generator`,
    which are given at the call.

    Example:
        >>> loss = ContrastiveWeightTyingLoss(negatives="unique")(hidden, embedding.weight, labels)
    """

    function = staticmethod(contrastive_weight_tying_loss)
    at_call = ("num_items_in_batch", "generator")

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        check_options(*(self.options[name] for name in ("negatives", "num_sampled", "temperature")))


def check_options(negatives: str, num_sampled: int | None, temperature: float | torch.Tensor) -> None:
    """Refuse wrong options before any tensor is seen.

    Raises:
        ValueError: see `contrastive_weight_tying_loss`.
    """
    if negatives not in NEGATIVES:
        raise ValueError(f"negatives={negatives!r}: expected one of {NEGATIVES}.")
    if (negatives == "sampled") != (num_sampled is not None):
        raise ValueError(
            f"num_sampled={num_sampled} with negatives={negatives!r}: expected a number for 'sampled', and None for "
            "the others."
        )
    if num_sampled is not None and (not isinstance(num_sampled, int) or num_sampled < 1):
        raise ValueError(f"num_sampled={num_sampled!r}: expected an integer of 1 or more.")
    refuse_several(temperature=temperature)
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature={temperature}: expected a number above 0.")


_warned: list[str] = []


def _warn_once(message: str) -> None:
    """Log only the first message; the others say the same about other batches."""
    if not _warned:
        _warned.append(message)
        logger.warning(message)


class _Candidates(NamedTuple):
    """The words that each position is compared with.

    Attributes:
        words: ids of the rows to multiply by: those of the batch in rising order, then samples.
        of_batch: number of words of the batch.
        counts: number of occurrences of each word of the batch.
    """

    words: torch.Tensor
    of_batch: int
    counts: torch.Tensor


def _candidates(
    batch: torch.Tensor, vocabulary: int, negatives: str, num_sampled: int, generator: torch.Generator | None
) -> _Candidates:
    words, counts = batch.unique(return_counts=True)
    of_batch = words.shape[0]
    if negatives == "sampled":
        outside = torch.ones(vocabulary, dtype=torch.bool, device=words.device)
        outside[words] = False
        others = outside.nonzero().view(-1)
        order = torch.randperm(len(others), generator=generator, device=words.device)
        words = torch.cat([words, others[order[:num_sampled]]])
    return _Candidates(words, of_batch, counts)


def _is_many() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _of_all_processes(words: torch.Tensor) -> torch.Tensor:
    """The words of all processes, which may have different numbers of them."""
    lengths = [torch.zeros(1, dtype=torch.int64, device=words.device) for _ in range(dist.get_world_size())]
    dist.all_gather(lengths, lengths[0].new_tensor([len(words)]))
    longest = max(int(length) for length in lengths)
    padded = torch.cat([words, words.new_zeros(longest - len(words))])
    parts = [torch.empty_like(padded) for _ in lengths]
    dist.all_gather(parts, padded)
    return torch.cat([part[: int(length)] for part, length in zip(parts, lengths, strict=True)])


def _check(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    negatives: str,
    num_sampled: int | None,
    temperature: float | torch.Tensor,
    ignore_index: int,
    reduction: str,
    num_items_in_batch: float | torch.Tensor | None,
) -> None:
    check_options(negatives, num_sampled, temperature)
    if reduction not in ("mean", "sum"):
        raise ValueError(f"{reduction!r} is not a valid value for reduction: expected 'mean' or 'sum'.")
    options = CrossEntropyOptions(
        ignore_index=ignore_index, reduction=reduction, num_items_in_batch=num_items_in_batch
    )
    check_operands(hidden, weight, labels, None, options)
