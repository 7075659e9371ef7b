"""Record the ties of a model in its config: the `tying` entry and `tie_word_embeddings`."""

import functools
from typing import Any

from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel

from ..config import SCHEMES, TyingConfig, TyingError, entry_of
from .anatomy import Anatomy
from .declared import join_chains
from .depth_groups import SUFFIX, depth_groups
from .groups import TieGroup, groups_held, locate, names_held, scheme_of
from .relaxation import relax_entries, relaxed_names
from .roles import FLAG_SET_BY_THE_CLASS, SCALED_BY_THE_FLAG
from .shared_layers import located_stacks


def refuse_foreign_entry(config: PreTrainedConfig) -> None:
    """Refuse a config in which a tie cannot be recorded.

    Raises:
        TyingError: when its field `tying` has another meaning.
    """
    value = getattr(config, "tying", None)
    if value is not None and entry_of(config) is None:
        raise TyingError(
            f"config.tying is {value!r:.80}, which is not an entry of this package: the tie cannot be recorded over "
            "it. Give that field another name in the config class, or remove it: del model.config.tying."
        )


def write_config(model: PreTrainedModel, anatomy: Anatomy | None = None, **changes: Any) -> TyingConfig:
    """Write `model.tie_groups` to its config, and return what was written.

    Entries about parts that this class lacks are kept: groups with names of another head, and schemes with roles that
    it lacks. So a language model that is loaded and saved as a classifier is still a tied language model.

    Args:
        model: a model with `tie_groups`.
        anatomy: reading of the model. It may be older than the ties, since only names are read from it.
        **changes: new values of fields of the entry, such as `on_conflict`; the others keep theirs. With
            `save_format=None` the format is the default for the groups as they are now.
    """
    before = TyingConfig.in_config(model.config).replace(**changes)
    anatomy = Anatomy(model) if anatomy is None else anatomy
    scheme = scheme_of(anatomy, groups_held(model))
    groups = _recorded_groups(anatomy, before.groups)
    relax = relax_entries(model)
    depth, in_depth = _recorded_depth(anatomy, before)
    groups = {name: names for name, names in groups.items() if name not in in_depth}
    write_flags(anatomy, tied=scheme in ("two_way", "three_way") and not _is_relaxed(anatomy))
    entry = before.replace(
        scheme=_recorded_scheme(anatomy, before.scheme, scheme),
        groups=groups,
        relax={name: before.relax[name] for name in before.relax if name in groups.keys() - names_held(model).keys()}
        | {name: settings for name, settings in relax.items() if name not in in_depth},
        depth=depth,
        save_format=before.save_format or default_save_format(anatomy),
    )
    model.config.tying = entry.to_dict()
    return entry


def _recorded_depth(anatomy: Anatomy, before: TyingConfig) -> tuple[list[dict[str, Any]], set[str]]:
    """The stacks of `before` that hold or are not in this model, and the names of the groups that they stand for."""
    held = {frozenset(group.names): group.name for group in groups_held(anatomy.model)}
    kept, covered = [], set()
    for stack in before.depth:
        here = located_stacks(anatomy, TyingConfig(depth=[stack]), strict=False)
        groups = [frozenset(names) for each in here for names in depth_groups(anatomy.own_slots, each).values()]
        if all(names in held for names in groups):
            kept.append(stack)
            covered |= {held[names] for names in groups}
        elif stack.get("damped"):  # the layers keep their factors, whatever is tied
            kept.append({"path": stack["path"], "order": [*range(len(stack["order"]))], "damped": stack["damped"]})
    return kept, covered


def _is_relaxed(anatomy: Anatomy) -> bool:
    """Whether target or output differs from the matrix by which they are tied."""
    pair = {anatomy.roles[role].name for role in ("target", "output") if role in anatomy.roles}
    return any(name in pair for _, _, name in relaxed_names(anatomy.model))


def _recorded_scheme(anatomy: Anatomy, before: str | None, now: str) -> str | None:
    """`before`, if it agrees with `now` about the roles that the model has; else `now`."""
    if before is None:
        # No scheme is recorded while the model holds what its class declares.
        held = [set(group.names) for group in groups_held(anatomy.model)]
        as_declared = all(any(set(chain) <= names for names in held) for chain in anatomy.declared)
        return now if len(anatomy.roles) > 1 or not as_declared else None

    def pairs(scheme: str) -> set[frozenset[str]]:
        roles = [role for role in SCHEMES[scheme] if role in anatomy.roles]
        return {frozenset((a, b)) for a in roles for b in roles if a < b}

    return before if pairs(before) == pairs(now) else now


