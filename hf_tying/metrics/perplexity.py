"""Perplexity from summed negative log-likelihoods and token counts, and two functions that put it in a `Trainer`."""

import math
from collections.abc import Sequence

import datasets
import evaluate
import torch
import torch.nn.functional as F
from transformers import EvalPrediction

_DESCRIPTION = """
Perplexity of a language model: exp of the mean negative log-likelihood per token. The mean is taken over the tokens of
the whole set, never over batches or sequences, so that it does not depend on how the text was cut.
"""

_INPUTS = """
Args:
    negative_log_likelihoods (`list[float]`): one number per sequence, summed over its predicted tokens, in nats.
    token_counts (`list[int]`): how many tokens were predicted in each sequence (for a causal model one less than its
        length; positions with the label -100 are not counted).
Returns:
    perplexity (`float`): exp(loss); `inf` where that overflows.
    loss (`float`): mean negative log-likelihood per token, in nats.
    tokens (`int`): predicted tokens in all.
Examples:
    >>> from hf_tying.metrics import Perplexity
    >>> scores = Perplexity().compute(negative_log_likelihoods=[math.log(4), math.log(4) * 2], token_counts=[1, 2])
    >>> round(scores["perplexity"], 6)
    4.0
"""


class Perplexity(evaluate.Metric):
    """The metric; arguments as for every `evaluate.Metric` (`keep_in_memory=True` writes no cache file)."""

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
    """Score each sequence; made for `Trainer(preprocess_logits_for_metrics=sequence_scores)`.

    The trainer then keeps two numbers per sequence in place of `(length, vocabulary)` logits.

    Args:
        logits (`torch.Tensor`, or a tuple that begins with it): `(batch, length, vocabulary)`, any float dtype.
        labels (`torch.Tensor`): `(batch, length)`; position t is predicted from the logits at t - 1; -100 is left out.

    Returns:
        `torch.Tensor`: `(batch, 2)`, float32: the negative log-likelihood in nats, and the tokens it is summed over.
    """
    logits = logits[0] if isinstance(logits, tuple) else logits
    targets = labels[:, 1:]
    losses = F.cross_entropy(logits[:, :-1].float().transpose(1, 2), targets, ignore_index=-100, reduction="none")
    return torch.stack((losses.sum(dim=1), (targets != -100).sum(dim=1).float()), dim=1)


def perplexity_of(predictions: EvalPrediction) -> dict[str, float | int]:
    """`Trainer(compute_metrics=perplexity_of)`, together with `sequence_scores`.

    Args:
        predictions (`transformers.EvalPrediction`): its `predictions` are the `(sequences, 2)` of `sequence_scores`.

    Returns:
        `dict`: `perplexity`, `loss` and `tokens`, as `Perplexity` gives them.
    """
    scores = predictions.predictions
    return Perplexity(keep_in_memory=True).compute(
        negative_log_likelihoods=scores[:, 0], token_counts=scores[:, 1].astype("int64")
    )


def exp_or_infinity(loss: float) -> float:
    """Perplexity of a mean loss in nats; `inf` where that overflows."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf
