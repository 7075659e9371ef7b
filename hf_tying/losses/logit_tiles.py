"""Logits tile by tile, for outputs of each token whose upstream gradients are not known before the backward pass."""

from dataclasses import dataclass

import torch

from .arithmetic import compute_dtypes
from .chunks import plan_tiles, targets_by_block
from .options import CrossEntropyOptions
from .pending_gradients import counted_positions


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


class LogitTiles:
    """The logits of the tokens whose label counts, in tiles of shape (words, tokens), in the exact dtype.

    Args:
        hidden: hidden states, as for `tied_log_probs`; checked (`check_operands`), like the next three.
        weight: softmax matrix.
        labels: labels.
        bias: bias.
        settings: what the logits are.

    Attributes:
        hidden: (N, D), the hidden states of the tokens that count, in the dtype of the products.
        weight: (V, D), without gradient.
        labels: (N,), int64.
        positions: (N,), places of these tokens among all; `None` if all count.
        at_label: (N,), the logit of each label.
        exact: dtype of logits and sums, float32 or float64.
        tokens, blocks: slices of the tokens and of the words.
    """

    def __init__(
        self,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        labels: torch.Tensor,
        bias: torch.Tensor | None,
        settings: LogitSettings,
    ) -> None:
        self.products, self.exact = compute_dtypes(hidden, weight)
        if settings.head_dtype is not None:
            self.products, self.exact = settings.head_dtype, torch.promote_types(torch.float32, settings.head_dtype)
        self.given, self.shape, self.weight = hidden, labels.shape, weight.detach()
        flat, self.labels = hidden.detach().reshape(-1, hidden.shape[-1]), labels.reshape(-1)
        self.positions = counted_positions(self.labels, settings.options.ignore_index)
        if self.positions is not None:
            flat, self.labels = flat[self.positions], self.labels[self.positions]
        self.hidden = flat.to(self.products)
        self._bias = None if bias is None else bias.detach().to(self.exact)
        cap, scale = settings.options.logit_softcap, settings.options.logit_scale
        self._cap = None if cap is None else float(cap)
        self._scale, self._temperature = 1.0 if scale is None else float(scale), settings.temperature
        plan = plan_tiles(len(flat), len(weight), self.exact.itemsize, hidden.device.type, settings.block_bytes)
        self.tokens, self.blocks = plan.tokens, plan.blocks
        self._targets = {rows.start: targets_by_block(self.labels[rows], plan.blocks) for rows in plan.tokens}
        self._memory = torch.empty(plan.longest_block, dtype=self.exact, device=hidden.device)
        rows = self.weight[self.labels].to(self.exact)
        products = torch.bmm(self.hidden.to(self.exact)[:, None, :], rows[:, :, None]).view(-1)
        self.at_label = self._logits(products if self._bias is None else products.add_(self._bias[self.labels]))

    def matrix(self, words: slice) -> torch.Tensor:
        """Rows of the matrix in the dtype of the products."""
        return self.weight[words].to(self.products)

    def tile(
        self, number: int, rows: slice, matrix: torch.Tensor
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
        """The logits of the words of `blocks[number]` at the tokens `rows`, in the memory of the tile before.

        Args:
            number: index of the block.
            rows: one of `tokens`.
            matrix: rows of the matrix for this block (`matrix`).

        Returns:
            The tile, and the places of the labels in it: rows and columns.
        """
        hidden = self.hidden[rows].t()
        tile = self._memory[: len(matrix) * hidden.shape[1]].view(len(matrix), -1)
        if matrix.dtype == self.exact:
            torch.mm(matrix, hidden, out=tile)
        else:
            tile.copy_(matrix @ hidden)
        if self._bias is not None:
            tile.add_(self._bias[self.blocks[number], None])
        at = self._targets[rows.start][number]
        self._logits(tile)[at] = self.at_label[rows][at[1]]  # in the exact dtype, also where products are rounded
        return tile, at

    def _logits(self, products: torch.Tensor) -> torch.Tensor:
        if self._cap is None:
            return products.mul_(self._scale / self._temperature)
        return products.mul_(self._scale / self._cap).tanh_().mul_(self._cap / self._temperature)

    def slope(self, tile: torch.Tensor) -> torch.Tensor | float:
        """The derivative of the logits of `tile` by their products: a number without a soft cap."""
        factor = self._scale / self._temperature
        if self._cap is None:
            return factor
        return (tile * (self._temperature / self._cap)).square_().neg_().add_(1).mul_(factor)

    def spread(self, values: torch.Tensor) -> torch.Tensor:
        """Values of the tokens that count, (N, ...), at their places among all; 0 elsewhere."""
        rest = values.shape[1:]
        if self.positions is not None:
            values = values.new_zeros(self.shape.numel(), *rest).index_put_((self.positions,), values)
        return values.view(self.shape + rest)

    def gathered(self, values: torch.Tensor) -> torch.Tensor:
        """Values of the tokens that count, (N,) in the exact dtype, of those of all tokens."""
        flat = values.reshape(-1).to(self.exact)
        return flat if self.positions is None else flat[self.positions]
