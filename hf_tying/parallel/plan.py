"""`parallel_plan`: where each tied matrix lies when a model is trained on many processes, and what keeps it one."""

import os
from collections.abc import Mapping
from contextlib import suppress
from math import prod

import torch
import transformers
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    PreTrainedConfig,
    PreTrainedModel,
)

from ..config import TyingError, nearest
from ..report.opening import open_source
from ..ties.anatomy import Anatomy
from ..ties.groups import TieGroup
from ..ties.sharding import stock_name
from ..ties.verify import groups_of, unwrapped
from .placement import Placement
from .plan_report import ParallelPlan

#: The dimensions of a mesh, the outermost first: pipeline stages, copies (DDP, HSDP), shards (FSDP2), tensor parallel.
AXES = ("pp", "dp", "fsdp", "tp")
_MOST = 2**20  # processes: each has its number in a plan


def parallel_plan(
    model: nn.Module | str | os.PathLike[str],
    mesh: Mapping[str, int],
    *,
    gather_dtype: torch.dtype | None = None,
    reduce_dtype: torch.dtype | None = None,
) -> ParallelPlan:
    """Where each tied matrix of `model` lies on a mesh of processes, what keeps its copies one, and what that costs.

    Bytes are those of parameters and gradients in one optimizer step; activations are not counted. Rings send
    `(n - 1) / n` of a tensor for a gather or a scatter, and twice that for an all-reduce. What FSDP2 gathers and frees
    it gathers again in the backward pass; the root and a kept unit are gathered once. Nothing is run, so a model on
    the meta device is enough.

    Args:
        model: a `PreTrainedModel`, also wrapped; or the folder of a saved one, or
            `owner/name[@revision][/subfolder]` on the Hub, of which the config alone is read, and the dtype there.
        mesh: sizes by axis: `pp` pipeline stages, `dp` copies (DDP; with `fsdp`, replicas), `fsdp` shards, `tp` parts
            of a matrix. Ranks count through `tp` first, then `fsdp`, `dp`, `pp`. An axis that is left out has size 1.
        gather_dtype: in which FSDP2 gathers parameters. Default `None`: their own.
        reduce_dtype: in which gradients are summed. Default `None`: the parameters' own.

    Raises:
        TyingError: the config cannot be read or makes no model; an unknown axis, a size below 1, more stages than
            layers, or an encoder-decoder with stages.

    Example:
        >>> print(parallel_plan("meta-llama/Llama-3.2-1B", {"dp": 64}))
    """
    model = unwrapped(model) if isinstance(model, nn.Module) else _empty_model(model)
    sizes = checked_mesh(mesh)
    anatomy = Anatomy(model)
    groups = groups_of(model)
    place = Placement(anatomy, groups, sizes, gather_dtype, reduce_dtype)
    tied = {name for group in groups for name in group.names}
    free = {id(p): (name, p) for name, p in anatomy.slots.items() if name not in tied}.values()
    plans = [place.group(group) for group in groups]
    if free:
        plans.append(place.rest(free))
    parts = [(name, anatomy.slots[group.root]) for group in groups for name in _used(anatomy, group)]
    # Untied, other modules are FSDP2 units; a carrier stays tied to the embedding that it carries.
    carrying = [group for group in groups if not anatomy.carriers.isdisjoint(group.names)]
    apart = Placement(anatomy, carrying, sizes, gather_dtype, reduce_dtype)
    return ParallelPlan(
        architecture=stock_name(model),
        mesh={axis: size for axis, size in sizes.items() if size > 1},
        groups=plans,
        sent=max(sum(plan.sent for plan in plans if stage in plan.stages) for stage in range(sizes["pp"])),
        sent_untied=apart.sent_by_the_busiest([*parts, *free]),
        notes=place.notes(plans),
    )


def _empty_model(source: str | os.PathLike[str]) -> PreTrainedModel:
    """The model of a config, on the meta device: of the class that it names, or of an Auto class that has one."""
    opened = open_source(os.fspath(source))
    if not opened.has("config.json"):
        raise TyingError(f"{str(source)!r} has no config.json: expected a folder that save_pretrained wrote.")
    fields = opened.json("config.json")
    kind = fields.pop("model_type", None)
    if kind not in transformers.CONFIG_MAPPING:
        raise TyingError(f"config.json in {source} has model_type {kind!r:.80}, which transformers does not have.")
    try:
        config = AutoConfig.for_model(kind, **fields)
        model = _of_config(config, source)
        if isinstance(config.dtype, torch.dtype):  # as from_pretrained has it
            nn.Module.to(model, config.dtype)
        return model
    except TyingError:
        raise
    except Exception as error:  # what classes of configs and models raise of fields that are not theirs
        reason = " ".join(str(error).split())
        raise TyingError(f"config.json in {source} makes no model: {reason:.300}") from error


def _of_config(config: PreTrainedConfig, source: str | os.PathLike[str]) -> PreTrainedModel:
    named = (getattr(transformers, name, None) for name in getattr(config, "architectures", None) or ())
    with torch.device("meta"):
        if (architecture := next(filter(None, named), None)) is not None:
            return architecture(config)
        for auto in (AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModelForMaskedLM, AutoModel):
            with suppress(ValueError):  # it has no class for this config
                return auto.from_config(config)
    raise TyingError(f"{source}: transformers has no model for a config of type {config.model_type!r}.")


def checked_mesh(mesh: Mapping[str, int]) -> dict[str, int]:
    """The sizes of all axes.

    Raises:
        TyingError: an unknown axis, or a size that no processes have.
    """
    if not isinstance(mesh, Mapping):
        raise TyingError(f"mesh={mesh!r}: expected sizes by axis, such as {{'dp': 8, 'tp': 2}}.")
    for axis, size in mesh.items():
        if axis not in AXES:
            hint = nearest(str(axis), AXES)
            raise TyingError(f"mesh={dict(mesh)}: unknown axis {axis!r}{hint}; expected {list(AXES)}.")
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise TyingError(f"mesh={dict(mesh)}: expected a number of processes from 1 for {axis!r}, found {size!r}.")
    if prod(mesh.values()) > _MOST:
        raise TyingError(f"mesh={dict(mesh)}: expected at most {_MOST:,} processes together.")
    return {axis: mesh.get(axis, 1) for axis in AXES}


def _used(anatomy: Anatomy, group: TieGroup) -> list[str]:
    """The names of a group that would be matrices of their own in an untied model."""
    return [name for name in group.names if name not in anatomy.carriers] or [group.root]
