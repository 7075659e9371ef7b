"""What FSDP2 and DeepSpeed ZeRO-3 do to parameters: in which unit one lies, when its values are there, to gather them.

Neither is imported here: a model that they have sharded says so by its classes and its parameters.
"""

import math
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeGuard, cast

import torch
from torch import nn

from ..config import TyingError

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor


def is_dtensor(tensor: torch.Tensor | None) -> "TypeGuard[DTensor]":
    """Whether `tensor` is one of several processes (FSDP2, tensor parallel)."""
    return hasattr(tensor, "device_mesh")


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All values of `tensor`, also where each process has a part of them: then all processes must call it."""
    return tensor.full_tensor() if is_dtensor(tensor) else tensor


def is_in_units(model: nn.Module) -> bool:
    """Whether FSDP2 has sharded `model`."""
    fully_shard = sys.modules.get("torch.distributed.fsdp")
    unit = getattr(fully_shard, "FSDPModule", None)
    return unit is not None and any(isinstance(module, unit) for module in model.modules())


def stock_name(model: nn.Module) -> str:
    """The name of the class of `model`, which FSDP2 has changed."""
    return type(model).__name__.removeprefix("FSDP")


def refuse_in_parts(model: nn.Module, action: str, gathers: bool = False) -> None:
    """Refuse a change for which this process has to have every parameter whole.

    Args:
        model: any.
        action: verb, which the name of the model follows.
        gathers: whether the change gathers what ZeRO-3 has partitioned. Default `False`: that is refused too.

    Raises:
        TyingError: FSDP2, tensor parallelism or ZeRO-3 has split the model. With the way out.
    """
    if any(map(is_dtensor, model.parameters())):
        raise TyingError(
            f"Cannot {action} {stock_name(model)}: its parameters are split over processes. Expected a whole model: "
            f"{action} it before accelerator.prepare(model) or fully_shard(model), or load the saved one in one "
            "process, without distributed_config."
        )
    if not gathers and any(map(is_partitioned, model.parameters())):
        raise TyingError(
            f"Cannot {action} {stock_name(model)}: DeepSpeed ZeRO-3 has partitioned its parameters. Do it in one "
            "process and save the model; ZeRO-3 trains it from that folder."
        )


def is_row_split(tensor: torch.Tensor | None) -> bool:
    """Whether tensor parallelism has given each process a block of rows of `tensor`, on a mesh of one dimension."""
    if not is_dtensor(tensor) or tensor.device_mesh.ndim != 1:
        return False
    return tensor.placements[0].is_shard(0)


def row_parts(tensor: "DTensor") -> int:
    """Into how many parts the rows of `tensor` are cut, by all dimensions of its mesh together."""
    sizes = zip(tensor.device_mesh.shape, tensor.placements, strict=True)
    return math.prod(size for size, placement in sizes if getattr(placement, "dim", None) == 0)


def unit_of(model: nn.Module, name: str) -> nn.Module | None:
    """The FSDP2 unit in which the parameter `name` lies: its module, or the nearest one around it, that is a unit."""
    fully_shard = sys.modules.get("torch.distributed.fsdp")
    if fully_shard is None or not hasattr(fully_shard, "FSDPModule"):
        return None
    around = [model]
    for part in name.split(".")[:-1]:
        if not isinstance(inner := getattr(around[-1], part, None), nn.Module):
            return None
        around.append(inner)
    return next((module for module in reversed(around) if isinstance(module, fully_shard.FSDPModule)), None)


def torn_units(model: nn.Module, names: Iterable[str]) -> list[nn.Module]:
    """The FSDP2 units that hold one tied matrix, where they are several.

    transformers' own FSDP2 makes the units first and ties then. With Accelerate's a tie lies in one unit
    (`hf_tying.parallel.fsdp2`).
    """
    if not getattr(model, "_is_fsdp_managed_module", False):
        return []
    units = {id(unit): unit for name in names if (unit := unit_of(model, name)) is not None}
    return list(units.values()) if len(units) > 1 else []


def shown_as_shards(model: nn.Module, names: Iterable[str]) -> bool:
    """Let several units of one matrix free what a forward pass has gathered; whether there are several.

    While it is gathered, from an evaluation to the next backward pass, each unit shows a tensor of its own.
    """
    units = torn_units(model, names)
    for unit in units:
        unit.reshard()  # pyright: ignore[reportCallIssue]
    return bool(units)


def keep_whole(unit: nn.Module) -> None:
    """Let an FSDP2 unit keep its parameters whole from its forward to its backward pass, as the root does by default.

    A loss that is computed after the head's forward reads its matrix then.
    """
    cast("FSDPModule", unit).set_reshard_after_forward(False, recurse=False)


def shape_of(parameter: torch.Tensor) -> torch.Size:
    """The shape of the whole parameter, also where ZeRO-3 leaves this process an empty tensor."""
    return getattr(parameter, "ds_shape", parameter.shape)


def is_partitioned(parameter: torch.Tensor | None) -> bool:
    """Whether ZeRO-3 has partitioned `parameter`, and its values are not gathered now."""
    if parameter is None or not hasattr(parameter, "ds_id"):
        return False
    return parameter.numel() < getattr(parameter, "ds_numel", 0)


def refuse_engine(model: nn.Module, action: str) -> None:
    """Refuse what makes parameters, or other rows, in a model of which `deepspeed.initialize` has made an engine.

    Raises:
        TyingError: for a model that ZeRO-3 trains.
    """
    if any(hasattr(module, "ds_id") for module in model.modules()):
        raise TyingError(
            f"Cannot {action} a model that an engine of DeepSpeed ZeRO-3 has taken: it would not know the new "
            "parameters. Do it before deepspeed.initialize, or save the model and load it again."
        )


@contextmanager
def gathered(parameters: Iterable[torch.Tensor | None], write: bool = False) -> Iterator[None]:
    """Inside this context those of `parameters` that ZeRO-3 has partitioned are whole; all processes must enter it.

    Args:
        parameters: any; those that nobody has partitioned are left alone, and all where DeepSpeed is not loaded (the
            empty tensors of a pickle).
        write: whether they may be written to inside. Each process then keeps its part of what process 0 has written.
    """
    held = list({id(p): p for p in parameters if is_partitioned(p)}.values())
    deepspeed = sys.modules.get("deepspeed")
    if not held or deepspeed is None:
        yield
        return
    with deepspeed.zero.GatheredParameters(held, modifier_rank=0 if write else None):
        yield


def gather_for(module: nn.Module, parameters: Iterable[torch.Tensor]) -> None:
    """Let ZeRO-3 gather those of `parameters` that it has partitioned whenever `module` is used, forward and back."""
    for parameter in parameters:
        if hasattr(parameter, "ds_id"):
            sys.modules["deepspeed"].zero.register_external_parameter(module, parameter)


def data_parallel_size(model: nn.Module) -> int:
    """How many processes train copies of `model` on batches of their own.

    All do, except for those of one copy that is split by tensor parallelism or a pipeline (`distributed_config`).
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return 1
    config = getattr(getattr(model, "config", None), "distributed_config", None)
    parts = [getattr(config, f"{kind}_size", None) or 1 for kind in ("tp", "pp", "cp")]
    return max(1, torch.distributed.get_world_size() // math.prod(parts))


def linear_replaced_by() -> str | None:
    """What DeepSpeed has put in the place of `torch.nn.functional.linear`: a part of a sentence, or `None`."""
    if not torch.nn.functional.linear.__module__.startswith("deepspeed."):
        return None
    return (
        "DeepSpeed ZeRO-3 has replaced torch.nn.functional.linear by its own, which says nothing of its operands. Set "
        '"memory_efficient_linear": false in the "zero_optimization" of its config'
    )
