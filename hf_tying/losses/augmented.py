"""`augmented_loss`: cross entropy plus the divergence from a target made of word vectors (Inan et al. 2017)."""

from dataclasses import fields
from typing import Any

import torch
from torch.nn import functional as F

from .augmented_autograd import augmented_path
from .compilation import untraced
from .gradient import is_plain
from .modules import LossModule
from .options import (
    AugmentedSettings,
    CrossEntropyOptions,
    check_operands,
    refuse_learned,
    with_learned_scale,
)
from .reference import reference_cross_entropy


def augmented_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    embedding: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    temperature: float = 20.0,
    alpha: float | None = None,
    gamma: float | None = None,
    detach_target: bool = False,
    ignore_index: int = -100,
    reduction: str = "mean",
    num_items_in_batch: float | torch.Tensor | None = None,
    cross_entropy_weight: float = 1.0,
    logit_scale: float | torch.Tensor | None = None,
    memory_budget: int | None = None,
) -> torch.Tensor:
    """`cross_entropy_weight * CE + alpha * KL(t || q)`, the augmented loss, without an (N, V) matrix.

    With a one-hot target every other word is equally wrong. Here the target t gives probability to words whose
    vectors are like that of the right one, too: with L the input embedding, W the softmax matrix and y the label,

        t = softmax(L L[y] / temperature)                  the target distribution
        q = softmax(logit_scale * W h / temperature)       the model's, without its output bias

    The live embedding makes the target, so it is trained by it too, as the matrix and as the label's row, unless
    `detach_target`. Everything is computed over blocks of the vocabulary, with gradients made in the forward pass: a
    backward pass can be run once. The target is computed once for each different label. In the backward pass the
    gradients of `weight` and `embedding` go into the buffers that `tied_embedding` shares, and are one where the two
    are the same tensor (REAL in the paper).

    Args:
        hidden: hidden states h, (..., D), floating point. No shift is made: `hidden[i]` predicts `labels[i]`.
        weight: softmax matrix W, (V, D), of the dtype of `hidden`, or of any dtype under autocast.
        labels: labels y, hidden.shape[:-1], int64: words from 0 to V - 1, or `ignore_index`.
        embedding: input embedding L, (V, any width), of the dtype of `weight`. Default: `weight`, as in a tied model.
            Give it for an untied model (AL in the paper).
        bias: bias of the cross entropy alone, (V,), floating point (equation 3.1 has none). Reusing the embedding, the
            paper sets it to zero.
        temperature: temperature tau of both distributions, above 0. Default 20, third-party accounts' value for the
            Penn Treebank.
        alpha: weight of the divergence, 0 or more. Default `gamma * temperature`: the gradient falls with the
            temperature, so the product keeps its size. Published settings are given as gamma.
        gamma: ratio alpha / temperature. Default 0.5; 0.5 to 0.8 were used on the Penn Treebank, 1.0 to 1.5 on
            WikiText-2.
        detach_target: whether the target gets no gradient. Default `False`: the paper does not mention it.
        ignore_index: value of labels that are left out. Default -100, as everywhere in transformers.
        reduction: `"mean"` over the labels that count, or `"sum"`. Default `"mean"`.
        num_items_in_batch: divisor of the sum for `"mean"`, in place of the number of labels that count here, as
            `Trainer` gives it. Default `None`.
        cross_entropy_weight: factor of the cross entropy. Default 1; with 0 the loss is the divergence alone.
        logit_scale: factor of the model's logits, in both parts. Default 1. It may be learned: a tensor of one
            element gets its gradient.
        memory_budget: bytes for blocks at work and kept products, beside the gradients. Default: as many as the
            gradient of `weight` has, from 16 to 64 MiB, or an eighth of it if that is more. A block is never narrower
            than 128 words.

    Returns:
        A scalar; float32, or float64 for float64 inputs. 0 where no label counts.

    Raises:
        ValueError: for a temperature not above 0, a negative alpha or gamma, both of them, a reduction other than the
            two, an embedding of another number of rows, labels of another shape, and any other option that requires
            a gradient.
        IndexError: for a label outside the vocabulary.
        RuntimeError: for mixed dtypes or devices, a bias of another length, `hidden` and `weight` of different width,
            and in the backward pass for a second one, or `create_graph=True`.

    Source: Inan, Khosravi & Socher 2017, "Tying Word Vectors and Word Classifiers", section 3, equations 3.1 to 3.7;
    tying: section 4. alpha as gamma * tau is third parties' form of it.

    Example (the reference, see `reference_augmented_loss`):
        >>> target = torch.softmax(embedding @ embedding[y] / temperature, -1)
        >>> model = torch.log_softmax(weight @ h / temperature, -1)
        >>> loss = cross_entropy + alpha * (target * (target.log() - model)).sum()
    """
    settings = AugmentedSettings(temperature, alpha, gamma, detach_target, cross_entropy_weight)
    options = CrossEntropyOptions(ignore_index, 0.0, reduction, num_items_in_batch, logit_scale)
    return augmented_parts(
        hidden, weight, labels, settings, embedding=embedding, bias=bias, options=options, memory_budget=memory_budget
    )[0]


