"""Distillation for autograd, by tiles: the divergence of two softmaxes, and the logits of a few words beside the rest.

In the forward pass each tile is computed twice: for the normalisers, then for the divergence. The backward pass
computes it once more. No tile outlives its turn, so the memory is the same for any number of tokens.
"""

from dataclasses import dataclass
from typing import Any

import torch

from .chunks import targets_by_block
from .divergences import divergence_terms, finite
from .gradient import refuse_double_backward
from .logit_tiles import LogitSettings, LogitTiles

_INSTEAD = "torch.log_softmax of whole logits"


@dataclass(frozen=True)
class Softmaxes:
    """A teacher, and what the logits of both sides are.

    Attributes:
        hidden: (..., D'), hidden states of the teacher.
        weight: (V, D'), its softmax matrix.
        bias: (V,), or `None`.
        settings: its logits.
        student: the student's logits.
        divergence: one of `DIVERGENCES`.
    """

    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    settings: LogitSettings
    student: LogitSettings
    divergence: str


def walked_divergence(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    positions: torch.Tensor | None,
    softmaxes: Softmaxes,
) -> torch.Tensor:
    """The divergence at each token, of the shape of the tokens, and 0 for those that do not count.

    Args:
        hidden: (..., D), hidden states of the student.
        weight: (V, D), its softmax matrix.
        bias: (V,), or `None`.
        positions: places of the tokens that count (`counted_positions`).
        softmaxes: the rest.
    """
    return _Divergence.apply(hidden, weight, bias, positions, softmaxes)


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        positions: torch.Tensor | None,
        both: Softmaxes,
    ) -> torch.Tensor:
        ctx.both, ctx.weight = both, weight
        pair = _Pair(hidden, weight, bias, positions, both)
        total, pull = pair.sums()
        # Those of the teacher are saved to be checked: an error if they are written to before the backward pass.
        teacher = both.hidden, both.weight, both.bias
        ctx.save_for_backward(hidden, weight, bias, positions, pull, *pair.normalisers, *teacher)
        return pair.student.spread(total)

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        refuse_double_backward("tied_distillation", _INSTEAD, upstream)
        hidden, weight, bias, positions, pull, ours, theirs, *_ = ctx.saved_tensors
        pair = _Pair(hidden, weight, bias, positions, ctx.both, (ours, theirs))
        upstream = pair.student.gathered(upstream)
        return (*pair.gradients(upstream, pull, ctx.needs_input_grad[:3], ctx.weight), None, None)


