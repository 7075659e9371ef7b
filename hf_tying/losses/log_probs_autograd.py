"""`tied_log_probs` for autograd: statistics in the forward pass, gradients by the same logits in the backward pass."""

from dataclasses import dataclass
from typing import Any

import torch

from .arithmetic import exp_of_difference
from .gradient import refuse_double_backward
from .logit_tiles import LabelledTiles, LogitSettings
from .token_statistics import FAR, TokenStatistics
from .vocabulary_part import VocabularyPart


@dataclass(frozen=True)
class LogProbsRequest:
    """Names of the outputs (fields of `TokenLogProbs`), what the logits are, and whose words, where they are split."""

    outputs: tuple[str, ...]
    settings: LogitSettings
    part: VocabularyPart | None = None


def walked_log_probs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    bias: torch.Tensor | None,
    request: LogProbsRequest,
) -> dict[str, torch.Tensor]:
    """The outputs of `request` by name, each of the shape of `labels`, without the whole logits."""
    return dict(zip(request.outputs, _TiedLogProbs.apply(hidden, weight, bias, labels, request), strict=True))


class _TiedLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        labels: torch.Tensor,
        request: LogProbsRequest,
    ) -> tuple[torch.Tensor, ...]:
        ctx.set_materialize_grads(False)
        tiles = LabelledTiles(hidden, weight, labels, bias, request.settings, request.part)
        statistics = TokenStatistics.of(tiles, request.outputs)
        ctx.request, ctx.weight = request, weight
        ctx.save_for_backward(hidden, weight, bias, labels, *statistics.tensors())
        outputs = {name: tiles.spread(_output(name, statistics, tiles)) for name in request.outputs}
        ctx.mark_non_differentiable(*(outputs[name] for name in outputs if name not in _DIFFERENTIABLE))
        return tuple(outputs.values())

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        pairs = zip(ctx.request.outputs, upstream, strict=True)
        given = {name: gradient for name, gradient in pairs if gradient is not None and name in _DIFFERENTIABLE}
        if not given:
            return None, None, None, None, None
        for gradient in given.values():
            refuse_double_backward("tied_log_probs", "torch.log_softmax of whole logits", gradient)
        hidden, weight, bias, labels, *statistics = ctx.saved_tensors
        tiles = LabelledTiles(hidden, weight, labels, bias, ctx.request.settings, ctx.request.part)
        given = {name: tiles.gathered(gradient) for name, gradient in given.items()}
        wanted = ctx.needs_input_grad[:3]
        return (*_gradients(tiles, TokenStatistics(*statistics), wanted, ctx.weight, **given), None, None)


_DIFFERENTIABLE = ("log_probs", "entropy", "logsumexp", "mean_logits")


def _output(name: str, statistics: TokenStatistics, tiles: LabelledTiles) -> torch.Tensor:
    label = statistics.at_label
    if name == "top1":
        assert statistics.first is not None
        return (label > statistics.largest) | (label == statistics.largest) & (tiles.labels < statistics.first)
    if name == "mean_logits":
        return statistics.total / tiles.words
    return getattr(statistics, name)()


def _gradients(
    tiles: LabelledTiles,
    statistics: TokenStatistics,
    wanted: tuple[bool, bool, bool],
    trained: torch.Tensor,
    log_probs: torch.Tensor | None = None,
    entropy: torch.Tensor | None = None,
    logsumexp: torch.Tensor | None = None,
    mean_logits: torch.Tensor | None = None,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """The gradients of hidden states, matrix and bias, where they are `wanted` (`LogitTiles.gradients`).

    A logit `l_j` of probability `p_j` gets `p_j * (constant - entropy * (l_j - base))`, and that of the label
    `log_probs` more.

    Args:
        tiles: logits.
        statistics: their statistics.
        wanted: for each of the three.
        trained: the matrix.
        log_probs: (N,), upstream gradient of this output; `None` where there is none.
        entropy: the same for the entropy.
        logsumexp: the same for the logarithm of the sum.
        mean_logits: the same for the mean; each logit gets an equal share of it.
    """
    base, odds, probability = statistics.base, statistics.odds, statistics.log_probs().exp()
    constant, at_label = torch.zeros_like(base), torch.zeros_like(base)
    if logsumexp is not None:
        constant, at_label = logsumexp, logsumexp * probability
    if log_probs is not None:
        # At the label 1 - p is what the odds say; a difference would lose its digits.
        constant, at_label = constant - log_probs, at_label + log_probs * odds.sigmoid()
    if entropy is not None:
        whole = statistics.entropy()
        constant = constant + entropy * (statistics.log_normaliser - whole)
        at_label = at_label - entropy * probability * (statistics.log_probs().clamp(min=FAR) + whole)
    share = 1 / statistics.normaliser

    def of_tile(tile: torch.Tensor, number: int, rows: slice) -> torch.Tensor:
        if entropy is None:
            gradient = exp_of_difference(tile, base[rows]).mul_(constant[rows] * share[rows])
        else:
            differences = tile.sub_(base[rows]).clamp_(min=FAR)
            gradient = differences.exp().mul_(share[rows])
            gradient.mul_(differences.mul_(-entropy[rows]).add_(constant[rows]))
        at = tiles.labels_at(number, rows)
        gradient[at] = at_label[rows][at[1]]
        return gradient if mean_logits is None else gradient.add_(mean_logits[rows], alpha=1 / tiles.words)

    return tiles.gradients(wanted, trained, of_tile)
