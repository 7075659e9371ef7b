"""`share_layers`, `unroll` and `fold`: layers of any transformers model as visits of a few shared blocks."""

import fnmatch
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import nn
from transformers.modeling_utils import PreTrainedModel

from ..config import RELAXATIONS, TyingConfig, TyingError
from ..ties.anatomy import Anatomy
from ..ties.depth_groups import FACTOR, depth_groups
from ..ties.record import write_config
from ..ties.relaxation import LowRank, relaxation_at
from ..ties.sharding import refuse_in_parts
from ..ties.shared_layers import damp, refuse_streams
from ..ties.slots import named_slots, parameter_of, same_values
from ..ties.tying import refuse_unfit, tie, untie
from .patterns import PATTERNS, order_of
from .stacks import chosen_stacks, grow, why_unlike

Model = TypeVar("Model", bound=PreTrainedModel)

INITS = ("first", "average", "stepwise", "svd")


def share_layers(
    model: Model,
    pattern: str | None = None,
    unique: int | None = None,
    *,
    order: Sequence[int] | None = None,
    init: str = "first",
    relax: dict[str, Any] | None = None,
    private: Iterable[str] = (),
    grow: bool = False,
    residual_factor: float | str | None = None,
    stack: str | None = None,
    save_format: str | None = None,
) -> Model:
    """Share the layers of a model, fresh or trained, in place.

    The model keeps its number of layers. Each is a visit of a shared block: a module of its own, with its own
    `layer_idx`, over parameters that all visits of the block have. So caches, masks and `generate` need no change.

    Args:
        model: any transformers model with a stack of layers, text, vision or speech.
        pattern: order of the blocks by its paper's name (`hf_tying.depth.patterns.PATTERNS`).
        unique: number of blocks of the pattern.
        order: instead of a pattern, the block of each layer, counted from 0. With `grow`, the trained layer of each.
        init: values of a block, from the layers that become its visits (Bae et al. 2024, Relaxed Recursive
            Transformers, section 3): `"first"` (default), the layer of its first visit; `"average"`, their mean;
            `"stepwise"`, of evenly spaced layers, the first and the last among them, the one with the block's number;
            `"svd"`, the first visit, and the best low rank of what the others differ by, which needs `relax`.
        relax: settings of a low-rank difference of each further visit, such as `{"rank": 16, "init": "svd"}`; see
            `hf_tying.config.RELAXATIONS` for other kinds. Vectors stay tied exactly. Default: none.
        private: names within a layer that stay apart, with `*` for any characters, in any case (`"*norm*"`,
            `"*bias"`). The config has the names that match now, never the pattern.
        grow: let the model get deeper: `order` names trained layers. The first visit of a layer is that layer. Each
            further one starts as the identity, by a factor of what it adds (`visit_factor`), which starts at 0 and is
            trained. The logits stay what they were.
        residual_factor: factor of what each layer adds (`visit_factor`, trained): a number, or `"looped"` for
            `1 / (N sqrt(L))`, N visits of its block, L blocks in the stack. Visits of one block add much the same, so
            that N of them need 1/N, where layers of their own need `1 / sqrt(L)` (Wang et al. 2026, On the Residual
            Scaling of Looped Transformers, with lambda = 1). For a fresh model. Default `None`: no factor.
        stack: which stack of layers: its path, or a part of it (`"encoder"`). Default `None`: all.
        save_format: `"portable"` (default): the file has every layer, for any loader. `"dedup"`: each block once, in a
            file that stock loaders refuse to read, since they would draw the other layers at random.

    Returns:
        The same model.

    Raises:
        TyingError: unknown patterns and settings, layers of different kinds under one block, adapters, weights without
            values; nothing is changed.

    Example:
        >>> share_layers(model, pattern="cycle", unique=4, init="stepwise")
    """
    refuse_unfit(model, "share the layers of")
    refuse_in_parts(model, "share the layers of")
    low_rank = _relaxation(relax, init)
    if init == "svd" and (low_rank is None or low_rank["kind"] != "lora"):
        raise TyingError(
            "init='svd' puts what visits differ by into a low rank: expected relax={'rank': ...} with it."
        )
    _refuse_factor(residual_factor, grow)
    declared = TyingConfig.in_config(model.config)
    entries, targets = [], chosen_stacks(model, stack)
    if grow and len(targets) > 1:
        raise TyingError(f"grow=True with {len(targets)} stacks: name one by stack=, of {list(targets)}.")
    private_of = _private_names(targets, private)
    for path, layers in targets.items():
        blocks = _order(path, len(layers), pattern, unique, order, grow)
        if any(entry["path"] == path and not entry.get("unrolled") for entry in declared.depth):
            raise TyingError(f"The layers of {path!r} are shared already: unroll(model) first.")
        for block in dict.fromkeys(blocks):
            _refuse_unlike(path, layers, blocks, block, grow)
        _refuse_rescaled(model, path, blocks)
        if grow or residual_factor is not None:
            refuse_streams(path, layers[0])
        entry: dict[str, Any] = {"path": path, "order": blocks}
        if names := private_of[path]:
            entry["private"] = names
        if low_rank is not None:
            entry["relax"] = {key: value for key, value in low_rank.items() if key != "init"}
        entries.append(entry)
    for name, parameter in named_slots(model).items():
        if not any(name.startswith(f"{path}.") for path in targets):
            continue
        if parameter.is_meta:
            raise TyingError(
                f"Cannot share {name!r}: it is on the meta device and has no value. Load the weights first."
            )
    if grow:
        _grow(model, entries[0])
    if residual_factor is not None:
        for entry in entries:
            _damp_all(model, entry, residual_factor)
    before = {}
    for entry in entries:
        before |= _initialise(model, entry, init, kept=(low_rank or {}).get("init") == "svd")
    kept = [other for other in declared.depth if other["path"] not in targets]
    tie(model, TyingConfig(depth=[*kept, *entries], save_format=save_format))
    for name, value in before.items():
        if isinstance(found := relaxation_at(model, name), LowRank):
            found.fit(value - parameter_of(model, name).detach())
    return model


