"""`tied_log_probs`: what post-training asks of each token, from hidden states and the softmax matrix."""

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace

import torch

from .arithmetic import compute_dtypes, without_autocast
from .compilation import untraced
from .gradient import is_plain, is_transformed
from .log_probs_autograd import LogProbsRequest, walked_log_probs
from .logit_tiles import LogitSettings
from .options import CrossEntropyOptions, check_operands, check_temperature, is_learned, with_learned_scale
from .vocabulary_part import is_split_vocabulary, own_part, whole

OUTPUTS = ("log_probs", "entropy", "top1", "logsumexp", "mean_logits", "log_sum_sq_probs")


@dataclass(frozen=True)
class TokenLogProbs:
    """What `tied_log_probs` returns: tensors of the shape of the labels, and `None` for what was not asked for.

    All are in float32, or in float64 for float64 inputs, but for `top1`. Where the label is ignored all are 0.

    Attributes:
        log_probs: natural logarithm of the probability of the label.
        entropy: entropy of the whole distribution, in nats.
        top1: bool, whether the label is the most likely word. Among equal words the first one is, as for `argmax`.
        logsumexp: logarithm of the sum of the exponentials of all logits.
        mean_logits: mean of all logits.
        log_sum_sq_probs: logarithm of the sum of the squared probabilities; no gradient flows through it.
    """

    log_probs: torch.Tensor | None = None
    entropy: torch.Tensor | None = None
    top1: torch.Tensor | None = None
    logsumexp: torch.Tensor | None = None
    mean_logits: torch.Tensor | None = None
    log_sum_sq_probs: torch.Tensor | None = None


def tied_log_probs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    bias: torch.Tensor | None = None,
    outputs: Collection[str] = ("log_probs", "entropy", "top1", "logsumexp"),
    *,
    temperature: float = 1.0,
    logit_scale: float | torch.Tensor | None = None,
    logit_softcap: float | None = None,
    ignore_index: int = -100,
    head_dtype: torch.dtype | None = None,
    memory_budget: int | None = None,
) -> TokenLogProbs:
    """Log-probability, entropy, and more of each token, without the (N, V) logits.

    The logits are `softcap(logit_scale * (hidden @ weight.T + bias)) / temperature`, in this order, which is that of
    the models and of the trainers that sample with a temperature. They are computed block by block, once in the
    forward pass and once more in the backward pass. Alive at a time are one block of them, the hidden states' gradient
    in float32, and one V x D gradient, into which `tied_embedding` of the same `weight` adds its rows
    (`hf_tying.losses.gradient`). Tokens whose label is ignored take part in no matrix product.

    Args:
        hidden: (..., D), floating point; no shift is made: `hidden[i]` predicts `labels[i]`.
        weight: (V, D), of the dtype of `hidden`, or any under autocast or with `head_dtype`. A DTensor whose rows are
            split over processes, as transformers' tensor parallelism makes it, is not gathered: the processes, which
            have the same tokens and call this together, exchange three to seven numbers a token.
        labels: hidden.shape[:-1], int64: words from 0 to V - 1, or `ignore_index`.
        bias: (V,), floating point.
        outputs: names of the fields of `TokenLogProbs` to compute. Default: the first four. Each costs a little at
            each logit: `("log_probs",)` where nothing else is read. `log_probs`, `entropy`, `logsumexp` and
            `mean_logits` are differentiable.
        temperature: number above 0 by which the logits are divided. Default 1.
        logit_scale: factor of the products (Cohere; 1 / logits_scaling in Granite). Default 1. It may be learned: a
            tensor of one element gets its gradient.
        logit_softcap: the cap of `cap * tanh(logits / cap)`, after the scale (Gemma 2, section 2). Default: none.
        ignore_index: labels of this value give 0, and no gradient. Default -100, as everywhere in transformers.
        head_dtype: dtype of the matrix products. With `torch.float32` a bfloat16 matrix is converted block by block,
            never whole. Default: that of `hidden`, or of autocast.
        memory_budget: most bytes of one block of logits. Default: 4 MiB on a CPU, whose cache holds it, else 64 MiB.

    Returns:
        `TokenLogProbs`.

    Raises:
        IndexError: for a label outside the vocabulary.
        ValueError: for an unknown output, none at all, a temperature not above 0, labels of another shape, and a soft
            cap or a temperature that requires a gradient.
        RuntimeError: for mixed dtypes or devices, a bias of another length, `hidden` and `weight` of different width,
            in the backward pass for `create_graph=True`, and for a split matrix with other tokens on each process, a
            trained bias that is not split, or a bias beside a learned scale.

    Example (the reference, see `reference_log_probs`):
        >>> log_probs = torch.log_softmax((hidden @ weight.T).float() / temperature, dim=-1)
        >>> log_probs.gather(-1, labels[..., None])[..., 0], -(log_probs.exp() * log_probs).sum(-1)
    """
    outputs, temperature = _checked_outputs(outputs), check_temperature(temperature)
    options = CrossEntropyOptions(ignore_index, logit_scale=logit_scale, logit_softcap=logit_softcap)
    request = LogProbsRequest(outputs, LogitSettings(options, temperature, head_dtype, memory_budget))
    return _log_probs(hidden, weight, labels, bias, request)


