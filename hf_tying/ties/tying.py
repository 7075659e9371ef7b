"""`tie` and `untie`: the explicit acts on a live model."""

import torch
from torch import nn
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import logging

from ..config import SCHEMES, TyingConfig, TyingError, nearest
from ..objectives.tied_loss import has_tied_loss, refuse_without_softmax, use_tied_loss
from .groups import (
    TieGroup,
    carriers,
    explicit_groups,
    make_groups,
    other_chains,
    roles,
    scheme_chains,
    split_declared,
)
from .modeling import TiedModelMixin, set_groups, tied_class
from .record import write_config
from .slots import actual_groups, difference, find_parameter, named_slots, same_values, separate
from .vocabulary import vocabularies_of

logger = logging.get_logger(__name__)


def tie(
    model: PreTrainedModel,
    scheme_or_groups: str | list[str] | dict[str, list[str]] | TyingConfig,
    init_from: str | None = None,
    tokenizer=None,
    target_tokenizer=None,
    on_conflict: str | None = None,
) -> PreTrainedModel:
    """Tie parameters of a live model, in place; from then on the tie is kept by everything that `TiedModelMixin` does.

    A scheme says everything about the embeddings: roles that it does not name are given their own matrix. Explicit
    groups are added to the ties that the model has. Nothing is changed if anything is wrong.

    Only parameters are tied. Biases, embedding scales and padding indices stay each module's own. So a padding row
    gets no gradient as an input, as before; as a row of the softmax it learns like any other word's.

    An optimizer made before holds matrices that are no longer the model's: make it again.

    Args:
        model: any `PreTrainedModel`; its class gets `TiedModelMixin` in front, under the same name.
        scheme_or_groups: `"none"`, `"two_way"`, `"source_target"`, `"three_way"`; or a list of parameter names (one
            group, the first is its root); or a dict of named groups; or a `TyingConfig`. A module's name stands for
            all its parameters.
        init_from: where the values come from when those of a group differ: a role (`"source"`, `"target"`,
            `"output"`), `"mean"`, or a parameter name. There is no default, since one of two trained matrices would be
            dropped.
        tokenizer: of the source side, compared with `target_tokenizer` when source and target are tied: equal sizes
            are not equal vocabularies. One tokenizer that holds two vocabularies (Marian, FSMT) is compared in itself.
        target_tokenizer: of the target side.
        on_conflict: recorded for later loads, see `TyingConfig`; `"error"` unless given here or in a `TyingConfig`.

    Returns:
        The same model.

    Raises:
        TyingError: for an unknown scheme or name, a scheme that the model cannot have, differing shapes, differing
            values without `init_from`, quantised sides, tensors on the meta device, an adapted (PEFT) model, different
            vocabularies.
    """
    refuse_unfit(model, "tie")
    config = TyingConfig.of(scheme_or_groups)
    if config.loss == "tied":
        refuse_without_softmax(model)
    if on_conflict is not None:
        config = config.replace(on_conflict=on_conflict)
    groups = _planned(model, config)
    _refuse_meta(model, groups)
    _compare_vocabularies(model, groups, tokenizer, target_tokenizer)
    sources = _sources(model, groups, init_from)
    separate(model, groups)
    with torch.no_grad():
        for group in groups:
            if (values := sources[group.name]) is not None:
                find_parameter(model, group.root).copy_(values)  # the root keeps its identity
    loss = {} if config.loss == "stock" else {"loss": config.loss}  # not named, it stays as it is
    _take_over(model, groups, on_conflict=config.on_conflict, save_format=config.save_format, **loss)
    return use_tied_loss(model) if loss and not has_tied_loss(model) else model


