"""The loss by Liger's fused linear cross entropy, which makes its gradients in the forward pass."""

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
    hidden, weight, bias = kernel_operands(hidden, weight, bias, options)
    # It makes gradients if and only if `hidden` requires one. Without that, the matrix above a frozen body would not
    # be trained; with it, an evaluation would cost a training step.
    trained = any(tensor is not None and tensor.requires_grad for tensor in (hidden, weight, bias))
    if not (trained and torch.is_grad_enabled()):
        hidden = hidden.detach()
    elif not hidden.requires_grad:
        hidden = hidden.detach().requires_grad_()
    reduction = options.reduction
    if reduction == "mean" and not _is_plain_mean(hidden, options):
        reduction = "sum"
    with torch.autocast(hidden.device.type, enabled=False):
        loss = library_function(LIGER)(
            input=hidden,
            weight=weight,
            target=labels.reshape(-1),
            bias=bias,
            # Its sums over classes are in the dtype of the weights.
            ce_weight=None if options.class_weight is None else options.class_weight.float(),
            ignore_index=options.ignore_index,
            label_smoothing=float(options.label_smoothing),
            reduction=reduction,
            softcap=None if options.logit_softcap is None else float(options.logit_softcap),
            accum_dtype=torch.float32,
        )
    # Each backward pass multiplies the one gradient it has made in place: a second one would be wrong.
    loss = with_backward_guard(loss, "liger", once=reduction != "none")
    if options.reduction == "none":
        return loss.view(labels.shape)
    return mean_of_sum(loss, labels, options) if reduction != options.reduction else loss


def _is_plain_mean(hidden: torch.Tensor, options: CrossEntropyOptions) -> bool:
    """Whether Liger's own mean can be used. It divides the gradient of each logit, which is too small for float16."""
    return options.num_items_in_batch is None and options.class_weight is None and hidden.dtype != torch.float16


LIGER = KernelLibrary(
    backend="liger",
    package="liger-kernel",
    install="'liger-kernel>=0.8.4'",
    module="liger_kernel.transformers.functional",
    function="liger_fused_linear_cross_entropy",
    least="0.8.4",
    # In the same interpreter, 37 words and a cap of 2: the loss of 0.8.2 and of 0.8.3 is off by 1 %, of 0.8.4 not.
    # 0.8.1 (read) multiplies the gradients of all tokens by what comes back for the first.
    why_not_older=(
        "older ones count words that are not there where logits are capped, and give wrong gradients for "
        "reduction='none'"
    ),
    refusals=lambda hidden, weight, bias, options: float64_refusal(hidden, weight),
    compute=_compute,
)
