"""`projection_penalty`: the regularisation of the projection in PR (Press & Wolf 2016, section 3.2)."""

from typing import Any

import torch

from ..losses.modules import LossModule

#: Default factor of each norm: the released code divides by 6.5, and lambda is 0.15 in the text of the paper.
STRENGTHS = {"fro_squared_half": 1 / 6.5, "fro": 0.15}


def projection_penalty(
    projection: torch.Tensor,
    *,
    norm: str = "fro_squared_half",
    strength: float | None = None,
    divisor: float | torch.Tensor = 1.0,
) -> torch.Tensor:
    """The term that projection regularisation adds to the loss: `strength * norm(P) / divisor`.

    The released code and the text of the paper differ. The code has half the square of the Frobenius norm, and divides
    it by the batch size, like the sum of the cross entropy over all steps. The text has `lambda * ||P||_2`. The
    default is that of the code, with which the published perplexities were made. Perplexity is always computed without
    this term.

    Args:
        projection: matrix P, (H, H), floating point. Its bias has no penalty.
        norm: `"fro_squared_half"`, half the sum of squares (`l2_loss` of the code), or `"fro"`, the root of that sum
            (the text). Default: that of the code.
        strength: factor of the norm. Default `None`: 1 / 6.5 for the norm of the code, 0.15 for that of the text.
        divisor: divisor of the sum of the tokens' losses: the number of tokens where the loss is their mean, the batch
            size where it is summed over the steps. Default 1.

    Returns:
        A scalar, in float32 or float64.

    Raises:
        ValueError: for an unknown norm, or a negative strength.

    Example:
        >>> loss = cross_entropy.sum() / batch + projection_penalty(P, divisor=batch)
    """
    return strength_of(norm, strength) * norm_of(projection, norm) / divisor


def strength_of(norm: str, strength: float | None = None) -> float:
    """What `norm` is multiplied by: `strength`, or its own default.

    Raises:
        ValueError: for an unknown norm, or a negative strength.
    """
    if norm not in STRENGTHS:
        raise ValueError(f"Unknown norm {norm!r}: expected one of {', '.join(map(repr, STRENGTHS))}.")
    strength = STRENGTHS[norm] if strength is None else strength
    if not strength >= 0:
        raise ValueError(f"strength={strength}: expected 0 or more.")
    return strength


def norm_of(projection: torch.Tensor, norm: str) -> torch.Tensor:
    """The norm of a matrix, a scalar in float32 or float64 (see `projection_penalty`)."""
    exact = projection if projection.dtype == torch.float64 else projection.float()
    if norm == "fro":
        # The root has no gradient at a projection of zeros; torch gives the subgradient 0.
        return torch.linalg.vector_norm(exact)
    return exact.square().sum() / 2


def share_of_update(labels: torch.Tensor, given: dict[str, Any]) -> float | torch.Tensor:
    """The share of a forward pass in an update, as a factor of a penalty.

    With it, the penalty counts once over all accumulation steps and all processes. The share is the number of words of
    this pass over `num_items_in_batch`, the number of words of the update. It is 1 where that number is smaller than
    the words of this pass (a sum by time steps), and where there is no such number, since `Trainer` divides then.

    Args:
        labels: predicted labels of this pass; -100 is left out.
        given: keywords of the pass: `num_items_in_batch`, or the share itself as `penalty_share`.

    Returns:
        A number or a scalar tensor, from 0 to 1.
    """
    if given.get("penalty_share") is not None:
        return given["penalty_share"]
    items = given.get("num_items_in_batch")
    if items is None:
        return 1.0
    return ((labels != -100).sum() / torch.as_tensor(items, device=labels.device)).clamp(max=1)


class ProjectionPenalty(LossModule):
    """`projection_penalty` as a module: it is made with the options, and called with the matrix.

    Args: the keywords of `projection_penalty` except `divisor`, which is given at the call.

    Raises:
        ValueError: at once, for an unknown norm or a negative strength.
    """

    function = staticmethod(projection_penalty)
    at_call = ("divisor",)

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        projection_penalty(torch.zeros(1, 1), **self.options)

    def __setstate__(self, state: dict) -> None:
        # Pickles of version 0.1 have the options as attributes.
        state.setdefault("options", {name: state[name] for name in ("norm", "strength") if name in state})
        super().__setstate__(state)
