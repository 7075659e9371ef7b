"""Where the parameters of a model lie on a mesh of processes, and the collectives that this takes in a step."""

import re
from collections.abc import Iterable
from math import prod

import torch
from torch import nn

from ..config import TyingError
from ..ties.anatomy import Anatomy
from ..ties.groups import TieGroup
from ..ties.sharding import shape_of, stock_name
from .collectives import Collective, joined, ring
from .plan_report import GroupPlan

_LAYER = re.compile(r"\.(?:layers?|h|blocks?)\.(\d+)\.")
_SPLITS = ("colwise", "rowwise", "embedding")  # the styles of transformers' tensor parallelism that split a matrix


class Placement:
    """Where the parameters of one model lie on one mesh.

    Args:
        anatomy: of the model.
        groups: of the model.
        sizes: of all axes.
        gather_dtype, reduce_dtype: see `parallel_plan`.
    """

    def __init__(
        self,
        anatomy: Anatomy,
        groups: Iterable[TieGroup],
        sizes: dict[str, int],
        gather_dtype: torch.dtype | None,
        reduce_dtype: torch.dtype | None,
    ) -> None:
        self.anatomy, self.sizes = anatomy, sizes
        self.gather_dtype, self.reduce_dtype = gather_dtype, reduce_dtype
        self.styles: dict[str, str] = getattr(anatomy.model, "tp_plan", None) or {}
        self.heads = {name for role, found in anatomy.roles.items() if role == "output" for name in found.names}
        self.groups = list(groups)
        whole = getattr(anatomy.model, "_no_split_modules", None) or ()
        self.units = [f"{path}." for path, module in anatomy.model.named_modules() if stock_name(module) in whole]
        # What holds a part of a tie is no unit (`parallel.fsdp2`).
        held = [{self.unit_of(name) for name in group.names} for group in self.groups]
        torn = {unit for units in held if len(units) > 1 for unit in units}
        self.units = [unit for unit in self.units if unit not in torn]
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

    def unit_of(self, name: str) -> str | None:
        """The layer that is an FSDP2 unit with a parameter, as Accelerate makes them; `None`: it is in the root's."""
        return next((unit for unit in self.units if name.startswith(unit)), None)

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
        shape, shards, trained = shape_of(parameter), self.sizes["fsdp"], parameter.requires_grad
        rows = shape[0] if shape else 1
        count = -(-rows // shards) * shards * (shape.numel() // max(rows, 1)) // parts  # shards have as many rows each
        gradient = count * (self.reduce_dtype or parameter.dtype).itemsize
        found = []
        if shards > 1:
            gathered = count * (self.gather_dtype or parameter.dtype).itemsize
            for what in ["forward"] if kept else ["forward", "backward"]:
                found.append(ring("all_gather", "fsdp", shards, gathered, f"weights, {what}"))
            if trained:
                found.append(ring("reduce_scatter", "fsdp", shards, gradient, "gradient"))
            gradient //= shards
        if trained and self.sizes["dp"] > 1:
            found.append(ring("all_reduce", "dp", self.sizes["dp"], gradient, "gradient"))
        if trained and len(stages) > 1:
            found.append(ring("all_reduce", "pp", len(stages), gradient, "gradient of the copies"))
        return tuple(found)

    # --- groups ------------------------------------------------------------------------------------------------------

    def group(self, group: TieGroup) -> GroupPlan:
        """The plan of one tie group."""
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
            parameters=shape_of(parameter).numel(),
            bytes=shape_of(parameter).numel() * parameter.element_size(),
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
        count = sum(shape_of(p).numel() for _, p in free)
        return GroupPlan(
            name="",
            names=(),
            roles=(),
            shape=(),
            parameters=count,
            bytes=sum(shape_of(p).numel() * p.element_size() for _, p in free),
            stages=tuple(range(self.sizes["pp"])),
            ranks=self.ranks(range(self.sizes["pp"])),
            copies=self.sizes["dp"],
            shards=prod(self.sizes.values()) // self.sizes["dp"],
            unit="layers" if self.sizes["fsdp"] > 1 else None,
            collectives=joined(max(self._by_stage(free), key=lambda found: sum(c.sent for c in found))),
        )

    def ranks(self, stages: Iterable[int]) -> tuple[int, ...]:
        """The processes of some pipeline stages."""
        each = prod(self.sizes.values()) // self.sizes["pp"]
        return tuple(stage * each + i for stage in stages for i in range(each))

    def sent_by_the_busiest(self, parts: Iterable[tuple[str, nn.Parameter]]) -> int:
        """Bytes that a rank sends for some parameters, on the stage that sends most."""
        return max(sum(c.sent for c in found) for found in self._by_stage(parts))

    def _by_stage(self, parts: Iterable[tuple[str, nn.Parameter]]) -> list[list[Collective]]:
        stages: list[list[Collective]] = [[] for _ in range(self.sizes["pp"])]
        for name, parameter in parts:
            stage = self.stage_of(name)
            # Of a model without ties, Accelerate makes one unit more of the input embedding, which is freed.
            freed = self.unit_of(name) or not self.groups and self.anatomy.role_of.get(name) in ("source", "target")
            stages[stage] += self.collectives(name, parameter, (stage,), kept=not freed)
        return stages

    def notes(self, plans: list[GroupPlan]) -> list[str]:
        """Sentences on what does not go together, or is not as the names of a group say."""
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
