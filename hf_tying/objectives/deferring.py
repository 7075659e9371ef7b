"""A forward pass of a model in which the products with its softmax matrix are deferred, and what stands against it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as module_hooks

from ..config import TyingError
from ..losses.compilation import break_graph
from ..losses.gradient import is_plain, is_transformed
from ..ties.relaxation import relaxation_at
from ..ties.sharding import is_dtensor, is_partitioned, is_row_split, keep_whole, linear_replaced_by, unit_of
from ..ties.slots import adapter_at, matrix_at_work, slot_of
from .step_loss import LossSettings
from .tied_softmax import TiedSoftmax

_HOOKS = ("forward", "backward", "backward_pre")


def why_whole(model: nn.Module, softmax: str, embedding: str, split: bool = True) -> str | None:
    """Reason why the logits of a forward pass cannot be deferred; `None` if they can.

    Args:
        model: the model.
        softmax: name of the softmax matrix.
        embedding: name of the embedding that the loss reads; the same, unless there is an objective.
        split: whether the loss is computed over a vocabulary that is split over processes too. Default `True`.
    """
    break_graph()
    if (replaced := linear_replaced_by()) is not None:
        return replaced
    for name in dict.fromkeys((softmax, embedding)):
        if relaxation_at(model, name) is not None:
            return f"{name!r} is relaxed: its module adds a difference of its own to the shared matrix"
        if name != softmax and (adapter := adapter_at(model, name)) is not None:
            return f"an adapter ({adapter}) is on {name!r}, and the rows that it gives are not those of the matrix"
        parameter = matrix_at_work(model, name)
        if is_partitioned(parameter):
            return f"DeepSpeed ZeRO-3 has partitioned {name!r}: call use_tied_loss after deepspeed.initialize"
        if is_plain(parameter):
            continue
        if is_transformed(parameter):
            return "the step is transformed (by torch.func, forward-mode AD or a trace), or has no values (meta, fake)"
        unit = unit_of(model, name) if is_dtensor(parameter) else None
        if unit is None and is_row_split(parameter) and split:
            continue
        if unit is None:
            kind = type(parameter).__name__
            return f"the softmax matrix or the embedding is a {kind} (sharded over processes, or quantised)"
        keep_whole(unit)
    reader = hooked(model, softmax)
    return None if reader is None else f"a hook reads the output of {reader!r}"


@contextmanager
def deferring(
    model: nn.Module,
    settings: LossSettings,
    softmax: str,
    embedding: str,
    defers: bool,
    num_items_in_batch: float | torch.Tensor | None = None,
) -> Iterator[TiedSoftmax]:
    """Context manager of a forward pass of `model`: yields the mode (`TiedSoftmax`) in which it runs.

    Args:
        model: the model.
        settings: settings of the loss.
        softmax: name of the softmax matrix.
        embedding: name of the embedding that the loss reads.
        defers: whether products are deferred (`why_whole` has given no reason).
        num_items_in_batch: number by which the model will divide a sum of losses.
    """

    def now() -> tuple[nn.Parameter, nn.Parameter]:
        return matrix_at_work(model, softmax), matrix_at_work(model, embedding)

    matrix, read = now()
    moves = any(map(is_dtensor, (matrix, read)))
    with _head_without_gathering(model, softmax, defers and is_row_split(matrix)) as product:
        mode = TiedSoftmax(matrix, settings, num_items_in_batch, read, defers, now if moves else None, product)
        with mode:
            yield mode


def untraced_where_sharded(model: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
    """`forward`, which dynamo leaves alone under FSDP2.

    FSDP2's hooks break the graph of a whole model, and dynamo would go on inside the mode, which it traces wrongly
    there. Layers that are compiled by themselves stay so.
    """
    if "torch._dynamo" in sys.modules and hasattr(model, "set_reshard_after_forward"):
        return torch.compiler.disable(forward)
    return forward


def why_not_seen(model: nn.Module, softmax: str) -> str:
    """Reason why a forward pass of `model` had no product with its softmax matrix, of the name `softmax`."""
    return why_whole(model, softmax, softmax) or (
        f"its forward does not multiply by {softmax!r} itself: it makes another matrix of it, or an adapter stands in "
        "for it"
    )


def refuse_narrow_head(model: nn.Module, softmax: str, mode: TiedSoftmax) -> None:
    """Refuse a forward pass with a `head_dtype` whose products were not seen, and are in the model's own dtype.

    Raises:
        TyingError: where the model did not multiply by its softmax matrix through torch's `linear`.
    """
    dtype = mode.loss.settings.head_dtype
    if dtype is not None and not mode.multiplied and not torch.compiler.is_compiling():
        raise TyingError(
            f"The head of {type(model).__name__} cannot be computed in {dtype} ({why_not_seen(model, softmax)}): "
            "expected one that multiplies by the softmax matrix. Leave it in the dtype of the model: "
            "use_tied_loss(model) without head_dtype, and cast_lm_head_to_fp32=False for TRL's trainers."
        )


@contextmanager
def _head_without_gathering(
    model: nn.Module, softmax: str, split: bool
) -> Iterator[Callable[[torch.Tensor], torch.Tensor] | None]:
    """Let the head compute what its class does, and yield the forward that tensor parallelism has given it.

    That one gathers the logits.
    """
    head = vars(slot_of(model, softmax)[0])
    gathering = head.pop("forward", None) if split else None
    try:
        yield gathering
    finally:
        if gathering is not None:
            head["forward"] = gathering


def hooked(model: nn.Module, name: str) -> str | None:
    """The module with a hook that is given logits, or their gradient: the head, or one around it in the model.

    A hook asks whether its output is a tensor, or changes it, and a backward hook is called for tensors alone. One
    that looks at no output says so by an attribute `reads_no_output`.

    Args:
        model: the model.
        name: name of the softmax matrix.

    Returns:
        The name of the module. `None` without such a hook, and for the matrix of an embedding, whose hooks see no
        logits.
    """
    path = name.split(".")[:-1]
    names = [".".join(path[: depth + 1]) for depth in range(len(path))]
    if not names or isinstance(model.get_submodule(names[-1]), nn.Embedding):
        return None
    everywhere = [hook for kind in _HOOKS for hook in getattr(module_hooks, f"_global_{kind}_hooks", {}).values()]
    if any(map(_reads_output, everywhere)):
        return names[-1]
    for each in names:
        module = model.get_submodule(each)
        if any(_reads_output(hook) for kind in _HOOKS for hook in getattr(module, f"_{kind}_hooks", {}).values()):
            return each
    return None


# Their own hooks pass on whatever is no tensor: torch's tracker (of `FlopCounterMode`), FSDP2, ZeRO-3.
_ENGINES = ("torch.utils.module_tracker", "torch.distributed.fsdp", "deepspeed.")


def _reads_output(hook: Callable[..., Any]) -> bool:
    """Whether a hook may look at its module's output."""
    engine = (getattr(hook, "__module__", None) or "").startswith(_ENGINES)
    return not engine and not getattr(hook, "reads_no_output", False)
