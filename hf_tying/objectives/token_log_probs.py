"""`tied_log_probs` of the logits of a forward pass, deferred or whole."""

from collections.abc import Collection

import torch

from ..losses.log_probs import LogProbsRequest, TokenLogProbs, log_probs_of_logits, tied_log_probs
from ..losses.logit_tiles import LogitSettings
from ..losses.options import CrossEntropyOptions
from .deferred_logits import DeferredLogits


def token_log_probs(
    logits: DeferredLogits | torch.Tensor,
    labels: torch.Tensor,
    outputs: Collection[str],
    temperature: float = 1.0,
    head_dtype: torch.dtype | None = None,
) -> TokenLogProbs:
    """Log-probabilities and more of the labels, by tiles where the logits are deferred.

    Args:
        logits: (..., V).
        labels: (...), int64, of the same tokens; -100 is left out.
        outputs: names of `TokenLogProbs`.
        temperature: divisor of the logits. Default 1.
        head_dtype: dtype of the products, where they are deferred. Default `None`: that of the forward pass.
    """
    if isinstance(logits, DeferredLogits) and (operands := logits.operands()) is not None:
        hidden, weight, bias, scale, softcap, context = operands
        with context.restored(grad=False):
            return tied_log_probs(
                hidden, weight, labels, bias, outputs, temperature=temperature, logit_scale=scale,
                logit_softcap=softcap, head_dtype=head_dtype, memory_budget=logits.settings.memory_budget,
            )  # fmt: skip
    if isinstance(logits, DeferredLogits):
        logits = logits.materialize("another operation than a scale and a soft cap")
    request = LogProbsRequest(tuple(outputs), LogitSettings(CrossEntropyOptions(), temperature))
    exact = torch.promote_types(logits.dtype, torch.float32)
    return TokenLogProbs(**log_probs_of_logits(logits.to(exact) / temperature, labels, request))
