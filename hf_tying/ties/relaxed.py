"""Relaxed tie groups of a model: `gap`, `harden`, `relaxation_penalty`, and the extension that honours them.

A relaxed group is declared like any other, with `relax` beside its names:

    tie(model, {"embeddings": {"names": ["model.embed_tokens", "lm_head"], "relax": {"kind": "lora", "rank": 8}}})

Its root is tied exactly. Each other member is the root's parameter with a small difference of its own
(`relaxation.KINDS`). Files have the whole value of each member, so that any loader computes the same, and the numbers
of the differences beside them, so that this package reads the tie.
"""

from typing import Any, TypeVar

import torch
from torch import nn
from transformers.modeling_utils import PreTrainedModel

from ..config import TyingConfig, TyingError
from .anatomy import Anatomy
from .groups import explicit_groups, groups_held, make_groups
from .modeling import set_groups, ties_wait
from .plain_modules import hold
from .record import write_config
from .relaxation import KINDS, LowRank, make_exact, relax, relaxation_at, relaxed_names
from .slots import parameter_of
from .verify import tied_part

Model = TypeVar("Model", bound=nn.Module)


def gap(model: nn.Module) -> dict[str, dict[str, float]]:
    """The distance of each relaxed member from its root.

    Args:
        model: any tied model or module, also wrapped.

    Returns:
        For each relaxed group, by the names of its members, the norm of the difference as a share of the root's norm
        (Frobenius): 0 where a member equals its root.
    """
    part = tied_part(model)
    distances: dict[str, dict[str, float]] = {}
    with torch.no_grad():
        for group, root, name in relaxed_names(part):
            matrix = parameter_of(part, root).float()
            found = relaxation_at(part, name)
            assert found is not None
            norm = torch.linalg.vector_norm(found(parameter_of(part, root)).float())
            distances.setdefault(group, {})[name] = float(norm / torch.linalg.vector_norm(matrix).clamp(min=1e-30))
    return distances


def relaxation_penalty(model: nn.Module) -> torch.Tensor:
    """A term for the loss that draws relaxed members to their roots: the sum of the squared distances of `gap`.

    The root's norm counts as a constant, so that the term does not make the root larger.

    Args:
        model: any tied model or module, also wrapped.

    Returns:
        A scalar in float32, zero for a model without a relaxed group.

    Example:
        >>> loss = model(**batch).loss + 0.1 * relaxation_penalty(model)
    """
    part = tied_part(model)
    terms = []
    for _, root, name in relaxed_names(part):
        matrix, found = parameter_of(part, root), relaxation_at(part, name)
        assert found is not None
        scale = matrix.detach().float().square().sum().clamp(min=1e-30)
        terms.append(found(matrix).float().square().sum() / scale)
    return torch.stack(terms).sum() if terms else torch.zeros(())


def harden(model: Model) -> Model:
    """Tie relaxed groups exactly again, in place: each member is its root, and the differences are dropped.

    The model computes something else afterwards, as far as `gap` was above zero. To keep the differences as plain
    matrices, `untie` the members instead.

    Returns:
        The same model.
    """
    part = tied_part(model)
    if names := [name for _, _, name in relaxed_names(part)]:
        for name in names:
            make_exact(part, name)
        record_relaxed(part)
    return model


# --- the extension ---------------------------------------------------------------------------------------------------


def refuse_misfit(model: nn.Module, value: Any) -> None:
    """Refuse relaxed groups that `model` cannot have; `value` is the part of the entry that declares them.

    Raises:
        TyingError: for a low rank of parameters that are no matrices, and for a root that is relaxed itself.
    """
    for group, chain, settings in _chains(model, value, strict=True):
        root = parameter_of(model, chain[0])
        if relaxation_at(model, chain[0]) is not None:
            raise TyingError(
                f"Group {group!r} has the root {chain[0]!r}, which is relaxed in another group: expected a root that "
                "is tied exactly. Name the root of that group first, or harden(model)."
            )
        if settings["kind"] == "lora" and root.ndim < 2 and len(_chains_of(value, group, model)) == 1:
            raise TyingError(
                f"Group {group!r} cannot be relaxed by 'lora': {chain[0]!r} has the shape {tuple(root.shape)}, and "
                "a low rank needs a matrix. Use the kind 'scale'."
            )
        for name in chain[1:]:
            found = relaxation_at(model, name)
            if found is not None and found.settings != _settings(settings):
                raise TyingError(
                    f"{name!r} is relaxed already, by {found.settings}: expected to find it tied exactly or untied. "
                    "Call harden(model) or untie(model, names) first."
                )


