"""Changes of ties during training: untie, or freeze one role, and keep the optimizer consistent."""

import copy

import torch
from torch import nn
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import logging

from ..config import TyingConfig, TyingError
from ..ties.groups import TieGroup
from ..ties.modeling import TiedModelMixin
from ..ties.slots import find_parameter, named_slots
from ..ties.tying import tie, untie
from ..ties.verify import groups_of
from .roles import names_of_role

logger = logging.get_logger(__name__)


def untie_trained(
    model: PreTrainedModel, optimizer: torch.optim.Optimizer, names: list[str] | None = None
) -> PreTrainedModel:
    """Untie names between two steps of `optimizer`, and give the optimizer the new copies with their state.

    The first name keeps its `nn.Parameter`. Each copy is put into the same parameter group (learning rate, weight
    decay, values of a scheduler), with a copy of the optimizer's state: moments, momentum, step count. So all of them
    take the step that an untied model with this state would take. In its group, a copy has the place that it has in
    `model.parameters()`. An optimizer that is made later for the untied model, as in a resumed run, can therefore load
    the state dict of this one.

    Args:
        model: any `PreTrainedModel`, unwrapped, between two steps (no gradients).
        optimizer: optimizer of the tied matrices, unless they are frozen; also wrapped by Accelerate.
        names: names to untie, see `untie`. Default: all.

    Returns:
        The same model.

    Raises:
        TyingError: if the optimizer does not hold a trained matrix (DeepSpeed and FSDP flatten or shard them), or
            `untie` refuses.
    """
    refuse_unheld(model, optimizer)
    before = named_slots(model)
    untie(model, names)
    _add_copies(model, optimizer, before)
    return model


def freeze_role(model: PreTrainedModel, optimizer: torch.optim.Optimizer | None, role: str) -> list[nn.Parameter]:
    """Freeze the matrix of one role. If it is tied to a role that is still trained, it is untied first.

    A frozen matrix stays in the optimizer, which skips it because it has no gradient. So weight decay and momentum do
    not change it, and the optimizer's state dict fits a run that freezes nothing. An output bias is not frozen.

    Args:
        model: any `PreTrainedModel`, unwrapped, between two steps (no gradients).
        optimizer: optimizer of the model, see `untie_trained`; `None` before it is made.
        role: `"input"`, `"source"`, `"target"` or `"output"`.

    Returns:
        The parameters that were trainable before and are frozen now.

    Raises:
        TyingError: if the model does not have the role, or `untie_trained` refuses.

    Source: "Train your classifier first", arXiv 2102.04697.
    """
    frozen = names_of_role(model, role)
    for group in groups_of(model):
        inside = [name for name in named_slots(model) if name in group.names and name in frozen]
        if inside and len(inside) < len(group.names):
            _part(model, optimizer, group, inside, role)
    parameters = {id(p): p for p in (find_parameter(model, name) for name in frozen)}
    changed = [p for p in parameters.values() if p.requires_grad]
    for parameter in changed:
        parameter.requires_grad_(False)
        parameter.grad = None
    return changed


def refuse_unheld(model: PreTrainedModel, optimizer: torch.optim.Optimizer | None) -> None:
    """Refuse an optimizer that does not hold a trained tied matrix, because its state could not be copied.

    Args:
        model: any `PreTrainedModel`, unwrapped.
        optimizer: optimizer of the model; `None` before it is made, which is accepted.

    Raises:
        TyingError: if a trained tied matrix is not among its parameters.
    """
    stepped = {id(p) for group in optimizer.param_groups for p in group["params"]} if optimizer is not None else set()
    for group in groups_of(model):
        parameter = find_parameter(model, group.root)
        if optimizer is not None and parameter.requires_grad and id(parameter) not in stepped:
            raise TyingError(
                f"Group {group.name!r} ({', '.join(group.names)}) cannot be untied in training: "
                f"{type(optimizer).__name__} does not hold its matrix (it was made before the tie, or it flattens or "
                "shards parameters, as DeepSpeed and FSDP do). Expected an optimizer over the model's own parameters; "
                "else untie(model) before training."
            )


def guard(model: PreTrainedModel, save_format: str | None = None) -> None:
    """Declare the actual ties of `model`, so that `TiedModelMixin` guards them.

    The model then refuses a state dict whose tied names have different values.

    Args:
        model: any `PreTrainedModel`, unwrapped.
        save_format: format of its files. `"portable"` files have each name, so that the model can load them after it
            has been untied. Default: unchanged.
    """
    entry = TyingConfig.from_dict(getattr(model.config, "tying", None))
    groups = {group.name: list(group.names) for group in groups_of(model)}
    if groups and (save_format is not None or not isinstance(model, TiedModelMixin)):
        tie(model, entry.replace(scheme=None, groups=groups, save_format=save_format or entry.save_format))


def step_of(when: float | int, steps: int) -> int:
    """Convert a moment to a number of steps.

    Args:
        when: fraction of all steps, or number of steps.
        steps: number of all steps.
    """
    return when if isinstance(when, int) else max(1, round(when * steps))


def check_when(name: str, when: float | int | None) -> None:
    """Refuse a moment that is neither a fraction in (0, 1] nor a number of steps from 1.

    Args:
        name: name of the argument, for the message.
        when: moment; `None` is accepted.

    Raises:
        TyingError: if `when` is anything else.
    """
    whole = isinstance(when, int) and not isinstance(when, bool) and when >= 1
    if when is not None and not whole and not (isinstance(when, float) and 0 < when <= 1):
        raise TyingError(
            f"{name}={when!r}: expected a fraction of the steps, a float above 0 and up to 1.0, or a number of steps, "
            "an int from 1."
        )


def _part(
    model: PreTrainedModel, optimizer: torch.optim.Optimizer | None, group: TieGroup, inside: list[str], role: str
) -> None:
    """Untie the names `inside` from the rest of `group`. They stay one matrix among themselves."""
    refuse_unheld(model, optimizer)
    before = named_slots(model)
    untie(model, inside)
    if len(inside) > 1:  # the first of the slots kept the parameter, so it is the root
        tie(model, {f"{group.name}_{role}": inside})
    if optimizer is not None:
        _add_copies(model, optimizer, before)
    rest = [name for name in group.names if name not in inside]
    logger.warning(
        f"freeze={role!r}: group {group.name!r} was one matrix, of which the role {role} cannot be frozen alone. "
        f"{', '.join(inside)} and {', '.join(rest)} are untied now, from equal values "
        f"({before[group.root].numel():,} parameters more); the config says so."
    )


def _add_copies(model: PreTrainedModel, optimizer: torch.optim.Optimizer, before: dict[str, nn.Parameter]) -> None:
    """Put the new parameters of the model into `optimizer`, beside those that had their places `before`."""
    place = {id(parameter): i for i, parameter in enumerate(model.parameters())}
    added: set[int] = set()
    for name, parameter in named_slots(model).items():
        old = before[name]
        if parameter is old or id(parameter) in added:
            continue
        added.add(id(parameter))
        for group in optimizer.param_groups:
            held = group["params"]
            if not any(p is old for p in held):
                continue
            later = (i for i, p in enumerate(held) if place.get(id(p), -1) > place[id(parameter)])
            at = next(later, len(held))
            held.insert(at, parameter)
            if "param_names" in group:
                group["param_names"].insert(at, name)
            if old in optimizer.state:
                optimizer.state[parameter] = copy.deepcopy(optimizer.state[old])
