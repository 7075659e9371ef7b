"""Where the shared factors of Tied-LoRA are: one module on the root of the model, of which layers use what is theirs.

PEFT's own place for something that belongs to an adapter and to no adapted layer is an `AuxiliaryTrainingWrapper`; as
one of these the shared factors are saved, left out of the base model's state dict, and deleted with the adapter. On
the root of the model they are also right for FSDP2, which keeps the root's parameters together during a whole step.
"""

import math
import weakref
from functools import partial

import torch
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from .config import TiedLoraConfig

#: The module on the root. The name must not contain the prefix "tied_lora_", by which PEFT knows adapter weights.
CONTAINER = "tied_matrices"


class Factor(nn.Module):
    """One factor that several modules share. It is used by calling it, so that hooks that bring weights are run.

    Args:
        shape: of the weight.
    """

    def __init__(self, *shape: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape))

    def forward(self, rows: int | None = None, columns: int | None = None, device=None) -> torch.Tensor:
        """The weight, or as much of it as a smaller module uses."""
        weight = self.weight[:rows, :columns] if rows or columns else self.weight
        return weight if device is None else weight.to(device)


class TiedMatrices(AuxiliaryTrainingWrapper):
    """All A, B and u of a model's Tied-LoRA adapters: `tied_lora_A[adapter][name]`, and so on.

    What is active and what is trained is said by the adapted layers, which PEFT always reaches.
    """

    adapter_layer_names = ("tied_lora_A", "tied_lora_B", "tied_lora_u")
    other_param_names = ("tied_lora_A", "tied_lora_B", "tied_lora_u")

    def __init__(self, adapter_name: str):
        super().__init__(nn.Identity(), adapter_name)

    def init_modules(self, adapter_name, **kwargs):
        self.tied_lora_A = nn.ModuleDict()
        self.tied_lora_B = nn.ModuleDict()
        self.tied_lora_u = nn.ModuleDict()
        # By adapter, name of A and name of u.
        self.slots: dict[tuple[str, str, str], InputSlot] = {}

    def update(self, adapter_name, **kwargs):
        super().update(adapter_name)
        for factors in self._all():
            if adapter_name not in factors:
                factors[adapter_name] = nn.ModuleDict()

    def _all(self) -> tuple[nn.ModuleDict, ...]:
        return self.tied_lora_A, self.tied_lora_B, self.tied_lora_u

    def factor(self, kind: str, adapter_name: str, name: str, shape: tuple[int, ...]) -> tuple[Factor, bool]:
        """A factor by its name, made on first use.

        Returns:
            The factor, and whether it is new.

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

    # What PEFT asks of an auxiliary module.

    def _get_available_adapters(self) -> set[str]:
        return set(self._adapters)

    def check_set_adapter(self, adapter_name):
        return None

    def set_adapter(self, adapter_names, inference_mode: bool = False) -> None:
        """Nothing: the layers say what is active, see `follow`."""

    def enable_adapters(self, enabled: bool) -> None:
        """Nothing: the layers say it, see `follow`."""

    def follow(self, active: list[str], disabled: bool) -> None:
        """Have the state that a layer has."""
        self._active_adapter = [name for name in active if name in self._adapters]
        self._disable_adapters = disabled

    def delete_adapter(self, adapter_name: str, new_active_adapters: list[str] | None) -> None:
        self._adapters.discard(adapter_name)
        for factors in self._all():
            if adapter_name in factors:
                del factors[adapter_name]
        self.slots = {key: slot for key, slot in self.slots.items() if key[0] != adapter_name}
        self._active_adapter = [name for name in new_active_adapters or [] if name in self._adapters]

    def adapter_state_dict(self, adapter_name, state_dict):
        return {}  # what is saved, and under which name, is said in one place: see `files`

    def adapter_state_dict_load_map(self, adapter_name):
        return {}

    def unload_and_optionally_merge_module(self, merge, safe_merge, adapter_names):
        # The layers are merged; this goes with its owner, see `TiedLoraModel._replace_module`.
        return self


class InputSlot:
    """`x A^T` for the modules of a layer that share A and, most often, x: computed by the first that asks.

    Each module takes a value at most once, so that none outlives the pass that made it: who comes again computes anew.
    """

    def __init__(self):
        self.members: set[str] = set()
        self._kept: tuple | None = None

    def take(self, member: str, x: torch.Tensor) -> torch.Tensor | None:
        """The value for the input `x`, if another module has just computed it."""
        if self._kept is None:
            return None
        source, state, waiting, value = self._kept
        if source() is not x or state != _state(x) or member not in waiting:
            return None
        waiting.discard(member)
        if not waiting:
            self._kept = None
        return value()

    def put(self, member: str, x: torch.Tensor, value: torch.Tensor) -> None:
        """Keep a value for the other members."""
        waiting = self.members - {member}
        # In training the graph keeps it, as long as it lives; a value kept here would keep the whole graph.
        value = weakref.ref(value) if value.requires_grad else partial(_same, value)
        self._kept = (weakref.ref(x), _state(x), waiting, value) if waiting else None

    # A copy has computed nothing yet; and what an unfinished pass has left cannot be copied.

    def __deepcopy__(self, memo):
        copied = type(self)()
        copied.members = set(self.members)
        return copied

    def __getstate__(self):
        return {"members": self.members, "_kept": None}


def _same(value):
    return value


def _state(x: torch.Tensor) -> tuple:
    """What, beside the object, must be the same for a value to be good for it."""
    kind = x.device.type
    autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    return None if x.is_inference() else x._version, torch.is_grad_enabled(), autocast


@torch.no_grad()
def initialise(factors: dict[str, nn.Parameter], config: TiedLoraConfig) -> None:
    """Give new factors their initial values: see `TiedLoraConfig`.

    Args:
        factors: by "A", "B", "u", "v"; those that are new among what one module uses.
        config: the adapter's settings.
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


def scaled(matrix: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
    """`diag(rows) matrix`; the matrix itself without rows."""
    return matrix if rows is None else matrix * rows.unsqueeze(-1)
