"""The tied softmax in plain torch: the reference of `tied_cross_entropy`, and its shortest description."""

import torch
from torch.nn import functional as F

from .arithmetic import without_autocast


def reference_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    num_items_in_batch: float | torch.Tensor | None = None,
    logit_scale: float | torch.Tensor | None = None,
    logit_softcap: float | None = None,
    class_weight: torch.Tensor | None = None,
) -> torch.Tensor:
    """Cross entropy of `softcap(logit_scale * (hidden @ weight.T + bias))`, the logits whole, in float32 or float64.

    Arguments, shapes and result are those of `tied_cross_entropy`. It differs from torch in one case: with every label
    ignored the mean is 0, not NaN.
    """
    logits = whole_logits(hidden, weight, bias, logit_scale, logit_softcap)
    losses = F.cross_entropy(
        logits.reshape(-1, weight.shape[0]),
        labels.reshape(-1),
        weight=None if class_weight is None else class_weight.to(logits.dtype),
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        reduction="none",
    )
    if reduction == "none":
        return losses.view(labels.shape)
    if reduction == "sum":
        return losses.sum()
    counted = labels.reshape(-1) != ignore_index
    items = counted.sum()
    if class_weight is not None:
        items = (class_weight.to(logits.dtype)[labels.reshape(-1).masked_fill(~counted, 0)] * counted).sum()
    if num_items_in_batch is not None:
        items = torch.as_tensor(num_items_in_batch, device=losses.device)
    return losses.sum() / items.masked_fill(items == 0, 1)


def whole_logits(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    logit_scale: float | torch.Tensor | None,
    logit_softcap: float | None,
) -> torch.Tensor:
    """`softcap(logit_scale * (hidden @ weight.T + bias))`, (..., V), in float32, or in float64 for float64 tensors."""
    exact = torch.float64 if torch.float64 in (hidden.dtype, weight.dtype) else torch.float32
    with without_autocast(hidden.device.type):
        logits = F.linear(hidden.to(exact), weight.to(exact), None if bias is None else bias.to(exact))
    if logit_scale is not None:
        logits = logits * logit_scale
    return logits if logit_softcap is None else logit_softcap * torch.tanh(logits / logit_softcap)
