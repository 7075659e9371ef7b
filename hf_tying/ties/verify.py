"""Check the ties of a live model: `assert_tied`, and the sentences that it is made of."""

from collections.abc import Collection, Iterable, Iterator
from typing import Any

from torch import nn
from transformers.modeling_utils import PreTrainedModel

from ..config import TyingConfig, TyingError, entry_of
from .across_ranks import differing_copies, differing_declarations, raised_on_every_rank
from .anatomy import Anatomy
from .declared import join_chains
from .depth_groups import depth_groups
from .groups import TieGroup, declared_groups, locate
from .sharding import is_dtensor, shown_as_shards
from .shared_layers import located_stacks
from .slots import (
    difference,
    find_parameter,
    find_slot,
    is_one,
    parameter_at_work,
    same_values,
    stands_in,
    why_incomparable,
    why_no_parameter,
)


def assert_tied(model: nn.Module, across_ranks: bool = False) -> None:
    """Raise unless every tie that `model` declares holds: one `nn.Parameter` in every place of each group.

    Identity counts, not equal values: two equal matrices drift apart at the first optimizer step. A model that
    `hf_tying` knows (class form, or after `tie`) is checked against its groups and its config. Any other
    `PreTrainedModel` is checked against the declaration of its class under `tie_word_embeddings`.

    Under PEFT the base model is checked. A LoRA on one side is accepted, and so are adapters that PEFT itself shares
    between both sides (`trainable_token_indices`, `ensure_weight_tying`). A copy that `modules_to_save` trains in
    place of one side is a broken tie.

    Args:
        model: a `PreTrainedModel` or a plain `nn.Module`, also wrapped by PEFT, DistributedDataParallel, torch.compile
            or torch's `AveragedModel`. A plain module declares what `tie` or `load_tied` has tied in it.
        across_ranks: of several processes, all must call it then: what is broken on one is raised on each, with its
            rank. All must declare the same ties, and a tied matrix that several hold must have one value, compared by
            SHA-256. Default `False`: each process looks at its own model.

    Raises:
        TyingError: lists each broken group: expected, found, way out.
    """
    if across_ranks:
        with raised_on_every_rank():
            assert_tied(model)
    model = tied_part(model)
    groups = groups_of(model)
    if across_ranks:
        found = [*differing_declarations(model, groups), *differing_copies(model, groups)]
    else:
        found = problems(model)
    if found:
        raise TyingError(f"{type(model).__name__} is not tied as declared:\n{_listed(found)}")


def refuse_untied(model: nn.Module, action: str) -> None:
    """Refuse to do something with a model whose ties are broken; nothing that PEFT adds is looked at.

    Args:
        model: model with `tie_groups`.
        action: what cannot be done, as a verb for the message.

    Raises:
        TyingError: lists each broken group: expected, found, way out.
    """
    if found := list(violations(model, groups_of(model))):
        raise TyingError(f"Cannot {action} {type(model).__name__}, it is not tied as declared:\n{_listed(found)}")


def _listed(found: list[str]) -> str:
    return "\n".join(f"  - {problem}" for problem in found)


def problems(model: nn.Module) -> list[str]:
    """One sentence for each reason why `model` is not tied as declared. One about a group begins with its name."""
    groups = groups_of(model)
    return [*violations(model, groups), *_parted_by_peft(model, groups)]


# Attributes in which wrappers of whole models keep the model: torch.compile, activation checkpointing, FSDP1, DDP and
# DeepSpeed.
_WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module", "module")
_LIBRARIES = ("torch.", "accelerate.", "deepspeed.", "peft.")


def unwrapped(model: nn.Module) -> PreTrainedModel:
    """The `PreTrainedModel` inside DDP, torch.compile and PEFT wrappers.

    Raises:
        TyingError: when there is not one.
    """
    inner: Any = model
    while not isinstance(inner, PreTrainedModel):
        if (inner := _wrapped(inner)) is None:
            raise TyingError(f"Cannot read the ties of {why_unsupported(model)}")
    return inner


def tied_part(model: nn.Module) -> nn.Module:
    """The module whose names a tie has: the `PreTrainedModel` inside wrappers, or the plain module inside them.

    Raises:
        TyingError: for what is no module, and for a plain module that holds a `PreTrainedModel`, which is tied itself.
    """
    inner: Any = model
    while inner is not None and not isinstance(inner, PreTrainedModel):
        inner = _wrapped(inner)
    if inner is not None:
        return inner
    if not isinstance(model, nn.Module) or any(isinstance(module, PreTrainedModel) for module in model.modules()):
        raise TyingError(f"Cannot read the ties of {why_unsupported(model)}")
    inner = model
    # A module may have a child called `module`: only the wrappers of libraries are taken off.
    while type(inner).__module__.startswith(_LIBRARIES) and isinstance(held := _wrapped(inner), nn.Module):
        inner = held
    return inner