def unroll(model: Model) -> Model:
    """Give each visit of a shared block parameters of its own, in place: a plain model, of the same function.

    The config remembers the order, for `fold`. An optimizer made before does not know the copies.

    Returns:
        The same model. An ALBERT, whose class shares one block, gets a group of layers for each layer.

    Raises:
        TyingError: nothing is shared, or layers have a factor of what they add, which plain layers lack.
    """
    refuse_unfit(model, "unroll")
    if _unshare_groups(model):
        return model
    shared = _shared(model, unrolled=False)
    for entry in shared:
        if damped := entry.get("damped"):
            raise TyingError(
                f"Cannot unroll {entry['path']!r}: layers {damped} have a factor of what they add ({FACTOR!r}), and "
                "no plain layer has. Save the model as it is, and load it by this package."
            )
    names = [name for entry in shared for chain in depth_groups(named_slots(model), entry).values() for name in chain]
    paths = {entry["path"] for entry in shared}
    untie(model, names)
    _write_depth(model, [entry | {"unrolled": True} for entry in shared], paths)
    return model


def fold(model: Model) -> Model:
    """Share the layers of an unrolled model again, in place, as the config remembers.

    Returns:
        The same model.

    Raises:
        TyingError: nothing was unrolled, or visits of one block differ by more than their relaxation holds: they were
            trained apart. `share_layers` chooses among their values.
    """
    refuse_unfit(model, "fold")
    refuse_in_parts(model, "fold")
    unrolled = _shared(model, unrolled=True)
    slots, residuals = named_slots(model), {}
    for entry in unrolled:
        folded = {key: value for key, value in entry.items() if key != "unrolled"}
        for root, chain in depth_groups(slots, folded).items():
            for name in chain[1:]:
                if same_values(slots[name], slots[root]):
                    continue
                residual = (slots[name] - slots[root]).detach()
                if not _fits(residual, entry.get("relax")):
                    raise TyingError(
                        f"Cannot fold {entry['path']!r}: {name!r} and {root!r} differ by more than a shared block "
                        "can. To choose among their values: share_layers(model, order=..., init=...)."
                    )
                residuals[name] = residual
    for entry in unrolled:
        for root, chain in depth_groups(slots, {**entry, "unrolled": False}).items():
            for name in chain[1:]:
                if name in residuals:
                    slots[name].data.copy_(slots[root])
    kept = [entry for entry in TyingConfig.in_config(model.config).depth if entry not in unrolled]
    folded = [{key: value for key, value in entry.items() if key != "unrolled"} for entry in unrolled]
    tie(model, TyingConfig(depth=[*kept, *folded]))
    for name, residual in residuals.items():
        if isinstance(found := relaxation_at(model, name), LowRank):
            found.fit(residual)
    return model


# --- the checks ------------------------------------------------------------------------------------------------------


