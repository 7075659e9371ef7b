"""What a class ties, read from the class itself, built without weights. The table is made of these readings."""

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from ..config import TyingError
from .stock_table import FLAG, StockClass, generalised, part_of

if TYPE_CHECKING:
    from transformers.modeling_utils import PreTrainedModel

# Fields of a config that count words, as opposed to codes, token types and characters.
WORDS = re.compile(r"(vocab_size|src_vocab_size|tgt_vocab_size|decoder_vocab_size|text_vocab_size|n_vocab)")
# What a config could have somebody else's code fetched for, or run.
_NOT_BUILT = ("model_type", "auto_map", "attn_implementation", "_attn_implementation", "experts_implementation")


def describe(model: "PreTrainedModel") -> StockClass:
    """Read the ties, roles and names of a model; its sizes do not matter.

    Args:
        model: a stock model, also on the meta device.
    """
    from ..ties.anatomy import Anatomy

    anatomy = Anatomy(model)
    paths = _paths_of_configs(model)
    ties, forced = [], None
    for prefix, sub, keys in _declaring(anatomy):
        path = paths.get(id(sub.config), "")
        dot = f"{prefix}." if prefix else ""
        ties += [(root, alias, path) for root, alias in keys if not dot or alias.startswith(dot)]
    from ..ties.record import flag_is_forced
    from ..ties.roles import SCALED_BY_THE_FLAG

    kind = type(model.config)
    if flag_is_forced(kind) and kind.model_type not in SCALED_BY_THE_FLAG:
        forced = bool(getattr(model.config, FLAG, False))
    named = {name for tie in ties for name in tie[:2]} | set(anatomy.role_of)
    keys = {name: found for name in sorted(named) if (found := _keys_on_disk(model, name)) != [name]}
    held, _ = shapes_in_files(model)
    buffers = {name for name, _ in model.named_buffers()} & model.state_dict().keys()
    return StockClass(
        ties=list(dict.fromkeys(ties)),
        roles={role: list(found.names) for role, found in anatomy.roles.items()},
        keys=keys,
        flags={path: bool(getattr(_config_at(model, path), FLAG, False)) for path in {tie[2] for tie in ties}},
        forced=forced,
        sizes={
            role: size for role, found in anatomy.roles.items() if (size := _sizes(model, anatomy.slots[found.name]))
        },
        parts=sorted({part_of(name) for name in held}),
        buffers=sorted({generalised(name) for name in buffers}),
    )


def build(config: dict[str, Any], architecture: str) -> "PreTrainedModel | None":
    """The transformers class that a config names, on the meta device; `None` where transformers has no such class.

    No code of the checkpoint is run, and nothing is fetched.

    Raises:
        TyingError: the config does not make that class.
    """
    import torch
    import transformers
    from transformers import AutoConfig

    cls = getattr(transformers, architecture, None)
    if not hasattr(cls, "post_init") or not isinstance(config.get("model_type"), str):
        return None
    try:
        fields = {key: value for key, value in _plain(config).items() if key not in _NOT_BUILT}
        with torch.device("meta"):
            return cls(AutoConfig.for_model(config["model_type"], **fields))
    except TyingError:
        raise
    except Exception as error:
        raise TyingError(f"config.json does not make a {architecture}: {error}") from error


def _plain(config: dict[str, Any]) -> dict[str, Any]:
    """A config without what would fetch or run anything, in nested configs too (which need their `model_type`)."""
    unwanted = set(_NOT_BUILT) - {"model_type"}
    kept = {key: value for key, value in config.items() if key not in unwanted}
    return {key: _plain(value) if isinstance(value, dict) else value for key, value in kept.items()}


def _declaring(anatomy: Any) -> list[tuple[str, Any, list[tuple[str, str]]]]:
    """The models inside that declare ties, each with the pairs of its own declaration."""
    from transformers.modeling_utils import PreTrainedModel

    from ..ties.declared import declared_pairs, stock_keys

    found = []
    for prefix, sub in anatomy.places:
        if isinstance(sub, PreTrainedModel) and stock_keys(sub):
            # The same reading as of the whole, of this one place.
            pairs = declared_pairs([(prefix, sub)], anatomy.slots, gated=False)
            found.append((prefix, sub, pairs))
    return found


def _paths_of_configs(model: Any) -> dict[int, str]:
    """The path of each nested config, by identity."""
    found = {id(model.config): ""}
    for name, value in vars(model.config).items():
        if hasattr(value, "to_diff_dict"):
            found.setdefault(id(value), name)
    return found


def _config_at(model: Any, path: str) -> Any:
    return getattr(model.config, path) if path else model.config


def _keys_on_disk(model: "PreTrainedModel", name: str) -> list[str]:
    """The names under which a file holds the live parameter `name`."""
    from ..ties.slots import find_parameter

    try:
        from transformers.core_model_loading import revert_weight_conversion  # private; without it, own names only

        return list(revert_weight_conversion(model, {name: find_parameter(model, name).detach()}))
    except (ImportError, AttributeError, TypeError):
        return [name]


def matches(name: str, patterns: Iterable[str] | None) -> bool:
    """Whether one of a class's patterns of ignored names is in `name`."""
    return any(re.search(pattern, name) for pattern in patterns or ())


def shapes_in_files(model: "PreTrainedModel") -> tuple[dict[str, tuple[int, ...]], set[str]]:
    """The shapes of all tensors that a file of `model` can have, and the names of those that it may lack.

    Those are buffers, and what the class makes by itself (sinusoids of positions).
    """
    state = model.state_dict()
    optional = {name for name, _ in model.named_buffers()} & state.keys()
    optional |= {name for name in state if matches(name, model._keys_to_ignore_on_load_missing)}
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    try:
        from transformers.core_model_loading import revert_weight_conversion

        reverted = {name: tuple(t.shape) for name, t in revert_weight_conversion(model, dict(state)).items()}
    except (ImportError, AttributeError, TypeError, RuntimeError, ValueError, KeyError):
        return shapes, optional
    # Under either of its names; one of them is enough.
    renamed = shapes.keys() - reverted.keys()
    return reverted | {name: shapes[name] for name in renamed}, optional | renamed


def _sizes(model: "PreTrainedModel", parameter: Any) -> list[str]:
    """The fields of the configs that count the rows of a matrix."""
    from ..ties.roles import TWO_SIZES

    found = []
    nested = ((name, value) for name, value in vars(model.config).items() if hasattr(value, "to_diff_dict"))
    parts = [("", model.config), *((name, value) for name, value in nested if "vision" not in name)]
    for path, part in parts:
        for name, value in vars(part).items():
            if WORDS.fullmatch(name) and value == parameter.shape[0]:
                found.append(f"{path}.{name}" if path else name)
    return [] if model.config.model_type in TWO_SIZES and len(found) > 1 else found
