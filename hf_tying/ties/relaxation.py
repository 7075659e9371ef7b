"""Relaxed members of a tie: a place that holds the shared parameter, and adds a small difference of its own.

The tie stays a tie: one `nn.Parameter` in every place. A relaxed place gives its module `parameter + difference`
instead, where the difference is made of few numbers and is zero at the start. So a model that is just relaxed
computes what it computed before, bit for bit.

The module gets a subclass with a property in front of the attribute, and a child `<attribute>_relaxation` with the
parameters of the difference. Names of parameters, state dicts and ties stay what they were.
"""

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, SupportsIndex

import torch
from torch import nn

from .depth_groups import SUFFIX
from .sharding import gathered, is_dtensor, is_partitioned, shape_of
from .slots import find_slot, parameter_of


class Relaxation(nn.Module, ABC):
    """The difference between a relaxed place and its root.

    Args:
        root: the shared parameter. Shape, dtype and device are taken from it.
        bound: largest norm of the difference, as a share of the root's norm (Frobenius). A larger difference is
            scaled down to it. Default `None`: no bound but that of the kind.
    """

    kind: str
    #: The parameter of this place in which the difference is linear.
    linear: str
    #: Names of parameters that all relaxed places of a group share.
    shared: tuple[str, ...] = ()

    def __init__(self, root: torch.Tensor, bound: float | None = None) -> None:
        super().__init__()
        self.bound = bound
        #: `False` while a file is read into the model: loaders need the parameter itself.
        self.active = True

    @abstractmethod
    def difference(self, root: torch.Tensor) -> torch.Tensor:
        """The difference before it is bounded, of the shape of `root`."""

    @property
    def settings(self) -> dict[str, Any]:
        """What a `relax` entry says of this relaxation."""
        return {"kind": self.kind} | ({} if self.bound is None else {"bound": self.bound})

    @abstractmethod
    def reset_parameters(self) -> None:
        """Make the difference zero."""

    def start(self) -> None:
        """Make the difference zero, also where ZeRO-3 has partitioned its parameters; from now on it acts."""
        with gathered(self._parameters.values(), write=True):
            self.reset_parameters()
        self.active = True

    @abstractmethod
    def resize(self, rows: int) -> None:
        """Follow a root with another number of rows. New rows have no difference."""

    def forward(self, root: torch.Tensor) -> torch.Tensor:
        """The difference, of the shape of `root`, with its bound."""
        difference = self.difference(root)
        return difference if self.bound is None else difference * self._share_left(root, difference)

    def _share_left(self, root: torch.Tensor, difference: torch.Tensor) -> torch.Tensor:
        """The factor by which the bound scales the difference down."""
        wide = torch.promote_types(difference.dtype, torch.float32)
        norm = torch.linalg.vector_norm(difference, dtype=wide)
        most = self.bound * torch.linalg.vector_norm(root.detach(), dtype=wide)
        return (most / norm.clamp(min=most).clamp(min=torch.finfo(wide).tiny)).to(difference.dtype)

    @torch.no_grad()
    def apply_bound(self, root: torch.Tensor) -> None:
        """Scale the parameters as the bound does, so that the difference stays when the root gets a larger norm."""
        if self.bound is not None:
            self._parameters[self.linear].mul_(self._share_left(root, self.difference(root)))


class Scale(Relaxation):
    """`kind="scale"`: each row has a factor of its own, `diag(1 + s) W`.

    `offset` is s, of shape (rows,).
    """

    kind = "scale"
    linear = "offset"

    def __init__(self, root: torch.Tensor, bound: float | None = None) -> None:
        super().__init__(root, bound)
        self.offset = nn.Parameter(torch.empty(shape_of(root)[0], dtype=root.dtype, device=root.device))
        self.reset_parameters()

    def difference(self, root: torch.Tensor) -> torch.Tensor:
        """`diag(s) W`."""
        return self.offset.reshape(-1, *[1] * (root.ndim - 1)) * root

    def reset_parameters(self) -> None:
        """Make the difference zero."""
        nn.init.zeros_(self.offset)

    def resize(self, rows: int) -> None:
        """Follow a root with another number of rows."""
        self.offset = _with_rows(self.offset, rows, 0)