def honour(model: nn.Module, value: Any, strict: bool = True) -> None:
    """Relax the members of groups as `value`, the part of the entry that declares them, says."""
    for _, (root, *members), settings in _chains(model, value, strict):
        parameter = parameter_of(model, root)
        first = next((found for name in members if (found := relaxation_at(model, name)) is not None), None)
        for name in members:
            if relaxation_at(model, name) is not None or settings["kind"] == "lora" and parameter.ndim < 2:
                continue
            relaxation = KINDS[settings["kind"]](parameter, **_options(settings))
            relaxation.active = not ties_wait()
            first = first or relaxation
            for key in relaxation.shared:
                relaxation._parameters[key] = first._parameters[key]
            relax(model, name, relaxation)


def values_before(model: nn.Module, config: TyingConfig) -> dict[str, torch.Tensor]:
    """The values of members that start from their own (`init="svd"`), before they are tied."""
    chains = _chains(model, config.declared_extensions().get("relax", {}), strict=True)
    return {
        name: parameter_of(model, name).detach().clone()
        for _, chain, settings in chains
        if settings.get("init") == "svd"
        for name in chain[1:]
    }


def fit_before(model: nn.Module, before: dict[str, torch.Tensor]) -> None:
    """Let low-rank differences approximate the values that their members had before they were tied."""
    for name, value in before.items():
        if isinstance(found := relaxation_at(model, name), LowRank):
            found.fit(value - parameter_of(model, name).detach())


def record_relaxed(model: nn.Module, save_format: str | None = None) -> None:
    """Record the relaxed groups of a live model, and what their differences share.

    Args:
        model: a model with `tie_groups`.
        save_format: form of its file. Default `None`: the default for the groups as they are now.
    """
    anatomy = Anatomy(model)
    groups = make_groups(anatomy, anatomy.tied, {group.name: list(group.names) for group in groups_held(model)})
    if isinstance(model, PreTrainedModel):
        set_groups(model, groups)
        write_config(model, save_format=save_format)
    else:
        hold(model, groups, save_format=save_format)


def _chains(model: nn.Module, value: Any, strict: bool) -> list[tuple[str, list[str], dict[str, Any]]]:
    """Group, names in this model with the root first, and settings; modules are expanded to their parameters."""
    names = {group: entry["names"] for group, entry in value.items()}
    found = explicit_groups(Anatomy(model), TyingConfig(groups=names), strict)
    settings_of = {group: entry["relax"] for group, entry in value.items()}
    chains = []
    for key, chain in found.items():
        group = next(g for g in names if key == g or key.startswith(f"{g}."))
        if len(chain) > 1:
            chains.append((group, chain, settings_of[group]))
    return chains


def _chains_of(value: Any, group: str, model: nn.Module) -> list[list[str]]:
    return [chain for _, chain, _ in _chains(model, {group: value[group]}, strict=True)]


def _options(settings: dict[str, Any]) -> dict[str, Any]:
    return {key: setting for key, setting in settings.items() if key not in ("kind", "init")}


def _settings(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings as `Relaxation.settings` gives them: with defaults, without what counts only at the start."""
    defaults = {"scale": {}, "lora": {"rank": 8}, "basis": {"filters": 2}}[settings["kind"]]
    given = defaults | {key: value for key, value in settings.items() if key != "init"}
    return {key: value for key, value in given.items() if value is not None}