def _wrapped(model: Any) -> Any:
    """What a wrapper holds; `None` where there is nothing."""
    if hasattr(model, "get_base_model"):
        return model.get_base_model()
    return next((held for name in _WRAPPERS if (held := getattr(model, name, None)) is not None), None)


def is_split(model: PreTrainedModel, groups: Iterable[TieGroup]) -> bool:
    """Whether one of `groups` is not one parameter now, and nothing stands in for it: a quick look, for every step."""
    return any(
        not is_one(model, group.names) and not any(stands_in(model, n) or offloaded(model, n) for n in group.names)
        for group in groups
    )


def why_unsupported(model: object) -> str:
    """Name what is not a `PreTrainedModel`, and say what to do with it: the end of a message."""
    expected = f"a {type(model).__name__}: expected a transformers PreTrainedModel"
    if not isinstance(model, nn.Module):
        return f"{expected}."
    inside = {name: module for name, module in model.named_modules() if isinstance(module, PreTrainedModel)}
    outermost = [name for name in inside if not any(name.startswith(f"{other}.") for other in inside)]
    if outermost:
        listed = ", ".join(f"{name!r} ({type(inside[name]).__name__})" for name in outermost)
        return f"{expected}. This module holds {listed}: give that one, before it is wrapped."
    return (
        f"{expected}. A plain nn.Module has no config, which this needs. Derive its class from PreTrainedModel, with "
        "a config class, and self.post_init() at the end of __init__. tie, untie, assert_tied, tying_report, "
        "save_tied, load_tied and hf_tying.losses work with any module."
    )


def groups_of(model: nn.Module) -> list[TieGroup]:
    """The declared groups of a model: those on record, else those that its class declares.

    A plain module without a record has those of the modules inside it.
    """
    known = getattr(model, "tie_groups", None)
    if known is not None:
        return list(known)
    if isinstance(model, PreTrainedModel):
        return declared_groups(Anatomy(model))
    anatomy = Anatomy(model)
    chains = [
        [f"{place}.{name}" for name in group.names]
        for place, module in anatomy.places
        for group in vars(module).get("tie_groups", ())
    ]
    held = join_chains(chains)
    return [TieGroup(names[0], tuple(names)) for names in held]


def violations(model: nn.Module, groups: Iterable[TieGroup]) -> Iterator[str]:
    """One sentence for each difference between `model` and what `groups` and its config declare."""
    groups = list(groups)
    for group in groups:
        shown_as_shards(model, group.names)
    anatomy = Anatomy(model)
    for group in groups:
        yield from _broken(model, group, anatomy.slots)
        yield from _stale_sizes(model, group, anatomy.slots)
    if hasattr(model, "tie_groups"):
        yield from _undeclared(groups, anatomy)
        yield from _config_differs(anatomy, groups)


def _broken(model: nn.Module, group: TieGroup, slots: dict) -> Iterator[str]:
    root = slots.get(group.root)
    for name in group.names:
        parameter = slots.get(name)
        if parameter is None:
            yield (
                f"group {group.name!r}: expected the parameter {name!r} (tied with {_others(group, name)}); it "
                f"{why_no_parameter(model, name, slots)}. Undo that, or call untie(model, [{name!r}]) before it."
            )
        elif root is not None and parameter is not root and not offloaded(model, name):
            yield (
                f"group {group.name!r}: expected {name!r} and {group.root!r} to be one parameter, found two "
                f"({_apart(parameter, root, _again(model, group))}; to keep both: untie(model, [{name!r}])."
            )


def _again(model: nn.Module, group: TieGroup) -> str:
    """The call that makes `group` one again, if its values are equal."""
    return "model.tie_weights()" if isinstance(model, PreTrainedModel) else f"tie(model, {list(group.names)})"


def _apart(parameter: nn.Parameter, root: nn.Parameter, again: str) -> str:
    """Describe how two parameters that should be one differ, and how to make them one again."""
    if parameter.is_meta or root.is_meta:
        return f"on the meta device). To tie them again: load the weights, then {again}"
    if is_dtensor(parameter) or is_dtensor(root):
        return "sharded apart). Shard them together: fully_shard([module_a, module_b]), or leave both to the root"
    if (why := why_incomparable(parameter) or why_incomparable(root)) is not None:
        return f"one {why})"
    if same_values(parameter, root):
        return f"equal so far). To tie them again: {again}"
    return f"{difference(parameter, root)}). To tie them again: tie(model, ..., init_from=<the name to keep>)"