class LowRank(Relaxation):
    """`kind="lora"`: a product of two thin matrices, `W + B A` (Hu et al. 2021, section 4.1, with alpha = rank).

    `lora_A` is (rank, columns) and `lora_B` (rows, rank); more than two dimensions count as columns.
    """

    kind = "lora"
    linear = "lora_B"

    def __init__(self, root: torch.Tensor, rank: int, bound: float | None = None) -> None:
        super().__init__(root, bound)
        rows, *columns = shape_of(root)
        self.lora_A = nn.Parameter(torch.empty(rank, math.prod(columns), dtype=root.dtype, device=root.device))
        self.lora_B = nn.Parameter(torch.empty(rows, rank, dtype=root.dtype, device=root.device))
        self.reset_parameters()

    def difference(self, root: torch.Tensor) -> torch.Tensor:
        """`B A`."""
        return (self.lora_B @ self.lora_A).reshape(root.shape)

    @property
    def settings(self) -> dict[str, Any]:
        """What a `relax` entry says of this relaxation."""
        return super().settings | {"rank": shape_of(self.lora_A)[0]}

    def reset_parameters(self) -> None:
        """Make the difference zero."""
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B)

    def resize(self, rows: int) -> None:
        """Follow a root with another number of rows."""
        self.lora_B = _with_rows(self.lora_B, rows, 0)

    def fit(self, residual: torch.Tensor) -> None:
        """Take the best approximation of `residual` of this rank (truncated SVD: Eckart & Young 1936).

        So Relaxed Recursive Transformers (Bae et al. 2024, section 3) start from trained layers.
        """
        rank, exact = shape_of(self.lora_A)[0], residual.detach().reshape(residual.shape[0], -1).double()
        left, values, right = torch.linalg.svd(exact, full_matrices=False)
        rank, root = min(rank, values.numel()), values.sqrt()
        with torch.no_grad(), gathered((self.lora_A, self.lora_B), write=True):
            self.lora_B.zero_()[:, :rank] = left[:, :rank] * root[:rank]
            self.lora_A.zero_()[:rank] = root[:rank, None] * right[:rank]


class Basis(Relaxation):
    """`kind="basis"`: a sum of a few shared filters with coefficients of this place, `W + c_0 W + sum_k c_k F_k`.

    This is the relaxed weight sharing of approximately equivariant networks (Wang, Walters & Yu 2022, section 4).
    `filters` (count, *shape of the root) is one parameter in all relaxed places of the group; `coefficients`
    (count + 1,) are of this place.
    """

    kind = "basis"
    linear = "coefficients"
    shared = ("filters",)

    def __init__(self, root: torch.Tensor, filters: int, bound: float | None = None) -> None:
        super().__init__(root, bound)
        self.filters = nn.Parameter(torch.empty(filters, *shape_of(root), dtype=root.dtype, device=root.device))
        self.coefficients = nn.Parameter(torch.empty(filters + 1, dtype=root.dtype, device=root.device))
        self.reset_parameters()

    def difference(self, root: torch.Tensor) -> torch.Tensor:
        """`c_0 W + sum_k c_k F_k`."""
        return self.coefficients[0] * root + torch.tensordot(self.coefficients[1:], self.filters, dims=1)

    @property
    def settings(self) -> dict[str, Any]:
        """What a `relax` entry says of this relaxation."""
        return super().settings | {"filters": shape_of(self.filters)[0]}

    def reset_parameters(self) -> None:
        """Make the difference zero."""
        columns = max(math.prod(self.filters.shape[2:]), 1)
        nn.init.normal_(self.filters, std=columns**-0.5)
        nn.init.zeros_(self.coefficients)

    def resize(self, rows: int) -> None:
        """Follow a root with another number of rows."""
        if shape_of(self.filters)[1] != rows:  # a shared one may be resized already
            self.filters = _with_rows(self.filters, rows, 1)


#: The classes of `config.RELAXATIONS`.
KINDS: dict[str, type[Relaxation]] = {relaxation.kind: relaxation for relaxation in (Scale, LowRank, Basis)}


def _with_rows(parameter: nn.Parameter, rows: int, dim: int) -> nn.Parameter:
    """`parameter` with `rows` along `dim`; additional ones are zero."""
    with gathered((parameter,)):
        kept = min(rows, parameter.shape[dim])
        shape = [*parameter.shape]
        shape[dim] = rows
        new = parameter.detach().new_zeros(shape)
        new.narrow(dim, 0, kept).copy_(parameter.detach().narrow(dim, 0, kept))
    return nn.Parameter(new, requires_grad=parameter.requires_grad)


# --- places ----------------------------------------------------------------------------------------------------------


def relaxation_at(model: nn.Module, name: str) -> Relaxation | None:
    """The relaxation of the place `name`; `None` where it is tied exactly, or is not there."""
    slot = find_slot(model, name)
    found = slot[0]._modules.get(slot[1] + SUFFIX) if slot else None
    return found if isinstance(found, Relaxation) else None


def relaxed_names(model: nn.Module) -> list[tuple[str, str, str]]:
    """Group, root and name of each relaxed place in the tie groups of `model`."""
    return [
        (group.name, group.root, name)
        for group in getattr(model, "tie_groups", ())
        for name in group.names
        if relaxation_at(model, name) is not None
    ]


