"""The temperature that makes a classifier's probabilities honest."""

import torch
from torch.nn import functional as F

from ..config import TyingError


def check_classes(labels: torch.Tensor, classes: int) -> None:
    """Refuse labels that are none of `classes`.

    Raises:
        TyingError: with the smallest and the largest one.
    """
    if labels.numel() and not ((labels >= 0) & (labels < classes)).all():
        raise TyingError(
            f"The labels go from {int(labels.min())} to {int(labels.max())}: expected 0 to {classes - 1}, one of "
            f"{classes} classes for each text. Leave texts without a class out."
        )


def fit_temperature(logits: torch.Tensor, labels: torch.Tensor, multi_label: bool = False) -> float:
    """Find the divisor of the logits with the smallest cross entropy on texts that were not trained on.

    The predicted classes do not change. `config.temperature` of a `TiedLSTMForSequenceClassification` applies it.

    Args:
        logits: (texts, classes), floating point, from before any temperature.
        labels: (texts,), int64; (texts, classes), floating point, 0 or 1, with `multi_label`.
        multi_label: whether a text has any number of classes, each with a probability of its own. Default `False`.

    Returns:
        The temperature, from 0.1 to 10. Predictions that are all right have the lower bound, and those that are worse
        than chance the upper one.

    Raises:
        TyingError: if there are no texts, a logit is not finite, or a label is no class.

    Source: Guo et al. 2017 section 4.2. The cross entropy is convex in the inverse of the temperature, so its one
        minimum is found by halving the interval of its slope.
    """
    logits, labels = logits.detach().double().cpu(), labels.cpu()
    if not logits.numel() or not torch.isfinite(logits).all():
        raise TyingError("The temperature needs finite logits of one text at least.")

    if not multi_label:
        check_classes(labels, logits.shape[-1])

    def slope(inverse: float) -> float:
        factor = torch.tensor(inverse, dtype=torch.float64, requires_grad=True)
        if multi_label:
            loss = F.binary_cross_entropy_with_logits(logits * factor, labels.double())
        else:
            loss = F.cross_entropy(logits * factor, labels)
        return float(torch.autograd.grad(loss, factor)[0])

    low, high = 0.1, 10.0
    for _ in range(60):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    return 1 / (low * high) ** 0.5