@untraced
def _log_probs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    bias: torch.Tensor | None,
    request: LogProbsRequest,
) -> TokenLogProbs:
    settings, device = request.settings, hidden.device.type
    split = is_split_vocabulary(weight)
    if split:
        hidden, labels = whole("hidden", hidden), whole("labels", labels)
    check_operands(hidden, weight, labels, bias, settings.options, one_dtype=settings.head_dtype is None)
    if split:
        if bias is not None and is_learned(settings.options.logit_scale):
            raise RuntimeError(
                "The matrix is split over the vocabulary, and a learned logit_scale beside a bias would get another "
                "gradient on each process: expected logit_scale.detach(), or no bias."
            )
        if is_transformed():
            raise RuntimeError(
                "The matrix is split over the vocabulary, which no transform (torch.func, forward-mode AD, a trace) "
                "knows of: expected the whole matrix, weight.full_tensor()."
            )
        weight, bias, part = own_part(weight, bias)
        part.check_same(labels)
        request = replace(request, part=part)
    hidden, bias, options = with_learned_scale(hidden, weight, bias, settings.options, settings.head_dtype)
    compute = walked_log_probs if is_plain(hidden) and is_plain(weight) else reference_log_probs
    products, _ = compute_dtypes(hidden, weight, settings.head_dtype)
    request = replace(request, settings=replace(settings, options=options, head_dtype=products))
    with without_autocast(device):  # what is exact stays so
        return TokenLogProbs(**compute(hidden, weight, labels, bias, request))


def reference_log_probs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    bias: torch.Tensor | None,
    request: LogProbsRequest,
) -> dict[str, torch.Tensor]:
    """The outputs of `request` by name in plain torch, the logits whole; for transformed and sharded tensors."""
    return log_probs_of_logits(request.settings.whole(hidden, weight, bias), labels, request)


def log_probs_of_logits(
    logits: torch.Tensor, labels: torch.Tensor, request: LogProbsRequest
) -> dict[str, torch.Tensor]:
    """The outputs of `request` by name, of logits (..., V) over the temperature."""
    counted = labels != request.settings.options.ignore_index
    places = labels.masked_fill(~counted, 0)[..., None]
    log_probs = logits.log_softmax(-1)
    compute: dict[str, Callable[[], torch.Tensor]] = {
        "log_probs": lambda: log_probs.gather(-1, places)[..., 0],
        # Of a word that is forbidden the product is 0, and so is its gradient.
        "entropy": lambda: -(log_probs.exp() * log_probs.clamp(min=torch.finfo(logits.dtype).min)).sum(-1),
        "top1": lambda: logits.argmax(-1) == places[..., 0],
        "logsumexp": lambda: logits.logsumexp(-1),
        "mean_logits": lambda: logits.mean(-1),
        "log_sum_sq_probs": lambda: (2 * log_probs.detach()).logsumexp(-1),
    }
    return {name: torch.where(counted, found := compute[name](), torch.zeros_like(found)) for name in request.outputs}


def _checked_outputs(outputs: Collection[str]) -> tuple[str, ...]:
    names = (outputs,) if isinstance(outputs, str) else tuple(outputs)
    unknown = [name for name in names if name not in OUTPUTS]
    if unknown or not names:
        raise ValueError(f"outputs={outputs!r}: expected one or more of {', '.join(OUTPUTS)}.")
    return names
