"""The augmented loss for autograd: cross entropy and divergence from one walk over blocks of the vocabulary.

The target distribution belongs to a word, not to a position: what it needs is computed once for each different label
of the batch, and copied to the positions only within a block. The walk goes twice over the words: for the sums of the
softmaxes, and for the gradients. Products of the first are kept for the second where the budget has room for them.

With a = scale * W h, u = L L[y], q = softmax(a / tau), t = softmax(u / tau), the divergence of a label's positions is,
on average, E_t[x] - log Z(u / tau) + mean of log Z(a / tau), where x = (u - mean of a) / tau. Its gradients are
(q - t) / tau with respect to a, and t (x - E_t[x]) / tau with respect to u.
"""

from dataclasses import dataclass

import torch

from .autograd import _dtypes
from .chunks import default_budget, plan_chunks
from .embedding import _add_rows
from .gradient import deliver
from .options import Options
from .softmax import _add_product, _exp_of_difference, _put_product

# Blocks at work at once: products, logits, probabilities and targets of the positions, and those of the labels.
_BLOCKS = 8


@dataclass
class Call:
    """What is computed. `options` are those of the cross entropy; without `embedding`, L is the softmax matrix."""

    options: Options
    labels: torch.Tensor
    temperature: float
    alpha: float
    detach_target: bool
    cross_entropy_weight: float
    memory_budget: int | None
    differentiable: bool


