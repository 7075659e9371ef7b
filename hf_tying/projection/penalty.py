"""`projection_penalty`: what keeps the projection of PR small (Press & Wolf 2016, section 3.2)."""

from typing import Any

import torch

from ..losses.modules import LossModule

#: What the norms are multiplied by unless somebody says otherwise: the released code divides by 6.5, the paper's text
#: has a lambda of 0.15.
STRENGTHS = {"fro_squared_half": 1 / 6.5, "fro": 0.15}


def projection_penalty(
    projection: torch.Tensor, *, norm: str = "fro_squared_half", strength: float | None = None, divisor=1.0
) -> torch.Tensor:
    """The term that projection regularisation adds to the loss: `strength * norm(P) / divisor`.

    The released code and the paper's text differ: the code has half the square of the Frobenius norm, and divides it
    by the batch, as it does the sum of the cross entropy over all steps; the text has `lambda * ||P||_2`. The default
    is the code, with which the published perplexities were made. Perplexity is always computed without this term.

    Args:
        projection: P, (H, H), floating point; its bias has no penalty.
        norm: `"fro_squared_half"`, half the sum of squares (the code's `l2_loss`), or `"fro"`, its root (the text).
        strength: default 1 / 6.5 for the code's norm, 0.15 for the text's.
        divisor: what the sum of the tokens' losses is divided by: the number of tokens for a loss that is their mean,
            the batch size where it is summed over the steps.

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
        # The root has no gradient at a projection of zeros; 0 is one of those that it may be given.
        return torch.linalg.vector_norm(exact)
    return exact.square().sum() / 2


def share_of_update(labels: torch.Tensor, given: dict[str, Any]) -> float | torch.Tensor:
    """The share of a forward pass in an update: a penalty of the whole update is multiplied by it, so that it counts
    once over all steps of accumulation and all processes.

    `num_items_in_batch` is the number of words of the update, and the share that of the words of this pass. It is 1
    where that is less than those words (a sum by time steps), and where there is none: `Trainer` divides then.

    Args:
        labels: of this pass, as they are predicted; -100 is left out.
        given: keywords of the pass: `num_items_in_batch`, or the share itself as `penalty_share`.
    """
    if given.get("penalty_share") is not None:
        return given["penalty_share"]
    items = given.get("num_items_in_batch")
    if items is None:
        return 1.0
    return ((labels != -100).sum() / torch.as_tensor(items, device=labels.device)).clamp(max=1)


class ProjectionPenalty(LossModule):
    """`projection_penalty` as a module: the options once, the matrix at each call.

    Args: the keywords of `projection_penalty` except `divisor`, which is given at the call.

    Raises:
        ValueError: at once, for an unknown norm or a negative strength.
    """

    function = staticmethod(projection_penalty)
    at_call = ("divisor",)

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        projection_penalty(torch.zeros(1, 1), **self.options)

    def __setstate__(self, state: dict) -> None:
        # Pickles of version 0.1 have the options as attributes.
        state.setdefault("options", {name: state[name] for name in ("norm", "strength") if name in state})
        super().__setstate__(state)
