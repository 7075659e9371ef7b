"""The names of an adapter's factors in its file, where shared factors are stored once, and the u and v are rows.

    base_model.model.tied_matrices.tied_lora_A.self_attn-qkv-4096        (r, in_features)
    base_model.model.tied_matrices.tied_lora_B.self_attn-q_proj-4096     (out_features, r)
    base_model.model.tied_matrices.tied_lora_u.self_attn-qkv-8           (layers, r)
    base_model.model.tied_matrices.tied_lora_v.self_attn-q_proj-4096     (layers, out_features)

The number of these tensors does not depend on the number of layers. With one tensor for the vector of each module, the
names of a small adapter would need more space than its values. `adapted_modules` in the config lists the modules, and
the factors that each of them uses.
"""

from collections.abc import Iterable

import torch

from ..report.layer_order import in_layer_order
from .config import TiedLoraConfig
from .matrices import CONTAINER
from .sharing import FactorNames, recorded_names

#: The start of every name in the file of an adapter.
BASE_PREFIX = "base_model.model."


def is_factor_name(key: str) -> bool:
    """Return whether `key` is the name of a factor in a file, with `BASE_PREFIX` or without it.

    Args:
        key: name of a tensor. transformers' own adapters are saved without `BASE_PREFIX`.
    """
    return key.startswith((f"{BASE_PREFIX}{CONTAINER}.", f"{CONTAINER}."))


def names_in_file(config: TiedLoraConfig) -> dict[str, str | list[str]]:
    """Map each name in the file to the name of that factor in a model, or to a list of names, one for each row.

    Names do not have the adapter's name or `BASE_PREFIX`.

    Args:
        config: settings with `adapted_modules`, as after injection or in a saved `adapter_config.json`.

    Raises:
        ValueError: the config has no `adapted_modules`, or they contradict its other settings.
    """
    if not config.adapted_modules:
        raise ValueError(
            "This Tied-LoRA config has no adapted_modules. Expected the adapter_config.json that was saved with the "
            "adapter; it is written when the adapter is put into a model."
        )
    found: dict[str, str | dict[str, None]] = {}
    recorded = recorded_names(config)
    for module in in_layer_order(recorded):
        names, in_model = recorded[module], names_in_model(config, module)
        for kind in "AB":
            found[in_model[kind].removesuffix(".weight")] = in_model[kind]
        for kind, rows in (("u", names.u_rows), ("v", names.v_rows)):
            if kind in in_model:
                found.setdefault(f"{CONTAINER}.tied_lora_{kind}.{rows}", {})[in_model[kind]] = None
    return {name: rows if isinstance(rows, str) else list(rows) for name, rows in found.items()}


def names_in_model(config: TiedLoraConfig, module: str) -> dict[str, str]:
    """Return the names in a model of the factors that a module uses.

    Args:
        config: settings with `adapted_modules`.
        module: name of the module.

    Returns:
        The names by "A", "B", "u" and "v"; u or v only if the adapter trains it.
    """
    names = FactorNames(**config.adapted_modules[module])
    found = {kind: f"{CONTAINER}.tied_lora_{kind}.{getattr(names, kind)}.weight" for kind in "ABu"}
    found["v"] = f"{module}.tied_lora_v.weight"
    absent = [kind for kind in "uv" if not getattr(config, f"train_{kind}")]
    return {kind: name for kind, name in found.items() if kind not in absent}


def file_from_state(state: dict[str, torch.Tensor], config: TiedLoraConfig) -> dict[str, torch.Tensor]:
    """Convert factors from their names in a model to their names in a file.

    Names do not have the adapter's name or `BASE_PREFIX`.

    Args:
        state: factors by their names in a model.
        config: settings with `adapted_modules`.
    """
    saved = {}
    for name, in_model in names_in_file(config).items():
        if isinstance(in_model, str):
            saved[name] = state[in_model]
        else:
            rows = [state[row] for row in in_model]
            saved[name] = torch.stack([row.to(rows[0].device) for row in rows])
    return saved


def state_from_file(saved: dict[str, torch.Tensor], config: TiedLoraConfig) -> dict[str, torch.Tensor]:
    """Convert the tensors of a file to their names in a model, with `BASE_PREFIX`.

    Tensors that are not factors are unchanged.

    Args:
        saved: tensors by their names in the file.
        config: settings with `adapted_modules`.

    Raises:
        RuntimeError: a factor is missing, has no place in the adapter, or has another number of rows.
    """
    names = names_in_file(config)
    factors = {key.removeprefix(BASE_PREFIX): value for key, value in saved.items() if is_factor_name(key)}
    for name, other in size_mismatches(names, factors).items():
        factors[name] = factors.pop(other)  # PEFT refuses the wrong size, or is asked to ignore it
    problems = [f"{name} is missing" for name in sorted(names.keys() - factors.keys())]
    problems += [f"{name} has no place in it" for name in sorted(factors.keys() - names.keys())]
    for name, rows in names.items():
        if name in factors and isinstance(rows, list) and len(rows) != len(factors[name]):
            problems.append(f"{name} has {len(factors[name])} rows for {len(rows)} modules")
    refuse_misfit(problems)
    state = {key: value for key, value in saved.items() if not is_factor_name(key)}
    for name, in_model in names.items():
        found = (
            {in_model: factors[name]}
            if isinstance(in_model, str)
            else zip(in_model, factors[name].unbind(), strict=True)
        )
        state |= {BASE_PREFIX + key: value for key, value in dict(found).items()}
    return state


def size_mismatches(expected: Iterable[str], found: Iterable[str]) -> dict[str, str]:
    """Pair each missing tensor name with an unexpected one that differs only in its size suffix.

    Args:
        expected: expected names.
        found: names in the file.
    """
    more = {name.rpartition("-")[0]: name for name in set(found) - set(expected)}
    missing = ((name, name.rpartition("-")[0]) for name in set(expected) - set(found))
    return {name: more[stem] for name, stem in missing if stem in more}


def refuse_misfit(problems: list[str]) -> None:
    """Refuse a file that does not fit its settings or its model.

    Args:
        problems: problems of the file, each a clause; empty if it fits.

    Raises:
        RuntimeError: there are problems. PEFT raises this type for a state dict that does not fit.
    """
    if problems:
        more = f"; and {len(problems) - 6} more" if len(problems) > 6 else ""
        raise RuntimeError(
            f"The adapter's file does not fit: {'; '.join(problems[:6])}{more}. Expected the adapter_config.json that "
            "was saved with it, and a base model of the same shape."
        )
