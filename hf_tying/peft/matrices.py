"""The shared factors of Tied-LoRA, which one module on the root of the model holds for all layers.

PEFT has `AuxiliaryTrainingWrapper` for parts of an adapter outside its adapted layers. As such a module, the shared
factors are saved, left out of the base model's state dict, and deleted with the adapter. The root of the model is also
the right place for FSDP2, which keeps the root's parameters together during a whole step.
"""

import math
import weakref
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import torch
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from .config import TiedLoraConfig
from .sharing import FactorNames

#: Name of the module on the root. It must not contain "tied_lora_", by which PEFT recognises adapter weights.
CONTAINER = "tied_matrices"


class Factor(nn.Module):
    """A factor that several modules share. Call it to use it, so that hooks that load or gather weights run.

    Args:
        *shape: shape of the weight.
    """

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape))

    def forward(
        self, rows: int | None = None, columns: int | None = None, device: torch.device | str | None = None
    ) -> torch.Tensor:
        """Return the weight, or the part of it that a smaller module uses.

        Args:
            rows: number of the first rows to use. Default: all.
            columns: number of the first columns to use. Default: all.
            device: device of the result. Default: that of the weight.
        """
        weight = self.weight
        if type(self) is not Factor or not isinstance(weight, nn.Parameter):
            # FSDP has gathered it for this call only, and frees it afterwards (FSDP2 changes the class of the module,
            # FSDP1 puts a view in the place of the parameter).
            weight = weight.clone()
        weight = weight[:rows, :columns] if rows or columns else weight
        return weight if device is None else weight.to(device)


class TiedMatrices(AuxiliaryTrainingWrapper):
    """All A, B and u of a model's Tied-LoRA adapters: `tied_lora_A[adapter][name]`, and so on.

    PEFT always calls the adapted layers, so they determine which adapter is active and which factors are trained.

    Args:
        adapter_name: name of the first adapter.
    """

    adapter_layer_names = ("tied_lora_A", "tied_lora_B", "tied_lora_u")
    other_param_names = ("tied_lora_A", "tied_lora_B", "tied_lora_u")

    def __init__(self, adapter_name: str) -> None:
        super().__init__(nn.Identity(), adapter_name)

    def init_modules(self, adapter_name: str, **kwargs: Any) -> None:
        """Make empty containers. PEFT's constructor calls this."""
        self.tied_lora_A = nn.ModuleDict()
        self.tied_lora_B = nn.ModuleDict()
        self.tied_lora_u = nn.ModuleDict()
        # The key is the adapter, the name of A and the name of u.
        self.slots: dict[tuple[str, str, str], InputSlot] = {}

    def update(self, adapter_name: str, **kwargs: Any) -> None:
        """Add an adapter without factors."""
        super().update(adapter_name)
        for factors in self._all_factors():
            if adapter_name not in factors:
                factors[adapter_name] = nn.ModuleDict()

    def _all_factors(self) -> tuple[nn.ModuleDict, ...]:
        return self.tied_lora_A, self.tied_lora_B, self.tied_lora_u

    def factor(self, kind: str, adapter_name: str, name: str, shape: tuple[int, ...]) -> tuple[Factor, bool]:
        """Find a factor by its name, or make it.

        Args:
            kind: "A", "B" or "u".
            adapter_name: name of the adapter.
            name: name of the factor.
            shape: shape of the factor.

        Returns:
            The factor, and whether it is new. The values of a new factor are not set yet.

        Raises:
            ValueError: a factor of that name has another shape.
        """
        factors = getattr(self, f"tied_lora_{kind}")[adapter_name]
        if name in factors:
            found = tuple(factors[name].weight.shape)
            if found != shape:
                raise ValueError(f"The {kind} named {name!r} of adapter {adapter_name!r} is {found}, not {shape}.")
            return factors[name], False
        factors[name] = Factor(*shape)
        return factors[name], True

    # The interface of PEFT's auxiliary modules.

    def _get_available_adapters(self) -> set[str]:
        return set(self._adapters)

    def check_set_adapter(self, adapter_name: str | list[str]) -> None:
        """Accept any adapter, because `set_adapter` does nothing."""
        return None

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Do nothing, because the layers determine which adapter is active (see `follow`)."""

    def enable_adapters(self, enabled: bool) -> None:
        """Do nothing, because the layers determine whether adapters are enabled (see `follow`)."""

    def follow(self, active: list[str], disabled: bool) -> None:
        """Copy the state of a layer.

        Args:
            active: names of the active adapters.
            disabled: whether adapters are disabled.
        """
        self._active_adapter = [name for name in active if name in self._adapters]
        self._disable_adapters = disabled

    def delete_adapter(self, adapter_name: str, new_active_adapters: list[str] | None) -> None:
        """Delete an adapter with its factors."""
        self._adapters.discard(adapter_name)
        for factors in self._all_factors():
            if adapter_name in factors:
                del factors[adapter_name]
        self.slots = {key: slot for key, slot in self.slots.items() if key[0] != adapter_name}
        self._active_adapter = [name for name in new_active_adapters or [] if name in self._adapters]

    def adapter_state_dict(self, adapter_name: str, state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return nothing, because `TiedLoraModel` saves all factors of an adapter by the names of `tensor_names`."""
        return {}

    def adapter_state_dict_load_map(self, adapter_name: str) -> dict[str, str]:
        """Return nothing, because `TiedLoraModel` converts the names of all factors."""
        return {}

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> Self:
        """Return the module itself. Only layers are merged; `TiedLoraModel._replace_module` removes this module."""
        return self