def _recorded_groups(anatomy: Anatomy, before: dict[str, list[str]]) -> dict[str, list[str]]:
    """The groups that the model holds, and those of `before` that reach beyond the names that it has."""
    groups = names_held(anatomy.model)
    group_of: dict[str | None, str] = {name: group for group, names in groups.items() for name in names}
    for group, names in before.items():
        if any(f"{SUFFIX}." in name for name in names):
            continue  # what differences share follows from the groups that are relaxed
        place = {name: locate(anatomy, name) for name in names}
        seen = [name for name in names if place[name] is not None]
        if len(seen) == len(names):
            continue
        held = group_of.get(place[seen[0]]) if seen else None
        together = seen if len(seen) < 2 else [name for name in seen if held and group_of.get(place[name]) == held]
        kept = [name for name in names if place[name] is None or name in together]
        if len(kept) > 1:
            known = {place[name] for name in kept}
            rest = [] if held is None else groups.pop(held, [])
            groups[group] = kept + [name for name in rest if name not in known]
    return groups


def default_save_format(anatomy: Anatomy) -> str:
    """`"dedup"` where the stock class re-ties exactly these groups from the same roots, `"portable"` elsewhere."""
    model = anatomy.model
    if relax_entries(model):
        return "portable"
    # Read again, since the flags on which it depends may have changed.
    stock = {frozenset(chain) for chain in join_chains(anatomy.declared_pairs())}
    own = {frozenset(group.names) for group in groups_held(model)}
    base = model.base_model_prefix
    reachable = all(
        group.root.startswith(f"{base}.") or not any(n.startswith(f"{base}.") for n in group.names)
        for group in groups_held(model)
        if any(
            name in anatomy.role_of for name in group.names
        )  # a base model has the embeddings, and not the layers of a head
    )
    return "dedup" if own == stock and reachable else "portable"


def write_flags(anatomy: Anatomy, tied: bool) -> None:
    """Keep `tie_word_embeddings` truthful for the target and output pair: PEFT, accelerate, vLLM, llama.cpp read it.

    The T5 family is left alone: its config classes put the flag back to True, or its models (SwitchTransformers) read
    it for the scale of the logits, which no tie and no untie may change.
    """
    if not {"target", "output"} <= anatomy.roles.keys():
        return
    pair = {anatomy.roles[role].name for role in ("target", "output")}
    if tied and any(pair <= set(chain) for chain in anatomy.declared):
        return  # the flags already declare it, in the form of the class
    for config in _flagged_configs(anatomy.model):
        config.tie_word_embeddings = tied


def _flagged_configs(model: PreTrainedModel) -> list:
    configs = [model.config, model.config.get_text_config(decoder=True)]
    return [c for c in configs if hasattr(c, "tie_word_embeddings") and not flag_is_forced(type(c))]


@functools.cache
def flag_is_forced(config_class: type) -> bool:
    """Whether `tie_word_embeddings` cannot be set freely: the class overrides it (T5, DBRX), or scales by it."""
    if config_class.model_type in SCALED_BY_THE_FLAG | FLAG_SET_BY_THE_CLASS:
        return True
    try:
        config_class()
    except Exception:  # a composite config needs its parts, and none of them forces the flag
        return False
    try:
        return any(config_class(tie_word_embeddings=value).tie_word_embeddings is not value for value in (True, False))
    except Exception:  # a class that checks its arguments
        return True


def refuse_contradicting_flag(anatomy: Anatomy, config: TyingConfig, groups: list[TieGroup]) -> None:
    """Refuse `tie_word_embeddings=False` beside a recorded tie of target and output.

    Raises:
        TyingError: with the explicit ways to open the model tied or untied.
    """
    if not config.groups or scheme_of(anatomy, groups) not in ("two_way", "three_way"):
        return
    target, output = (anatomy.roles[role].name for role in ("target", "output"))
    if any({target, output} & config.relaxed_names(group.name) for group in groups if group.name in config.groups):
        return  # a relaxed tie is none to a stock loader
    recorded = {name for names in config.groups.values() for name in names}
    if {target, output} <= recorded and not any({target, output} <= set(chain) for chain in anatomy.declared):
        for flagged in _flagged_configs(anatomy.model):
            if not flagged.tie_word_embeddings:
                raise TyingError(
                    "The config has tie_word_embeddings=False, but its `tying` entry ties "
                    f"{output!r} to {target!r}. To open it tied: from_pretrained(..., tie_word_embeddings=True); to "
                    "open it untied, untie(model) after that."
                )
