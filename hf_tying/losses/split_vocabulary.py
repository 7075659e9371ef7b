"""Cross entropy over a vocabulary that is split over processes: each has some words of the matrix, and all the tokens.

Tensor parallelism gives each process a block of rows of the softmax matrix, and gathers the logits for the loss. Here
each walks over the logits of its own words, and they exchange a few numbers a token once: the largest logit, the sum
of exponentials against it, the target's logit, and the sum of logits for label smoothing (Megatron-LM, Shoeybi et al.
2019, section 3, which exchanges three). The gradient of the hidden states is summed once; that of the matrix is each
process's own. The log-probabilities of the tokens are made in the same way (`log_probs`).
"""

import torch

from .log_probs_autograd import LogProbsRequest, walked_log_probs
from .logit_tiles import LogitSettings
from .options import CrossEntropyOptions
from .vocabulary_part import VocabularyPart


def split_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    bias: torch.Tensor | None,
    options: CrossEntropyOptions,
    part: VocabularyPart,
    block_bytes: int | None = None,
) -> torch.Tensor:
    """`tied_cross_entropy` of which each process of a group has a part of the matrix. All must call it together.

    Args:
        hidden: (..., D), floating point, the same on all processes, as is its gradient.
        weight: (v, D), the rows of this process. It may have none.
        labels: (...), int64, words of all processes, or `options.ignore_index`; the same on all processes.
        bias: (v,), of those words.
        options: of the cross entropy; no class weights, and a scale that is a number.
        part: which words these are.
        block_bytes: most bytes of one tile of logits. Default `None`: as for `tied_log_probs`.

    Returns:
        As `tied_cross_entropy`, the same on all processes.
    """
    share = options.label_smoothing
    outputs = ("log_probs", "logsumexp", "mean_logits") if share else ("log_probs",)
    settings = LogitSettings(options, head_dtype=options.head_dtype, block_bytes=block_bytes)
    found = walked_log_probs(hidden, weight, labels, bias, LogProbsRequest(outputs, settings, part))
    losses = -found["log_probs"]
    if share:
        losses = (1 - share) * losses + share * (found["logsumexp"] - found["mean_logits"])
    if options.reduction == "none":
        return losses
    if options.reduction == "sum":
        return losses.sum()
    counted = (labels != options.ignore_index).sum()
    items = torch.as_tensor(counted if options.num_items_in_batch is None else options.num_items_in_batch)
    return losses.sum() / items.to(losses.device).masked_fill(items == 0, 1)
