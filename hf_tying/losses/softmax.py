"""The tied softmax: cross entropy and its gradients from one walk over blocks of the vocabulary, logits never whole.

The walk goes twice over each chunk of tokens. First, block by block: logits, and what each token's loss needs of them.
Then, block by block again: the gradient of the logits, multiplied into the gradients of the hidden states and of the
matrix. Between the two a block's values are kept where there is room for them: in the memory of the matrix's own
gradient, each row of which is written only once the values in it are used up; in a buffer; or nowhere, and then they
are computed again. With room for all, that is three matrix products, the least that exact gradients need.

With the target's logit `l_t` as the reference of each token, the loss is `log(1 + sum of exp(l_j - l_t) over j != t)`:
no maximum to look for, and no digit lost where the model is sure. The gradient of logit j is then the kept exponential
times a factor of its token alone, and that factor goes into the hidden states: the second walk has no work on logits.
(`Exponentials`. Where one could overflow, or the products are in half precision: `Logits`.)
"""

from dataclasses import dataclass
from math import log

import torch
from torch.nn.functional import softplus

from .chunks import Plan

# Half-precision values are kept as bfloat16: it has the range of float32, and an exponential needs it.
_KEPT_AS = {torch.float16: torch.bfloat16}
# On a CPU torch's exp2 is two to twenty times as fast as its exp (2.13, AVX2), of the same accuracy.
_LOG2_E = 1 / log(2)
# An exponential or a sum of them beyond this is taken for an overflow.
_LARGE = 1e30
# Under a soft cap up to this, no two logits are so far apart that an exponential of their difference is 0.
_LARGEST_CAP = 40.0


@dataclass
class Softmax:
    """Cross entropy of N tokens over V words, with logits `softcap(scale * (hidden @ weight.T + bias))`.

    The loss of a token is `true_share * -log p(target) - sum over j of smoothing_j * log p(j)`; gradients are those of
    the sum of `factor * loss`.

    Attributes:
        hidden: (N, D), in the dtype of the matrix products.
        weight: (V, D), in any floating-point dtype.
        bias: (V,) in the exact dtype, or `None`.
        labels: (N,), int64, all of them words.
        true_share, factor: (N,), in the exact dtype.
        smoothing: (V,) in the exact dtype, or `None`.
        scale, softcap: of the logits.
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


@dataclass
class Gradients:
    """What is asked for, allocated by the caller. `hidden` and `bias` are in the exact dtype, `weight` in its own."""

    hidden: torch.Tensor | None = None
    weight: torch.Tensor | None = None
    bias: torch.Tensor | None = None

    def __bool__(self) -> bool:
        return any(gradient is not None for gradient in (self.hidden, self.weight, self.bias))


def cross_entropy(softmax: Softmax, plan: Plan, gradients: Gradients) -> torch.Tensor:
    """The loss of each token, (N,) in the exact dtype; `gradients` are filled."""
    losses = torch.empty_like(softmax.factor)
    memory = _Memory(softmax, plan, gradients)
    as_exponentials = softmax.hidden.dtype == softmax.exact and (softmax.softcap or 0.0) <= _LARGEST_CAP
    for rows in plan.tokens:
        walk = _Walk(softmax, plan, gradients, memory, rows)
        if not as_exponentials or not walk.forward(Exponentials):
            walk.forward(Logits)
        losses[rows] = walk.values.losses
        if gradients:
            walk.backward()
    return losses


# Blocks are (words, tokens). `at` are the places of the targets in one: rows, and columns.
At = tuple[torch.Tensor, torch.Tensor]


class Exponentials:
    """A block's values are `exp(l_j - l_t)`, and 0 at the target."""

    keeps_products = False

    def __init__(self, softmax: Softmax, rows: slice, target: torch.Tensor):
        self.softmax = softmax
        self.true_share, self.upstream = softmax.true_share[rows], softmax.factor[rows]
        # A soft cap is applied in base e, and everything else in base 2, by one factor of the products.
        self.scale = softmax.scale if softmax.softcap is not None else softmax.scale * _LOG2_E
        self.target = _capped(target * self.scale, softmax.softcap)
        self.others = torch.zeros_like(target)  # the sum of the exponentials, the target's own apart
        self.smoothed = torch.zeros_like(target)  # the sum of smoothing_j * (l_j - l_t), in bits
        if softmax.smoothing is not None:
            self.smoothed_target = softmax.smoothing[softmax.labels[rows]]

    def read(self, block: torch.Tensor, words: slice, at: At) -> None:
        """From products to values, and what the loss needs of them."""
        self._differences(block, words)
        if self.softmax.smoothing is not None:
            block[at] = 0.0
            self.smoothed += self.softmax.smoothing[words] @ block
        block.exp2_()
        block[at] = 0.0
        self.others += block.sum(0)

    def compute(self, block: torch.Tensor, words: slice, at: At) -> None:
        """From products to values."""
        self._differences(block, words).exp2_()
        block[at] = 0.0

    def _differences(self, block: torch.Tensor, words: slice) -> torch.Tensor:
        if self.softmax.bias is not None:
            block.add_(self.softmax.bias[words, None], alpha=self.scale)
        if self.softmax.softcap is None:
            return block.sub_(self.target)
        return _capped(block, self.softmax.softcap).sub_(self.target).mul_(_LOG2_E)

    def finish(self) -> bool:
        """The losses; whether nothing has overflowed. A NaN is no overflow but the answer."""
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
        self.losses = share * surprise - self.smoothed / _LOG2_E
        self.factor = self.upstream * share / normaliser
        self.at_target = at_target
        if (cap := self.softmax.softcap) is not None:
            self.at_target = at_target * (1 - (self.target / cap).square())
        return not (self.others > _LARGE).any()

    def differentiate(self, block: torch.Tensor, words: slice, at: At) -> None:
        """From values to the gradient of the logits, each token's yet to be multiplied by its `factor`."""
        inner = None
        if (cap := self.softmax.softcap) is not None:  # of the tanh: 1 - (l / cap)^2
            inner = block.log().add_(self.target).div_(cap).square_().neg_().add_(1)
        if self.softmax.smoothing is not None:
            block.addcmul_(self.softmax.smoothing[words, None], self.smoothing_share, value=-1)
        if inner is not None:
            block.mul_(inner)
        block[at] = self.at_target[at[1]]


