"""How the factors of an adapter are named in its file: every shared one once, the u and the v of all layers as rows.

    base_model.model.tied_matrices.tied_lora_A.self_attn-qkv-4096        (r, in_features)
    base_model.model.tied_matrices.tied_lora_B.self_attn-q_proj-4096     (out_features, r)
    base_model.model.tied_matrices.tied_lora_u.self_attn-qkv-8           (layers, r)
    base_model.model.tied_matrices.tied_lora_v.self_attn-q_proj-4096     (layers, out_features)

A handful of tensors whatever the number of layers: the names of one vector per module would take more than the
vectors of a small adapter. Which modules there are, and what each uses, is in `adapted_modules` of the config.
"""

from collections.abc import Iterable

import torch

from .config import TiedLoraConfig
from .matrices import CONTAINER
from .sharing import Sharing

PREFIX = "base_model.model."


def is_of_file(key: str) -> bool:
    """Is this the name of a factor in a file?"""
    return key.startswith((f"{PREFIX}{CONTAINER}.", f"{CONTAINER}."))


def parts_of_file(config: TiedLoraConfig) -> dict[str, str | list[str]]:
    """From each name in the file to the one that it has in a model; for a matrix of rows to those of the rows.

    Names are without the adapter's, and without `base_model.model`.

    Args:
        config: with `adapted_modules`, as it is after injection and in a saved `adapter_config.json`.

    Raises:
        ValueError: the config does not say which modules are adapted.
    """
    if not config.adapted_modules:
        raise ValueError(
            "This Tied-LoRA config has no adapted_modules. Expected the adapter_config.json that was saved with the "
            "adapter; it is written when the adapter is put into a model."
        )
    parts: dict[str, str | list[str]] = {}
    for module in in_order(config.adapted_modules):
        names, of_model = Sharing(**config.adapted_modules[module]), names_in_model(config, module)
        for kind in "AB":
            parts[of_model[kind].removesuffix(".weight")] = of_model[kind]
        for kind, rows in (("u", names.u_rows), ("v", names.v_rows)):
            if kind in of_model:
                rows = parts.setdefault(f"{CONTAINER}.tied_lora_{kind}.{rows}", [])
                if of_model[kind] not in rows:
                    rows.append(of_model[kind])
    return parts


def names_in_model(config: TiedLoraConfig, module: str) -> dict[str, str]:
    """By "A", "B", "u" and "v", as far as the adapter has them: the name in a model of that factor of a module."""
    names = Sharing(**config.adapted_modules[module])
    found = {kind: f"{CONTAINER}.tied_lora_{kind}.{getattr(names, kind)}.weight" for kind in "ABu"}
    found["v"] = f"{module}.tied_lora_v.weight"
    absent = [kind for kind in "uv" if not getattr(config, f"train_{kind}")]
    return {kind: name for kind, name in found.items() if kind not in absent}


def in_order(modules: Iterable[str]) -> list[str]:
    """Names of modules in the order of their layers: 9 before 10."""
    return sorted(modules, key=lambda name: [(int(p), "") if p.isdigit() else (-1, p) for p in name.split(".")])


def to_file(state: dict[str, torch.Tensor], config: TiedLoraConfig) -> dict[str, torch.Tensor]:
    """The tensors of the file, from those of a model by their names there, without the adapter's."""
    saved = {}
    for name, of_model in parts_of_file(config).items():
        if isinstance(of_model, str):
            saved[name] = state[of_model]
        else:
            rows = [state[row] for row in of_model]
            saved[name] = torch.stack([row.to(rows[0].device) for row in rows])
    return saved


def from_file(saved: dict[str, torch.Tensor], config: TiedLoraConfig) -> dict[str, torch.Tensor]:
    """The opposite of `to_file`: what is not a factor stays as it is.

    Raises:
        RuntimeError: factors are missing, or more than the adapter has, or have other numbers of rows.
    """
    parts = parts_of_file(config)
    factors = {key.removeprefix(PREFIX): value for key, value in saved.items() if is_of_file(key)}
    for name, other in but_for_size(parts, factors).items():
        factors[name] = factors.pop(other)  # PEFT says, or is told to ignore, that it has another size
    problems = [f"{name} is missing" for name in sorted(parts.keys() - factors.keys())]
    problems += [f"{name} has no place in it" for name in sorted(factors.keys() - parts.keys())]
    for name, rows in parts.items():
        if name in factors and isinstance(rows, list) and len(rows) != len(factors[name]):
            problems.append(f"{name} has {len(factors[name])} rows for {len(rows)} modules")
    refuse(problems)
    state = {key: value for key, value in saved.items() if not is_of_file(key)}
    for name, of_model in parts.items():
        found = (
            {of_model: factors[name]}
            if isinstance(of_model, str)
            else zip(of_model, factors[name].unbind(), strict=True)
        )
        state |= {PREFIX + key: value for key, value in dict(found).items()}
    return state


def but_for_size(expected: Iterable[str], found: Iterable[str]) -> dict[str, str]:
    """For names that are not found: those of what is found whose name has another size at its end, and no place."""
    more = {name.rpartition("-")[0]: name for name in set(found) - set(expected)}
    missing = ((name, name.rpartition("-")[0]) for name in set(expected) - set(found))
    return {name: more[stem] for name, stem in missing if stem in more}


def refuse(problems: list[str]) -> None:
    """Raise, if there are any, for a file that does not fit."""
    if problems:
        more = f"; and {len(problems) - 6} more" if len(problems) > 6 else ""
        raise RuntimeError(
            f"The adapter's file does not fit: {'; '.join(problems[:6])}{more}. Expected the adapter_config.json that "
            "was saved with it, and a base model of the same shape."
        )