class TiedAugmentedLoss(torch.autograd.Function):
    """(total, cross entropy), the second without a gradient."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, embedding, call: Call):
        ctx.weight, ctx.embedding, ctx.run = weight, embedding, None
        wanted = ctx.needs_input_grad[:4] if call.differentiable else (False,) * 4
        run = _Run(hidden, weight, bias, embedding, call, wanted)
        if any(wanted):
            ctx.run = run
        ctx.mark_non_differentiable(run.cross_entropy)
        return run.total, run.cross_entropy

    @staticmethod
    def backward(ctx, upstream, _):
        if torch.is_grad_enabled():
            raise RuntimeError(
                "augmented_loss has no gradient of its gradient (create_graph=True): use "
                "hf_tying.losses.augmented.reference_augmented_loss for that."
            )
        if ctx.run is None:
            raise RuntimeError(
                "Trying to go backward through augmented_loss a second time: its gradients were made in the forward "
                "pass, and given out. Compute the loss again."
            )
        run, ctx.run = ctx.run, None
        hidden, weight, bias, embedding = run.give_out(upstream)
        if weight is not None:
            weight = deliver(ctx.weight, weight)
        if embedding is not None:
            embedding = deliver(ctx.embedding, embedding)
        return hidden, weight, bias, embedding, None


class _Run:
    """The losses, and the gradients of `wanted` (of hidden, weight, bias, embedding)."""

    def __init__(self, hidden, weight, bias, embedding, call: Call, wanted):
        self.inputs = (hidden, weight, bias, embedding)
        labels = call.labels.reshape(-1)
        self.tokens = torch.nonzero(labels != call.options.ignore_index).view(-1)
        self.products, self.exact = _dtypes(hidden, weight)
        share = 1.0 / self._count(call.options)
        # Gradients are made with the share of a position, except where what is so small would vanish: half way then.
        self.unit = max(len(self.tokens), 1) ** -0.5 if self.products == torch.float16 else share
        self.rest = share / self.unit
        with torch.autocast(hidden.device.type, enabled=False):
            self.gradients = [self._zeros(*pair) for pair in zip(self.inputs, wanted, strict=True)]
            flat = hidden.reshape(-1, hidden.shape[-1])
            if len(self.tokens) < len(labels):
                flat, labels = flat[self.tokens], labels[self.tokens]
            losses = torch.zeros(2, dtype=self.exact, device=hidden.device)
            if len(labels):
                walk = _Walk(self, flat.detach(), labels, call)
                losses = torch.stack(walk.forward())
                if any(wanted):
                    walk.backward()
            self.cross_entropy = losses[0] * share
            self.total = call.cross_entropy_weight * self.cross_entropy
            if call.alpha:
                self.total = self.total + call.alpha * share * losses[1]
        self.inputs = tuple(None if each is None else (each.shape, each.dtype) for each in self.inputs)

    def _count(self, options: Options):
        """What the sum is divided by, not 0."""
        count = 1 if options.reduction == "sum" else options.num_items_in_batch
        if isinstance(count, torch.Tensor):
            count = count.to(self.tokens.device, self.exact)
            return count.masked_fill(count == 0, 1)
        return (len(self.tokens) if count is None else count) or 1

    def _zeros(self, tensor, wanted: bool) -> torch.Tensor | None:
        """For a gradient, as it is until it is given out: float16 has no room for what is yet to be multiplied."""
        if not wanted:
            return None
        hidden = tensor is self.inputs[0]
        shape = (len(self.tokens), tensor.shape[-1]) if hidden else tensor.shape
        dtype = self.exact if hidden or tensor.dim() == 1 or tensor.dtype == torch.float16 else tensor.dtype
        return torch.zeros(shape, dtype=dtype, device=tensor.device)

    def give_out(self, upstream: torch.Tensor) -> list[torch.Tensor | None]:
        """The gradients for autograd, times what the backward pass brings; they are not held here any more."""
        gradients, self.gradients = self.gradients, []
        factor = upstream * self.rest
        if factor.device.type != "cpu" or float(factor) != 1:
            for gradient in gradients:
                if gradient is not None:
                    gradient.mul_(factor)
        if gradients[0] is not None:
            shape, dtype = self.inputs[0]
            if len(self.tokens) < shape[:-1].numel():
                hidden = gradients[0].new_zeros(shape[:-1].numel(), shape[-1])
                gradients[0] = hidden.index_copy_(0, self.tokens, gradients[0])
            gradients[0] = gradients[0].view(shape)
        pairs = zip(gradients, self.inputs, strict=True)
        return [None if gradient is None else gradient.to(of[1]) for gradient, of in pairs]


class _LogSumExp:
    """Of each column of a matrix that comes by blocks of rows; and the mean of something under its softmax."""

    def __init__(self, columns: int, dtype: torch.dtype, device: torch.device):
        self.largest = torch.full((columns,), -torch.inf, dtype=dtype, device=device)
        self.sum, self.weighted = torch.zeros_like(self.largest), torch.zeros_like(self.largest)

    def read(self, block: torch.Tensor, values: torch.Tensor | None = None) -> None:
        """`block` is used up."""
        before, self.largest = self.largest, torch.maximum(self.largest, block.amax(0))
        rescaled = (before - self._base()).exp()
        _exp_of_difference(block, self._base())
        self.sum = self.sum * rescaled + block.sum(0)
        if values is not None:
            self.weighted = self.weighted * rescaled + block.mul_(values).sum(0)

    def probabilities(self, block: torch.Tensor) -> torch.Tensor:
        """In place. The largest and the sum stay apart: their sum would lose digits where logits are large."""
        return _exp_of_difference(block, self._base()).mul_(1 / self.sum)

    def log(self) -> torch.Tensor:
        return self._base() + self.sum.log()

    def mean(self) -> torch.Tensor:
        return self.weighted / self.sum

    def _base(self) -> torch.Tensor:
        return self.largest.masked_fill(self.largest == -torch.inf, 0.0)


class _Products:
    """Matrix products of blocks of rows with a few columns, in the exact dtype; kept while there is room for them."""

    def __init__(self, exact: torch.dtype, room: int):
        self.exact, self.room, self.kept = exact, room, {}

    def __call__(self, name: str, words: slice, matrix: torch.Tensor, columns: torch.Tensor, again: bool = True):
        """`matrix @ columns.T`, not to be written to. `again`: whether the second walk will ask for it."""
        key = name, words.start
        if key in self.kept:
            return self.kept.pop(key)
        product = (matrix @ columns.t()).to(self.exact)
        size = product.numel() * product.element_size()
        if again and size <= self.room:
            self.room -= size
            self.kept[key] = product
        return product


class _Walk:
    """Over blocks of words for the sums, and once more for the gradients."""

    def __init__(self, run: _Run, hidden: torch.Tensor, labels: torch.Tensor, call: Call):
        _, self.weight, bias, embedding = (None if each is None else each.detach() for each in run.inputs)
        self.run, self.exact, self.call, self.labels, self.temperature = run, run.exact, call, labels, call.temperature
        self.scale = 1.0 if call.options.logit_scale is None else float(call.options.logit_scale)
        self.hidden = hidden.to(run.products)
        self.bias = None if bias is None else bias.to(self.exact)[:, None]
        self.into_hidden, self.into_weight, self.into_bias, self.into_embedding = run.gradients
        self.tied = embedding is None
        self.embedding = self.weight if self.tied else embedding
        if self.tied:
            self.into_embedding = self.into_weight
        if call.detach_target or not call.alpha:
            self.into_embedding = None

        budget = call.memory_budget
        if budget is None:
            budget = default_budget(*self.weight.shape, self.weight.element_size())
        self.blocks = plan_chunks(
            *hidden.shape,
            len(self.weight),
            self.weight.element_size(),
            self.exact.itemsize,
            budget=2 * budget // _BLOCKS,
            gradients=False,
            matrix_gradient=False,
            accumulates=False,
            device=self.weight.device.type,
        ).blocks
        at_work = _BLOCKS * max(words.stop - words.start for words in self.blocks) * len(labels) * self.exact.itemsize
        differentiated = any(gradient is not None for gradient in run.gradients)
        self.products = _Products(self.exact, budget - at_work if differentiated else 0)

        order = labels.argsort()
        starts = torch.tensor([words.start for words in self.blocks], device=labels.device)
        bounds = [*torch.searchsorted(labels[order], starts).tolist(), len(labels)]
        self.places = [order[a:b] for a, b in zip(bounds, bounds[1:], strict=False)]  # of the labels in each block

        self.usual, self.flat = (_LogSumExp(len(labels), self.exact, labels.device) for _ in range(2))
        if call.alpha:
            # Of each different label: its vector, and the mean of the hidden states from which it is predicted.
            self.different, self.place, counts = labels.unique(return_inverse=True, return_counts=True)
            self.counts = counts.to(self.exact)
            self.vectors = self.embedding[self.different].to(run.products)
            sums = torch.zeros(len(counts), hidden.shape[1], dtype=self.exact, device=hidden.device)
            sums.index_add_(0, self.place, hidden.to(self.exact))
            self.means = sums.div_(self.counts[:, None]).to(run.products)
            self.target = _LogSumExp(len(counts), self.exact, labels.device)

    def forward(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The sums over all positions of cross entropy and divergence."""
        at_label = torch.zeros(len(self.labels), dtype=self.exact, device=self.labels.device)
        for words, at in zip(self.blocks, self.places, strict=True):
            softmax, inputs = self._matrices(words)
            logits, products = self._logits(words, softmax)
            at_label[at] = logits[self.labels[at] - words.start, at]
            self.usual.read(logits)
            if self.call.alpha:
                self.flat.read(products * (self.scale / self.temperature))
                u = self._u(words, inputs)
                self.target.read(u, self._x(u, words, softmax))
        cross_entropy = (self.usual.log() - at_label).sum()
        if not self.call.alpha:
            return cross_entropy, cross_entropy.new_zeros(())
        of_target = (self.counts * (self.target.mean() - self.target.log())).sum()
        return cross_entropy, of_target + self.flat.log().sum()

    def backward(self) -> None:
        """Fill the gradients."""
        call, unit = self.call, self.run.unit
        of_divergence = unit * call.alpha / self.temperature
        if self.into_embedding is not None:
            into_vectors = torch.zeros_like(self.vectors, dtype=self.exact)
            mean, shares = self.target.mean(), self.counts * of_divergence
        for words, at in zip(self.blocks, self.places, strict=True):
            softmax, inputs = self._matrices(words)
            logits, products = self._logits(words, softmax)
            into_logits = self.usual.probabilities(logits)
            into_logits[self.labels[at] - words.start, at] -= 1
            into_logits.mul_(unit * call.cross_entropy_weight * self.scale)
            if self.into_bias is not None:
                self.into_bias[words] = into_logits.sum(1)
            if call.alpha:
                u = self._u(words, inputs)
                x = None if self.into_embedding is None else self._x(u, words, softmax)
                target = self.target.probabilities(u)
                difference = self.flat.probabilities(products * (self.scale / self.temperature))
                difference.sub_(target.index_select(1, self.place))
                into_logits.add_(difference.mul_(of_divergence * self.scale))
            factors = into_logits.to(self.run.products)
            if self.into_hidden is not None:
                _add_product(self.into_hidden, factors.t(), softmax)
            into_softmax, into_inputs = [(factors, self.hidden)], []
            if self.into_embedding is not None:
                factors = x.sub_(mean).mul_(target).mul_(shares).to(self.run.products)
                _add_product(into_vectors, factors.t(), inputs)
                (into_softmax if self.tied else into_inputs).append((factors, self.vectors))
            self._put(self.into_weight, words, into_softmax)
            self._put(self.into_embedding, words, into_inputs)
        if self.into_embedding is not None:
            _add_rows(self.into_embedding, self.different, into_vectors)

    def _matrices(self, words: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows of W and of L in the dtype of the products."""
        softmax = self.weight[words].to(self.run.products)
        return softmax, softmax if self.tied else self.embedding[words].to(self.run.products)

    def _logits(self, words: slice, softmax: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Those of the cross entropy, and the products, not to be written to."""
        products = self.products("hidden", words, softmax, self.hidden)
        if self.bias is None:
            return products * self.scale, products
        return (products + self.bias[words]).mul_(self.scale), products

    def _u(self, words: slice, inputs: torch.Tensor) -> torch.Tensor:
        """u / tau."""
        return self.products("vectors", words, inputs, self.vectors) / self.temperature

    def _x(self, u: torch.Tensor, words: slice, softmax: torch.Tensor) -> torch.Tensor:
        """(u - mean of a) / tau."""
        means = self.products("means", words, softmax, self.means, again=self.into_embedding is not None)
        return torch.sub(u, means, alpha=self.scale / self.temperature)

    def _put(self, gradient: torch.Tensor | None, words: slice, factors: list) -> None:
        """The sum of some products, rounded once."""
        if gradient is None or not factors:
            return
        rows = sums = gradient[words]
        if rows.dtype != self.exact:
            sums = torch.empty_like(rows, dtype=self.exact)
        for index, (left, right) in enumerate(factors):
            _put_product(sums, left, right, first=index == 0)
        if sums is not rows:
            rows.copy_(sums)