def relax_entries(model: nn.Module) -> dict[str, dict[str, Any]]:
    """The `relax` entries of the groups of `model`, by the groups' names."""
    entries = {}
    for group in getattr(model, "tie_groups", ()):
        found = {name: relaxation_at(model, name) for name in group.aliases}
        exact = [name for name, relaxation in found.items() if relaxation is None]
        if relaxation := next((each for each in found.values() if each is not None), None):
            entries[group.name] = relaxation.settings | ({"exact": exact} if exact else {})
    return entries


def relax(model: nn.Module, name: str, relaxation: Relaxation) -> None:
    """Relax the place `name` by `relaxation`."""
    slot = find_slot(model, name)
    assert slot is not None, name
    module, attribute = slot
    module._modules[attribute + SUFFIX] = relaxation.train(module.training)
    module.__class__ = _relaxed(type(module), attribute)


def make_exact(model: nn.Module, name: str) -> Relaxation | None:
    """Take the relaxation of the place `name` off: its module uses the shared parameter itself. Returns it."""
    relaxation = relaxation_at(model, name)
    if relaxation is None:
        return None
    slot = find_slot(model, name)
    assert slot is not None, name
    module, attribute = slot
    del module._modules[attribute + SUFFIX]
    stock, attributes = stock_class(type(module))
    module.__class__ = functools.reduce(_relaxed, (each for each in attributes if each != attribute), stock)
    return relaxation


def value_at(model: nn.Module, name: str) -> torch.Tensor:
    """What the module of `name` works with: the parameter, with the difference of a relaxed place."""
    slot = find_slot(model, name)
    assert slot is not None, name
    module, attribute = slot
    value = module._parameters[attribute]
    assert value is not None, name
    relaxation = relaxation_at(model, name)
    if relaxation is None:
        return value
    with gathered((value, *relaxation._parameters.values())):
        return value + relaxation.forward(value)


@contextmanager
def resized(model: nn.Module) -> Iterator[None]:
    """Let members be plain tied parameters inside this context, and follow their root's number of rows after it."""
    places = [(root, name, relaxation_at(model, name)) for _, root, name in relaxed_names(model)]
    held = [place for place in places if place[2] is not None and place[2].active]  # not again inside this context
    for root, _, relaxation in held:
        assert relaxation is not None
        of_root = parameter_of(model, root)
        with gathered((of_root, *relaxation._parameters.values()), write=True):
            relaxation.apply_bound(of_root)
        relaxation.active = False
    try:
        yield
    finally:
        first: dict[int, Any] = {}
        for root, name, relaxation in held:
            assert relaxation is not None
            shared = {key: id(relaxation._parameters[key]) for key in relaxation.shared}
            for key, old in shared.items():
                relaxation._parameters[key] = first.get(old, relaxation._parameters[key])
            relaxation.resize(parameter_of(model, root).shape[0])
            first |= {old: relaxation._parameters[key] for key, old in shared.items()}
            if relaxation_at(model, name) is not relaxation:  # its module was replaced
                relax(model, name, relaxation)
            relaxation.active = True


@functools.cache
def _relaxed(cls: type[nn.Module], attribute: str) -> type[nn.Module]:
    """`cls` whose `attribute` is its parameter with the difference added. The name of the class stays."""

    def value(self: nn.Module) -> torch.Tensor | None:
        parameter, relaxation = self._parameters.get(attribute), self._modules.get(attribute + SUFFIX)
        if parameter is None or relaxation is None or not relaxation.active or parameter.is_meta:
            return parameter  # without a value yet, or offloaded: who asks now fills the place
        sharded = is_dtensor(parameter) and any(map(is_dtensor, relaxation._parameters.values()))
        if sharded or is_partitioned(parameter):
            return parameter  # both are in parts, and gathered for a step: who asks now looks for a name
        return parameter + relaxation(parameter)

    def reduce(self: nn.Module, protocol: SupportsIndex) -> tuple[Any, ...]:
        # Pickle finds classes by name, and under this name it would find the stock class.
        return _revive, stock_class(type(self)), object.__reduce_ex__(self, protocol)[2]

    body = {
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
        "__reduce_ex__": reduce,
        "_relaxed_class": cls,
        "_relaxed_attribute": attribute,
        attribute: property(value),
    }
    return type(cls.__name__, (cls,), body)


def stock_class(cls: type[nn.Module]) -> tuple[type[nn.Module], tuple[str, ...]]:
    """The class without relaxations, and the attributes that are relaxed, the last one last."""
    own = vars(cls)
    if "_relaxed_class" not in own:
        return cls, ()
    stock, attributes = stock_class(own["_relaxed_class"])
    return stock, (*attributes, own["_relaxed_attribute"])


def _revive(stock: type[nn.Module], attributes: tuple[str, ...]) -> nn.Module:
    """Make the object of a pickle. Pickles find this function by its name in this module, so it must stay here."""
    cls = functools.reduce(_relaxed, attributes, stock)
    return cls.__new__(cls)
