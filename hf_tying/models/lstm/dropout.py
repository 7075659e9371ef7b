"""The dropout kinds of the papers, each by its definition. A rate of 0, or evaluation, gives what was put in."""

import torch
from torch.nn import functional as F


def locked_mask(like: torch.Tensor, rate: float) -> torch.Tensor:
    """One mask for each example, for all its steps (Gal & Ghahramani 2016 section 4; Merity et al. 2017 section 4.2).

    Args:
        like: (batch, time, width), or (batch, width).
        rate: the share that is 0; the rest is `1 / (1 - rate)`.

    Returns:
        (batch, width), in the dtype of `like`.
    """
    mask = torch.empty(len(like), like.shape[-1], dtype=like.dtype, device=like.device)
    return mask.bernoulli_(1 - rate).div_(1 - rate)


def drop(vectors: torch.Tensor, rate: float, mask: torch.Tensor | None = None, locked: bool = False) -> torch.Tensor:
    """`vectors` (batch, time, width) by `mask` (batch, width) if there is one, else by a new one of the kind."""
    if mask is None and not rate:
        return vectors
    if mask is None and not locked:
        return F.dropout(vectors, rate)
    mask = locked_mask(vectors, rate) if mask is None else mask
    return vectors * mask[:, None, :]


def drop_words(vectors: torch.Tensor, ids: torch.Tensor, vocabulary: int, rate: float) -> torch.Tensor:
    """Embedding dropout: all vectors of a dropped word are 0, those of the others scaled (Merity et al. 2017 section
    4.3, Gal & Ghahramani 2016 section 4.2).

    The mask lies on what was looked up and not on the matrix: the same vectors and gradients, without a copy of the
    matrix, which has another role beside this one.

    Args:
        vectors: (batch, time, width), rows of the embedding.
        ids: (batch, time), their words.
    """
    if not rate:
        return vectors
    kept = torch.empty(vocabulary, dtype=vectors.dtype, device=vectors.device).bernoulli_(1 - rate).div_(1 - rate)
    return vectors * kept[ids][..., None]
