"""The values of a block of the softmax, from matrix products to the loss of each token and the gradient of the logits.

There are two kinds. `Exponentials` take the target's logit `l_t` as the reference of each token. The loss is then
`log(1 + sum of exp(l_j - l_t) over j != t)`: no maximum to look for, and no digit lost where the model is sure. The
gradient of logit j is the kept exponential times a factor of its token alone. That factor goes into the hidden states,
so that the second pass has no work on logits. `Logits` are for what an exponential cannot hold, and for products in
half precision. Which kind is taken, and when its methods are called, is decided in `walk`.
"""

from dataclasses import dataclass

import torch
from torch.nn.functional import softplus

from .arithmetic import LOG2_E, exp_of_difference

# Larger exponentials, or sums of them, count as an overflow.
_LARGE = 1e30
# Smallest sum of a token's shares, relative to their sizes. It is 0 with class weights of 0.
_SMALLEST_SHARE = 1e-3


@dataclass
class Softmax:
    """Cross entropy of N tokens over V words, with logits `softcap(scale * (hidden @ weight.T + bias))`.

    The loss of a token is `true_share * -log p(target) - sum over j of smoothing_j * log p(j)`; gradients are those of
    the sum of `factor * loss`.

    Attributes:
        hidden: hidden states, (N, D), in the dtype of the matrix products.
        weight: softmax matrix, (V, D), in any floating-point dtype.
        bias: bias, (V,), in the exact dtype, or `None`.
        labels: labels, (N,), int64, all of them words.
        true_share: share of the label in each target, (N,), in the exact dtype.
        factor: factor of each loss, (N,), in the exact dtype.
        smoothing: share of each word in all targets, (V,), in the exact dtype, or `None`.
        scale: factor of the logits.
        softcap: cap of the logits, or `None`.
        exact: dtype of losses and sums: float32, or float64 for float64 tensors.
    """

    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    labels: torch.Tensor
    true_share: torch.Tensor
    factor: torch.Tensor
    smoothing: torch.Tensor | None
    scale: float
    softcap: float | None
    exact: torch.dtype


# Blocks are (words, tokens). `at` are the places of the targets in one: rows, and columns (`targets_by_block`).
At = tuple[torch.Tensor, torch.Tensor]


class Exponentials:
    """Blocks of the values `exp(l_j - l_t)`, with 0 at the target."""

    keeps_products = False

    def __init__(self, softmax: Softmax, rows: slice, target: torch.Tensor) -> None:
        self.softmax = softmax
        self.true_share, self.upstream = softmax.true_share[rows], softmax.factor[rows]
        # A soft cap is applied in base e, and everything else in base 2, by one factor of the products.
        self.scale = softmax.scale if softmax.softcap is not None else softmax.scale * LOG2_E
        self.target = _capped(target * self.scale, softmax.softcap)
        self.others = torch.zeros_like(target)  # the sum of the exponentials, the target's own apart
        self.smoothed = torch.zeros_like(target)  # the sum of smoothing_j * (l_j - l_t), in bits
        if softmax.smoothing is not None:
            self.smoothed_target = softmax.smoothing[softmax.labels[rows]]

    def read(self, block: torch.Tensor, words: slice, at: At) -> None:
        """Replace products by values, and sum what the loss needs."""
        self._differences(block, words)
        if self.softmax.smoothing is not None:
            block[at] = 0.0
            self.smoothed += self.softmax.smoothing[words] @ block
        block.exp2_()
        block[at] = 0.0
        self.others += block.sum(0)

    def compute(self, block: torch.Tensor, words: slice, at: At) -> None:
        """Replace products by values."""
        self._differences(block, words).exp2_()
        block[at] = 0.0

    def _differences(self, block: torch.Tensor, words: slice) -> torch.Tensor:
        if self.softmax.bias is not None:
            block.add_(self.softmax.bias[words, None], alpha=self.scale)
        if self.softmax.softcap is None:
            return block.sub_(self.target)
        return _capped(block, self.softmax.softcap).sub_(self.target).mul_(LOG2_E)

    def finish(self) -> bool:
        """Compute the losses, and return whether these values can hold the logits. A NaN is a result, not an overflow.

        They cannot hold a target at minus infinity, to which no other logit can be compared, and shares of a token
        that cancel, since they divide by their sum.
        """
        self.others += _nan_where_infinite(self.target)
        surprise, normaliser = self.others.log1p(), 1 + self.others
        total, share, at_target = 0.0, self.true_share, -self.others
        if (smoothing := self.softmax.smoothing) is not None:
            total = smoothing.sum()
            share = self.true_share + total
            self.smoothing_share = normaliser / share
            # One quotient: in a vocabulary of one word the parts cancel, to the last digit.
            at_target = total - self.true_share * self.others - self.smoothed_target * normaliser
            at_target = at_target / share
        self.losses = share * surprise - self.smoothed / LOG2_E
        self.factor = self.upstream * share / normaliser
        self.at_target = at_target
        if (cap := self.softmax.softcap) is not None:
            self.at_target = at_target * (1 - (self.target / cap).square())
        unfit = (self.others > _LARGE) | (self.target == -torch.inf)
        if smoothing is not None:
            unfit |= share.abs() <= _SMALLEST_SHARE * (self.true_share.abs() + abs(total))
        return not unfit.any()

    def differentiate(self, block: torch.Tensor, words: slice, at: At) -> None:
        """Replace values by the gradient of the logits, without the `factor` of each token."""
        inner = None
        if (cap := self.softmax.softcap) is not None:  # derivative of the cap: 1 - (l / cap)^2
            inner = block.log().add_(self.target).div_(cap).square_().neg_().add_(1)
        if self.softmax.smoothing is not None:
            block.addcmul_(self.softmax.smoothing[words, None], self.smoothing_share, value=-1)
        if inner is not None:
            block.mul_(inner)
        block[at] = self.at_target[at[1]]


