"""Statistics of each token over its logits, from one pass over all tiles.

A token's label is kept apart from all other words, as in `softmax.Logits`: its log-probability is then
`-softplus(log sum over j != t of exp(l_j) - l_t)`, and no digit is lost where the model is sure. Sums over the other
words are relative to the largest of their logits so far.
"""

from dataclasses import dataclass, fields

import torch
from torch.nn.functional import softplus

from .arithmetic import exp_of_difference
from .logit_tiles import LabelledTiles
from .vocabulary_part import VocabularyPart

#: Beyond this difference an exponential is 0 in float64 too; a forbidden word, at minus infinity, counts as this far.
FAR = -1e4
# The sums that an output needs beside the sum of exponentials.
_NEEDED = {"entropy": "weighted", "log_sum_sq_probs": "squares", "mean_logits": "total", "top1": "first"}


@dataclass
class TokenStatistics:
    """Sums over the words other than the label, (N,), in the exact dtype; `None` for one that is not needed.

    Attributes:
        at_label: logit of the label.
        largest: largest logit of the others.
        sum: sum of exp(l - largest).
        weighted: sum of exp(l - largest) * (l - largest).
        squares: sum of exp(2 (l - largest)).
        total: sum of the logits, that of the label included.
        first: int64, the first word whose logit is `largest`.
    """

    at_label: torch.Tensor
    largest: torch.Tensor
    sum: torch.Tensor
    weighted: torch.Tensor | None = None
    squares: torch.Tensor | None = None
    total: torch.Tensor | None = None
    first: torch.Tensor | None = None

    @classmethod
    def of(cls, tiles: LabelledTiles, outputs: tuple[str, ...]) -> "TokenStatistics":
        """The statistics that `outputs`, names of `TokenLogProbs`, need."""
        zeros = torch.zeros_like(tiles.at_label)
        needed = {name: zeros.clone() for output, name in _NEEDED.items() if output in outputs}
        if "first" in needed:
            needed["first"] = needed["first"].long()
        statistics = cls(tiles.at_label, torch.full_like(zeros, -torch.inf), zeros, **needed)
        for number, words in enumerate(tiles.blocks):
            matrix = tiles.matrix(words)
            for rows in tiles.tokens:
                statistics._add(tiles.tile(number, rows, matrix), tiles.labels_at(number, rows), words, rows)
        return statistics if tiles.part is None else statistics._over(tiles.part)

    def _over(self, part: VocabularyPart) -> "TokenStatistics":
        """Those over the words of all processes, of those of this one, by one exchange of them."""
        if self.first is not None:
            self.first += part.start  # as a float32: exact up to 16,777,216 words
        names = [name for name, value in vars(self).items() if value is not None]
        own = torch.stack([vars(self)[name].to(self.sum.dtype) for name in names])
        found = dict(zip(names, part.gathered(own).unbind(1), strict=True))
        largest = found["largest"].amax(0)
        base = largest.masked_fill(largest == -torch.inf, 0.0)
        change = (found["largest"] - base).clamp_(min=FAR)
        merged = {name: value.sum(0) for name, value in found.items() if name in ("at_label", "total")}
        merged |= {"largest": largest, "sum": (change.exp() * found["sum"]).sum(0)}
        if "weighted" in found:
            merged["weighted"] = (change.exp() * (found["weighted"] + change * found["sum"])).sum(0)
        if "squares" in found:
            merged["squares"] = ((2 * change).exp() * found["squares"]).sum(0)
        if "first" in found:
            merged["first"] = found["first"].masked_fill(found["largest"] < largest, torch.inf).amin(0).long()
        return TokenStatistics(**merged)

    def _add(self, tile: torch.Tensor, at: tuple[torch.Tensor, torch.Tensor], words: slice, rows: slice) -> None:
        """Add a tile, whose memory is written over."""
        if self.total is not None:
            self.total[rows] += tile.sum(0)
        tile[at] = -torch.inf
        before = self.largest[rows].clone()
        if self.first is None:
            now = torch.maximum(before, tile.amax(0))
        else:
            here, place = tile.max(0)
            self.first[rows] = torch.where(here > before, place + words.start, self.first[rows])
            now = torch.maximum(before, here)
        base = now.masked_fill(now == -torch.inf, 0.0)  # no other word so far
        change = (before - base).clamp_(min=FAR)
        if self.weighted is None:
            exponentials = exp_of_difference(tile, base)
        else:
            differences = tile.sub_(base).clamp_(min=FAR)
            exponentials = differences.exp()
            self.weighted[rows] = change.exp() * (self.weighted[rows] + change * self.sum[rows])
            self.weighted[rows] += differences.mul_(exponentials).sum(0)
        self.largest[rows] = now
        self.sum[rows] = change.exp() * self.sum[rows] + exponentials.sum(0)
        if self.squares is not None:
            self.squares[rows] = (2 * change).exp() * self.squares[rows] + exponentials.square_().sum(0)

    def tensors(self) -> tuple[torch.Tensor | None, ...]:
        """All fields, in the order of the constructor."""
        return tuple(getattr(self, field.name) for field in fields(self))

    @property
    def odds(self) -> torch.Tensor:
        """Logarithm of the odds of all other words against the label."""
        above = self.at_label.clamp(min=0)
        return self.largest - self.at_label + self.sum.log() + (above - above)  # NaN for a label at infinity

    @property
    def base(self) -> torch.Tensor:
        """Largest of all logits."""
        return torch.maximum(self.largest, self.at_label)

    @property
    def normaliser(self) -> torch.Tensor:
        """Sum of exp(l - base) over all words."""
        return self._others + self._own.exp()

    @property
    def log_normaliser(self) -> torch.Tensor:
        """Logarithm of `normaliser`."""
        sure = self.at_label >= self.largest  # log(1 + others) keeps the digits of small others
        return torch.where(sure, self._others.log1p(), self.normaliser.log())

    @property
    def _change(self) -> torch.Tensor:
        return (self.largest - self.base).clamp(min=FAR)

    @property
    def _own(self) -> torch.Tensor:
        return (self.at_label - self.base).clamp(min=FAR)

    @property
    def _others(self) -> torch.Tensor:
        return self.sum * self._change.exp()

    def log_probs(self) -> torch.Tensor:
        """Log-probability of the label."""
        return -softplus(self.odds, threshold=80)

    def logsumexp(self) -> torch.Tensor:
        """Logarithm of the sum of the exponentials of all logits."""
        return self.base + self.log_normaliser

    def entropy(self) -> torch.Tensor:
        """Entropy of the distribution, in nats; needs `weighted`."""
        weighted = self._change.exp() * (self.weighted + self._change * self.sum) + self._own.exp() * self._own
        return self.log_normaliser - weighted / self.normaliser

    def log_sum_sq_probs(self) -> torch.Tensor:
        """Logarithm of the sum of the squared probabilities; needs `squares`."""
        return (self.squares * (2 * self._change).exp() + (2 * self._own).exp()).log() - 2 * self.log_normaliser