@untraced
def augmented_parts(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    settings: AugmentedSettings,
    *,
    embedding: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    options: CrossEntropyOptions | None = None,
    memory_budget: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`augmented_loss` and the cross entropy alone, from which perplexity is computed.

    Args:
        hidden: hidden states, as for `augmented_loss`.
        weight: softmax matrix, as for `augmented_loss`.
        labels: labels, as for `augmented_loss`.
        settings: the divergence, and the weights of both parts.
        embedding: input embedding, as for `augmented_loss`.
        bias: bias of the cross entropy, as for `augmented_loss`.
        memory_budget: memory in bytes, as for `augmented_loss`.
        options: options of the cross entropy. Default: `CrossEntropyOptions()`. Only `ignore_index`, `reduction`,
            `num_items_in_batch` and `logit_scale` may differ from that.

    Returns:
        Two scalars: the augmented loss, and the cross entropy (reduced alike, not multiplied by
        `cross_entropy_weight`), which has no gradient.

    Raises:
        ValueError: for options of the cross entropy that the augmented loss does not have.
        IndexError, RuntimeError, ValueError: see `augmented_loss`.

    Example:
        >>> loss, cross_entropy = augmented_parts(hidden, embedding.weight, labels, AugmentedSettings(gamma=1.0))
        >>> loss.backward()
        >>> perplexity = cross_entropy.exp()
    """
    options = options or CrossEntropyOptions()
    if options.reduction not in ("mean", "sum"):
        raise ValueError(f"{options.reduction!r} is not a valid value for reduction: expected 'mean' or 'sum'.")
    if options.label_smoothing or options.logit_softcap is not None or options.class_weight is not None:
        raise ValueError("The augmented loss has no label_smoothing, logit_softcap or class_weight: expected none.")
    refuse_learned(". hf_tying.losses.augmented.reference_augmented_loss gives it one", **vars(settings))
    check_operands(hidden, weight, labels, bias, options)
    if embedding is weight:
        embedding = None
    if embedding is not None:
        _check_embedding(embedding, weight)
        embedding = embedding.detach() if settings.detach_target else embedding
    hidden, bias, options = with_learned_scale(hidden, weight, bias, options)
    if all(is_plain(tensor) for tensor in (hidden, weight, embedding) if tensor is not None):
        return augmented_path(hidden, weight, labels, bias, embedding, settings, options, memory_budget)
    keywords = options.keywords()
    keywords = {name: keywords[name] for name in ("ignore_index", "reduction", "num_items_in_batch", "logit_scale")}
    total = reference_augmented_loss(
        hidden, weight, labels, embedding=embedding, bias=bias, **vars(settings), **keywords
    )
    return total, reference_cross_entropy(hidden, weight, labels, bias=bias, **keywords).detach()


def reference_augmented_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    embedding: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    num_items_in_batch: float | torch.Tensor | None = None,
    logit_scale: float | torch.Tensor | None = None,
    **settings: Any,
) -> torch.Tensor:
    """`augmented_loss` in plain torch with whole matrices, as the reference of its tests.

    Arguments, shapes and result as for `augmented_loss`; `settings` are the keywords of `AugmentedSettings`.
    """
    chosen = AugmentedSettings(**settings)
    exact = torch.float64 if torch.float64 in (hidden.dtype, weight.dtype) else torch.float32
    counted = labels != ignore_index
    reduced: dict[str, Any] = dict(
        ignore_index=ignore_index, reduction=reduction, num_items_in_batch=num_items_in_batch
    )
    cross_entropy = reference_cross_entropy(hidden, weight, labels, bias=bias, logit_scale=logit_scale, **reduced)
    matrix = (weight if embedding is None else embedding).to(exact)
    target = F.log_softmax(matrix[labels[counted]] @ matrix.t() / chosen.temperature, -1)
    if chosen.detach_target:
        target = target.detach()
    logits = hidden[counted].to(exact) @ weight.to(exact).t() * (1.0 if logit_scale is None else logit_scale)
    divergence = F.kl_div(F.log_softmax(logits / chosen.temperature, -1), target, reduction="sum", log_target=True)
    items = 1 if reduction == "sum" else counted.sum() if num_items_in_batch is None else num_items_in_batch
    items = torch.as_tensor(items, device=hidden.device)
    divergence = chosen.divergence_weight * divergence / items.masked_fill(items == 0, 1)
    return chosen.cross_entropy_weight * cross_entropy + divergence


class AugmentedLoss(LossModule):
    """`augmented_loss` as a module: it is made with the options, and called with the tensors.

    The arguments are the keywords of `augmented_loss` except `embedding`, `bias` and `num_items_in_batch`, which are
    given at the call.

    Raises:
        ValueError: at once, for a temperature, alpha or gamma that `augmented_loss` refuses.

    Example:
        >>> loss = AugmentedLoss(gamma=1.0)(hidden, embedding.weight, labels)
    """

    function = staticmethod(augmented_loss)
    at_call = ("embedding", "bias", "num_items_in_batch")

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        settings = AugmentedSettings(**{field.name: self.options[field.name] for field in fields(AugmentedSettings)})
        self.options |= {"alpha": settings.divergence_weight, "gamma": None}


def _check_embedding(embedding: torch.Tensor, weight: torch.Tensor) -> None:
    if embedding.dim() != 2 or len(embedding) != len(weight):
        raise ValueError(
            f"Expected embedding with a row for each of the {len(weight)} words of weight {tuple(weight.shape)}, got "
            f"{tuple(embedding.shape)}."
        )
    if embedding.dtype != weight.dtype or embedding.device != weight.device:
        raise RuntimeError(
            f"Expected embedding like weight, in {weight.dtype} on {weight.device}; it is in {embedding.dtype} on "
            f"{embedding.device}."
        )