class Logits:
    """A block's values are the logits; what is kept of it are the products.

    For whatever `Exponentials` cannot hold, and for products in half precision, whose rounding is that of the usual
    path then: logits are rounded once, and once the gradient that goes into the products.
    """

    keeps_products = True
    scale = 1.0
    factor = None

    def __init__(self, softmax: Softmax, rows: slice, target: torch.Tensor):
        self.softmax, self.labels = softmax, softmax.labels[rows]
        self.true_share, self.upstream = softmax.true_share[rows], softmax.factor[rows]
        self.target = _capped(target * softmax.scale, softmax.softcap)
        self.largest = torch.full_like(target, -torch.inf)  # of the other words, and the sum of exp(l_j - largest)
        self.sum = torch.zeros_like(target)
        self.smoothed = torch.zeros_like(target)

    def read(self, block: torch.Tensor, words: slice, at: At) -> None:
        """From products to values, and what the loss needs of them."""
        self.compute(block, words, at)
        if self.softmax.smoothing is not None:
            self.smoothed += self.softmax.smoothing[words] @ block
        block[at] = -torch.inf
        largest = torch.maximum(self.largest, block.amax(0))
        base = largest.masked_fill(largest == -torch.inf, 0.0)  # no other word so far
        self.sum = self.sum * (self.largest - base).exp() + _exp_of_difference(block, base).sum(0)
        self.largest = largest

    def compute(self, block: torch.Tensor, words: slice, at: At) -> None:
        """From products to values."""
        if self.softmax.bias is not None:
            block.add_(self.softmax.bias[words, None])
        if self.softmax.scale != 1:
            block.mul_(self.softmax.scale)
        _capped(block, self.softmax.softcap)
        block[at] = self.target[at[1]]  # in the exact dtype, also where products are rounded

    def finish(self) -> bool:
        """The losses; nothing overflows here."""
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
            self.losses = self.losses + total * (self.target + surprise) - self.smoothed
            self.at_target = self.at_target + total * (-surprise).exp() - smoothing[self.labels]
            self.share = self.share + total
        else:  # one factor in place of two
            self.share, self.at_target, self.last = self.share * self.last, self.at_target * self.last, None
        self.share = self.share / normaliser
        return True

    def differentiate(self, block: torch.Tensor, words: slice, at: At) -> None:
        """From values to the gradient of the products."""
        softmax = self.softmax
        inner = None if softmax.softcap is None else (block / softmax.softcap).square_().neg_().add_(1)
        _exp_of_difference(block, self.base).mul_(self.share)
        if softmax.smoothing is not None:
            block.sub_(softmax.smoothing[words, None])
        block[at] = self.at_target[at[1]]
        if inner is not None:
            block.mul_(inner)
        if self.last is not None:
            block.mul_(self.last)


