"""The loss by Apple's cut cross entropy, in the version that leaves nothing out."""

from collections.abc import Iterator

import torch

from .autograd import tied_path
from .kernel_libraries import (
    KernelLibrary,
    any_label_counts,
    float64_refusal,
    kernel_operands,
    library_function,
    mean_of_sum,
    with_backward_guard,
)
from .options import CrossEntropyOptions

# Largest number of words in a block of its kernels.
_MOST_WORDS = 256


def _compute(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    bias: torch.Tensor | None,
    options: CrossEntropyOptions,
    memory_budget: int | None = None,
) -> torch.Tensor:
    if not any_label_counts(labels, options):
        return tied_path(hidden, weight, labels, bias, options, memory_budget)
    hidden, weight, _ = kernel_operands(hidden, weight, None, options)
    flat, classes = labels.reshape(-1), options.class_weight
    with torch.autocast(hidden.device.type, enabled=False):
        loss = library_function(CCE)(
            hidden,
            weight,
            flat,
            ignore_index=options.ignore_index,
            softcap=None if options.logit_softcap is None else float(options.logit_softcap),
            # Never its mean, which can be NaN or another mean. The division costs nothing here.
            reduction="sum" if options.reduction != "none" and classes is None else "none",
            # No gradient is filtered out by its size, and both gradients are summed in float32.
            impl="cce_exact",
        )
        loss = with_backward_guard(loss, "cce", once=False)
        if classes is not None:
            loss = loss * classes.float()[flat.masked_fill(flat == options.ignore_index, 0)]
        if options.reduction == "none":
            return loss.view(labels.shape)
        loss = loss.sum()
    return mean_of_sum(loss, labels, options) if options.reduction == "mean" else loss


def _refusals(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, options: CrossEntropyOptions
) -> Iterator[str]:
    yield from float64_refusal(hidden, weight)
    if bias is not None:
        yield "bias (25.6.4 counts it once for every 256 columns of the matrix)"
    if options.label_smoothing:
        yield "label_smoothing (it has none)"
    if options.logit_softcap is not None and len(weight) % _MOST_WORDS:
        yield (
            f"logit_softcap and {len(weight)} words, not a multiple of {_MOST_WORDS} (where the last block ends after "
            "the vocabulary, its kernel caps the absent logits from minus infinity to -logit_softcap, and counts them)"
        )


CCE = KernelLibrary(
    backend="cce",
    package="cut-cross-entropy",
    install="'cut-cross-entropy @ git+https://github.com/apple/ml-cross-entropy.git'",
    module="cut_cross_entropy",
    function="linear_cross_entropy",
    least="25.6.4",
    # Measured with the 25.1.1 of PyPI in Triton's interpreter, float16, D 64, V 20,000: the gradient of hidden
    # is off by 10 times the rounding of its dtype (2.0e-3 of its norm), growing with V; 25.6.4: 1.04 times.
    why_not_older="older ones sum gradients in half precision, or make none in float32",
    refusals=_refusals,
    compute=_compute,
)
