"""The visits of a shared block in training: the gradient that comes through each, and how far they agree."""

from typing import Any

import torch
from torch import nn

from ..config import TyingConfig
from ..ties.anatomy import Anatomy
from ..ties.depth_groups import depth_groups
from ..ties.sharding import whole
from ..ties.shared_layers import located_stacks
from ..ties.slots import find_slot


class VisitMeter:
    """A meter of the gradient of each visit of the blocks that `share_layers` made.

    While a layer runs, its modules hold views of the shared parameters. Autograd computes the gradient of every view
    before it sums them, so a hook on the view can read it. Of each parameter, the gradients of all visits are kept
    until the last one has come, and then only their scalar products.

    Args:
        model: model with shared layers; another one has nothing to measure.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._handles: list[Any] = []
        self._pending: dict[str, dict[int, torch.Tensor]] = {}
        #: By block, its visits; by block and parameter, the scalar products of the visits' gradients.
        self._visits: dict[str, list[int]] = {}
        self._products: dict[str, dict[str, torch.Tensor]] = {}

    def attach(self) -> None:
        """Measure every forward pass until `detach`."""
        if self._handles:
            return
        config = TyingConfig.in_config(getattr(self.model, "config", None))
        anatomy = Anatomy(self.model)
        for stack in located_stacks(anatomy, config, strict=False) if config.depth else ():
            path, order = stack["path"], stack["order"]
            groups = depth_groups(anatomy.own_slots, stack)
            for block in dict.fromkeys(order):
                visits = [i for i, each in enumerate(order) if each == block]
                name = f"{path}.{visits[0]}"
                self._visits[name], self._products[name] = visits, {}
                for i in visits if len(visits) > 1 else ():
                    layer, inside = self.model.get_submodule(f"{path}.{i}"), f"{path}.{i}."
                    root_of = {
                        name: root for root, names in groups.items() for name in names if name.startswith(inside)
                    }
                    self._watch(name, i, layer, root_of)

    def detach(self) -> None:
        """Stop measuring. The last measurements are kept."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._pending.clear()

    def measurements(self) -> dict[str, float]:
        """Return what the last backward pass gave, by block (the path of its first layer) and layer.

        `grad_norm/<block>/layer_<i>` is the norm (L2) of the part that comes through this layer, over the parameters
        that all visits have. `grad_share/...` is its share in the sum of these norms (0 to 1). `grad_alignment/...` is
        its cosine to the gradient of the block, which is their sum (-1 to 1): visits of one mind have 1.
        """
        logs: dict[str, float] = {}
        for block, products in self._products.items():
            if not products:
                continue
            gram = torch.stack([each.double().cpu() for each in products.values()]).sum(0)
            norms = gram.diagonal().clamp(min=0).sqrt()
            together = gram.sum().clamp(min=0).sqrt()
            cosines = gram.sum(1) / (norms * together).clamp(min=torch.finfo(torch.float64).tiny)
            shares = norms / norms.sum().clamp(min=torch.finfo(torch.float64).tiny)
            for what, values in (("norm", norms), ("share", shares), ("alignment", cosines)):
                pairs = zip(self._visits[block], values.tolist(), strict=True)
                logs |= {f"grad_{what}/{block}/layer_{i}": value for i, value in pairs}
        return logs

    def _watch(self, block: str, visit: int, layer: nn.Module, root_of: dict[str, str]) -> None:
        places: dict[nn.Module, list[tuple[nn.Module, str, str]]] = {layer: []}
        for name, root in root_of.items():
            if (slot := find_slot(self.model, name)) is not None:
                places[layer].append((*slot, root))
                places.setdefault(slot[0], []).append((*slot, root))
        # Re-entrant checkpointing computes a layer again without its own hooks: then those of the modules inside act.
        for module, slots in places.items():
            self._hook(block, visit, module, list(dict.fromkeys(slots)))

    def _hook(self, block: str, visit: int, module: nn.Module, slots: list[tuple[nn.Module, str, str]]) -> None:
        held: list[tuple[dict[str, Any], str, nn.Parameter]] = []

        def before(module: nn.Module, args: tuple[Any, ...]) -> None:
            for owner, attribute, root in slots:
                parameter = owner._parameters.get(attribute)
                if torch.is_grad_enabled() and isinstance(parameter, nn.Parameter) and parameter.requires_grad:
                    view = parameter.view_as(parameter)
                    view.register_hook(lambda grad, root=root: self._receive(block, visit, root, grad))
                    held.append((owner._parameters, attribute, parameter))
                    owner._parameters[attribute] = view

        def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            while held:
                parameters, attribute, parameter = held.pop()
                parameters[attribute] = parameter

        self._handles += [
            module.register_forward_pre_hook(before),
            module.register_forward_hook(after, always_call=True),
        ]

    def _receive(self, block: str, visit: int, root: str, grad: torch.Tensor) -> None:
        """Keep the gradient of one parameter in one visit; with those of all visits, their scalar products."""
        found = self._pending.setdefault(root, {})
        if visit in found:  # of an earlier pass, in which a visit had no gradient
            found.clear()
        found[visit] = whole(grad.detach()).clone()  # `.grad` may take the tensor itself, and add to it
        if len(found) == len(self._visits[block]):
            rows = torch.stack([found[i].float().flatten() for i in self._visits[block]])
            self._products[block][root] = rows @ rows.mT
            del self._pending[root]
