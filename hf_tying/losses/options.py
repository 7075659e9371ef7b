"""Options and operands of the losses, and the checks of both."""

from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from .arithmetic import autocast_dtype, compute_dtypes
from .gradient import is_transformed

REDUCTIONS = ("mean", "sum", "none")
#: alpha = GAMMA * temperature unless one of them is given.
GAMMA = 0.5


@dataclass(frozen=True)
class CrossEntropyOptions:
    """The keywords of `tied_cross_entropy` that say what is computed.

    `upstream` is the expected factor of the backward pass. It is known beforehand where a sum is divided outside
    (`ForCausalLMLoss`). Gradients are made with it; any other factor costs one more pass over them. `head_dtype` is
    the dtype of the matrix products; the reference has all in float32 or float64.
    """

    ignore_index: int = -100
    label_smoothing: float = 0.0
    reduction: str = "mean"
    num_items_in_batch: float | torch.Tensor | None = None
    logit_scale: float | torch.Tensor | None = None
    logit_softcap: float | None = None
    class_weight: torch.Tensor | None = None
    upstream: float | torch.Tensor = 1.0
    head_dtype: torch.dtype | None = None

    def keywords(self) -> dict[str, Any]:
        """The options as keywords of `reference_cross_entropy`."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("upstream", "head_dtype")}


@dataclass(frozen=True)
class AugmentedSettings:
    """The keywords of `augmented_loss` that a cross entropy does not have; described there, with reasons of defaults.

    Raises:
        ValueError: for a temperature not above 0, a negative alpha or gamma, or both of them.
    """

    temperature: float = 20.0
    alpha: float | None = None
    gamma: float | None = None
    detach_target: bool = False
    cross_entropy_weight: float = 1.0

    def __post_init__(self) -> None:
        refuse_several(**vars(self))
        if not self.temperature > 0:
            raise ValueError(f"temperature={self.temperature}: expected a number above 0.")
        if self.alpha is not None and self.gamma is not None:
            raise ValueError(
                f"alpha={self.alpha} and gamma={self.gamma} are both given: expected one of them, since alpha is "
                "gamma * temperature."
            )
        for name in ("alpha", "gamma"):
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise ValueError(f"{name}={value}: expected 0 or more.")

    @property
    def divergence_weight(self) -> float:
        """The weight alpha of the divergence, given or derived from gamma."""
        gamma = GAMMA if self.gamma is None else self.gamma
        weight = gamma * self.temperature if self.alpha is None else self.alpha
        return weight if is_learned(weight) else float(weight)


def is_learned(value: object) -> bool:
    """Whether `value` is a tensor for which a gradient is expected."""
    return isinstance(value, torch.Tensor) and value.requires_grad and torch.is_grad_enabled()


def refuse_learned(otherwise: str, **options: object) -> None:
    """Refuse options that are learned: they are read as numbers, and would get no gradient.

    Args:
        otherwise: end of the message, after the first way out.
        **options: values of the options.

    Raises:
        ValueError: for a tensor that requires a gradient, unless gradients are off.
    """
    for name, value in options.items():
        if is_learned(value):
            raise ValueError(
                f"{name} is a tensor that requires a gradient, and would get none from this loss: expected a number, "
                f"or {name}.detach(){otherwise}."
            )


def refuse_several(**options: object) -> None:
    """Refuse options with a number for each token or word: the loss has one for all.

    Args:
        **options: values of the options.

    Raises:
        ValueError: for a tensor of several elements, or of none.
    """
    for name, value in options.items():
        if isinstance(value, torch.Tensor) and value.numel() != 1:
            raise ValueError(
                f"{name} has the shape {tuple(value.shape)}: expected one number for all tokens and words."
            )


def check_temperature(temperature: float) -> float:
    """The temperature as a number.

    Raises:
        ValueError: for one that is not above 0, or requires a gradient.
    """
    if is_learned(temperature):
        raise ValueError(
            "temperature is a tensor that requires a gradient, and would get none: expected a number. Without a soft "
            "cap logit_scale=1 / temperature is the same, and may be learned."
        )
    refuse_several(temperature=temperature)
    if not temperature > 0:
        raise ValueError(f"temperature={temperature}: expected a number above 0.")
    return float(temperature)


def with_learned_scale(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    options: CrossEntropyOptions,
    head_dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None, CrossEntropyOptions]:
    """Multiply a learned scale into hidden states and bias, so that it gets a gradient. The logits are the same.

    In half precision that rounds no more than the products will. A word that its bias forbids has no part in the
    gradient of the scale: 0 times infinity is no number.
    """
    scale = options.logit_scale
    if not isinstance(scale, torch.Tensor) or not is_learned(scale):
        return hidden, bias, options
    scale, (products, exact) = scale.reshape(()), compute_dtypes(hidden, weight, head_dtype)
    if bias is not None:
        infinite, bias = bias.isinf(), bias.to(exact)
        bias = torch.where(infinite, bias.detach() * scale.detach(), bias.masked_fill(infinite, 0.0) * scale)
    hidden = hidden.to(torch.promote_types(hidden.dtype, products)) * scale
    return hidden, bias, replace(options, logit_scale=None)


def check_operands(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    bias: torch.Tensor | None,
    options: CrossEntropyOptions,
    one_dtype: bool = True,
) -> None:
    """Refuse what torch refuses in `linear` and `cross_entropy`, by the same exceptions, before any work.

    Args:
        hidden: hidden states, as for `tied_cross_entropy`.
        weight: softmax matrix, as for `tied_cross_entropy`.
        labels: labels, as for `tied_cross_entropy`.
        bias: bias, as for `tied_cross_entropy`.
        options: options of the loss.
        one_dtype: whether `hidden` and `weight` must have the same dtype outside autocast.

    Raises:
        IndexError, RuntimeError, ValueError: see `tied_cross_entropy`.
    """
    if weight.dim() != 2:
        raise ValueError(f"Expected weight of shape (V, D), got {tuple(weight.shape)}.")
    if hidden.dim() < 1 or hidden.shape[-1] != weight.shape[1]:
        raise RuntimeError(
            f"hidden and weight cannot be multiplied: expected hidden of shape (..., {weight.shape[1]}) for weight "
            f"{tuple(weight.shape)}, got {tuple(hidden.shape)}."
        )
    if labels.shape != hidden.shape[:-1]:
        raise ValueError(
            f"Expected one label for each hidden state, {tuple(hidden.shape[:-1])}, got labels of shape "
            f"{tuple(labels.shape)}. Shift or flatten both alike."
        )
    if labels.dtype != torch.int64:
        raise RuntimeError(f"Expected labels of dtype torch.int64, got {labels.dtype}.")
    for name, vector in (("bias", bias), ("class_weight", options.class_weight)):
        if vector is not None and vector.shape != weight.shape[:1]:
            raise RuntimeError(f"Expected {name} of shape {tuple(weight.shape[:1])}, got {tuple(vector.shape)}.")
    tensors = {"hidden": hidden, "weight": weight, "bias": bias, "class_weight": options.class_weight}
    for name, tensor in tensors.items():
        if tensor is not None and not tensor.is_floating_point():
            raise RuntimeError(f"Expected {name} in a floating-point dtype, got {tensor.dtype}.")
        if tensor is not None and tensor.device != labels.device:
            raise RuntimeError(f"Expected {name} on the device of labels, {labels.device}; it is on {tensor.device}.")
    if one_dtype and hidden.dtype != weight.dtype and autocast_dtype(hidden.device.type) is None:
        raise RuntimeError(
            f"Expected hidden and weight of one dtype, got {hidden.dtype} and {weight.dtype}. Convert one, or use "
            "torch.autocast."
        )
    refuse_several(
        label_smoothing=options.label_smoothing,
        logit_scale=options.logit_scale,
        logit_softcap=options.logit_softcap,
        num_items_in_batch=options.num_items_in_batch,
    )
    if options.head_dtype is not None and not options.head_dtype.is_floating_point:
        raise ValueError(f"head_dtype={options.head_dtype}: expected a floating-point dtype.")
    if options.reduction not in REDUCTIONS:
        raise ValueError(f"{options.reduction!r} is not a valid value for reduction: expected one of {REDUCTIONS}.")
    if options.num_items_in_batch is not None and options.reduction != "mean":
        raise ValueError(
            f"num_items_in_batch divides the sum of losses, so reduction is 'mean', not {options.reduction!r}."
        )
    if not 0 <= options.label_smoothing < 1:
        raise RuntimeError(f"label_smoothing must be at least 0 and below 1, got {options.label_smoothing}.")
    if options.logit_softcap is not None and not options.logit_softcap > 0:
        raise ValueError(f"logit_softcap must be above 0, got {options.logit_softcap}.")
    refuse_learned(
        "",
        label_smoothing=options.label_smoothing,
        class_weight=options.class_weight,
        num_items_in_batch=options.num_items_in_batch,
    )
    refuse_learned(
        ". hf_tying.losses.reference_cross_entropy gives it one, with all logits at once",
        logit_softcap=options.logit_softcap,
    )
    if labels.numel() and not is_transformed(labels):
        wrong = labels[(labels != options.ignore_index) & ((labels < 0) | (labels >= len(weight)))]
        if len(wrong):
            raise IndexError(
                f"Target {int(wrong[0])} is out of bounds: expected words from 0 to {len(weight) - 1}, or "
                f"ignore_index={options.ignore_index}."
            )
