"""Perplexity from summed negative log-likelihoods and token counts, and two functions that give it to a `Trainer`."""

import math
from collections.abc import Sequence

import datasets
import evaluate
import torch
import torch.nn.functional as F
from transformers import EvalPrediction

_DESCRIPTION = """
Perplexity of a language model: exp of the mean negative log-likelihood per token. The mean is taken over the tokens of
the whole set, not over batches or sequences, so it does not depend on how the text is cut.
"""

_INPUTS = """
Args:
    negative_log_likelihoods (`list[float]`): sum over the predicted tokens of each sequence, in nats.
    token_counts (`list[int]`): number of predicted tokens of each sequence (for a causal model, one less than its
        length; positions with the label -100 are not counted).
Returns:
    perplexity (`float`): exp(loss); `inf` if that overflows.
    loss (`float`): mean negative log-likelihood per token, in nats.
    tokens (`int`): number of predicted tokens in all sequences.
Examples:
    >>> from hf_tying.metrics import Perplexity
    >>> scores = Perplexity().compute(negative_log_likelihoods=[math.log(4), math.log(4) * 2], token_counts=[1, 2])
    >>> round(scores["perplexity"], 6)
    4.0
"""


class Perplexity(evaluate.Metric):
    """Perplexity of a language model. Arguments are those of any `evaluate.Metric`, such as `keep_in_memory=True`."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features(
                {
                    "negative_log_likelihoods": datasets.Value("float64"),
                    "token_counts": datasets.Value("int64"),
                }
            ),
        )

    def _compute(
        self, negative_log_likelihoods: Sequence[float], token_counts: Sequence[int]
    ) -> dict[str, float | int]:
        tokens = int(sum(token_counts))
        if tokens <= 0:
            raise ValueError(
                f"Perplexity of {tokens} tokens: expected at least one. Is every label -100, or is every sequence one "
                "token long?"
            )
        loss = math.fsum(negative_log_likelihoods) / tokens
        return {"perplexity": exp_or_infinity(loss), "loss": loss, "tokens": tokens}


def sequence_scores(logits: torch.Tensor | tuple[torch.Tensor, ...], labels: torch.Tensor) -> torch.Tensor:
    """Score each sequence. Use it as `Trainer(preprocess_logits_for_metrics=sequence_scores)`.

    The trainer then keeps two numbers per sequence in place of `(length, vocabulary)` logits.

    Args:
        logits (`torch.Tensor`, or a tuple that begins with it): `(batch, length, vocabulary)`, any float dtype.
        labels (`torch.Tensor`): `(batch, length)`, int64. The label at t is predicted by the logits at t - 1; -100 is
            left out.

    Returns:
        `torch.Tensor`: `(batch, 2)`, float32: the negative log-likelihood in nats, and the number of its tokens.
    """
    logits = logits[0] if isinstance(logits, tuple) else logits
    targets = labels[:, 1:]
    losses = F.cross_entropy(logits[:, :-1].float().transpose(1, 2), targets, ignore_index=-100, reduction="none")
    return torch.stack((losses.sum(dim=1), (targets != -100).sum(dim=1).float()), dim=1)


def perplexity_of(predictions: EvalPrediction) -> dict[str, float | int]:
    """Compute perplexity in a `Trainer`: `Trainer(compute_metrics=perplexity_of)`, together with `sequence_scores`.

    Args:
        predictions (`transformers.EvalPrediction`): scores of `sequence_scores` as its `predictions`,
            `(sequences, 2)`.

    Returns:
        `dict`: `perplexity`, `loss` and `tokens`, as `Perplexity` computes them.
    """
    scores = predictions.predictions
    return Perplexity(keep_in_memory=True).compute(
        negative_log_likelihoods=scores[:, 0], token_counts=scores[:, 1].astype("int64")
    )


def exp_or_infinity(loss: float) -> float:
    """Perplexity of a mean loss in nats; `inf` if it overflows."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf
