"""`diagnose`: comparison of the matrices of a model with those of an untied twin, with ranks and gradient shares."""

import json
import re
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text
from torch import nn
from transformers.modeling_utils import PreTrainedModel

from ..config import TyingError
from ..report.drawing import TIED, color_of_role, number_by_steps, plain, points_of
from ..report.names import printable, shortened, wrapped
from ..report.tables import Report
from ..ties.anatomy import roles
from ..ties.sharding import gathered, shape_of
from ..ties.slots import find_parameter
from ..ties.verify import groups_of, unwrapped
from .geometry import Alignment, alignment, effective_rank

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class MatrixDiagnosis:
    """The diagnosis of one matrix of a model.

    Args:
        name: name of its tie group, or its role if it is not tied.
        roles: roles of the matrix.
        shape: (V, D).
        effective_rank: effective rank, see `effective_rank`.
        alignment: `Alignment` to the twin's matrix of each role; empty without a twin.
        gradient_share: mean share of each role in the given logs, 0 to 1; empty without logs.
    """

    name: str
    roles: list[str]
    shape: list[int]
    effective_rank: float
    alignment: dict[str, Alignment] = field(default_factory=dict)
    gradient_share: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class RoleDiagnostics(Report):
    """The result of `diagnose`.

    The table has a row for each matrix and role. The picture shows the alignment to the twin's roles, the effective
    ranks, and the gradient shares over the steps.

    Args:
        matrices: a `MatrixDiagnosis` for each embedding matrix of the model.
        twin_effective_rank: effective rank of the twin's matrix of each role; empty without a twin.
        history: gradient shares of each `<name>/<role>`, as (step, share); empty without logs.
    """

    matrices: list[MatrixDiagnosis]
    twin_effective_rank: dict[str, float] = field(default_factory=dict)
    history: dict[str, list[tuple[int, float]]] = field(default_factory=dict)

    def to_dict(self) -> dict:
        """Return the report as plain types, ready for `json.dumps`."""
        return json.loads(json.dumps(asdict(self)))

    def to_logs(self) -> dict[str, float]:
        """Return `effective_rank/<name>`, and with a twin `alignment/<name>/<role>` and `neighbours/<name>/<role>`."""
        logs = {f"effective_rank/{matrix.name}": matrix.effective_rank for matrix in self.matrices}
        for matrix in self.matrices:
            logs |= {f"alignment/{matrix.name}/{role}": found.cosine for role, found in matrix.alignment.items()}
            logs |= {f"neighbours/{matrix.name}/{role}": found.neighbours for role, found in matrix.alignment.items()}
        return logs

    def _table(self, width: int) -> Table:
        table = Table(title="What each role does", box=SIMPLE_HEAD, pad_edge=False, padding=(0, 2, 0, 0))
        heads = ("matrix", "effective\nrank", "role", "twin's\nrank", "alignment", "neighbours", "gradient\nshare")
        for head in heads:
            table.add_column(head, justify="left" if head in ("matrix", "role") else "right", no_wrap=True)
        for matrix in self.matrices:
            rank = f"{matrix.effective_rank:.1f} of {min(matrix.shape, default=0)}"
            for i, role in enumerate(matrix.alignment or matrix.roles):
                found = matrix.alignment.get(role)
                table.add_row(
                    Text("\n".join(wrapped(printable(matrix.name), max(width - 66, 14))) if i == 0 else ""),
                    rank if i == 0 else "",
                    role,
                    _number(self.twin_effective_rank.get(role), 1),
                    _number(found and found.cosine),
                    _number(found and found.neighbours),
                    _number(matrix.gradient_share.get(role)),
                    end_section=i == len(matrix.alignment or matrix.roles) - 1,
                )
        return table

    def _draw(self, figure: "Figure") -> None:
        aligned = {
            f"{m.name} to twin's {role}": (role, found) for m in self.matrices for role, found in m.alignment.items()
        }
        ranks = {m.name: (m.effective_rank, [*m.roles]) for m in self.matrices}
        ranks |= {f"twin's {role}": (rank, [role]) for role, rank in self.twin_effective_rank.items()}
        panels = 1 + bool(aligned) + bool(self.history)
        rows = max(len(aligned) * 2, len(ranks), 4)
        figure.set_size_inches(4.6 * panels, 1.6 + 0.35 * rows)
        axes = list(figure.subplots(1, panels, squeeze=False)[0])
        if aligned:
            _draw_alignment(axes.pop(0), aligned)
        _draw_ranks(axes.pop(0), ranks)
        if self.history:
            _draw_shares(axes.pop(0), self.history)


def _draw_alignment(axes: "Axes", aligned: dict[str, tuple[str, Alignment]]) -> None:
    for y, (role, found) in enumerate(aligned.values()):
        color = color_of_role(role)
        axes.barh(y - 0.19, found.cosine, 0.36, color=color)
        axes.barh(y + 0.19, found.neighbours, 0.36, color="white", edgecolor=color, hatch="////")
    _name_rows(axes, list(aligned))
    axes.axvline(0, color="black", linewidth=0.6)
    axes.set(title="alignment to the untied twin", xlabel="cosine (solid), shared neighbours (hatched)")


def _draw_ranks(axes: "Axes", ranks: dict[str, tuple[float, list[str]]]) -> None:
    for y, (rank, roles_of) in enumerate(ranks.values()):
        axes.barh(y, rank, 0.7, color=color_of_role(roles_of[0]) if len(roles_of) == 1 else TIED)
    _name_rows(axes, list(ranks))
    axes.set(title="effective rank", xlabel="number of dimensions")


def _draw_shares(axes: "Axes", history: dict[str, list[tuple[int, float]]]) -> None:
    groups = list(dict.fromkeys(name.rpartition("/")[0] for name in history))
    styles = ("-", "--", ":", "-.")
    for name, points in history.items():
        group, _, role = name.rpartition("/")
        label = role if len(groups) == 1 else name
        axes.plot(
            [step for step, _ in points], [share for _, share in points], label=plain(shortened(printable(label), 30)),
            color=color_of_role(role), linestyle=styles[groups.index(group) % len(styles)], **points_of(len(points)),
        )  # fmt: skip
    axes.set(title="gradient by role", xlabel="step", ylabel="share of the gradient", ylim=(0, 1))
    number_by_steps(axes.xaxis, (step for points in history.values() for step, _ in points))
    axes.legend(fontsize=8)


def _name_rows(axes: "Axes", labels: list[str]) -> None:
    axes.set_yticks(range(len(labels)), [plain(shortened(printable(label), 34)) for label in labels], fontsize=8)
    axes.set_ylim(max(len(labels), 3) - 0.5, -0.5)  # a single bar is no block


def diagnose(
    model: nn.Module, twin: nn.Module | None = None, *, history: list[dict[str, Any]] | None = None, **options: Any
) -> RoleDiagnostics:
    """Compare the matrices of `model` with those of an untied twin.

    Args:
        model: a `PreTrainedModel`, tied or untied, also wrapped.
        twin: model of the same architecture and vocabulary, trained untied. Its matrices show what each role alone
            learns. Default `None`: nothing is compared.
        history: `trainer.state.log_history` of a run with `TyingCallback(log_roles=True)`, for the gradient shares.
            Default: no shares.
        **options: keywords of `alignment`: `method`, `neighbours`, `rows`, `sample`, `seed`.

    Returns:
        A `RoleDiagnostics`: `.to_dict()`, `.to_table()`, `.to_logs()`, `.plot(path)`.

    Raises:
        TyingError: the model has no embedding matrices, or the twin is tied itself or has another vocabulary.
        ValueError: see `alignment`.

    Example:
        >>> print(diagnose(tied, untied, history=trainer.state.log_history).to_table())
    """
    model = unwrapped(model)
    found, roles_of = _matrices(model)
    if not found:
        raise TyingError(f"{type(model).__name__} has no embedding matrix to diagnose.")
    twins = _twin_matrices(twin, found) if twin is not None else {}
    shares = gradient_shares(history or [])
    with gathered((*found.values(), *twins.values())):
        matrices = [
            MatrixDiagnosis(
                name=name,
                roles=roles_of[name],
                shape=list(matrix.shape),
                effective_rank=effective_rank(matrix),
                alignment={role: alignment(matrix, other, **options) for role, other in twins.items()},
                gradient_share={
                    role: sum(share for _, share in points) / len(points)
                    for role in roles_of[name]
                    if (points := shares.get(f"{name}/{role}"))
                },
            )
            for name, matrix in found.items()
        ]
        twin_ranks = {role: effective_rank(matrix) for role, matrix in twins.items()}
    return RoleDiagnostics(matrices, twin_ranks, shares)


def gradient_shares(history: list[dict[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    """Collect the gradient shares in the log history of a Trainer.

    Args:
        history: `trainer.state.log_history`.

    Returns:
        The (step, share) pairs of each `<group>/<role>`, in the order of the logs.
    """
    shares: dict[str, list[tuple[int, float]]] = {}
    for entry in history:
        for key, value in entry.items():
            if match := re.fullmatch("grad_share/(.+)", key):
                shares.setdefault(match[1], []).append((int(entry.get("step", 0)), float(value)))
    return shares


def _matrices(model: PreTrainedModel) -> tuple[dict[str, torch.Tensor], dict[str, list[str]]]:
    """The distinct matrices of a model, and the roles of each. A matrix is named after its tie group, or its role."""
    group_of = {name: group.name for group in groups_of(model) for name in group.names}
    found: dict[str, torch.Tensor] = {}
    roles_of: dict[str, list[str]] = {}
    for role, place in roles(model).items():
        parameter = find_parameter(model, place.name)
        if parameter is None:
            continue
        name = next((known for known, other in found.items() if other is parameter), None)
        if name is None:
            name = group_of.get(place.name, role)
            name = role if name in found else name
        found[name] = parameter
        roles_of.setdefault(name, []).append(role)
    return found, roles_of


def _twin_matrices(twin: nn.Module, found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    twins, roles_of = _matrices(unwrapped(twin))
    tied = [f"{name!r} ({' and '.join(of)})" for name, of in roles_of.items() if len(of) > 1]
    if tied:
        raise TyingError(
            f"The twin's matrix {tied[0]} is tied itself: expected a model whose roles were trained apart, "
            "tie_word_embeddings=False or untie(model) before its training."
        )
    by_role = {roles_of[name][0]: matrix for name, matrix in twins.items()}
    words = {shape_of(matrix)[0] for matrix in (*found.values(), *by_role.values())}
    if len(words) > 1:
        raise TyingError(f"Model and twin have matrices of {sorted(words)} rows: expected one vocabulary for all.")
    return by_role


def _number(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
