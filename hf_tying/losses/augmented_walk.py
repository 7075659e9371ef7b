"""The walk of the augmented loss: cross entropy, divergence and their gradients, by blocks of the vocabulary.

The target distribution belongs to a word, not to a position: what it needs is computed once for each different label
of the batch, and copied to the positions only within a block. The walk passes twice over the words: for the sums of
the softmaxes, and for the gradients. Products of the first pass are kept for the second where the budget has room for
them.

With a = scale * W h, u = L L[y], q = softmax(a / tau), t = softmax(u / tau), the divergence of a label's positions is,
on average, E_t[x] - log Z(u / tau) + mean of log Z(a / tau), where x = (u - mean of a) / tau. Its gradients are
(q - t) / tau with respect to a, and t (x - E_t[x]) / tau with respect to u.
"""

from dataclasses import dataclass

import torch

from .arithmetic import add_product, add_rows, exp_of_difference, put_product
from .chunks import plan_chunks, targets_by_block
from .options import AugmentedSettings
from .pending_gradients import Gradients

# Number of blocks in memory at once: products, logits, probabilities and targets of the positions, and those of the
# labels.
_BLOCKS = 8


@dataclass
class AugmentedSoftmax:
    """Cross entropy and divergence of N positions over V words.

    Attributes:
        hidden: hidden states, (N, D), in any floating-point dtype.
        weight: softmax matrix, (V, D), in any floating-point dtype.
        bias: bias of the cross entropy alone, (V,), or `None`.
        embedding: matrix of the target, (V, any width); `None`: `weight`.
        labels: labels, (N,), int64, N of 1 or more, all of them words.
        settings: settings of the loss.
        scale: factor of the logits.
        products: dtype of the matrix products.
        exact: dtype of losses and sums: float32, or float64 for float64 tensors.
    """

    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    embedding: torch.Tensor | None
    labels: torch.Tensor
    settings: AugmentedSettings
    scale: float
    products: torch.dtype
    exact: torch.dtype