class _Pair:
    """The tiles of both sides, cut alike, and the logarithms of their normalisers."""

    def __init__(
        self,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        positions: torch.Tensor | None,
        both: Softmaxes,
        normalisers: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> None:
        self.divergence = both.divergence
        self.student = LogitTiles(hidden, weight, positions, bias, both.student)
        self.teacher = LogitTiles(both.hidden, both.weight, positions, both.bias, both.settings, self.student.plan)
        if normalisers is None:
            normalisers = _log_normaliser(self.student), _log_normaliser(self.teacher)
        self.normalisers = normalisers

    def _log_probs(self, student: torch.Tensor, teacher: torch.Tensor, rows: slice) -> tuple[torch.Tensor, ...]:
        """Of the teacher and of the student, of a tile, in the student's exact dtype."""
        log_q, log_p = student.sub_(self.normalisers[0][rows]), teacher.sub_(self.normalisers[1][rows])
        return finite(log_p.to(log_q.dtype)), finite(log_q)

    def sums(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The divergence of each token, and the sum of `pull` (`divergence_terms`)."""
        total = torch.zeros_like(self.normalisers[0])
        pull = torch.zeros_like(total)
        for number, words in enumerate(self.student.blocks):
            ours, theirs = self.student.matrix(words), self.teacher.matrix(words)
            for rows in self.student.tokens:
                tiles = self.student.tile(number, rows, ours), self.teacher.tile(number, rows, theirs)
                terms, pulls = divergence_terms(self.divergence, *self._log_probs(*tiles, rows))
                total[rows] += terms.sum(0)
                pull[rows] += pulls.sum(0)
        return total, pull

    def gradients(
        self, upstream: torch.Tensor, pull: torch.Tensor, wanted: tuple[bool, ...], trained: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        """The gradients of the student's hidden states, matrix and bias."""

        def of_tile(tile: torch.Tensor, number: int, rows: slice) -> torch.Tensor:
            theirs = self.teacher.tile(number, rows, self.teacher.matrix(self.teacher.blocks[number]))
            log_p, log_q = self._log_probs(tile, theirs, rows)
            pulls = divergence_terms(self.divergence, log_p, log_q)[1]
            return pulls.addcmul_(log_q.exp_(), pull[rows], value=-1).mul_(upstream[rows])

        return self.student.gradients(wanted, trained, of_tile)


def _log_normaliser(tiles: LogitTiles) -> torch.Tensor:
    """Logarithm of the sum of the exponentials of all logits, (N,)."""
    found = torch.full((len(tiles.hidden),), -torch.inf, dtype=tiles.exact, device=tiles.hidden.device)
    for number, words in enumerate(tiles.blocks):
        matrix = tiles.matrix(words)
        for rows in tiles.tokens:
            found[rows] = torch.logaddexp(found[rows], tiles.tile(number, rows, matrix).logsumexp(0))
    return found


# --- a few words of each token, beside the rest ---------------------------------------------------------------------


def collapsed_logits(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    positions: torch.Tensor | None,
    ids: torch.Tensor,
    settings: LogitSettings,
) -> torch.Tensor:
    """The logits of k words of each token, and last the logarithm of the sum of the exponentials of all others.

    Args:
        hidden: (..., D).
        weight: (V, D).
        bias: (V,), or `None`.
        positions: places of the tokens that count (`counted_positions`).
        ids: (N, k), the words of each token that counts, none twice.
        settings: what the logits are.

    Returns:
        (N, k + 1), in the exact dtype: in effect the logits of a vocabulary in which all other words are one.
    """
    return _CollapsedLogits.apply(hidden, weight, bias, positions, ids, settings)


class _CollapsedLogits(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        positions: torch.Tensor | None,
        ids: torch.Tensor,
        settings: LogitSettings,
    ) -> torch.Tensor:
        ctx.settings, ctx.weight = settings, weight
        tiles = LogitTiles(hidden, weight, positions, bias, settings)
        places = _places(ids, tiles)
        found = torch.empty(len(ids), ids.shape[1] + 1, dtype=tiles.exact, device=hidden.device)
        found[:, -1] = -torch.inf
        for number, words in enumerate(tiles.blocks):
            matrix = tiles.matrix(words)
            for rows in tiles.tokens:
                tile, (at, token, slot) = tiles.tile(number, rows, matrix), places[rows.start][number]
                part = found[rows]
                part[token, slot] = tile[at, token]
                tile[at, token] = -torch.inf
                part[:, -1] = torch.logaddexp(part[:, -1], tile.logsumexp(0))
        ctx.save_for_backward(hidden, weight, bias, positions, ids, found[:, -1].clone())
        return found

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        refuse_double_backward("top_k_distillation", _INSTEAD, upstream)
        hidden, weight, bias, positions, ids, rest = ctx.saved_tensors
        tiles = LogitTiles(hidden, weight, positions, bias, ctx.settings)
        places, rest = _places(ids, tiles), finite(rest)

        def of_tile(tile: torch.Tensor, number: int, rows: slice) -> torch.Tensor:
            at, token, slot = places[rows.start][number]
            gradient = tile.sub_(rest[rows]).exp_().mul_(upstream[rows, -1])
            gradient[at, token] = upstream[rows][token, slot]
            return gradient

        return (*tiles.gradients(ctx.needs_input_grad[:3], ctx.weight, of_tile), None, None, None)


def _places(ids: torch.Tensor, tiles: LogitTiles) -> dict[int, list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]]:
    """For each chunk of tokens and each block: the rows in the tile, the tokens, and which of the k words it is."""
    k = ids.shape[1]
    return {
        rows.start: [(at, flat // k, flat % k) for at, flat in targets_by_block(ids[rows].reshape(-1), tiles.blocks)]
        for rows in tiles.tokens
    }


def most_likely(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    positions: torch.Tensor | None,
    k: int,
    settings: LogitSettings,
) -> torch.Tensor:
    """The k words of the largest logits of each token that counts, (N, k)."""
    tiles = LogitTiles(hidden, weight, positions, bias, settings)
    best: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    for number, words in enumerate(tiles.blocks):
        matrix = tiles.matrix(words)
        for rows in tiles.tokens:
            values, ids = tiles.tile(number, rows, matrix).topk(min(k, len(matrix)), 0)
            ids += words.start
            if rows.start in best:
                before, earlier = best[rows.start]
                values, order = torch.cat([before, values]).topk(min(k, len(before) + len(values)), 0)
                ids = torch.cat([earlier, ids]).gather(0, order)
            best[rows.start] = values, ids
    if not best:
        return torch.empty(0, k, dtype=torch.int64, device=hidden.device)
    return torch.cat([best[rows.start][1] for rows in tiles.tokens], 1).t().contiguous()
