"""The roles of a tied matrix in training: the gradient that comes through each, and a factor for one of them."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers.modeling_utils import PreTrainedModel

from ..config import TyingError
from ..ties.anatomy import Anatomy, roles
from ..ties.sharding import whole
from ..ties.slots import find_slot
from ..ties.verify import groups_of, unwrapped
from .visits import VisitMeter

#: `input` is every embedding of input tokens: that of a language model, or both of an encoder-decoder.
ROLES = {"input": ("source", "target"), "source": ("source",), "target": ("target",), "output": ("output",)}


def names_of_role(model: PreTrainedModel, role: str) -> list[str]:
    """Find the parameter names of a role, with the names that only carry its matrix (BART's `shared`).

    Args:
        model: any `PreTrainedModel`.
        role: `"input"`, `"source"`, `"target"` or `"output"` (see `ROLES`).

    Raises:
        TyingError: if the role is unknown, or the model does not have it.
    """
    if role not in ROLES:
        raise TyingError(f"Unknown role {role!r}: expected one of {', '.join(ROLES)}.")
    found = roles(model)
    names = [name for part in ROLES[role] for name in (found[part].names if part in found else ())]
    if not names:
        raise TyingError(
            f"{type(model).__name__} has no {role} embedding: its roles are {', '.join(found) or 'none'}."
        )
    return names


class RoleMeter:
    """A meter of the gradient norm of each use of a tied matrix, and of each visit of a shared block (`VisitMeter`).

    In a forward pass, each use gets a view of the one parameter. Autograd computes the gradient of every use before it
    sums them, so a hook on the view can read it.

    Args:
        model: model with declared groups. Names with a role are measured, and layers that `share_layers` made.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._handles: list = []
        self._watched: list[tuple[str, str]] = []
        self._norms: dict[tuple[str, str], torch.Tensor] = {}
        self._visits = VisitMeter(model)

    def attach(self) -> None:
        """Measure every forward pass until `detach`."""
        if self._handles:
            return
        self._norms.clear()
        self._watched.clear()
        self._visits.attach()
        role_of = Anatomy(self.model).role_of
        for group in groups_of(self.model):
            for name in group.names:
                module, attribute = find_slot(self.model, name)
                if name in role_of and attribute == "weight":
                    self._watch(module, group.name, role_of[name])

    def detach(self) -> None:
        """Stop measuring. The last measurements are kept."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._visits.detach()

    def norms(self) -> dict[str, float]:
        """Return `grad_norm/<group>/<role>` (L2) and `grad_share/<group>/<role>` (0 to 1) of the last backward pass.

        A group has no shares if one of its roles was not measured. With them, `VisitMeter.measurements`.
        """
        norms = {key: float(whole(value)) for key, value in self._norms.items()}
        totals: dict[str, float] = {}
        for (group, _), norm in norms.items():
            totals[group] = totals.get(group, 0.0) + norm
        logs = {f"grad_norm/{group}/{role}": norm for (group, role), norm in norms.items()}
        complete = totals.keys() - {group for group, _ in self.unseen()}
        for (group, role), norm in norms.items():
            if group in complete:
                logs[f"grad_share/{group}/{role}"] = norm / totals[group] if totals[group] else 0.0
        return logs | self._visits.measurements()

    def unseen(self) -> list[tuple[str, str]]:
        """Return the groups and roles without a gradient in the last backward pass, as pairs of names.

        A loss that reads the matrix itself, and does not call the head, is such a use. The list is empty before the
        first pass, and if nothing is trained.
        """
        return [key for key in dict.fromkeys(self._watched) if key not in self._norms] if self._norms else []

    def _watch(self, module: nn.Module, group: str, role: str) -> None:
        key = (group, role)
        self._watched.append(key)
        parameters: list[nn.Parameter] = []

        def before(module: nn.Module, args: tuple) -> None:
            parameter = module._parameters.get("weight")
            if torch.is_grad_enabled() and parameter is not None and parameter.requires_grad:
                view = parameter.view_as(parameter)
                view.register_hook(lambda grad: self._norms.__setitem__(key, grad.detach().float().norm()))
                parameters.append(parameter)
                module._parameters["weight"] = view

        def after(module: nn.Module, args: tuple, output: torch.Tensor) -> None:
            if parameters:
                module._parameters["weight"] = parameters.pop()

        after.reads_no_output = True  # so that the loss is still computed by blocks
        self._handles += [
            module.register_forward_pre_hook(before),
            module.register_forward_hook(after, always_call=True),
        ]


@contextmanager
def measured_roles(model: nn.Module) -> Iterator[RoleMeter]:
    """Attach a `RoleMeter` to `model` for the length of a block, outside `Trainer`."""
    meter = RoleMeter(unwrapped(model))
    meter.attach()
    try:
        yield meter
    finally:
        meter.detach()


def scale_input_gradient(model: nn.Module, scale: float) -> list:
    """Multiply the part of the gradient that comes through the embedding lookup by `scale`, until it is removed.

    Only the matrix is below the lookup, so no other gradient changes, and the part of the softmax is as before. (The
    published code also has a factor for the other role. It acts on the logits, so it would scale the gradient of the
    whole model.)

    Args:
        model: model with input embeddings, tied or untied, also under `use_tied_loss`.
        scale: factor, 0 or more; 5 in the source.

    Returns:
        Handles. `handle.remove()` on each of them removes the factor.

    Source: Lopardo et al. 2026 (arXiv 2603.26663).

    Example (the reference, for one lookup):
        >>> rows = F.embedding(input_ids, weight)
        >>> rows.register_hook(lambda grad: grad * scale)
    """

    def after(module: nn.Module, args: tuple, output: torch.Tensor) -> None:
        if torch.is_grad_enabled() and output.requires_grad:
            output.register_hook(lambda grad: grad * scale)

    inner = unwrapped(model)
    modules = {find_slot(inner, name)[0] for name in names_of_role(inner, "input")}
    return [module.register_forward_hook(after) for module in modules]
