"""`tied_cross_entropy`: the loss of a language model from its hidden states and its softmax matrix."""

import torch

from .backends import choose_backend
from .compilation import untraced
from .gradient import is_plain
from .modules import LossModule
from .options import CrossEntropyOptions, check_operands, with_learned_scale
from .reference import reference_cross_entropy
from .vocabulary_part import is_split_vocabulary


def tied_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    num_items_in_batch: float | torch.Tensor | None = None,
    logit_scale: float | torch.Tensor | None = None,
    logit_softcap: float | None = None,
    class_weight: torch.Tensor | None = None,
    memory_budget: int | None = None,
    backend: str = "auto",
    head_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Exact cross entropy of `softcap(logit_scale * (hidden @ weight.T + bias))`, without the (N, V) logits.

    Gradients are made in the forward pass, block by block (`hf_tying.losses.walk`), so a backward pass can be run
    once. At most one V x D gradient, `memory_budget`, and some N x D matrices in float32 are alive. In the backward
    pass the gradient of `weight` is one buffer, into which `tied_embedding` of the same `weight` adds its rows
    (`hf_tying.losses.gradient`). Tokens whose label is ignored take part in no matrix product.

    Args:
        hidden: hidden states, (..., D), floating point. No shift is made: `hidden[i]` predicts `labels[i]`.
        weight: softmax matrix, (V, D), of the dtype of `hidden`, or of any dtype under autocast.
        labels: labels, hidden.shape[:-1], int64: words from 0 to V - 1, or `ignore_index`.
        bias: bias of the softmax, (V,), floating point. Default `None`.
        ignore_index: value of labels that are left out. Default -100, as everywhere in transformers.
        label_smoothing: share of the target that is spread evenly over all words, in [0, 1) (Szegedy et al. 2016,
            section 7), as in `torch.nn.functional.cross_entropy`. Default 0.
        reduction: `"mean"` over the labels that count (by their class weights), `"sum"`, or `"none"` for the loss of
            each token, which makes its gradients in the backward pass, and its logits twice. Default `"mean"`.
        num_items_in_batch: divisor of the sum for `"mean"`, in place of the number of labels that count here.
            `Trainer` gives it for a mean over accumulated steps and over processes. Default `None`.
        logit_scale: factor of the logits (Cohere; 1 / logits_scaling in Granite). Default 1. It may be learned: a
            tensor of one element gets its gradient.
        logit_softcap: cap of the logits, which become `cap * tanh(logits / cap)` after the scale (Gemma 2, equation in
            section 2). Default `None`.
        class_weight: weight for each label, (V,), as in torch. Default `None`.
        memory_budget: bytes for blocks at work and values kept from the first products to the last, beside the
            gradient. Default: as many as the gradient of `weight` has, from 16 to 64 MiB, or an eighth of it if that
            is more. A larger one avoids computing logits twice where the tokens are many.
        backend: implementation: `"torch"`, `"liger"`, `"cce"` (if installed, on a GPU), or `"auto"`, see
            `hf_tying.losses.backends`. Default `"auto"`.
        head_dtype: dtype of the matrix products. With `torch.float32` a bfloat16 matrix is converted block by block,
            never whole, and its gradient is summed in float32. Default `None`: that of `hidden`, or of autocast.

    Returns:
        A scalar, or for `"none"` a tensor like `labels`; float32, or float64 for float64 inputs. 0 where no label
        counts.

    Raises:
        IndexError: for a label outside the vocabulary.
        ValueError: for labels of another shape, an unknown reduction or backend, and a soft cap, class weights,
            a label smoothing or a number of items that requires a gradient.
        RuntimeError: for mixed dtypes or devices, a bias or class weights of another length, `hidden` and `weight` of
            different width, a weight that is split over processes, a label smoothing outside [0, 1), and in the
            backward pass for a second one, or `create_graph=True`.

    Example (the reference, see `hf_tying.losses.reference`):
        >>> logits = hidden @ weight.T
        >>> torch.nn.functional.cross_entropy(logits.float(), labels)
    """
    options = CrossEntropyOptions(
        ignore_index, label_smoothing, reduction, num_items_in_batch, logit_scale, logit_softcap, class_weight,
        head_dtype=head_dtype,
    )  # fmt: skip
    return cross_entropy(hidden, weight, labels, bias, options, memory_budget, backend)


@untraced
def cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    bias: torch.Tensor | None,
    options: CrossEntropyOptions,
    memory_budget: int | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """`tied_cross_entropy` with its options in one object."""
    if is_split_vocabulary(weight):
        raise RuntimeError(
            "The matrix is split over processes: expected the whole one, weight.full_tensor(). Of the split one, "
            "tied_log_probs gives the log-probabilities, where all processes have the same tokens."
        )
    check_operands(hidden, weight, labels, bias, options, one_dtype=options.head_dtype is None)
    hidden, bias, options = with_learned_scale(hidden, weight, bias, options, options.head_dtype)
    compute = choose_backend(backend, hidden, weight, bias, options)
    if not (is_plain(hidden) and is_plain(weight)):
        hidden = hidden.to(torch.promote_types(hidden.dtype, options.head_dtype or hidden.dtype))
        return reference_cross_entropy(hidden, weight, labels, bias=bias, **options.keywords())
    return compute(hidden, weight, labels, bias, options, memory_budget)


class TiedCrossEntropy(LossModule):
    """`tied_cross_entropy` as a module: it is made with the options, and called with the tensors.

    The arguments are the keywords of `tied_cross_entropy` except `bias`, `class_weight` and `num_items_in_batch`,
    which are given at the call.

    Example:
        >>> loss = TiedCrossEntropy(label_smoothing=0.1)(hidden, embedding.weight, labels)
    """

    function = staticmethod(tied_cross_entropy)
    at_call = ("bias", "class_weight", "num_items_in_batch")
