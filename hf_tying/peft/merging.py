"""Merges of adapters into tied weights: the delta is added to the shared matrix once, or the merge is refused."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from ..config import TyingError
from ..projection.head import ProjectedLinear
from ..ties.anatomy import Anatomy
from ..ties.groups import TieGroup
from ..ties.sharding import is_partitioned
from ..ties.slots import find_parameter, find_slot, fit_rows, set_parameter, state_key


def guard_merges(wrapped: Callable[..., Any], tuner: BaseTuner, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Wrap the methods of PEFT's `BaseTuner` that write deltas into base weights, and keep the ties of the base model.

    Nothing changes for a model without ties and without a projection.

    Args:
        wrapped: bound method of the tuner.
        tuner: the tuner.
        args: positional arguments of the method.
        kwargs: keyword arguments of the method.

    Returns:
        The result of the method.

    Raises:
        TyingError: from `refuse_projected`, `refuse_partitioned` and `refuse_uneven`, before anything is merged.
    """
    model = getattr(tuner, "model", None)
    unloading = wrapped.__name__ == "_unload_and_optionally_merge"
    merging = not unloading or kwargs.get("merge", args[0] if args else True)
    if merging:
        refuse_projected(model)
        refuse_partitioned(model)
    if not merging or not getattr(model, "tie_groups", None):
        return wrapped(*args, **kwargs)
    refuse_uneven(model, kwargs.get("adapter_names") or list(tuner.active_adapters))
    with untied_while_merging(model):
        return wrapped(*args, **kwargs)


def refuse_projected(model: nn.Module) -> None:
    """Refuse to merge an adapter on a head with a projection (PR).

    The adapter reads the input of the head. The matrix of the head reads it after the projection.

    Args:
        model: base model with adapters.

    Raises:
        TyingError: merging would change the function.
    """
    for name, module in model.named_modules() if isinstance(model, nn.Module) else ():
        if isinstance(getattr(module, "base_layer", None), ProjectedLinear):
            raise TyingError(
                f"Cannot merge: the adapter on {name!r} reads what comes before the projection (PR) of that head, and "
                "its matrix what comes after it. Keep the adapter unmerged, or merge_projection(model) before it is "
                "trained."
            )


def refuse_partitioned(model: nn.Module) -> None:
    """Refuse to merge an adapter into a matrix of which this process has no values.

    Args:
        model: base model with adapters.

    Raises:
        TyingError: DeepSpeed ZeRO-3 has partitioned an adapted module.
    """
    for name, module in model.named_modules() if isinstance(model, nn.Module) else ():
        if hasattr(module, "base_layer") and any(map(is_partitioned, module.parameters())):
            raise TyingError(
                f"Cannot merge: DeepSpeed ZeRO-3 has partitioned {name!r}. Save the adapter and merge it in one "
                "process, or merge inside deepspeed.zero.GatheredParameters([*model.parameters()], modifier_rank=0)."
            )


def refuse_uneven(model: nn.Module, adapters: list[str]) -> None:
    """Refuse to merge adapters that do not change every name of a tie by the same delta.

    Args:
        model: base model with adapters and `tie_groups`.
        adapters: names of the adapters to merge.

    Raises:
        TyingError: merging would change a name by a delta that its adapter does not have.
    """
    carriers = Anatomy(model).carriers
    for group in model.tie_groups:
        deltas = {name: _delta(model, name, adapters) for name in _used(group, carriers)}
        adapted = [name for name, delta in deltas.items() if delta is not None]
        if not adapted:
            continue
        free = [name for name, delta in deltas.items() if delta is None]
        first = deltas[adapted[0]]
        if free or not all(torch.equal(first, deltas[name]) for name in adapted):
            other = f"{free[0]!r} has none" if free else f"{adapted[1]!r} has a different one"
            raise TyingError(
                f"Cannot merge: {adapted[0]!r} has an adapter and {other}, but they are one parameter (group "
                f"{group.name!r}); the merged delta would change every use of it. Keep the adapter unmerged, or "
                "untie first: base = model.unload(); untie(base); then load the adapter on it and merge."
            )


def _used(group: TieGroup, carriers: set[str]) -> list[str]:
    """The names of a tie that are in use. A carrier only holds the matrix (the `shared` of BART and T5)."""
    return [name for name in group.names if name not in carriers] or list(group.names)


def _delta(model: nn.Module, name: str, adapters: list[str]) -> torch.Tensor | None:
    """The delta that merging adds to the parameter `name`, in its layout; `None` if no adapter is on it."""
    path = state_key(model, name)
    if ".base_layer." not in path:
        return None
    layer = model.get_submodule(path[: path.index(".base_layer.")])
    held = [adapter for adapter in adapters if adapter in layer._all_available_adapter_names()]
    if not held:
        return None
    if hasattr(layer, "get_delta_weight"):
        return sum(layer.get_delta_weight(adapter).detach() for adapter in held)
    # A layer of trainable tokens has no method for its delta, so a copy is merged and the difference taken.
    trial = copy.deepcopy(layer)
    trial.merge(adapter_names=held)
    return (trial.get_base_layer().weight - layer.get_base_layer().weight).detach()


@contextmanager
def untied_while_merging(model: nn.Module) -> Iterator[None]:
    """Give each name of a tie its own copy while PEFT merges, then make them one again.

    The delta that PEFT adds to each copy is thereby added to the one matrix once.

    Args:
        model: base model with `tie_groups`.
    """
    carriers = Anatomy(model).carriers  # carriers keep the matrix of the first name in use
    groups = [_used(group, carriers) for group in model.tie_groups]
    for first, *others in groups:
        root = find_parameter(model, first)
        for name in others:
            if find_parameter(model, name) is root:
                set_parameter(model, name, nn.Parameter(root.detach().clone(), requires_grad=root.requires_grad))
    try:
        yield
    finally:
        for first, *others in groups:
            root = find_parameter(model, first)
            for name in others:
                own = find_parameter(model, name)
                if root is not None and own is not None and torch.equal(own, root):
                    set_parameter(model, name, root)
                    fit_rows(find_slot(model, name)[0])
