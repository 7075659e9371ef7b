"""How the ties are recorded: the `tying` entry and `tie_word_embeddings` of the config, written from what is so."""

import functools

from transformers.modeling_utils import PreTrainedModel

from ..config import TyingConfig, TyingError
from .anatomy import Anatomy
from .declared import declared_pairs, join_chains
from .groups import TieGroup, scheme_of
from .roles import SCALED_BY_THE_FLAG


def write_config(model: PreTrainedModel, **changes) -> TyingConfig:
    """Write `model.tie_groups` to its config, and return what was written.

    Args:
        model: a model with `tie_groups`.
        changes: `on_conflict`, `save_format`; what is not given stays as the entry has it. `save_format=None` asks for
            the default of the groups as they are now.
    """
    before = TyingConfig.from_dict(getattr(model.config, "tying", None)).replace(**changes)
    anatomy = Anatomy(model)
    scheme = scheme_of(anatomy, model.tie_groups)
    write_flags(anatomy, tied=scheme in ("two_way", "three_way"))
    entry = before.replace(
        scheme=scheme,
        groups={group.name: list(group.names) for group in model.tie_groups},
        save_format=before.save_format or default_save_format(anatomy),
    )
    model.config.tying = entry.to_dict()
    return entry


def default_save_format(anatomy: Anatomy) -> str:
    """`"dedup"` where the stock class re-ties exactly these groups from the same roots, `"portable"` elsewhere."""
    model = anatomy.model
    # Read anew: the flags, on which it depends, may just have been written.
    stock = {frozenset(chain) for chain in join_chains(declared_pairs(model, anatomy.slots))}
    own = {frozenset(group.names) for group in model.tie_groups}
    base = model.base_model_prefix
    reachable = all(
        group.root.startswith(f"{base}.") or not any(n.startswith(f"{base}.") for n in group.names)
        for group in model.tie_groups
    )
    return "dedup" if own == stock and reachable else "portable"


def write_flags(anatomy: Anatomy, tied: bool) -> None:
    """Keep `tie_word_embeddings` truthful for the target and output pair: PEFT, accelerate, vLLM, llama.cpp read it.

    The T5 family is left alone: its config classes put the flag back to True, or its models (SwitchTransformers) read
    it for the scale of the logits, which no tie and no untie may change.
    """
    if not {"target", "output"} <= anatomy.roles.keys():
        return
    for config in _flagged_configs(anatomy.model):
        config.tie_word_embeddings = tied


def _flagged_configs(model: PreTrainedModel) -> list:
    configs = [model.config, model.config.get_text_config(decoder=True)]
    return [c for c in configs if hasattr(c, "tie_word_embeddings") and not flag_is_forced(type(c))]


@functools.cache
def flag_is_forced(config_class: type) -> bool:
    """Whether the flag says nothing about ties: the class answers True whatever it is told, or scales logits by it."""
    if config_class.model_type in SCALED_BY_THE_FLAG:
        return True
    try:
        return config_class(tie_word_embeddings=False).tie_word_embeddings is True
    except Exception:  # a composite config that needs its parts: none of these forces the flag
        return False


def refuse_contradicting_flag(anatomy: Anatomy, config: TyingConfig, groups: list[TieGroup]) -> None:
    """A recorded tie of target and output under `tie_word_embeddings=False`: somebody asked for it to be opened
    untied.

    Raises:
        TyingError: with the explicit way to do that.
    """
    if not config.groups or scheme_of(anatomy, groups) not in ("two_way", "three_way"):
        return
    target, output = (anatomy.roles[role].name for role in ("target", "output"))
    recorded = {name for names in config.groups.values() for name in names}
    if {target, output} <= recorded:
        for flagged in _flagged_configs(anatomy.model):
            if not flagged.tie_word_embeddings:
                raise TyingError(
                    "The config has tie_word_embeddings=False, but its `tying` entry ties "
                    f"{output!r} to {target!r}. To open it untied: load it as it is, then untie(model)."
                )
