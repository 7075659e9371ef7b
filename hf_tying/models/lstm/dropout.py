"""The kinds of dropout in the papers, each by its definition. A rate of 0 changes nothing."""

import torch
from torch.nn import functional as F


def locked_mask(like: torch.Tensor, rate: float) -> torch.Tensor:
    """Draw one mask for each example, to be used at all its steps.

    Args:
        like: tensor that the mask is for, (batch, time, width) or (batch, width).
        rate: share of the mask that is 0. The rest is `1 / (1 - rate)`.

    Returns:
        (batch, width), in the dtype and on the device of `like`.

    Source: Gal & Ghahramani 2016 section 4; Merity et al. 2017 section 4.2.
    """
    mask = torch.empty(len(like), like.shape[-1], dtype=like.dtype, device=like.device)
    return mask.bernoulli_(1 - rate).div_(1 - rate)


def drop(vectors: torch.Tensor, rate: float, mask: torch.Tensor | None = None, locked: bool = False) -> torch.Tensor:
    """Multiply vectors by a mask.

    Args:
        vectors: (batch, time, width).
        rate: share of a new mask that is 0.
        mask: (batch, width). Default: a new mask.
        locked: whether a new mask is the same at all steps of an example. Default `False`.

    Returns:
        (batch, time, width).
    """
    if mask is None and not rate:
        return vectors
    if mask is None and not locked:
        return F.dropout(vectors, rate)
    mask = locked_mask(vectors, rate) if mask is None else mask
    return vectors * mask[:, None, :]


def drop_words(vectors: torch.Tensor, ids: torch.Tensor, vocabulary: int, rate: float) -> torch.Tensor:
    """Set all vectors of dropped words to 0, and scale the others: embedding dropout.

    The mask is applied to the vectors and not to the matrix. Vectors and gradients are the same, no copy of the matrix
    is made, and the matrix keeps all rows in its output role.

    Args:
        vectors: (batch, time, width), rows of the embedding.
        ids: (batch, time), int64, the words of these rows.
        vocabulary: number of words.
        rate: share of the words to drop. The vectors of the others are multiplied by `1 / (1 - rate)`.

    Returns:
        (batch, time, width).

    Source: Merity et al. 2017 section 4.3; Gal & Ghahramani 2016 section 4.2.
    """
    if not rate:
        return vectors
    kept = torch.empty(vocabulary, dtype=vectors.dtype, device=vectors.device).bernoulli_(1 - rate).div_(1 - rate)
    return vectors * kept[ids][..., None]
