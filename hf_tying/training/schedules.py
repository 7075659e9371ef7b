"""Ties that change while a model trains: untied in mid-run, or one role frozen, with the optimizer following."""

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
    """`untie(model, names)` between two steps of `optimizer`, which goes on with every matrix as if nothing had been.

    The first name keeps its `nn.Parameter`; each copy is put into the same parameter group (learning rate, weight
    decay, what a scheduler keeps there), with a copy of the optimizer's state: moments, momentum, step count. So both
    take the next step that a model would take that had been untied all along and had that state. In its group a copy
    stands where the order of `model.parameters()` has it: an optimizer made later for the untied model, as in a
    resumed run, loads this one's state dict.

    Args:
        model: any `PreTrainedModel`, unwrapped, between two steps (no gradients).
        optimizer: holds the tied matrices, unless they are frozen; also as Accelerate wraps it.
        names: see `untie`; all when not given.

    Returns:
        The same model.

    Raises:
        TyingError: when the optimizer does not hold a matrix that is trained (it flattens or shards them: DeepSpeed,
            FSDP), and for all that `untie` refuses.
    """
    refuse_unheld(model, optimizer)
    before = named_slots(model)
    untie(model, names)
    _add_copies(model, optimizer, before)
    return model


def freeze_role(model: PreTrainedModel, optimizer: torch.optim.Optimizer | None, role: str) -> list[nn.Parameter]:
    """Stop the training of one role's matrix. Where it is tied to a role that stays free, it is untied first.

    A frozen matrix stays in the optimizer, which passes over it for want of a gradient: weight decay and momentum do
    not move it either, and its state dict fits a run that freezes nothing. An output bias is no matrix and stays free.

    Args:
        model: any `PreTrainedModel`, unwrapped, between two steps (no gradients).
        optimizer: see `untie_trained`; `None` where it is not made yet.
        role: `"input"`, `"source"`, `"target"` or `"output"`.

    Returns:
        The parameters that were free and are frozen now.

    Raises:
        TyingError: for a role that the model has not, and for all that `untie_trained` refuses.

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
    """Whether `optimizer` can follow an `untie` of `model`.

    Raises:
        TyingError: when a trained tied matrix is not among its parameters.
    """
    stepped = {id(p) for group in optimizer.param_groups for p in group["params"]} if optimizer is not None else set()
    for group in groups_of(model):
        parameter = find_parameter(model, group.root)
        if optimizer is not None and parameter.requires_grad and id(parameter) not in stepped:
            raise TyingError(
                f"Group {group.name!r} ({', '.join(group.names)}) cannot be taken apart in training: "
                f"{type(optimizer).__name__} does not hold its matrix (it was made before the tie, or it flattens or "
                "shards parameters, as DeepSpeed and FSDP do). Expected an optimizer over the model's own parameters; "
                "else untie(model) before training."
            )


def guard(model: PreTrainedModel, save_format: str | None = None) -> None:
    """Put `model` under `TiedModelMixin` with the ties that it has; its files get `save_format`, if given.

    It then refuses a state dict in which tied names differ, and `"portable"` files hold each name, so that the model
    can load them after it has been untied.
    """
    entry = TyingConfig.from_dict(getattr(model.config, "tying", None))
    groups = {group.name: list(group.names) for group in groups_of(model)}
    if groups and (save_format is not None or not isinstance(model, TiedModelMixin)):
        tie(model, entry.replace(scheme=None, groups=groups, save_format=save_format or entry.save_format))


def step_of(when: float | int, steps: int) -> int:
    """The number of steps done at `when`: a fraction of `steps`, or that number itself."""
    return when if isinstance(when, int) else max(1, round(when * steps))


def check_when(name: str, when: float | int | None) -> None:
    """A fraction in (0, 1] or a number of steps.

    Raises:
        TyingError: for anything else.
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
    """Take the names `inside` out of `group`, as one matrix among themselves."""
    refuse_unheld(model, optimizer)
    before = named_slots(model)
    untie(model, inside)
    if len(inside) > 1:  # in the order of the slots, so that the one that kept the parameter is the root
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
    """Put into `optimizer` each parameter that stands where another one stood `before`."""
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
