"""`tie` and `untie`, which change the ties of a live model. It is read once; a plan is made, checked, and applied."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import logging

from ..config import TyingConfig, TyingError
from .anatomy import Anatomy
from .classes import with_mixin
from .depth_groups import SUFFIX
from .extensions import honour_extensions, refuse_misfits
from .groups import TieGroup, explicit_groups, make_groups, names_held
from .modeling import TiedModelMixin, set_groups
from .plain_modules import hold, refuse_extensions
from .planning import (
    at_stake,
    compare_vocabularies,
    plan_tie,
    refuse_meta,
    values_to_take,
    without_names,
    without_ties,
)
from .record import refuse_foreign_entry, write_config
from .relaxation import make_exact, relaxed_names, value_at
from .relaxed import record_relaxed
from .relaxing import fit_before, refuse_unrelaxable, relax_declared, values_before
from .resizing import fit_tied
from .sharding import gathered, is_in_units, refuse_engine, refuse_in_parts
from .shared_configs import own_config
from .slots import parameter_of, set_parameter, shared_names, untie_others
from .verify import tied_part, why_unsupported

if TYPE_CHECKING:
    from transformers.tokenization_utils_base import PreTrainedTokenizerBase

logger = logging.get_logger(__name__)
Model = TypeVar("Model", bound=nn.Module)


def tie(
    model: Model,
    scheme_or_groups: str | list[str] | tuple[str, ...] | dict[str, Any] | TyingConfig,
    init_from: str | None = None,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    target_tokenizer: "PreTrainedTokenizerBase | None" = None,
    on_conflict: str | None = None,
) -> Model:
    """Tie parameters of a live model, in place. From then on `TiedModelMixin` keeps the tie.

    A plain `nn.Module` keeps its class. Its record is on the module (deepcopy and pickle carry it), hooks on
    `load_state_dict` keep the tie, `assert_tied` checks it, and `save_tied` writes it.

    A scheme declares all embeddings: roles that it does not name get their own matrix. Explicit
    groups are added to the ties that the model has. Nothing is changed if anything is wrong.

    Only parameters are tied. Each module keeps its own bias, embedding scale and padding index. So a padding row
    gets no gradient as an input, as before; as a row of the softmax it learns like that of any other word.

    An optimizer made before holds matrices that the model no longer has: make it again.

    Args:
        model: any `PreTrainedModel`; its class gets `TiedModelMixin` in front, under the same name. Or a plain
            `nn.Module`; a scheme needs its `get_input_embeddings` and `get_output_embeddings`.
        scheme_or_groups: declaration of the ties: `"none"`, `"two_way"`, `"source_target"`, `"three_way"`; or a
            list of parameter names (one group, the first is its root); or a dict of named groups; or a dict from each
            tied name to its source, as in transformers' `_tied_weights_keys`; or a `TyingConfig`. The name of a module
            stands for all its parameters.
        init_from: source of the values when those of a group differ: a role (`"source"`, `"target"`,
            `"output"`), `"mean"`, or the name of a parameter or of a module that holds one of each such group. There
            is no default, since one of two trained matrices would be dropped.
        tokenizer: tokenizer of the source side. When source and target are tied, its vocabulary is compared with that
            of `target_tokenizer`: equal sizes are not equal vocabularies. A single tokenizer may hold
            two vocabularies (Marian, FSMT); these are compared.
        target_tokenizer: tokenizer of the target side. Default `None`: `tokenizer`.
        on_conflict: choice recorded for later loads, see `TyingConfig`. Default: that of the `TyingConfig`, or
            `"error"`.

    Returns:
        The same model.

    Raises:
        TyingError: for an unknown scheme or name, a scheme that the model cannot have, differing shapes, differing
            values without `init_from`, quantised sides, tensors on the meta device, an adapted (PEFT) model, different
            vocabularies.
    """
    refuse_unfit(model, "tie", plain=True)
    config = TyingConfig.of(scheme_or_groups)
    if on_conflict is not None:
        config = config.replace(on_conflict=on_conflict)
    if isinstance(model, PreTrainedModel):
        refuse_foreign_entry(model.config)
        refuse_misfits(model, config)
    else:
        refuse_extensions(model, config)
    refuse_unrelaxable(model, config)
    if config.projection is not None or config.relax or any("relax" in stack for stack in config.depth):
        refuse_engine(model, "add parameters to")
    anatomy = Anatomy(model)
    explicit = explicit_groups(anatomy, config)
    with gathered(at_stake(anatomy, explicit.values()), write=True):
        groups = plan_tie(anatomy, config, explicit)
        refuse_meta(anatomy, groups)
        _refuse_other_units(anatomy, groups, "tie")
        compare_vocabularies(anatomy, groups, tokenizer, target_tokenizer)
        values = values_to_take(anatomy, groups, init_from)
        before = values_before(model, config)
        further = config.declared_extensions()  # extensions that are not named stay
        if config.depth:
            further["depth"] = config.depth
        _apply(anatomy, groups, values, on_conflict=config.on_conflict, save_format=config.save_format, **further)
    if config.relax or any("relax" in stack for stack in config.depth):
        relax_declared(model, config)
        fit_before(model, before)
        record_relaxed(model, config.save_format)
    if isinstance(model, PreTrainedModel):
        honour_extensions(model, config)
    return model


def untie(model: Model, names: list[str] | str | None = None) -> Model:
    """Give names a parameter of their own, in place, and record it in the config, so that nothing ties them again.

    Values are unchanged. The first name keeps the old `nn.Parameter`, the others get a copy: an optimizer made before
    does not know the copies; make it again, or add them by `optimizer.add_param_group`.

    Without `names`, two kinds of ties stay. One is the ties of an architecture besides its embeddings (BERT's output
    bias). The other is a matrix that only carries an embedding (`shared` in BART and T5): alone it would be a dead
    parameter without gradient. Name it to untie it all the same.

    Args:
        model: any `PreTrainedModel` or plain `nn.Module`, tied by this package, by its own class, or by hand.
        names: names to take out of their groups: parameters, modules (for all tied parameters below them) and whole
            groups. Default `None`: all.

    Returns:
        The same model.

    Raises:
        TyingError: for a name that is not tied, or an adapted (PEFT) model.
    """
    refuse_unfit(model, "untie", plain=True)
    refuse_engine(model, "untie")
    if isinstance(model, PreTrainedModel):
        refuse_foreign_entry(model.config)
    anatomy = Anatomy(model)
    remaining = without_ties(anatomy) if names is None else without_names(anatomy, names)
    groups = make_groups(anatomy, [chain for chain in remaining if len(chain) > 1], names_held(model))
    _refuse_other_units(anatomy, groups, "untie")
    with gathered(at_stake(anatomy)):
        _apply(anatomy, groups, {}, save_format=None)
    return model


def refuse_unfit(model: nn.Module, action: str, plain: bool = False) -> None:
    """Refuse a model whose ties cannot be changed. `plain` says whether a plain `nn.Module` will do.

    Raises:
        TyingError: for a model that carries adapters, for wrappers, and for what holds a `PreTrainedModel` or is no
            module.
    """
    modules = [*model.modules()] if isinstance(model, nn.Module) else []
    if any("base_layer" in module._modules or "original_module" in module._modules for module in modules):
        raise TyingError(
            f"Cannot {action} a model that carries adapters ({type(model).__name__}): its layers are wrapped by "
            f"PEFT. {action} the base model before get_peft_model, or take the adapters off first by "
            "`model.unload()`."
        )
    if isinstance(model, PreTrainedModel):
        return
    holds_a_model = any(isinstance(module, PreTrainedModel) for module in modules)
    if not plain or not isinstance(model, nn.Module) or holds_a_model:
        raise TyingError(f"Cannot {action} {why_unsupported(model)}")
    if (part := tied_part(model)) is not model:
        raise TyingError(
            f"Cannot {action} a {type(model).__name__}: it is a wrapper. {action} the {type(part).__name__} inside "
            "it, before it is wrapped."
        )


def _refuse_other_units(anatomy: Anatomy, groups: list[TieGroup], action: str) -> None:
    """Refuse other ties in a model of FSDP2, whose units put the parameters back that they were made with.

    Tensor parallelism has no units. There a tie joins matrices that are split alike.

    Raises:
        TyingError: what is one parameter now and what is one in `groups` differ.
    """
    tied = {frozenset(names) for names in shared_names(anatomy.slots)}
    if tied == {frozenset(group.names) for group in groups}:
        return
    unlike = (
        len({getattr(anatomy.slots.get(name), "placements", None) for name in group.names}) > 1 for group in groups
    )
    if is_in_units(anatomy.model) or any(unlike):
        refuse_in_parts(anatomy.model, action, gathers=True)


# --- the one writer --------------------------------------------------------------------------------------------------


def _apply(anatomy: Anatomy, groups: list[TieGroup], values: dict[str, torch.Tensor], **changes: Any) -> None:
    """Tie a model by `groups`, and write its config.

    Args:
        anatomy: reading of the model before the change.
        groups: all groups that are to hold.
        values: new values, by the names of roots.
        **changes: further changes of the config's entry (see `record.write_config`).
    """
    model = anatomy.model
    freed = _values_of_freed(model, groups)
    groups = _without_differences(groups, freed)
    if isinstance(model, PreTrainedModel):
        own_config(model)
    untie_others(model, groups)
    for name, value in freed.items():
        make_exact(model, name)
        set_parameter(model, name, nn.Parameter(value, requires_grad=parameter_of(model, name).requires_grad))
    with torch.no_grad():
        for root, value in values.items():
            parameter_of(model, root).copy_(value)  # the root keeps its identity
    if isinstance(model, PreTrainedModel):
        if not isinstance(model, TiedModelMixin):
            model.__class__ = with_mixin(TiedModelMixin, type(model))
        assert isinstance(model, TiedModelMixin)  # for type checkers
        model._ties_made = True
        set_groups(model, groups)
        fit_tied(model)
        write_config(model, anatomy, **changes)
    else:
        hold(model, groups, **changes)
    # A warning, since transformers shows nothing below that level by default.
    logger.warning(f"{type(model).__name__}: {_described(groups)}.")


def _values_of_freed(model: nn.Module, groups: list[TieGroup]) -> dict[str, torch.Tensor]:
    """The whole values of relaxed names that are in no group of `groups`: they become matrices of their own.

    Raises:
        TyingError: where a relaxed name would be a root, which is tied exactly.
    """
    relaxed = {name: group for group, _, name in relaxed_names(model)}
    for group in groups:
        if group.root in relaxed:
            raise TyingError(
                f"{group.root!r} is relaxed (group {relaxed[group.root]!r}), and cannot be the root of other names: "
                "untie the relaxed names, or harden(model) first."
            )
    tied = {name for group in groups for name in group.aliases}
    return {name: value_at(model, name).detach().clone() for name in relaxed if name not in tied}


def _without_differences(groups: list[TieGroup], freed: Iterable[str]) -> list[TieGroup]:
    """Groups without the parameters of differences that are about to go."""
    below = tuple(f"{name}{SUFFIX}." for name in freed)
    kept = [TieGroup(group.name, tuple(n for n in group.names if not n.startswith(below))) for group in groups]
    return [group for group in kept if len(group.names) > 1]


def _described(groups: list[TieGroup], most: int = 3) -> str:
    """Describe groups in one line."""
    parts = []
    for group in groups[:most]:
        more = f" and {len(group.names) - 4} more" if len(group.names) > 5 else ""
        names = group.names[:4] if more else group.names
        parts.append(f"{', '.join(names)}{more} are one parameter (group {group.name!r})")
    if len(groups) > most:
        parts.append(f"and {len(groups) - most} more groups")
    return "; ".join(parts) or "nothing is tied"
