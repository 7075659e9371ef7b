"""`add_weighted_adapter`: one adapter for the weighted sum of several."""

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from peft.utils.other import ModulesToSaveWrapper
from transformers.utils import logging

from ..config import TiedLoraConfig
from ..layer import TiedLoraLayer
from ..tensor_names import names_in_model
from .alternating import Update
from .fit import fit_updates

if TYPE_CHECKING:
    from ..model import TiedLoraModel

logger = logging.get_logger(__name__)

#: A config, and the factors of each module by their kinds.
Combined = tuple[TiedLoraConfig, dict[str, dict[str, torch.Tensor]]]

COMBINATION_TYPES = ("fit", "cat")


def add_weighted_adapter(
    tuner: "TiedLoraModel",
    adapters: list[str],
    weights: list[float],
    adapter_name: str,
    combination_type: str = "fit",
    r: int | None = None,
    iterations: int = 300,
) -> None:
    """Add an adapter that is the weighted sum of others.

    Args:
        tuner: model with the adapters. The next arguments are those of its `add_weighted_adapter`.
        adapters: names of the adapters.
        weights: one finite factor for each adapter.
        adapter_name: name of the new adapter.
        combination_type: `"fit"` or `"cat"`.
        r: rank of the new adapter, for `"fit"`.
        iterations: largest number of sweeps of a fit.

    Raises:
        ValueError: as there; the model is then unchanged.
    """
    _check(tuner, adapters, weights, adapter_name, combination_type, r)
    layers = {layer.module_name: layer for layer in tuner.model.modules() if isinstance(layer, TiedLoraLayer)}
    layers = {module: layer for module, layer in layers.items() if layer.uses.keys() & set(adapters)}
    combine = _cat if combination_type == "cat" else _fit
    config, values = combine(tuner.peft_config, layers, adapters, weights, r, iterations)
    tuner.peft_config[adapter_name] = config
    try:
        tuner.inject_adapter(tuner.model, adapter_name)
    except ValueError:
        del tuner.peft_config[adapter_name]
        raise
    with torch.no_grad():
        for module, layer in layers.items():
            places = layer.factors(adapter_name)
            if adapter_name in layer.tied_lora_v:
                places["v"] = layer.tied_lora_v[adapter_name]
            for kind, place in places.items():
                place.weight.copy_(values[module][kind])


def _check(
    tuner: "TiedLoraModel",
    adapters: list[str],
    weights: list[float],
    adapter_name: str,
    combination_type: str,
    r: int | None,
) -> None:
    unknown = [name for name in adapters if name not in tuner.peft_config]
    if unknown:
        raise ValueError(f"Adapter {unknown[0]} does not exist. The model has {', '.join(tuner.peft_config)}.")
    if not adapters or len(adapters) != len(weights):
        raise ValueError(f"{len(adapters)} adapters and {len(weights)} weights: expected one weight for each adapter.")
    if not all(math.isfinite(weight) for weight in weights):
        raise ValueError(f"weights={weights}: expected finite numbers.")
    if adapter_name in tuner.peft_config:
        raise ValueError(f"There is an adapter {adapter_name!r} already: delete it first, or give another name.")
    if combination_type not in COMBINATION_TYPES:
        raise ValueError(
            f"Invalid combination_type: {combination_type!r}. Expected 'cat' or 'fit'; LoRA has more: export each "
            "adapter (hf_tying.peft.export_to_lora), and combine the exports."
        )
    if r is not None and combination_type == "cat":
        raise ValueError(f"r={r} with combination_type='cat', of which the rank is the sum of the ranks.")
    wrappers = [module for module in tuner.modules() if isinstance(module, ModulesToSaveWrapper)]
    if any(sum(name in wrapper.modules_to_save for name in adapters) > 1 for wrapper in wrappers):
        raise ValueError(
            "Several of the adapters have their own weights for the same module (modules_to_save), of which there is "
            "no sum."
        )


def _cat(
    configs: dict[str, TiedLoraConfig],
    layers: dict[str, TiedLoraLayer],
    adapters: list[str],
    weights: list[float],
    r: int | None,
    iterations: int,
) -> Combined:
    """The exact sum: the adapters side by side, as rows of one A and u and columns of one B."""
    way = "Use combination_type='fit', which approximates the sum; or export the adapters to LoRA and combine these."
    first = configs[adapters[0]]
    if len(adapters) > 1 and any(configs[name].train_v for name in adapters):
        raise ValueError(f"combination_type='cat': the adapters have a v each, and side by side there is one. {way}")
    for module, layer in layers.items():
        names = {
            replace(layer.uses[name].names, u_rows="") if name in layer.uses else None  # u_rows has r in its name
            for name in adapters
        }
        if len(names) > 1:
            raise ValueError(
                f"combination_type='cat': the adapters do not share the same in {module!r}, or not all of them are on "
                f"it. {way}"
            )
    config = _changed(first, sum(configs[name].r for name in adapters))
    config = replace(config, variant=None, train_u=any(configs[name].train_u for name in adapters))
    values = {}
    for module, layer in layers.items():
        used = [layer.uses[name] for name in adapters]
        a = [each.A.weight * (weight * each.scaling) for each, weight in zip(used, weights, strict=True)]
        ones = [each.A.weight.new_ones(len(each.A.weight)) for each in used]
        u = [one if each.u is None else each.u.weight for each, one in zip(used, ones, strict=True)]
        values[module] = {"A": torch.cat(a), "B": torch.cat([each.B.weight for each in used], 1), "u": torch.cat(u)}
        if config.train_v:
            values[module]["v"] = layer.tied_lora_v[adapters[0]].weight
    return config, values


def _fit(
    configs: dict[str, TiedLoraConfig],
    layers: dict[str, TiedLoraLayer],
    adapters: list[str],
    weights: list[float],
    r: int | None,
    iterations: int,
) -> Combined:
    """The adapter of rank r that is nearest to the sum."""
    updates = {}
    with torch.no_grad():
        for module, layer in layers.items():
            parts = [
                [factor.to("cpu", torch.float64) for factor in (weight * a, b)]
                for name, weight in zip(adapters, weights, strict=True)
                if name in layer.uses
                for a, b in [layer.get_lora_factors(name)]
            ]
            updates[module] = Update(torch.cat([b for _, b in parts], 1), torch.cat([a for a, _ in parts]))
    config = _changed(configs[adapters[0]], r or max(configs[name].r for name in adapters))
    config = replace(config, target_modules=list(layers), exclude_modules=None, layers_to_transform=None)
    state, errors, _ = fit_updates(
        config, updates, {module: layer.kind for module, layer in layers.items()}, iterations=iterations
    )
    norm = sum(float(update.squared_norm()) for update in updates.values())
    error = math.sqrt(sum(errors.values()) / norm) if norm else 0.0
    logger.warning(
        f"The adapter of rank {config.r} that was fitted to the sum of {', '.join(adapters)} has a relative error of "
        f"{error:.2%}; a larger r has a smaller one."
    )
    values = {
        module: {kind: state[name] for kind, name in names_in_model(config, module).items()} for module in layers
    }
    return config, values


def _changed(config: TiedLoraConfig, r: int) -> TiedLoraConfig:
    # Biases belong to the model, not to one adapter.
    return replace(config, r=r, alpha=r, tied_lora_alpha=None, bias="none", modules_to_save=None, adapted_modules=None)
