"""What one forward pass uses of a model's matrices over a vocabulary: facts, found by watching it."""

import copy
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from .zoo_configs import vocabulary_sizes

_LOOKUPS = {
    "embedding",
    "index",
    "index_select",
    "gather",
    "_unsafe_index",
    "_embedding_bag",
    "_embedding_bag_forward_only",
}
_PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "addmv", "mv", "dot", "linear", "matmul", "convolution", "_convolution",
             "mkldnn_rnn_layer", "_grouped_mm"}  # fmt: skip


@dataclass
class Uses:
    """Names of parameters over a vocabulary, by what a forward pass did with them.

    Args:
        lookups: their rows were looked up by word ids, with the inputs that held these ids.
        products: a product with them has the vocabulary in its shape, and reaches the model's output.
        dead_products: such a product that reaches no output.
        others: used in another way, with the names of the operations.
        idle: used by nothing.
    """

    lookups: dict[str, set[str]] = field(default_factory=dict)
    products: set[str] = field(default_factory=set)
    dead_products: set[str] = field(default_factory=set)
    others: dict[str, set[str]] = field(default_factory=dict)
    idle: set[str] = field(default_factory=set)


def separate(model: PreTrainedModel) -> None:
    """Give every name of every parameter in `model` a parameter of its own, in place, also where two paths hold one
    module."""
    seen: set[int] = set()
    for path, module in list(model.named_modules(remove_duplicate=False)):
        if id(module) in seen and path:
            parent, _, child = path.rpartition(".")
            twin = copy.copy(module)
            twin._parameters = dict(module._parameters)
            twin._modules = dict(module._modules)
            model.get_submodule(parent)._modules[child] = twin
        seen.add(id(module))
    for _, module in model.named_modules(remove_duplicate=False):
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(parameter.detach().clone(), parameter.requires_grad)


class _Watch(TorchDispatchMode):
    """Follows parameters through views, casts and sums, until they meet something that depends on the input."""

    def __init__(self, slots: dict[str, nn.Parameter], ids: dict[str, set[int]]):
        super().__init__()
        self.ids = ids
        self.fed: dict[str, set[str]] = {}
        self.origins = {parameter.untyped_storage()._cdata: {name} for name, parameter in slots.items()}
        self.sizes = {name: parameter.shape for name, parameter in slots.items()}
        self.kept = []
        self.uses: dict[str, list[tuple[str, tuple]]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        operation = func._schema.name.split("::")[1].rstrip("_") if hasattr(func, "_schema") else str(func)
        given = _tensors((args, kwargs or {}))
        origins = [(tensor, self.origins.get(tensor.untyped_storage()._cdata)) for tensor in given if _plain(tensor)]
        parameters = {name for _, names in origins if names for name in names}
        if not parameters:
            return result
        results = [tensor for tensor in _tensors(result) if _plain(tensor)]
        met = any(names is None and tensor.dim() for tensor, names in origins)
        if met or operation in _LOOKUPS or operation in _PRODUCTS:
            shape = tuple(results[0].shape) if results else ()
            for name in parameters:
                self.uses.setdefault(name, []).append((operation, shape))
                if operation in _LOOKUPS:
                    self.fed.setdefault(name, set()).update(self.sources(given))
        else:
            for tensor in results:
                self.origins[tensor.untyped_storage()._cdata] = parameters
                self.kept.append(tensor)
        return result

    def sources(self, given: list[torch.Tensor]) -> set[str]:
        """The inputs that hold the ids of a lookup."""
        indices = [tensor for tensor in given if not tensor.is_floating_point() and tensor.dtype != torch.bool]
        values = {int(value) for tensor in indices for value in tensor.unique()}
        return {name for name, ids in self.ids.items() if values & ids and len(values - ids) <= len(values & ids)}


def _plain(tensor: torch.Tensor) -> bool:
    return tensor.layout == torch.strided and tensor.device.type != "meta"


def _tensors(tree) -> list[torch.Tensor]:
    if isinstance(tree, torch.Tensor):
        return [tree]
    if isinstance(tree, dict):
        tree = tree.values()
    if isinstance(tree, (list, tuple, type({}.values()))):
        return [tensor for item in tree for tensor in _tensors(item)]
    return []


def used(model: PreTrainedModel, inputs: dict) -> Uses:
    """What one forward pass of `model` does with each of its matrices over a vocabulary.

    Every name is given a parameter of its own before (in a copy), so that the use of a tied matrix goes to the name
    that used it. Products "reach" the output if the output has a gradient with respect to them.

    Args:
        model: a model of the zoo; left as it is.
        inputs: of one forward pass.
    """
    model = copy.deepcopy(model)
    separate(model)
    slots = dict(model.named_parameters(remove_duplicate=False))
    sizes = set(vocabulary_sizes(model.config).values())
    for slot in slots.values():
        if slot.is_floating_point():
            slot.requires_grad_(True)
    ids = {
        name: set(value.unique().tolist())
        for name, value in inputs.items()
        if isinstance(value, torch.Tensor) and value.dtype == torch.long and name.endswith("input_ids")
    }
    uses, fed, reaching = _watched(model, inputs, slots, ids)
    over = {name for name, slot in slots.items() if is_over(slot, sizes) or _is_longer(slot, sizes) and fed.get(name)}
    found = Uses()
    for name in sorted(over):
        if name not in uses:
            found.idle.add(name)
        for operation, shape in uses.get(name, []):
            if operation in _LOOKUPS:
                found.lookups[name] = fed[name]
            elif operation in _PRODUCTS and sizes & {slots[name].shape[0], slots[name].shape[-1]} & set(shape):
                (found.products if name in reaching else found.dead_products).add(name)
            else:
                found.others.setdefault(name, set()).add(f"{operation} -> {shape}")
    return found


def is_over(parameter: torch.Tensor, sizes: set[int]) -> bool:
    """Whether `parameter` is a matrix with one row, or one column, for each entry of a vocabulary."""
    return parameter.dim() >= 2 and bool(sizes & {parameter.shape[0], parameter.shape[-1]})


def _is_longer(parameter: torch.Tensor, sizes: set[int]) -> bool:
    """Whether `parameter` can be a vocabulary with some more rows, of images or of prompts."""
    return parameter.dim() == 2 and bool(sizes) and parameter.shape[0] > min(sizes)


def _watched(model, inputs, slots, ids) -> tuple[dict, dict, set[str]]:
    """Uses by name, input names of the lookups by name, and the names that reach the output: all names where a model
    cannot be run with gradients."""
    try:
        with _Watch(slots, ids) as watch:
            output = model(**inputs)
        return watch.uses, watch.fed, _reaching(output, slots)
    except (AssertionError, RuntimeError):
        with torch.no_grad(), _Watch(slots, ids) as watch:
            model(**inputs)
        return watch.uses, watch.fed, set(slots)


def _reaching(output, slots: dict[str, nn.Parameter]) -> set[str]:
    slots = {name: slot for name, slot in slots.items() if slot.requires_grad}
    ends = [tensor for tensor in _tensors(output) if tensor.is_floating_point() and tensor.requires_grad]
    if not ends or not slots:
        return set()
    generator = torch.Generator().manual_seed(2)
    total = sum((end.float() * torch.rand(end.shape, generator=generator)).sum() for end in ends)
    gradients = torch.autograd.grad(total, list(slots.values()), allow_unused=True)
    return {name for name, gradient in zip(slots, gradients, strict=True) if gradient is not None and gradient.any()}