def untie(model: PreTrainedModel, names: list[str] | str | None = None) -> PreTrainedModel:
    """Give names a parameter of their own, in place; the config says so and nothing ties them again.

    Values are unchanged. The first name keeps the old `nn.Parameter`, the others get a copy: an optimizer made before
    does not know the copies; make it again, or add them by `optimizer.add_param_group`.

    Without `names`, what an architecture ties besides its embeddings stays (BERT's output bias), and a matrix that
    only carries another one stays with it (BART's and T5's `shared`, with the source embedding): alone it would be a
    dead parameter without gradient. Name such a one to untie it all the same.

    Args:
        model: any `PreTrainedModel`, tied by this package, by its own class, or by hand.
        names: the parameter names to take out of their groups; all of them when not given.

    Returns:
        The same model.

    Raises:
        TyingError: for a name that is not tied, or an adapted (PEFT) model.
    """
    refuse_unfit(model, "untie")
    slots = named_slots(model)
    chains = actual_groups(model)
    if names is None:
        kept = [*scheme_chains(model, "none"), *other_chains(model, split_declared(model))]
        remaining = [[name for name in part if name in chain] for chain in chains for part in kept]
    else:
        leaving = [names] if isinstance(names, str) else names
        if not isinstance(leaving, list | tuple | set) or not all(isinstance(name, str) for name in leaving):
            raise TyingError(
                f"Cannot untie {names!r}: expected a parameter name, a list of names, or nothing for all."
            )
        leaving = set(leaving)
        apart = {name for group in getattr(model, "tie_groups", []) for name in group.names}  # in fact, not on record
        tied = {name for chain in chains for name in chain}
        for name in leaving - tied - apart:
            state = "is not tied" if name in slots else "does not exist"
            raise TyingError(f"Cannot untie {name!r}: it {state}{nearest(name, tied)}.")
        remaining = [[name for name in chain if name not in leaving] for chain in chains]
    groups = make_groups(model, [chain for chain in remaining if len(chain) > 1], _named(model), slots)
    return _take_over(model, groups, save_format=None)


def _take_over(model: PreTrainedModel, groups: list[TieGroup], **changes) -> PreTrainedModel:
    if not isinstance(model, TiedModelMixin):
        model.__class__ = tied_class(type(model))
    model._ties_made = True
    set_groups(model, groups)
    write_config(model, **changes)
    if not groups:
        logger.info(f"{type(model).__name__}: nothing is tied.")
    for group in groups:
        logger.info(f"{type(model).__name__}: group {group.name!r} is one parameter: {', '.join(group.names)}.")
    return model


def _named(model: PreTrainedModel) -> dict[str, list[str]]:
    """The groups that the model has by name, so that names and roots stay as the user chose them."""
    return {group.name: list(group.names) for group in getattr(model, "tie_groups", None) or []}


def _planned(model: PreTrainedModel, config: TyingConfig) -> list[TieGroup]:
    """The groups after `config`: those of now, the roles regrouped by a scheme, the explicit groups added."""
    slots = named_slots(model)
    explicit = explicit_groups(model, config, slots)
    chains = list(explicit.values())
    now = actual_groups(model)
    if config.scheme is None:
        chains += now
    else:
        chains += scheme_chains(model, config.scheme)
        role_names = {name for names in roles(model).values() for name in names}
        chains += [[n for n in chain if n not in role_names] for chain in now]
        if config.scheme != "none":  # what the architecture ties besides, where that overwrites nothing
            chains += [c for c in other_chains(model, split_declared(model)) if _equal([slots[n] for n in c])]
    named = {**_named(model), **explicit} if config.scheme is None else explicit
    return make_groups(model, [chain for chain in chains if len(chain) > 1], named, slots)


def _equal(tensors: list[torch.Tensor]) -> bool:
    return all(same_values(tensor, tensors[0]) for tensor in tensors)


