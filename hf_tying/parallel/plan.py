"""`parallel_plan`: where each tied matrix lies when a model is trained on many processes, and what keeps it one."""

import json
import os
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from math import prod
from typing import TYPE_CHECKING

import torch
import transformers
from rich.table import Table
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    PreTrainedModel,
)

from ..config import TyingError, nearest
from ..report.tables import Report
from ..ties.anatomy import Anatomy
from ..ties.groups import TieGroup
from ..ties.sharding import shape_of
from ..ties.slots import find_slot
from ..ties.verify import groups_of, unwrapped

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: The dimensions of a mesh, the outermost first: pipeline stages, copies (DDP, HSDP), shards (FSDP2), tensor parallel.
AXES = ("pp", "dp", "fsdp", "tp")
_LAYER = re.compile(r"\.(?:layers?|h|blocks?)\.(\d+)\.")
_SPLITS = ("colwise", "rowwise", "embedding")  # the styles of transformers' tensor parallelism that split a matrix


@dataclass(frozen=True)
class Collective:
    """One collective of a training step.

    Attributes:
        kind: `"all_reduce"`, `"all_gather"` or `"reduce_scatter"`.
        axis: of the mesh.
        ranks: how many take part.
        payload: bytes of the whole tensor, on each of them.
        sent: bytes that each of them sends, in a ring.
        what: what is sent.
    """

    kind: str
    axis: str
    ranks: int
    payload: int
    sent: int
    what: str


@dataclass(frozen=True)
class GroupPlan:
    """One tie group on a mesh; or, with an empty name, all parameters that are tied to nothing.

    Attributes:
        name: of the group.
        names: of the parameters; none for what is not tied.
        roles: those that the names have.
        shape: of the matrix; none for what is not tied.
        parameters, bytes: of the whole, once.
        stages: the pipeline stages that hold a copy.
        ranks: the processes that hold a copy or a part of one.
        copies: how many whole copies all of them hold together.
        shards: how many parts a copy is split into.
        unit: the FSDP2 unit that it lies in; `None` without that axis.
        styles: of tensor parallelism, by name; empty without that axis.
        collectives: those of one step that gather it, and keep its copies one.
    """

    name: str
    names: tuple[str, ...]
    roles: tuple[str, ...]
    shape: tuple[int, ...]
    parameters: int
    bytes: int
    stages: tuple[int, ...]
    ranks: tuple[int, ...]
    copies: int
    shards: int
    unit: str | None
    styles: dict[str, str] = field(default_factory=dict)
    collectives: tuple[Collective, ...] = ()

    @property
    def sent(self) -> int:
        """Bytes that a rank sends for it in a step."""
        return sum(collective.sent for collective in self.collectives)