def _relaxation(relax: dict[str, Any] | None, init: str) -> dict[str, Any] | None:
    if init not in INITS:
        raise TyingError(f"init={init!r}: expected one of {', '.join(INITS)}.")
    if relax is None:
        return None
    if not isinstance(relax, dict):
        raise TyingError(f"relax is a {type(relax).__name__}: expected a dict such as {{'rank': 16}}.")
    settings = {"kind": "lora", **relax}
    TyingConfig(depth=[{"path": "layers", "order": [0, 0], "relax": settings}])  # refuses wrong settings
    if init == "svd":
        settings["init"] = "svd"
    return settings


def _order(
    path: str, layers: int, pattern: str | None, unique: int | None, order: Sequence[int] | None, grow: bool
) -> list[int]:
    if (pattern is None) == (order is None):
        raise TyingError(f"Expected either a pattern, one of {', '.join(PATTERNS)}, or an order of blocks.")
    if pattern is not None:
        if grow:
            raise TyingError("grow=True needs `order`: which trained layer each visit is of.")
        return order_of(pattern, layers, unique)
    if not isinstance(order, list | tuple) or not all(type(block) is int and block >= 0 for block in order):
        raise TyingError(f"order={order!r:.80}: expected a list of numbers from 0.")
    if grow:
        if len(order) < layers or set(order) != set(range(layers)):
            raise TyingError(
                f"The order has {len(order)} visits of layers {sorted(set(order))}: to grow {path!r}, expected each "
                f"of its {layers} layers at least once."
            )
    elif len(order) != layers:
        raise TyingError(
            f"The order has {len(order)} layers, and {path!r} has {layers}: expected the block of each layer. To make "
            "the model deeper: grow=True."
        )
    return list(order)


def _refuse_unlike(path: str, layers: nn.ModuleList, order: list[int], block: int, grow: bool) -> None:
    visits = [block] if grow else [i for i, each in enumerate(order) if each == block]
    for i in visits[1:]:
        if (why := why_unlike(layers[visits[0]], layers[i])) is None:
            continue
        kinds: list[int] = []
        for layer in layers:
            kinds.append(next((k for k in kinds if why_unlike(layers[k], layer) is None), len(kinds)))
        fitting = [
            f"pattern={name!r}, unique={count}"
            for name in PATTERNS
            for count in range(len(layers) - 1, 0, -1)
            if _fits_pattern(name, count, kinds)
        ]
        like = [j for j, kind in enumerate(kinds) if kind == kinds[visits[0]]]
        raise TyingError(
            f"Layers {visits[0]} and {i} of {path!r} cannot be one block: layer {i} {why}. Layers like layer "
            f"{visits[0]}: {like}. What fits: {', '.join(fitting[:3]) or 'an `order` that shares like layers only'}."
        )


def _fits_pattern(pattern: str, unique: int, kinds: list[int]) -> bool:
    try:
        order = order_of(pattern, len(kinds), unique)
    except TyingError:
        return False
    return all(len({kinds[i] for i, each in enumerate(order) if each == block}) == 1 for block in set(order))


def _refuse_factor(factor: float | str | None, grow: bool) -> None:
    number = isinstance(factor, int | float) and not isinstance(factor, bool) and 0 < factor < math.inf
    if factor is not None and factor != "looped" and not number:
        raise TyingError(f"residual_factor={factor!r:.80}: expected a number above 0, or 'looped'.")
    if factor is not None and grow:
        raise TyingError("grow=True starts further visits at the factor 0: expected no residual_factor with it.")


def _refuse_rescaled(model: PreTrainedModel, path: str, order: list[int]) -> None:
    """Refuse RWKV's scaling for inference, which divides the matrices of a layer by its number, in place."""
    every = getattr(model.config, "rescale_every", 0)
    if every and len(order) > max(every, len(set(order))):
        raise TyingError(
            f"Layers of {path!r} cannot be one block: in evaluation the model divides their matrices in place, by a "
            f"power of two for each {every} layers (rescale_every in its config), and visits of a block would divide "
            "one matrix twice. Load the model with rescale_every=0."
        )


def _private_names(stacks: Mapping[str, nn.ModuleList], private: Iterable[str]) -> dict[str, list[str]]:
    """The names that match in each stack. A pattern may be for one of them alone, such as cross-attention."""
    patterns = [private] if isinstance(private, str) else list(private)
    names = {
        path: list(dict.fromkeys(name for layer in layers for name, _ in layer.named_parameters()))
        for path, layers in stacks.items()
    }
    known = [name for found in names.values() for name in found]
    for pattern in patterns:
        if not isinstance(pattern, str) or not any(_matches(name, pattern) for name in known):
            raise TyingError(f"private={pattern!r} matches nothing in a layer: expected some of {known[:6]}.")
    return {
        path: [name for name in found if any(_matches(name, pattern) for pattern in patterns)]
        for path, found in names.items()
    }


