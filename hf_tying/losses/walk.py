"""The walk over blocks of the vocabulary: cross entropy and its gradients, the logits never whole.

The walk passes twice over each chunk of tokens, block by block. The first pass computes logits, and sums for each
token's loss. The second pass computes the gradient of the logits, and multiplies it into the gradients of the hidden
states and of the matrix. Between the two a block's values are kept where there is room for them: in the memory of the
matrix's own gradient, each row of which is written only once the values in it are used up; in a buffer; or nowhere,
and then they are computed again. With room for all, that is three matrix products, the least that exact gradients
need.
"""

import torch

from .arithmetic import add_product, put_product
from .chunks import ChunkPlan, block_in, row_length, targets_by_block
from .pending_gradients import Gradients
from .softmax import Exponentials, Logits, Softmax

# Half-precision values are kept as bfloat16: it has the range of float32, and an exponential needs it.
_KEPT_AS = {torch.float16: torch.bfloat16}
# Under a soft cap up to this, no two logits are so far apart that an exponential of their difference is 0.
_LARGEST_CAP = 40.0


def cross_entropy(softmax: Softmax, plan: ChunkPlan, gradients: Gradients) -> torch.Tensor:
    """The loss of each token, (N,) in the exact dtype. `gradients` are filled in place."""
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


class _Memory:
    """Memory that all chunks of tokens use in turn: the current block, and room for kept values."""

    def __init__(self, softmax: Softmax, plan: ChunkPlan, gradients: Gradients) -> None:
        device, kept_as = softmax.weight.device, _KEPT_AS.get(softmax.weight.dtype, softmax.weight.dtype)
        self.block = torch.empty(plan.longest_block, dtype=softmax.exact, device=device)
        self.buffer = torch.empty(plan.buffer, dtype=kept_as, device=device)
        # The gradient of the matrix, until its rows are written.
        self.borrowed = None if gradients.weight is None else gradients.weight.view(kept_as)

    def places(self, plan: ChunkPlan, rows: slice) -> list[torch.Tensor | None]:
        """Memory for the values of each block; `None` where they are computed again."""
        count, free, places = rows.stop - rows.start, 0, []
        borrowed = self.borrowed if rows.start == 0 else None
        # Each word's values in its own row; or, of more tokens than a row has room for, one after the other from the
        # first row on, where they never lie behind the row that is being written.
        length = row_length(count)
        stride = length if borrowed is None or count > borrowed.shape[1] else borrowed.shape[1]
        for block in plan.blocks:
            words = block.stop - block.start
            start = stride * block.start
            if borrowed is not None and start + stride * (words - 1) + count <= borrowed.numel():
                places.append(borrowed.as_strided((words, count), (stride, 1), start))
            elif free + words * length <= len(self.buffer):
                places.append(block_in(self.buffer[free:], words, count))
                free += words * length
            else:
                places.append(None)
        return places

    def is_borrowed(self, place: torch.Tensor) -> bool:
        return place.untyped_storage().data_ptr() != self.buffer.untyped_storage().data_ptr()


class _Walk:
    """The two passes over one chunk of tokens, block by block: for the losses, and for the gradients."""

    def __init__(self, softmax: Softmax, plan: ChunkPlan, gradients: Gradients, memory: _Memory, rows: slice) -> None:
        self.softmax, self.gradients, self.memory, self.rows = softmax, gradients, memory, rows
        self.labels, self.hidden = softmax.labels[rows], softmax.hidden[rows]
        self.blocks = plan.blocks
        self.places = memory.places(plan, rows) if gradients else [None] * len(plan.blocks)
        self.targets = targets_by_block(self.labels, plan.blocks)

    def forward(self, kind: type[Exponentials] | type[Logits]) -> bool:
        """The first pass, with values of `kind`. Returns False where these cannot hold the logits."""
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
        """The second pass: fill the gradients."""
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
                add_product(into_hidden, factors.t(), self._matrix(words))
            if gradients.weight is not None:
                put_product(gradients.weight[words], factors, weighted, first=self.rows.start == 0)
        if into_hidden is not None and values.factor is not None:
            into_hidden.mul_((values.factor * softmax.scale)[:, None])

    def _target_products(self) -> torch.Tensor:
        rows = self.softmax.weight[self.labels].to(self.softmax.exact)
        products = torch.bmm(self.hidden.to(self.softmax.exact)[:, None, :], rows[:, :, None]).view(-1)
        return products if self.softmax.bias is None else products + self.softmax.bias[self.labels]

    def _block(self, words: slice) -> torch.Tensor:
        return block_in(self.memory.block, words.stop - words.start, len(self.labels))

    def _matrix(self, words: slice) -> torch.Tensor:
        return self.softmax.weight[words].to(self.softmax.hidden.dtype)

    def _products(self, words: slice, block: torch.Tensor, keep: torch.Tensor | None = None) -> None:
        """Write the products into `block`, and into `keep` in its dtype: the first pass rounds as the second will."""
        matrix, hidden = self._matrix(words), self.multiplied.t()
        out = next((place for place in (keep, block) if place is not None and place.dtype == matrix.dtype), None)
        products = torch.mm(matrix, hidden) if out is None else torch.mm(matrix, hidden, out=out)
        if keep is not None and products is not keep:
            products = keep.copy_(products)
        if products is not block:
            block.copy_(products)
