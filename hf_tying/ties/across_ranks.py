"""One question for all processes: an error of one is an error of all, and copies of a matrix are compared by digest.

Every function here is a collective: all processes of the group must call it. Without a group nothing is sent.
"""

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ..config import TyingError, entry_of
from .groups import TieGroup
from .sharding import is_dtensor, is_partitioned
from .slots import find_parameter


def rank_and_size() -> tuple[int, int]:
    """The rank of this process and the number of all; `(0, 1)` without a group."""
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def from_every_rank(value: Any) -> list:
    """What each process has given, in the order of ranks; small and picklable."""
    rank, size = rank_and_size()
    if size == 1:
        return [value]
    found = [None] * size
    dist.all_gather_object(found, value)
    return found


def on_any_rank(flag: bool, device: torch.device | str = "cpu") -> bool:
    """Whether any process has said yes: one number is sent, so that it may be asked at every step.

    Args:
        flag: of this process.
        device: where the backend of the group wants its tensors.
    """
    if rank_and_size()[1] == 1:
        return flag
    told = torch.tensor(int(flag), device=device)
    dist.all_reduce(told, op=dist.ReduceOp.MAX)
    return bool(told)


@contextmanager
def raised_on_every_rank() -> Iterator[None]:
    """Inside this context an error of one process is raised by all, with the ranks that it came from.

    Where it is no `TyingError`, the process that has it raises its own.
    """
    own = None
    try:
        yield
    except Exception as error:
        own = error
    ours = own is None or isinstance(own, TyingError)
    told = from_every_rank(None if own is None else str(own) if ours else f"{type(own).__name__}: {own}")
    if own is not None and (len(told) == 1 or not ours):
        raise own
    if lines := [f"rank {rank} of {len(told)}: {text}" for rank, text in enumerate(told) if text is not None]:
        raise TyingError("\n".join(lines)) from own


def differing_copies(model: nn.Module, groups: Iterable[TieGroup]) -> list[str]:
    """One sentence for each group whose matrix is held by several processes with different values.

    Shards are compared with those of the same place in the mesh; the shards of ZeRO-3 have no copies.
    """
    roots = [(group.name, find_parameter(model, group.root)) for group in groups]
    own = {name: (_place(root), digest(root)) for name, root in roots if root is not None and _is_here(root)}
    told = from_every_rank(own)
    problems = []
    for name in sorted({name for each in told for name in each}):
        values: dict[tuple, dict[str, list[int]]] = {}
        for rank, each in enumerate(told):
            if name in each:
                place, value = each[name]
                values.setdefault(place, {}).setdefault(value, []).append(rank)
        for copies in values.values():
            if len(copies) > 1:
                sides = " and ".join(f"one on {_ranks(ranks)}" for ranks in copies.values())
                problems.append(
                    f"group {name!r}: expected one value on all of {len(told)} ranks, found {len(copies)}: {sides}. "
                    "To make them one: wrap the model by Accelerate or DistributedDataParallel, which take those of "
                    "rank 0; in a run that was wrapped, load its last checkpoint."
                )
    return problems


def differing_declarations(model: nn.Module, groups: Iterable[TieGroup]) -> list[str]:
    """One sentence for each other declaration than that of rank 0: each by itself may hold.

    The stages of a pipeline have one config, and groups of their own.
    """
    own = entry_of(getattr(model, "config", None)) or {}
    if not hasattr(model, "_pp_stage"):
        own = own | {"groups": sorted(sorted(group.names) for group in groups)}
    told = from_every_rank(own)
    problems = []
    for rank, found in enumerate(told):
        keys = [key for key in sorted(found | told[0]) if found.get(key) != told[0].get(key)]
        if keys:
            differing = ", ".join(f"{key}={found.get(key)!r:.150}, not {told[0].get(key)!r:.150}" for key in keys)
            problems.append(
                f"expected one declaration on all of {len(told)} ranks, found on rank {rank} another one than on rank "
                f"0: {differing}. Call tie and untie alike on all ranks."
            )
    return problems


def digest(tensor: torch.Tensor) -> str:
    """SHA-256 of the values that this process holds of `tensor`."""
    held = tensor.to_local() if is_dtensor(tensor) else tensor
    values = held.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(values.numpy().data).hexdigest()


def _is_here(parameter: nn.Parameter) -> bool:
    return not parameter.is_meta and not is_partitioned(parameter)


def _place(parameter: torch.Tensor) -> tuple:
    """Which part of a matrix a process holds: its coordinates in those dimensions of a mesh that split it."""
    if not is_dtensor(parameter):
        return ()
    mesh = parameter.device_mesh
    return tuple(
        mesh.get_local_rank(dim) for dim, placement in enumerate(parameter.placements) if not placement.is_replicate()
    )


def _ranks(ranks: list[int], most: int = 8) -> str:
    more = f" and {len(ranks) - most} more" if len(ranks) > most else ""
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks[:most]))}{more}"
