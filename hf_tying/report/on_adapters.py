"""A report on Tied-LoRA adapters, in a live model or in a folder: each shared factor is a tie group."""

from math import prod
from pathlib import Path

from torch import nn

from ..config import TyingError
from ..ties.headers import read_header, read_json
from .layer_order import in_layer_order
from .records import GroupReport, TyingReport, bytes_of, group_report, missing_in_file, torch_dtype

FOLDER_FILES = ("adapter_config.json", "adapter_model.safetensors")


def adapter_groups(model: nn.Module) -> list[GroupReport]:
    """The groups of a live model: one for each factor of an adapter that several modules use.

    Args:
        model: any module. A layer of Tied-LoRA in it is known by its `factors`, `uses` and `module_name`.
    """
    users: dict[tuple[str, str], list[tuple[str, nn.Parameter]]] = {}
    for layer in model.modules():
        if all(hasattr(layer, attribute) for attribute in ("factors", "uses", "module_name")):
            for adapter, used in layer.uses.items():
                for kind, factor in layer.factors(adapter).items():
                    factor_of = f"{adapter}: {kind}", getattr(used.names, kind)
                    users.setdefault(factor_of, []).append((layer.module_name, factor.weight))
    groups = []
    for (part, name), held in users.items():
        weight, distinct = held[0][1], len({id(weight) for _, weight in held})
        if len(held) > 1:
            groups.append(
                group_report(
                    f"{part} {name}",
                    [module for module, _ in held],
                    {},
                    list(weight.shape),
                    str(weight.dtype).removeprefix("torch."),
                    weight.element_size(),
                    declared=True,
                    actual=distinct == 1,
                    in_file=None,
                    copies=distinct,
                    status="tied" if distinct == 1 else "broken",
                    apart=[module for module, other in held if other is not weight],
                    part=part,
                )
            )
    return groups


def report_on_adapter(folder: Path) -> TyingReport:
    """Report a saved adapter. Its settings and the header of its file are read, and no weight.

    Args:
        folder: with `adapter_config.json` and `adapter_model.safetensors`.

    Raises:
        TyingError: the adapter is of another type, or its files are missing, truncated or malformed.
    """
    settings, weights = (folder / name for name in FOLDER_FILES)
    config = read_json(settings)
    if config.get("peft_type") != "TIED_LORA":
        raise TyingError(
            f"{settings} is of an adapter of type {config.get('peft_type')!r}: its modules share nothing. Expected a "
            "model's folder, or that of a Tied-LoRA adapter."
        )
    header = read_header(weights)
    users: dict[tuple[str, str, str], list[str]] = {}
    adapted = config.get("adapted_modules") or {}
    for module in in_layer_order(adapted):
        names = adapted[module]
        for kind, rows in (("A", "A"), ("B", "B"), ("u", "u_rows")):
            if kind != "u" or config.get("train_u"):
                users.setdefault((kind, names[kind], names[rows]), []).append(module)
    groups = []
    for (kind, name, saved_as), modules in users.items():
        shape, dtype = header.get(f"base_model.model.tied_matrices.tied_lora_{kind}.{saved_as}", ((), ""))
        if len(modules) > 1:
            groups.append(
                group_report(
                    f"{kind} {name}",
                    modules,
                    {},
                    list(shape[1:] if kind == "u" else shape),
                    torch_dtype(dtype),
                    bytes_of(dtype),
                    declared=True,
                    actual=None,
                    in_file=modules[:1] if shape else [],
                    status="tied" if shape else "broken",
                    part=kind,
                )
            )
    parameters = sum(prod(shape) for shape, _ in header.values())
    findings = [missing_in_file(group, weights.name) for group in groups if group.broken]
    name = f"Tied-LoRA {config.get('variant') or ''}".strip()
    return TyingReport(str(folder), name, None, parameters, groups, findings)
