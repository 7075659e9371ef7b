"""Logits tile by tile, for outputs of each token whose upstream gradients are not known before the backward pass."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from .arithmetic import add_product, compute_dtypes
from .chunks import ChunkPlan, block_in, plan_tiles, targets_by_block
from .gradient import accumulate_or_claim
from .options import CrossEntropyOptions
from .pending_gradients import counted_positions
from .reference import whole_logits
from .vocabulary_part import VocabularyPart


@dataclass(frozen=True)
class LogitSettings:
    """What the logits are: `softcap(scale * products) / temperature`, and how they are computed.

    Attributes:
        options: scale and soft cap of the logits, and the label that is ignored.
        temperature: number above 0 that divides the logits.
        head_dtype: dtype of the products; `None`: as for `tied_cross_entropy`.
        block_bytes: most bytes of a tile; `None`: by the device.
    """

    options: CrossEntropyOptions
    temperature: float = 1.0
    head_dtype: torch.dtype | None = None
    block_bytes: int | None = None

    def whole(self, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """The logits (..., V) by plain torch, in float32 or float64; for transformed and sharded tensors."""
        hidden = hidden.to(torch.promote_types(hidden.dtype, self.head_dtype or hidden.dtype))
        logits = whole_logits(hidden, weight, bias, self.options.logit_scale, self.options.logit_softcap)
        return logits / self.temperature


class LogitTiles:
    """The logits of the tokens that count, in tiles of shape (words, tokens), in the exact dtype.

    Args:
        hidden: hidden states, as for `tied_log_probs`; checked (`check_operands`), like the next two.
        weight: softmax matrix.
        positions: (N,), places among all tokens of those that count; `None` if all count.
        bias: bias.
        settings: what the logits are.
        plan: the tiles. Default `None`: by the settings.

    Attributes:
        hidden: (N, D), the hidden states of the tokens that count, in the dtype of the products.
        weight: (V, D), without gradient.
        positions: as given.
        exact: dtype of logits and sums, float32 or float64.
        plan: the tiles.
        tokens, blocks: slices of the tokens and of the words.
    """

    def __init__(
        self,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        positions: torch.Tensor | None,
        bias: torch.Tensor | None,
        settings: LogitSettings,
        plan: ChunkPlan | None = None,
    ) -> None:
        self.products, self.exact = compute_dtypes(hidden, weight, settings.head_dtype)
        self.shape, self.weight, self.positions = hidden.shape[:-1], weight.detach(), positions
        flat = hidden.detach().reshape(-1, hidden.shape[-1])
        self.hidden = (flat if positions is None else flat[positions]).to(self.products)
        self._bias = None if bias is None else bias.detach().to(self.exact)
        self._dtypes = hidden.dtype, None if bias is None else bias.dtype
        cap, scale = settings.options.logit_softcap, settings.options.logit_scale
        self._cap = None if cap is None else float(cap)
        self._scale, self._temperature = 1.0 if scale is None else float(scale), settings.temperature
        if plan is None:
            sizes = len(self.hidden), len(weight), self.exact.itemsize
            plan = plan_tiles(*sizes, hidden.device.type, settings.block_bytes)
        self.plan = plan
        self.tokens, self.blocks = plan.tokens, plan.blocks
        self._memory = torch.empty(plan.longest_block, dtype=self.exact, device=hidden.device)

    def matrix(self, words: slice) -> torch.Tensor:
        """Rows of the matrix in the dtype of the products."""
        return self.weight[words].to(self.products)

    def tile(self, number: int, rows: slice, matrix: torch.Tensor) -> torch.Tensor:
        """The logits of the words of `blocks[number]` at the tokens `rows`, in the memory of the tile before.

        Args:
            number: index of the block.
            rows: one of `tokens`.
            matrix: rows of the matrix for this block (`matrix`).
        """
        hidden = self.hidden[rows].t()
        tile = block_in(self._memory, len(matrix), hidden.shape[1])
        if matrix.dtype == self.exact:
            torch.mm(matrix, hidden, out=tile)
        else:
            tile.copy_(matrix @ hidden)
        if self._bias is not None:
            tile.add_(self._bias[self.blocks[number], None])
        return self._logits(tile)

    def _logits(self, products: torch.Tensor) -> torch.Tensor:
        if self._cap is None:
            return products.mul_(self._scale / self._temperature)
        return products.mul_(self._scale / self._cap).tanh_().mul_(self._cap / self._temperature)

    def _slope(self, tile: torch.Tensor) -> torch.Tensor | float:
        """The derivative of the logits of `tile` by their products: a number without a soft cap."""
        factor = self._scale / self._temperature
        if self._cap is None:
            return factor
        return (tile * (self._temperature / self._cap)).square_().neg_().add_(1).mul_(factor)

    def gradients(
        self,
        wanted: tuple[bool, ...],
        trained: torch.Tensor,
        of_tile: Callable[[torch.Tensor, int, slice], torch.Tensor],
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """What a backward function returns for hidden states, matrix and bias, where they are `wanted`.

        Args:
            wanted: for each of the three.
            trained: the matrix as it was given, whose one gradient buffer is shared (`accumulate_or_claim`).
            of_tile: makes the gradient of the logits of a tile, given the tile, the number of its block and its
                tokens; it may write over the tile.
        """
        hidden, weight, exact = self.hidden, self.weight, self.exact
        into_hidden = torch.zeros_like(hidden, dtype=exact) if wanted[0] else None
        into_weight = torch.empty_like(weight, memory_format=torch.contiguous_format) if wanted[1] else None
        into_bias = torch.zeros(len(weight), dtype=exact, device=weight.device) if wanted[2] else None
        for number, words in enumerate(self.blocks):
            matrix = self.matrix(words)
            into_rows = None
            if into_weight is not None:  # of another dtype it is rounded once, from all tokens
                own = into_weight[words]
                into_rows = own.zero_() if own.dtype == exact else torch.zeros_like(own, dtype=exact)
            for rows in self.tokens:
                tile = self.tile(number, rows, matrix)
                slope = self._slope(tile)
                gradient = of_tile(tile, number, rows).mul_(slope)
                if into_bias is not None:
                    into_bias[words] += gradient.sum(1)
                gradient = gradient.to(self.products)
                if into_hidden is not None:
                    add_product(into_hidden[rows], gradient.t(), matrix)
                if into_rows is not None:
                    add_product(into_rows, gradient, hidden[rows])
            if into_weight is not None and into_rows is not None and into_weight.dtype != exact:
                into_weight[words] = into_rows
        return (
            None if into_hidden is None else self.spread(self._over_all_words(into_hidden).to(self._dtypes[0])),
            None if into_weight is None else accumulate_or_claim(trained, into_weight),
            None if into_bias is None else into_bias.to(self._dtypes[1]),
        )

    def _over_all_words(self, into_hidden: torch.Tensor) -> torch.Tensor:
        """The gradient of the hidden states over the whole vocabulary, of that over the words of `weight`."""
        return into_hidden

    def spread(self, values: torch.Tensor) -> torch.Tensor:
        """Values of the tokens that count, (N, ...), at their places among all; 0 elsewhere."""
        rest = values.shape[1:]
        if self.positions is not None:
            values = values.new_zeros(self.shape.numel(), *rest).index_put_((self.positions,), values)
        return values.view(self.shape + rest)

    def gathered(self, values: torch.Tensor) -> torch.Tensor:
        """Values of the tokens that count, (N, ...) in the exact dtype, of those of all tokens."""
        flat = values.reshape(self.shape.numel(), *values.shape[len(self.shape) :]).to(self.exact)
        return flat if self.positions is None else flat[self.positions]


class LabelledTiles(LogitTiles):
    """The logits of the tokens whose label counts, the label's own in the exact dtype.

    Args:
        hidden: as for `LogitTiles`, like the others but the labels.
        weight: softmax matrix.
        labels: labels, of the shape of the tokens.
        bias: bias.
        settings: what the logits are.
        part: the words that the rows of `weight` are; `None` for all.

    Attributes:
        labels: (N,), int64.
        at_label: (N,), the logit of each label; 0 for a word that another process has.
        part: as given.
        words: V, number of all words.
    """

    def __init__(
        self,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        labels: torch.Tensor,
        bias: torch.Tensor | None,
        settings: LogitSettings,
        part: VocabularyPart | None = None,
    ) -> None:
        flat = labels.reshape(-1)
        super().__init__(hidden, weight, counted_positions(flat, settings.options.ignore_index), bias, settings)
        self.labels = flat if self.positions is None else flat[self.positions]
        self.part, self.words = part, len(weight) if part is None else part.words
        places = self.labels if part is None else part.places(self.labels, len(weight))
        self._targets = {rows.start: targets_by_block(places[rows], self.blocks) for rows in self.tokens}
        if part is None:
            self.at_label = self._at(self.hidden, places)
        else:
            own = (places >= 0).nonzero()[:, 0]
            self.at_label = self.hidden.new_zeros(len(places), dtype=self.exact)
            self.at_label[own] = self._at(self.hidden[own], places[own])

    def _at(self, hidden: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """The logit of row `places[i]` of the matrix at `hidden[i]`, (n,)."""
        rows = self.weight[places].to(self.exact)
        products = torch.bmm(hidden.to(self.exact)[:, None, :], rows[:, :, None]).view(-1)
        return self._logits(products if self._bias is None else products.add_(self._bias[places]))

    def _over_all_words(self, into_hidden: torch.Tensor) -> torch.Tensor:
        return into_hidden if self.part is None else self.part.summed(into_hidden)

    def labels_at(self, number: int, rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """The places of the labels in a tile: rows and columns."""
        return self._targets[rows.start][number]

    def tile(self, number: int, rows: slice, matrix: torch.Tensor) -> torch.Tensor:
        """As in `LogitTiles`, with the labels' logits in the exact dtype, also where products are rounded."""
        tile, at = super().tile(number, rows, matrix), self.labels_at(number, rows)
        tile[at] = self.at_label[rows][at[1]]
        return tile