class InputSlot:
    """A cache of `x A^T` for the modules of one layer that share A, and usually x.

    The first module computes the value, and the others take it. Each module takes a value at most once, and computes
    it again after that. So no value is kept longer than the forward pass that computed it.
    """

    def __init__(self) -> None:
        self.members: set[str] = set()
        self._kept: tuple | None = None

    def take(self, member: str, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor | None:
        """Take the value that another module has computed for the same input and the same A.

        Args:
            member: name of the module.
            x: input, `(..., in_features)`.
            weight: A, `(r, in_features)`.

        Returns:
            The value, `(..., r)`, or `None` if there is none.
        """
        if self._kept is None:
            return None
        source, matrix, state, waiting, value = self._kept
        same = source() is x and matrix() is weight and state == _state(x, weight)
        if not same or member not in waiting:
            return None
        waiting.discard(member)
        if not waiting:
            self._kept = None
        return value()

    def put(self, member: str, x: torch.Tensor, weight: torch.Tensor, value: torch.Tensor) -> None:
        """Keep a value for the other members as long as `x` exists.

        Args:
            member: name of the module that computed it.
            x: input, `(..., in_features)`.
            weight: A, `(r, in_features)`.
            value: `x A^T`, `(..., r)`.
        """
        waiting = self.members - {member}
        # In training the graph keeps the value alive, and a strong reference here would keep the whole graph alive. If
        # saved tensors are packed (checkpointing, offloading), the graph keeps neither the value nor `x` alive.
        weak = value.requires_grad and not _saved_tensors_are_packed()
        value = weakref.ref(value) if weak else partial(_same, value)
        source, matrix = weakref.ref(x, self._forget), weakref.ref(weight)
        self._kept = (source, matrix, _state(x, weight), waiting, value) if waiting else None

    def _forget(self, source: weakref.ref) -> None:
        if self._kept is not None and self._kept[0] is source:
            self._kept = None

    # A copy starts empty, because weak references cannot be copied.

    def __deepcopy__(self, memo: dict[int, Any]) -> "InputSlot":
        copied = type(self)()
        copied.members = set(self.members)
        return copied

    def __getstate__(self) -> dict[str, Any]:
        return {"members": self.members, "_kept": None}


@dataclass
class LayerFactors:
    """The shared factors that one layer uses, for one adapter.

    It refers to the places of modules, not to the modules or their parameters. FSDP1 puts another module into a place,
    and PEFT replaces parameters when it casts them and when it loads them with `low_cpu_mem_usage`.

    Args:
        names: names of the factors.
        places: dict that holds each factor, and the factor's name in it, by "A", "B" and, if there is a u, "u".
        slot: cache of `x A^T`, which all modules with the same A and u use.
        scaling: factor of the update, `alpha / r`.
        trained: kinds of factors that the adapter trains, among "A", "B" and "u".
    """

    names: FactorNames
    places: dict[str, tuple[nn.ModuleDict, str]]
    slot: InputSlot
    scaling: float
    trained: frozenset[str]

    def factor(self, kind: str) -> Factor | None:
        """Return a factor.

        Args:
            kind: "A", "B" or "u".

        Returns:
            The factor, or `None` for a u of 1.
        """
        holder, name = self.places.get(kind, (None, ""))
        return None if holder is None else holder[name]

    A, B, u = (property(lambda self, kind=kind: self.factor(kind)) for kind in "ABu")

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "places" not in state:  # a pickle of 0.1 has the factors themselves
            found = {kind: state.pop(kind) for kind in "ABu"}
            state["places"] = {kind: ({"": factor}, "") for kind, factor in found.items() if factor is not None}
        self.__dict__.update(state)


def _same(value: torch.Tensor) -> torch.Tensor:
    return value


def _state(x: torch.Tensor, weight: torch.Tensor) -> tuple:
    """The versions and modes that must be unchanged for a kept value to be valid, besides the object `x` itself."""
    kind = x.device.type
    autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    versions = [None if tensor.is_inference() else tensor._version for tensor in (x, weight)]
    return *versions, torch.is_grad_enabled(), autocast


def _saved_tensors_are_packed() -> bool:
    """Whether autograd saves tensors in another form, by `torch.autograd.graph.saved_tensors_hooks`.

    Torch has no public function for this. A version without the private one only shares less.
    """
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return top is not None and top(True) is not None


@torch.no_grad()
def initialise_factors(factors: dict[str, nn.Parameter], config: TiedLoraConfig) -> None:
    """Give new factors the initial values that `TiedLoraConfig` describes.

    Args:
        factors: new factors of one module, by "A", "B", "u" and "v".
        config: settings of the adapter.
    """
    starts_at_zero = next(kind for kind in "BvuA" if getattr(config, f"train_{kind}")) if config.init_weights else None
    for kind, weight in factors.items():
        if kind == starts_at_zero:
            nn.init.zeros_(weight)
        elif kind in "AB":
            nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
        elif not config.init_weights:
            nn.init.normal_(weight)
        else:
            nn.init.constant_(weight, config.u_initial if kind == "u" else 1.0)


def scale_rows(matrix: torch.Tensor, factors: torch.Tensor | None) -> torch.Tensor:
    """Compute `diag(factors) matrix`.

    Args:
        matrix: (rows, columns).
        factors: (rows,), or `None` for 1.
    """
    return matrix if factors is None else matrix * factors.unsqueeze(-1)
