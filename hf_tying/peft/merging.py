"""Adapters over a tie: a merge writes into the shared matrix, so it is done once and right, or refused."""

import copy
import functools
from contextlib import contextmanager

import torch
from torch import nn

from ..config import TyingError
from ..projection.head import ProjectedLinear
from ..ties.slots import find_parameter, find_slot, fit_rows, link, state_key

# Private or public, these are the methods through which PEFT writes deltas into base weights.
_MERGES = ("merge_adapter", "unmerge_adapter", "_unload_and_optionally_merge")


def guard(tuner: type) -> None:
    """Put the check in front of the merges of PEFT's `BaseTuner`; models without ties go straight through."""
    for method in _MERGES:
        if method in vars(tuner):
            setattr(tuner, method, _guarded(vars(tuner)[method]))


def _guarded(stock_method):
    writes = stock_method.__name__ != "_unload_and_optionally_merge"

    @functools.wraps(stock_method)
    def method(self, *args, **kwargs):
        model = getattr(self, "model", None)
        merging = writes or kwargs.get("merge", args[0] if args else True)
        if merging:
            refuse_projected(model)
        if not merging or not getattr(model, "tie_groups", None):
            return stock_method(self, *args, **kwargs)
        names = kwargs.get("adapter_names") or list(self.active_adapters)
        refuse_uneven(model, names)
        with apart(model):
            return stock_method(self, *args, **kwargs)

    return method


def refuse_projected(model: nn.Module) -> None:
    """An adapter on a head with a projection (PR) takes its input before the projection, and the matrix after it.

    Raises:
        TyingError: when merging would make another function of the two.
    """
    for name, module in model.named_modules() if isinstance(model, nn.Module) else ():
        if isinstance(getattr(module, "base_layer", None), ProjectedLinear):
            raise TyingError(
                f"Cannot merge: the adapter on {name!r} reads what comes before the projection (PR) of that head, and "
                "its matrix what comes after it. Keep the adapter unmerged, or merge_projection(model) before it is "
                "trained."
            )


def refuse_uneven(model: nn.Module, adapters: list[str]) -> None:
    """Adapters must change every name of a tie by the same delta.

    Raises:
        TyingError: when merging would push a one-sided delta into the other side too.
    """
    for group in model.tie_groups:
        deltas = {name: _delta(model, name, adapters) for name in group.names}
        adapted = [name for name, delta in deltas.items() if delta is not None]
        if not adapted:
            continue
        free = [name for name in group.names if deltas[name] is None]
        first = deltas[adapted[0]]
        if free or not all(torch.equal(first, deltas[name]) for name in adapted):
            other = f"{free[0]!r} has none" if free else f"{adapted[1]!r} has a different one"
            raise TyingError(
                f"Cannot merge: {adapted[0]!r} has an adapter and {other}, but they are one parameter (group "
                f"{group.name!r}); the merged delta would change every use of it. Keep the adapter unmerged, or "
                "untie first: base = model.unload(); untie(base); then load the adapter on it and merge."
            )


def _delta(model: nn.Module, name: str, adapters: list[str]) -> torch.Tensor | None:
    """What merging would add to the parameter `name`, in its own layout; `None` without an adapter on it."""
    path = state_key(model, name)
    if ".base_layer." not in path:
        return None
    layer = model.get_submodule(path[: path.index(".base_layer.")])
    held = [adapter for adapter in adapters if adapter in layer._all_available_adapter_names()]
    if not held:
        return None
    if hasattr(layer, "get_delta_weight"):
        return sum(layer.get_delta_weight(adapter).detach() for adapter in held)
    # Trainable tokens know no delta: merge a copy of the layer and look.
    trial = copy.deepcopy(layer)
    trial.merge(adapter_names=held)
    return (trial.get_base_layer().weight - layer.get_base_layer().weight).detach()


@contextmanager
def apart(model: nn.Module):
    """Give each name its own copy while PEFT writes, and make them one again: a delta written to both counts once."""
    groups = list(model.tie_groups)
    for group in groups:
        root = find_parameter(model, group.root)
        for name in group.targets:
            if find_parameter(model, name) is root:
                link(model, name, nn.Parameter(root.detach().clone(), requires_grad=root.requires_grad))
    try:
        yield
    finally:
        for group in groups:
            root = find_parameter(model, group.root)
            for name in group.targets:
                own = find_parameter(model, name)
                if root is not None and own is not None and torch.equal(own, root):
                    link(model, name, root)
                    fit_rows(find_slot(model, name)[0])