def _matches(name: str, pattern: str) -> bool:
    """Upper and lower case are alike: a norm is `input_layernorm` in one model, and `LayerNorm` in another."""
    return fnmatch.fnmatchcase(name.lower(), pattern.lower())


# --- the changes -----------------------------------------------------------------------------------------------------


def _grow(model: PreTrainedModel, entry: dict[str, Any]) -> None:
    """Add the layers, and damp the further visits."""
    order = entry["order"]
    grow(model, entry["path"], order)
    again = [i for i, block in enumerate(order) if block in order[:i]]
    stack = model.get_submodule(entry["path"])
    assert isinstance(stack, nn.ModuleList)
    for i in again:
        damp(stack[i])
    if again:
        entry["damped"] = again


def _damp_all(model: PreTrainedModel, entry: dict[str, Any], factor: float | str) -> None:
    """Give each layer a factor of what it adds."""
    order = entry["order"]
    for i, block in enumerate(order):
        looped = 1 / (order.count(block) * math.sqrt(len(set(order))))
        damp(model.get_submodule(f"{entry['path']}.{i}"), looped if isinstance(factor, str) else float(factor))
    entry["damped"] = list(range(len(order)))


def _initialise(model: PreTrainedModel, entry: dict[str, Any], init: str, kept: bool) -> dict[str, torch.Tensor]:
    """Give all visits of a block its values. Returns those that the further visits had, if they are to be `kept`."""
    slots = named_slots(model)
    path, order = entry["path"], entry["order"]
    blocks = list(dict.fromkeys(order))
    before = {}
    with torch.no_grad():
        old = {name: parameter.detach().clone() for name, parameter in slots.items() if name.startswith(f"{path}.")}
        for root, chain in depth_groups(slots, entry).items():
            number, _, rest = root.removeprefix(f"{path}.").partition(".")
            values = [old[name] for name in chain]
            if init == "average":
                value = torch.stack([each.double() for each in values]).mean(0).to(values[0].dtype)
            elif init == "stepwise":
                block = blocks.index(order[int(number)])
                source = round(block * (len(order) - 1) / max(len(blocks) - 1, 1))
                value = old.get(f"{path}.{source}.{rest}", values[0])
            else:
                value = values[0]
            if value.shape != values[0].shape:
                value = values[0]
            for name in chain:
                slots[name].copy_(value)
            if kept:
                before |= dict(zip(chain[1:], values[1:], strict=True))
    return before


def _fits(residual: torch.Tensor, relax: dict[str, Any] | None) -> bool:
    """Whether a low rank can hold `residual`, up to the rounding of its dtype."""
    if relax is None or relax.get("kind") != "lora" or residual.ndim < 2:
        return False
    values = torch.linalg.svdvals(residual.reshape(residual.shape[0], -1).double())
    rest = values[(RELAXATIONS["lora"] | relax)["rank"] :]
    return bool(rest.numel() == 0 or rest.max() <= 100 * torch.finfo(residual.dtype).eps * values.max().clamp(min=1))


def _shared(model: PreTrainedModel, unrolled: bool) -> list[dict[str, Any]]:
    found = [entry for entry in TyingConfig.in_config(model.config).depth if entry.get("unrolled", False) == unrolled]
    if not found:
        what = "unrolled layers to fold" if unrolled else "shared layers to unroll"
        raise TyingError(f"{type(model).__name__} has no {what}: share_layers(model, ...) shares some.")
    return found


def _write_depth(model: PreTrainedModel, entries: list[dict[str, Any]], paths: set[str]) -> None:
    kept = [entry for entry in TyingConfig.in_config(model.config).depth if entry["path"] not in paths]
    write_config(model, Anatomy(model), depth=[*kept, *entries])


def _unshare_groups(model: PreTrainedModel) -> bool:
    """Give an ALBERT one group of layers for each layer. Returns whether the model is one."""
    config: Any = model.config
    groups = getattr(config, "num_hidden_groups", None)
    path = next((p for p, module in model.named_modules() if p.endswith("albert_layer_groups")), None)
    if not isinstance(groups, int) or path is None or groups == config.num_hidden_layers:
        return False
    layers = config.num_hidden_layers
    grow(model, path, [int(i / (layers / groups)) for i in range(layers)])
    return True