def augmented_sums(
    problem: AugmentedSoftmax, gradients: Gradients, unit: float | torch.Tensor, budget: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The sums over all positions of cross entropy and divergence, neither of them weighted, in the exact dtype.

    Args:
        problem: the loss to compute.
        gradients: zeros, to be filled with the gradients of the weighted sum of both, times `unit`.
        unit: factor of the gradients.
        budget: bytes for blocks at work and kept products.
    """
    itemsize, exact = problem.weight.element_size(), problem.exact
    blocks = plan_chunks(
        *problem.hidden.shape,
        vocabulary=len(problem.weight),
        itemsize=itemsize,
        exact_itemsize=exact.itemsize,
        budget=2 * budget // _BLOCKS,
        gradients=False,
        matrix_gradient=False,
        accumulates=False,
        device=problem.weight.device.type,
    ).blocks
    at_work = _BLOCKS * max(words.stop - words.start for words in blocks) * len(problem.labels) * exact.itemsize
    walk = _Walk(problem, gradients, blocks, _Products(exact, budget - at_work if gradients else 0))
    sums = walk.forward()
    if gradients:
        walk.backward(unit)
    return sums


class _LogSumExp:
    """The log-sum-exp of each column of a matrix that comes in blocks of rows, and means under its softmax."""

    def __init__(self, columns: int, dtype: torch.dtype, device: torch.device) -> None:
        self.largest = torch.full((columns,), -torch.inf, dtype=dtype, device=device)
        self.sum, self.weighted = torch.zeros_like(self.largest), torch.zeros_like(self.largest)

    def read(self, block: torch.Tensor, values: torch.Tensor | None = None) -> None:
        """Take in a block of rows, and `values` whose mean is wanted. `block` is overwritten."""
        before, self.largest = self.largest, torch.maximum(self.largest, block.amax(0))
        rescaled = (before - self._base()).exp()
        exp_of_difference(block, self._base())
        self.sum = self.sum * rescaled + block.sum(0)
        if values is not None:
            self.weighted = self.weighted * rescaled + block.mul_(values).sum(0)

    def probabilities(self, block: torch.Tensor) -> torch.Tensor:
        """The softmax of a block, in place.

        The largest and the sum stay apart: their sum would lose digits where logits are large.
        """
        return exp_of_difference(block, self._base()).mul_(1 / self.sum)

    def log(self) -> torch.Tensor:
        return self._base() + self.sum.log()

    def mean(self) -> torch.Tensor:
        return self.weighted / self.sum

    def _base(self) -> torch.Tensor:
        return self.largest.masked_fill(self.largest == -torch.inf, 0.0)


class _Products:
    """Matrix products of blocks of rows with a few columns, in the exact dtype; kept while there is room for them."""

    def __init__(self, exact: torch.dtype, room: int) -> None:
        self.exact, self.room, self.kept = exact, room, {}

    def __call__(
        self, name: str, words: slice, matrix: torch.Tensor, columns: torch.Tensor, again: bool = True
    ) -> torch.Tensor:
        """`matrix @ columns.T`, not to be written to. `again`: whether the second pass will ask for it."""
        key = name, words.start
        if key in self.kept:
            return self.kept.pop(key)
        product = (matrix @ columns.t()).to(self.exact)
        size = product.numel() * product.element_size()
        if again and size <= self.room:
            self.room -= size
            self.kept[key] = product
        return product


@dataclass
class _DifferentLabels:
    """The K different labels of the batch, with their vectors and hidden states.

    Attributes:
        words: labels in rising order, (K,).
        place: index in `words` of each position's label, (N,).
        counts: number of positions with each label, (K,), in the exact dtype.
        vectors: rows of the target's matrix, (K, any width), in the dtype of the products.
        means: mean of the hidden states from which each label is predicted, (K, D), in the dtype of the products.
    """

    words: torch.Tensor
    place: torch.Tensor
    counts: torch.Tensor
    vectors: torch.Tensor
    means: torch.Tensor


def _different_labels(problem: AugmentedSoftmax) -> _DifferentLabels:
    hidden, exact = problem.hidden, problem.exact
    words, place, counts = problem.labels.unique(return_inverse=True, return_counts=True)
    matrix, counts = problem.weight if problem.embedding is None else problem.embedding, counts.to(exact)
    sums = torch.zeros(len(counts), hidden.shape[1], dtype=exact, device=hidden.device)
    sums.index_add_(0, place, hidden.to(exact))
    means = sums.div_(counts[:, None]).to(problem.products)
    return _DifferentLabels(words, place, counts, matrix[words].to(problem.products), means)


class _Walk:
    """The two passes over blocks of words: for the sums of the softmaxes, and for the gradients."""

    def __init__(
        self, problem: AugmentedSoftmax, gradients: Gradients, blocks: tuple[slice, ...], products: _Products
    ) -> None:
        self.problem, self.gradients, self.blocks, self.products = problem, gradients, blocks, products
        self.scale, self.temperature = problem.scale, problem.settings.temperature
        self.alpha = problem.settings.divergence_weight
        self.hidden = problem.hidden.to(problem.products)
        self.bias = None if problem.bias is None else problem.bias.to(problem.exact)[:, None]
        self.targets = targets_by_block(problem.labels, blocks)
        # The gradient of the target's matrix, which is that of `weight` where it is the same.
        self.into_embedding = gradients.weight if problem.embedding is None else gradients.embedding
        if problem.settings.detach_target or not self.alpha:
            self.into_embedding = None
        count, device = len(problem.labels), problem.labels.device
        self.usual, self.flat = (_LogSumExp(count, problem.exact, device) for _ in range(2))
        if self.alpha:
            self.different = _different_labels(problem)
            self.target = _LogSumExp(len(self.different.words), problem.exact, device)

    def forward(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The first pass: the sums over all positions of cross entropy and divergence."""
        labels = self.problem.labels
        at_label = torch.zeros(len(labels), dtype=self.problem.exact, device=labels.device)
        for words, (rows, columns) in zip(self.blocks, self.targets, strict=True):
            softmax, inputs = self._matrices(words)
            logits, products = self._logits(words, softmax)
            at_label[columns] = logits[rows, columns]
            self.usual.read(logits)
            if self.alpha:
                self.flat.read(products * (self.scale / self.temperature))
                u = self._u(words, inputs)
                self.target.read(u, self._x(u, words, softmax))
        cross_entropy = (self.usual.log() - at_label).sum()
        if not self.alpha:
            return cross_entropy, cross_entropy.new_zeros(())
        of_target = (self.different.counts * (self.target.mean() - self.target.log())).sum()
        return cross_entropy, of_target + self.flat.log().sum()

    def backward(self, unit: float | torch.Tensor) -> None:
        """The second pass: fill the gradients."""
        gradients, dtype = self.gradients, self.problem.products
        of_cross_entropy = unit * float(self.problem.settings.cross_entropy_weight) * self.scale
        of_divergence = unit * self.alpha / self.temperature
        if self.into_embedding is not None:
            into_vectors = torch.zeros_like(self.different.vectors, dtype=self.problem.exact)
            mean, shares = self.target.mean(), self.different.counts * of_divergence
        for words, at_labels in zip(self.blocks, self.targets, strict=True):
            softmax, inputs = self._matrices(words)
            logits, products = self._logits(words, softmax)
            into_logits = self.usual.probabilities(logits)
            into_logits[at_labels] -= 1
            into_logits.mul_(of_cross_entropy)
            if gradients.bias is not None:
                gradients.bias[words] = into_logits.sum(1)
            if self.alpha:
                u = self._u(words, inputs)
                x = None if self.into_embedding is None else self._x(u, words, softmax)
                target = self.target.probabilities(u)
                difference = self.flat.probabilities(products * (self.scale / self.temperature))
                difference.sub_(target.index_select(1, self.different.place))
                into_logits.add_(difference.mul_(of_divergence * self.scale))
            factors = into_logits.to(dtype)
            if gradients.hidden is not None:
                add_product(gradients.hidden, factors.t(), softmax)
            into_softmax, into_inputs = [(factors, self.hidden)], []
            if self.into_embedding is not None:
                factors = x.sub_(mean).mul_(target).mul_(shares).to(dtype)
                add_product(into_vectors, factors.t(), inputs)
                of_target = into_softmax if self.problem.embedding is None else into_inputs
                of_target.append((factors, self.different.vectors))
            self._put(gradients.weight, words, into_softmax)
            self._put(self.into_embedding, words, into_inputs)
        if self.into_embedding is not None:
            add_rows(self.into_embedding, self.different.words, into_vectors)

    def _matrices(self, words: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows of W and of L in the dtype of the products."""
        softmax, embedding = self.problem.weight[words].to(self.problem.products), self.problem.embedding
        return softmax, softmax if embedding is None else embedding[words].to(self.problem.products)

    def _logits(self, words: slice, softmax: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The logits of the cross entropy, and the products, which are not to be written to."""
        products = self.products("hidden", words, softmax, self.hidden)
        if self.bias is None:
            return products * self.scale, products
        return (products + self.bias[words]).mul_(self.scale), products

    def _u(self, words: slice, inputs: torch.Tensor) -> torch.Tensor:
        """Logits of the target distribution: `u / tau`."""
        return self.products("vectors", words, inputs, self.different.vectors) / self.temperature

    def _x(self, u: torch.Tensor, words: slice, softmax: torch.Tensor) -> torch.Tensor:
        """Logits of the target minus the mean of those of the model: `(u - mean of a) / tau`."""
        means = self.products("means", words, softmax, self.different.means, again=self.into_embedding is not None)
        return torch.sub(u, means, alpha=self.scale / self.temperature)

    def _put(self, gradient: torch.Tensor | None, words: slice, factors: list) -> None:
        """Write the sum of products `left @ right` into rows of `gradient`, rounded once."""
        if gradient is None or not factors:
            return
        rows = sums = gradient[words]
        if rows.dtype != self.problem.exact:
            sums = torch.empty_like(rows, dtype=self.problem.exact)
        for index, (left, right) in enumerate(factors):
            put_product(sums, left, right, first=index == 0)
        if sums is not rows:
            rows.copy_(sums)