def _stale_sizes(model: nn.Module, group: TieGroup, slots: dict) -> Iterator[str]:
    for name in group.names:
        if name not in slots or not name.endswith(".weight") or why_incomparable(slots[name]) is not None:
            continue
        module, rows = find_slot(model, name)[0], slots[name].shape[0]
        for attribute in ("num_embeddings", "out_features"):
            if (size := getattr(module, attribute, rows)) != rows:
                yield (
                    f"group {group.name!r}: {name!r} has {rows} rows, but its module says {attribute}={size}. "
                    f"{_resize(model)}call {_again(model, group)}."
                )


def _resize(model: nn.Module) -> str:
    """The way to resize a `PreTrainedModel`, as the start of a sentence that goes on with another way out."""
    if isinstance(model, PreTrainedModel):
        return "Resize by model.resize_token_embeddings(...) on the whole model, or "
    return "To take the size of the matrix: "


def _undeclared(groups: list[TieGroup], anatomy: Anatomy) -> Iterator[str]:
    group_of = {name: group.name for group in groups for name in group.names}
    for tied in anatomy.tied:
        # Parameters that PEFT shares between its own adapters are not the model's, and are not in its files.
        names = [name for name in tied if find_slot(anatomy.model, name) is not None]
        if len({group_of.get(name, name) for name in names}) > 1:
            yield (
                f"{names} are one parameter, but no group declares it: a tie made by hand is lost in a file. Declare "
                f"it by tie(model, {names}), or undo it by untie(model, {names[1:]})."
            )


def _config_differs(anatomy: Anatomy, groups: list[TieGroup]) -> Iterator[str]:
    model = anatomy.model
    if (
        not isinstance(model, PreTrainedModel)
        or entry_of(model.config) is None
        or not getattr(model, "_is_declared_class", lambda: True)()
    ):
        return  # the record of another head lacks the names that only this class has
    record = TyingConfig.in_config(anatomy.model.config)
    located: list[Collection[str]] = [
        {place for name in names if (place := locate(anatomy, name)) is not None} for names in record.groups.values()
    ]
    for stack in located_stacks(anatomy, record, strict=False):
        located += depth_groups(anatomy.own_slots, stack).values()
    if record.scheme is None:  # the embeddings are left to what the class declares
        located = [*join_chains([*located, *anatomy.declared])]
    declared = sorted({tuple(sorted(names)) for names in located if len(names) > 1})
    held = sorted({tuple(sorted(group.names)) for group in groups})
    if declared != held:
        yield (
            f"config.tying declares {[*map(list, declared)] or 'no group'}, the model holds "
            f"{[*map(list, held)] or 'no group'}. Change ties by tie() and untie(), not by editing the config."
        )


def _parted_by_peft(model: nn.Module, groups: list[TieGroup]) -> Iterator[str]:
    """Ties that `modules_to_save` breaks: it replaces one side by a copy, which is trained alone."""
    carriers = Anatomy(model).carriers if groups else ()
    for group in groups:
        used = [name for name in group.names if name not in carriers]
        at_work = {name: parameter_at_work(model, name) for name in used}
        if is_one(model, group.names) and len({id(parameter) for parameter in at_work.values()}) > 1:
            copied = [name for name in used if at_work[name] is not find_parameter(model, name)]
            yield (
                f"group {group.name!r}: expected {', '.join(used)} to be one parameter, found a copy that PEFT trains "
                f"alone (modules_to_save) for {', '.join(copied)}. To train it apart: untie(model, {copied}) before "
                "get_peft_model. To train the group as one: ensure_weight_tying=True in the adapter's config, with "
                "the name of an embedding that PEFT knows by name (embed_tokens, lm_head), or without an adapter."
            )


def _others(group: TieGroup, name: str) -> str:
    return ", ".join(repr(n) for n in group.names if n != name)


def offloaded(model: nn.Module, name: str) -> bool:
    """Whether accelerate holds the value of `name` elsewhere and puts it in place at each forward pass."""
    module = find_slot(model, name)[0]
    parameter = find_parameter(model, name)
    return parameter is not None and parameter.is_meta and hasattr(module, "_hf_hook")