class Logits:
    """Blocks of logits, of which the products are kept.

    They are for values that `Exponentials` cannot hold, and for products in half precision. Their rounding is that of
    the usual path: logits are rounded once, and so is the gradient of the products.
    """

    keeps_products = True
    scale = 1.0
    factor = None

    def __init__(self, softmax: Softmax, rows: slice, target: torch.Tensor) -> None:
        self.softmax, self.labels = softmax, softmax.labels[rows]
        self.true_share, self.upstream = softmax.true_share[rows], softmax.factor[rows]
        self.target = _capped(target * softmax.scale, softmax.softcap)
        self.largest = torch.full_like(target, -torch.inf)  # of the other words, and the sum of exp(l_j - largest)
        self.sum = torch.zeros_like(target)
        self.smoothed = torch.zeros_like(target)

    def read(self, block: torch.Tensor, words: slice, at: At) -> None:
        """Replace products by values, and sum what the loss needs."""
        self.compute(block, words, at)
        if self.softmax.smoothing is not None:
            self.smoothed += self.softmax.smoothing[words] @ block
        block[at] = -torch.inf
        largest = torch.maximum(self.largest, block.amax(0))
        base = largest.masked_fill(largest == -torch.inf, 0.0)  # no other word so far
        self.sum = self.sum * (self.largest - base).exp() + exp_of_difference(block, base).sum(0)
        self.largest = largest

    def compute(self, block: torch.Tensor, words: slice, at: At) -> None:
        """Replace products by values."""
        if self.softmax.bias is not None:
            block.add_(self.softmax.bias[words, None])
        if self.softmax.scale != 1:
            block.mul_(self.softmax.scale)
        _capped(block, self.softmax.softcap)
        block[at] = self.target[at[1]]  # in the exact dtype, also where products are rounded

    def finish(self) -> bool:
        """Compute the losses. Nothing overflows here."""
        odds = self.largest - self.target + self.sum.log()  # of all other words against the target, in logs
        surprise = softplus(odds + _nan_where_infinite(self.target), threshold=80)
        # The largest logit and the sum relative to it stay apart: their sum would lose digits where logits are large.
        self.base = torch.maximum(self.largest, self.target)
        normaliser = self.sum * (self.largest - self.base).exp() + (self.target - self.base).exp()
        self.losses = self.true_share * surprise
        self.at_target = -self.true_share * odds.sigmoid()
        self.share, self.last = self.true_share, self.upstream * self.softmax.scale
        if (smoothing := self.softmax.smoothing) is not None:
            total = smoothing.sum()
            # Not from the target and its surprise: a forbidden target is at minus infinity.
            self.losses = self.losses + total * (self.base + normaliser.log()) - self.smoothed
            self.at_target = self.at_target + total * (-surprise).exp() - smoothing[self.labels]
            self.share = self.share + total
        else:  # one factor in place of two
            self.share, self.at_target, self.last = self.share * self.last, self.at_target * self.last, None
        self.share = self.share / normaliser
        return True

    def differentiate(self, block: torch.Tensor, words: slice, at: At) -> None:
        """Replace values by the gradient of the products."""
        softmax = self.softmax
        inner = None if softmax.softcap is None else (block / softmax.softcap).square_().neg_().add_(1)
        exp_of_difference(block, self.base).mul_(self.share)
        if softmax.smoothing is not None:
            block.sub_(softmax.smoothing[words, None])
        block[at] = self.at_target[at[1]]
        if inner is not None:
            block.mul_(inner)
        if self.last is not None:
            block.mul_(self.last)


def _nan_where_infinite(target: torch.Tensor) -> torch.Tensor:
    """Zeros, with NaN for a NaN or for infinity, as torch computes `inf - inf` for such a logit."""
    above = target.clamp(min=0)
    return above - above


def _capped(logits: torch.Tensor, cap: float | None) -> torch.Tensor:
    """`cap * tanh(logits / cap)`, in place."""
    return logits if cap is None else logits.div_(cap).tanh_().mul_(cap)