def _nan_where_infinite(target: torch.Tensor) -> torch.Tensor:
    """0, and NaN for a NaN or for infinity: as in torch, where such a logit meets its equal in inf - inf."""
    above = target.clamp(min=0)
    return above - above


def _capped(logits: torch.Tensor, cap: float | None) -> torch.Tensor:
    """`cap * tanh(logits / cap)`, in place."""
    return logits if cap is None else logits.div_(cap).tanh_().mul_(cap)


def _exp_of_difference(block: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    """`exp(block - base)`, in place."""
    return block.sub_(base).mul_(_LOG2_E).exp2_()


class _Memory:
    """What all chunks of tokens use in turn."""

    def __init__(self, softmax: Softmax, plan: Plan, gradients: Gradients):
        device, kept_as = softmax.weight.device, _KEPT_AS.get(softmax.weight.dtype, softmax.weight.dtype)
        self.block = torch.empty(plan.longest_block, dtype=softmax.exact, device=device)
        self.buffer = torch.empty(plan.buffer, dtype=kept_as, device=device)
        # The gradient of the matrix, until its rows are written.
        self.borrowed = None if gradients.weight is None else gradients.weight.view(kept_as)

    def places(self, plan: Plan, rows: slice) -> list[torch.Tensor | None]:
        """Where the values of each block are kept; `None`: they are computed again."""
        count, free, places = rows.stop - rows.start, 0, []
        borrowed = self.borrowed if rows.start == 0 else None
        # Each word's values in its own row; or, of more tokens than a row has room for, one after the other from the
        # first row on, where they never lie behind the row that is being written.
        stride = count if borrowed is None else max(count, borrowed.shape[1])
        for block in plan.blocks:
            shape = (block.stop - block.start, count)
            start = stride * block.start
            if borrowed is not None and start + stride * (shape[0] - 1) + count <= borrowed.numel():
                places.append(borrowed.as_strided(shape, (stride, 1), start))
            elif free + shape[0] * count <= len(self.buffer):
                places.append(self.buffer[free : free + shape[0] * count].view(shape))
                free += shape[0] * count
            else:
                places.append(None)
        return places

    def is_borrowed(self, place: torch.Tensor) -> bool:
        return place.untyped_storage().data_ptr() != self.buffer.untyped_storage().data_ptr()


class _Walk:
    """Over one chunk of tokens, block by block, and once more for the gradients."""

    def __init__(self, softmax: Softmax, plan: Plan, gradients: Gradients, memory: _Memory, rows: slice):
        self.softmax, self.gradients, self.memory, self.rows = softmax, gradients, memory, rows
        self.labels, self.hidden = softmax.labels[rows], softmax.hidden[rows]
        self.blocks = plan.blocks
        self.places = memory.places(plan, rows) if gradients else [None] * len(plan.blocks)
        self.targets = self._targets()

    def forward(self, kind: type[Exponentials] | type[Logits]) -> bool:
        """The first walk. False where `kind` cannot hold these logits."""
        self.values = kind(self.softmax, self.rows, self._target_products())
        self.multiplied = self.hidden if self.values.scale == 1 else self.hidden * self.values.scale
        for words, place, at in zip(self.blocks, self.places, self.targets, strict=True):
            block = self._block(words)
            if place is not None and place.dtype == block.dtype and not kind.keeps_products:
                block = place
            self._products(words, block, keep=place if kind.keeps_products else None)
            self.values.read(block, words, at)
            if place is not None and place is not block and not kind.keeps_products:
                place.copy_(block)
        return self.values.finish()

    def backward(self) -> None:
        """The second walk."""
        values, softmax, gradients = self.values, self.softmax, self.gradients
        if None not in self.places:
            self.multiplied = None  # nothing is computed again
        into_hidden = None if gradients.hidden is None else gradients.hidden[self.rows].zero_()
        weighted = self.hidden if values.factor is None else self.hidden * values.factor[:, None]
        if softmax.scale != 1 and values.factor is not None:
            weighted.mul_(softmax.scale)
        for words, place, at in zip(self.blocks, self.places, self.targets, strict=True):
            block = self._block(words)
            if place is None:
                self._products(words, block)
            elif place.dtype == block.dtype and not self.memory.is_borrowed(place):
                block = place
            else:
                block.copy_(place)  # the rows of the gradient that hold it are about to be written
            if place is None or values.keeps_products:
                values.compute(block, words, at)
            values.differentiate(block, words, at)
            if gradients.bias is not None:
                sums = block.sum(1) if values.factor is None else (block @ values.factor).mul_(softmax.scale)
                gradients.bias[words] += sums
            factors = block.to(softmax.hidden.dtype)
            if into_hidden is not None:
                _add_product(into_hidden, factors.t(), self._matrix(words))
            if gradients.weight is not None:
                _put_product(gradients.weight[words], factors, weighted, first=self.rows.start == 0)
        if into_hidden is not None and values.factor is not None:
            into_hidden.mul_((values.factor * softmax.scale)[:, None])

    def _targets(self) -> list[At]:
        """For each block, the targets in it: rows of the block, and their tokens."""
        words, tokens = self.labels.sort()
        starts = torch.tensor([block.start for block in self.blocks], device=words.device)
        bounds = [*torch.searchsorted(words, starts).tolist(), len(words)]
        return [
            (words[a:b] - block.start, tokens[a:b])
            for block, a, b in zip(self.blocks, bounds, bounds[1:], strict=False)
        ]

    def _target_products(self) -> torch.Tensor:
        rows = self.softmax.weight[self.labels].to(self.softmax.exact)
        products = torch.bmm(self.hidden.to(self.softmax.exact)[:, None, :], rows[:, :, None]).view(-1)
        return products if self.softmax.bias is None else products + self.softmax.bias[self.labels]

    def _block(self, words: slice) -> torch.Tensor:
        count = len(self.labels)
        return self.memory.block[: (words.stop - words.start) * count].view(-1, count)

    def _matrix(self, words: slice) -> torch.Tensor:
        return self.softmax.weight[words].to(self.softmax.hidden.dtype)

    def _products(self, words: slice, block: torch.Tensor, keep: torch.Tensor | None = None) -> None:
        """Into `block`, and as they are kept into `keep`: then the first walk rounds as the second will."""
        matrix, hidden = self._matrix(words), self.multiplied.t()
        out = next((place for place in (keep, block) if place is not None and place.dtype == matrix.dtype), None)
        products = torch.mm(matrix, hidden) if out is None else torch.mm(matrix, hidden, out=out)
        if keep is not None and products is not keep:
            products = keep.copy_(products)
        if products is not block:
            block.copy_(products)


def _add_product(out: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    if left.dtype == out.dtype:
        out.addmm_(left, right)
    else:
        out.add_(left @ right)


def _put_product(out: torch.Tensor, left: torch.Tensor, right: torch.Tensor, first: bool) -> None:
    """Into memory that holds nothing yet, or added to what earlier tokens have given."""
    if not first:
        _add_product(out, left, right)
    elif left.dtype == out.dtype:
        torch.mm(left, right, out=out)
    else:
        out.copy_(left @ right)