def _sources(model: PreTrainedModel, groups: list[TieGroup], init_from: str | None) -> dict[str, torch.Tensor | None]:
    """For each group the values that it takes; `None` where its names agree and nothing is to be done."""
    role_names = roles(model)
    chosen = None
    if not isinstance(init_from, str | None):
        raise TyingError(f"init_from={init_from!r}: expected a role, 'mean', or a name of the tied groups.")
    if init_from in role_names:
        chosen = role_names[init_from][-1]
    elif init_from in SCHEMES["three_way"]:
        raise TyingError(
            f"init_from={init_from!r}: {type(model).__name__} has no such embedding, only {list(role_names)}."
        )
    elif init_from is not None and init_from != "mean":
        chosen = init_from
        if not any(chosen in group.names for group in groups):
            hint = nearest(str(init_from), [*role_names, "mean", *(n for group in groups for n in group.names)])
            raise TyingError(f"init_from={init_from!r}: expected a role, 'mean', or a name of the tied groups{hint}.")
    sources = {}
    idle = carriers(model)  # whatever they hold is nobody's training
    for group in groups:
        used = [name for name in group.names if name not in idle] or group.names
        held = list({id(p): p for p in (find_parameter(model, name) for name in used)}.values())
        root = find_parameter(model, group.root)
        if _equal(held):
            sources[group.name] = None if same_values(root, held[0]) else held[0].detach().clone()
            continue
        if init_from == "mean":
            sources[group.name] = torch.stack([p.detach().float() for p in held]).mean(0).to(held[0].dtype)
        elif chosen in group.names:
            sources[group.name] = find_parameter(model, chosen).detach().clone()
        else:
            apart = difference(held[0], held[1])
            raise TyingError(
                f"The names of group {group.name!r} hold different values ({', '.join(group.names)}; {apart}), and "
                "tying keeps one. Say which: init_from='source' | 'target' | 'output' | 'mean' | a parameter name."
            )
    return sources


def refuse_unfit(model: nn.Module, action: str) -> None:
    modules = model.modules() if isinstance(model, nn.Module) else ()
    if any(hasattr(module, "base_layer") or hasattr(module, "original_module") for module in modules):
        raise TyingError(
            f"Cannot {action} a model that carries adapters ({type(model).__name__}): its layers are wrapped by "
            f"PEFT. {action} the base model before get_peft_model, or take the adapters off first by "
            "`model.unload()`."
        )
    if not isinstance(model, PreTrainedModel):
        raise TyingError(
            f"Cannot {action} a {type(model).__name__}: expected a transformers PreTrainedModel. Inside a wrapper "
            "(DistributedDataParallel, torch.compile) it is `model.module` or `model._orig_mod`: do it before "
            "wrapping."
        )


def _refuse_meta(model: PreTrainedModel, groups: list[TieGroup]) -> None:
    for group in groups:
        for name in group.names:
            if find_parameter(model, name).is_meta:
                raise TyingError(
                    f"Cannot tie {name!r}: it is on the meta device and has no value. Load the weights first, or "
                    "declare "
                    "the tie in the config: config.tying = {'version': 1, 'scheme': ...}."
                )


def _compare_vocabularies(model: PreTrainedModel, groups: list[TieGroup], tokenizer, target_tokenizer) -> None:
    if tokenizer is None and target_tokenizer is None:
        return
    role_names = roles(model)
    if not {"source", "target"} <= role_names.keys():
        return
    pair = {role_names["source"][-1], role_names["target"][-1]}
    if not any(pair <= set(group.names) for group in groups):
        return
    # One given for both sides is compared with itself: MarianTokenizer and FSMTTokenizer can hold two vocabularies.
    source = vocabularies_of(tokenizer if tokenizer is not None else target_tokenizer)[0]
    target = vocabularies_of(target_tokenizer if target_tokenizer is not None else tokenizer)[1]
    unlike = [word for word in source.keys() | target.keys() if source.get(word) != target.get(word)]
    if unlike:
        example = min(unlike)
        raise TyingError(
            f"Cannot tie source and target: the tokenizers have different vocabularies ({len(source)} and "
            f"{len(target)} words, {len(unlike)} of them with another id or on one side only, as {example!r}: "
            f"{source.get(example)} and {target.get(example)}). One row would stand for two words: train a joint "
            "vocabulary, or join these by hf_tying.data.join_vocabularies."
        )