@dataclass(frozen=True)
class ParallelPlan(Report):
    """What `parallel_plan` gives.

    Attributes:
        architecture: the model's class.
        mesh: from each axis to its size, the outermost first.
        groups: the tie groups, then what is tied to nothing.
        sent: bytes that a rank sends in a step for its parameters and their gradients, of the stage that sends most.
        sent_untied: the same if each name had a matrix of its own.
        notes: sentences on what does not go together.
    """

    architecture: str
    mesh: dict[str, int]
    groups: list[GroupPlan]
    sent: int
    sent_untied: int
    notes: list[str]

    def to_dict(self) -> dict:
        """All of it, in plain types."""
        return asdict(self) | {"world_size": prod(self.mesh.values())}

    def to_json(self) -> str:
        """`to_dict` as JSON."""
        return json.dumps(self.to_dict(), indent=2)

    def _table(self, width: int) -> Table:
        mesh = ", ".join(f"{axis}={size}" for axis, size in self.mesh.items()) or "one process"
        notes = "".join(f"\n{note}" for note in self.notes)
        table = Table(
            title=f"{self.architecture} on {prod(self.mesh.values())} processes ({mesh})",
            caption=f"A rank sends {_size(self.sent)} in a step; untied {_size(self.sent_untied)}.{notes}",
            title_justify="left",
            caption_justify="left",
        )
        for heading in ("group", "names", "MiB", "copies", "ranks", "unit, style", "in a step"):
            table.add_column(heading, overflow="fold")
        for group in self.groups:
            styles = sorted(set(group.styles.values()))
            table.add_row(
                group.name or "not tied",
                "\n".join(group.names[:4]) + (f"\nand {len(group.names) - 4} more" if len(group.names) > 4 else ""),
                f"{group.bytes / 2**20:,.2f}",
                f"{group.copies}" + (f" in {group.shards} parts" if group.shards > 1 else ""),
                _ranges(group.ranks),
                ", ".join([*filter(None, [group.unit]), *styles]) or "-",
                "\n".join(f"{c.kind} over {c.axis}={c.ranks}: {_size(c.sent)} ({c.what})" for c in group.collectives)
                or "-",
            )
        return table

    def _draw(self, figure: "Figure") -> None:
        """A bar for each group: the bytes that a rank sends for it in a step, by collective."""
        figure.set_size_inches(8, 1.5 + 0.6 * len(self.groups))
        axes = figure.subplots()
        colours = {"all_reduce": "tab:blue", "all_gather": "tab:green", "reduce_scatter": "tab:orange"}
        for row, group in enumerate(self.groups):
            left = 0.0
            for collective in group.collectives:
                width = collective.sent / 2**20
                axes.barh(row, width, left=left, color=colours[collective.kind], edgecolor="white")
                left += width
        axes.set_yticks(range(len(self.groups)), [group.name or "not tied" for group in self.groups])
        axes.invert_yaxis()
        axes.set_xlabel("MiB that a rank sends in a step")
        axes.set_title(f"{self.architecture}, {', '.join(f'{axis}={size}' for axis, size in self.mesh.items())}")
        kinds = [kind for kind in colours if any(c.kind == kind for group in self.groups for c in group.collectives)]
        axes.legend(handles=[axes.barh(0, 0, color=colours[kind], label=kind) for kind in kinds])


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
        model: a `PreTrainedModel`, also wrapped; or the folder of a saved one, or its id on the Hub, of which the
            config alone is read.
        mesh: sizes by axis: `pp` pipeline stages, `dp` copies (DDP; with `fsdp`, replicas), `fsdp` shards, `tp` parts
            of a matrix. Ranks count through `tp` first, then `fsdp`, `dp`, `pp`. An axis that is left out has size 1.
        gather_dtype: in which FSDP2 gathers parameters. Default `None`: their own.
        reduce_dtype: in which gradients are summed. Default `None`: the parameters' own.

    Raises:
        TyingError: for an unknown axis, a size below 1, more stages than layers, or an encoder-decoder with stages.

    Example:
        >>> print(parallel_plan("meta-llama/Llama-3.2-1B", {"dp": 64}))
    """
    model = unwrapped(model) if isinstance(model, nn.Module) else _empty_model(model)
    sizes = _checked(mesh)
    anatomy = Anatomy(model)
    place = _Placement(anatomy, sizes, gather_dtype, reduce_dtype)
    groups = groups_of(model)
    tied = {name for group in groups for name in group.names}
    free = {name: p for name, p in anatomy.slots.items() if name not in tied and find_slot(model, name) is not None}
    free = {id(p): (name, p) for name, p in free.items()}.values()
    plans = [place.group(group) for group in groups]
    if free:
        plans.append(place.rest(free))
    parts = [(name, anatomy.slots[group.root]) for group in groups for name in _used(anatomy, group)]
    return ParallelPlan(
        architecture=type(model).__name__,
        mesh={axis: size for axis, size in sizes.items() if size > 1},
        groups=plans,
        sent=max(sum(plan.sent for plan in plans if stage in plan.stages) for stage in range(sizes["pp"])),
        sent_untied=place.sent_by_the_busiest([*parts, *free]),
        notes=place.notes(plans),
    )


def _empty_model(source: str | os.PathLike[str]) -> PreTrainedModel:
    """The model of a config, on the meta device: of the class that it names, or of an Auto class that has one."""
    config = AutoConfig.from_pretrained(source)
    named = (getattr(transformers, name, None) for name in getattr(config, "architectures", None) or ())
    with torch.device("meta"):
        if (architecture := next(filter(None, named), None)) is not None:
            return architecture(config)
        for auto in (AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModelForMaskedLM, AutoModel):
            with suppress(ValueError):  # it has no class for this config
                return auto.from_config(config)
    raise TyingError(f"{source}: transformers has no model for a config of type {config.model_type!r}.")


def _checked(mesh: Mapping[str, int]) -> dict[str, int]:
    for axis, size in mesh.items():
        if axis not in AXES:
            raise TyingError(f"mesh={dict(mesh)}: unknown axis {axis!r}{nearest(axis, AXES)}; expected {list(AXES)}.")
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise TyingError(f"mesh={dict(mesh)}: expected a number of processes from 1 for {axis!r}, found {size!r}.")
    return {axis: mesh.get(axis, 1) for axis in AXES}


def _used(anatomy: Anatomy, group: TieGroup) -> list[str]:
    """The names of a group that would be matrices of their own in an untied model."""
    return [name for name in group.names if name not in anatomy.carriers] or [group.root]


class _Placement:
    """Where the parameters of one model lie on one mesh.

    Args:
        anatomy: of the model.
        sizes: of all axes.
        gather_dtype, reduce_dtype: see `parallel_plan`.
    """

    def __init__(
        self,
        anatomy: Anatomy,
        sizes: dict[str, int],
        gather_dtype: torch.dtype | None,
        reduce_dtype: torch.dtype | None,
    ) -> None:
        self.anatomy, self.sizes = anatomy, sizes
        self.gather_dtype, self.reduce_dtype = gather_dtype, reduce_dtype
        self.styles: dict[str, str] = getattr(anatomy.model, "tp_plan", None) or {}
        self.heads = {name for role, found in anatomy.roles.items() if role == "output" for name in found.names}
        self.layers = 1 + max((int(m[1]) for name in anatomy.slots if (m := _LAYER.search(name))), default=-1)
        if sizes["pp"] > 1 and getattr(anatomy.model.config, "is_encoder_decoder", False):
            raise TyingError(
                f"mesh: {type(anatomy.model).__name__} has an encoder and a decoder, and transformers cuts no such "
                "model into pipeline stages: expected pp=1."
            )
        if sizes["pp"] > max(1, self.layers):
            raise TyingError(f"mesh: pp={sizes['pp']} stages, and the model has {self.layers} layers: expected fewer.")

    # --- one parameter -----------------------------------------------------------------------------------------------

    def stage_of(self, name: str) -> int:
        """The pipeline stage of a parameter, as transformers cuts a model.

        Embeddings are on the first, the rest of what is no layer on the last, layers are spread evenly.
        """
        last = self.sizes["pp"] - 1
        if match := _LAYER.search(name):
            return min(int(match[1]) // (self.layers // self.sizes["pp"]), last)
        return 0 if self.anatomy.role_of.get(name) in ("source", "target") else last

    def style_of(self, name: str) -> str | None:
        """The style of tensor parallelism that the model has for a parameter, or for its module."""
        if self.sizes["tp"] == 1:
            return None
        generic = re.sub(r"\.\d+(?=\.|$)", ".*", name)
        return self.styles.get(generic) or self.styles.get(generic.rpartition(".")[0])

    def collectives(
        self, name: str, parameter: nn.Parameter, stages: tuple[int, ...], kept: bool
    ) -> tuple[Collective, ...]:
        """Those of one step for one parameter.

        Args:
            name: of the parameter.
            parameter: the parameter itself.
            stages: that hold a copy.
            kept: whether FSDP2 keeps it whole from the forward to the backward pass.
        """
        parts = self.sizes["tp"] if _is_split(self.style_of(name)) else 1
        count, trained = parameter.numel() // parts, parameter.requires_grad
        gradient = count * (self.reduce_dtype or parameter.dtype).itemsize
        found = []
        if (shards := self.sizes["fsdp"]) > 1:
            gathered = count * (self.gather_dtype or parameter.dtype).itemsize
            for what in ["forward"] if kept else ["forward", "backward"]:
                found.append(_collective("all_gather", "fsdp", shards, gathered, f"weights, {what}"))
            if trained:
                found.append(_collective("reduce_scatter", "fsdp", shards, gradient, "gradient"))
            gradient //= shards
        if trained and self.sizes["dp"] > 1:
            found.append(_collective("all_reduce", "dp", self.sizes["dp"], gradient, "gradient"))
        if trained and len(stages) > 1:
            found.append(_collective("all_reduce", "pp", len(stages), gradient, "gradient of the copies"))
        return tuple(found)

    # --- groups ------------------------------------------------------------------------------------------------------

    def group(self, group: TieGroup) -> GroupPlan:
        parameter = self.anatomy.slots[group.root]
        stages = tuple(sorted({self.stage_of(name) for name in group.names}))
        styles = {name: style for name in group.names if (style := self.style_of(name))}
        # The tie makes one matrix of it, split as the name with a style says.
        name = next(iter(styles), group.root)
        shards = (self.sizes["tp"] if _is_split(styles.get(name)) else 1) * self.sizes["fsdp"]
        ranks = self.ranks(stages)
        return GroupPlan(
            name=group.name,
            names=group.names,
            roles=tuple(dict.fromkeys(self.anatomy.role_of[n] for n in group.names if n in self.anatomy.role_of)),
            shape=tuple(shape_of(parameter)),
            parameters=parameter.numel(),
            bytes=parameter.numel() * parameter.element_size(),
            stages=stages,
            ranks=ranks,
            copies=len(ranks) // shards,
            shards=shards,
            unit="root" if self.sizes["fsdp"] > 1 else None,
            styles=styles,
            collectives=self.collectives(name, parameter, stages, kept=True),
        )

    def rest(self, free: Iterable[tuple[str, nn.Parameter]]) -> GroupPlan:
        """What is tied to nothing, in one line: the collectives of the stage that sends most."""
        count = sum(p.numel() for _, p in free)
        return GroupPlan(
            name="",
            names=(),
            roles=(),
            shape=(),
            parameters=count,
            bytes=sum(p.numel() * p.element_size() for _, p in free),
            stages=tuple(range(self.sizes["pp"])),
            ranks=self.ranks(range(self.sizes["pp"])),
            copies=self.sizes["dp"],
            shards=prod(self.sizes.values()) // self.sizes["dp"],
            unit="layers" if self.sizes["fsdp"] > 1 else None,
            collectives=_joined(max(self._by_stage(free), key=lambda found: sum(c.sent for c in found))),
        )

    def ranks(self, stages: Iterable[int]) -> tuple[int, ...]:
        each = prod(self.sizes.values()) // self.sizes["pp"]
        return tuple(stage * each + i for stage in stages for i in range(each))

    def sent_by_the_busiest(self, parts: Iterable[tuple[str, nn.Parameter]]) -> int:
        return max(sum(c.sent for c in found) for found in self._by_stage(parts))

    def _by_stage(self, parts: Iterable[tuple[str, nn.Parameter]]) -> list[list[Collective]]:
        stages: list[list[Collective]] = [[] for _ in range(self.sizes["pp"])]
        for name, parameter in parts:
            stage = self.stage_of(name)
            kept = name in self.heads or not _LAYER.search(name) and name not in self.anatomy.role_of
            stages[stage] += self.collectives(name, parameter, (stage,), kept)
        return stages

    def notes(self, plans: list[GroupPlan]) -> list[str]:
        notes = []
        for plan in plans:
            if plan.name and len(plan.stages) > 1:
                notes.append(
                    f"Group {plan.name!r} has copies on stages {list(plan.stages)}. The pipeline of transformers runs "
                    "no backward pass, and a training step of it is refused; an engine that has one must sum their "
                    "gradients in every step."
                )
            if plan.styles and len(plan.styles) < len(plan.names):
                notes.append(f"Group {plan.name!r}: tensor parallelism splits it as {next(iter(plan.styles))!r}.")
        if self.sizes["tp"] > 1 and not self.styles:
            notes.append(f"{type(self.anatomy.model).__name__} has no plan for tensor parallelism: nothing is split.")
        return notes


def _is_split(style: str | None) -> bool:
    return style is not None and any(kind in style for kind in _SPLITS)


def _collective(kind: str, axis: str, ranks: int, payload: int, what: str) -> Collective:
    rounds = 2 if kind == "all_reduce" else 1
    return Collective(kind, axis, ranks, payload, rounds * (ranks - 1) * payload // ranks, what)


def _joined(found: Iterable[Collective]) -> tuple[Collective, ...]:
    """One for each kind, axis and purpose, with the bytes of all."""
    sums: dict[tuple, list[int]] = {}
    for c in found:
        totals = sums.setdefault((c.kind, c.axis, c.ranks, c.what), [0, 0])
        totals[0] += c.payload
        totals[1] += c.sent
    return tuple(
        Collective(kind, axis, n, payload, sent, what) for (kind, axis, n, what), (payload, sent) in sums.items()
    )


def _ranges(ranks: tuple[int, ...]) -> str:
    """`0-3, 8` for the numbers 0, 1, 2, 3, 8."""
    parts: list[list[int]] = []
    for rank in ranks:
        if parts and rank == parts[-1][-1] + 1:
            parts[-1][-1:] = [rank] if len(parts[-1]) > 1 else [parts[-1][0], rank]
        else:
            parts.append([rank])
    return ", ".join("-".join(map(str, part)) for part in parts)


def _size(count: int) -> str:
    return f"{count / 2**30:,.2f} GiB" if count >= 2**30 else f"{count / 2**20:,.2f} MiB"
