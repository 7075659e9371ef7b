"""A report on Tied-LoRA adapters, in a live model or in a folder: each shared factor is a tie group."""

from math import prod
from typing import TYPE_CHECKING, Any

from ..config import TyingError
from .dtypes import bytes_of, torch_dtype
from .layer_order import in_layer_order
from .records import GroupReport, TyingReport, group_report, missing_in_file
from .sources import Source

if TYPE_CHECKING:
    from torch import nn

SETTINGS, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
#: The subfolder in which an adapter is published in its tied form, beside its LoRA form.
TIED_FORM = "tied_lora"


def adapter_groups(model: "nn.Module") -> list[GroupReport]:
    """The groups of a live model: one for each factor of an adapter that several modules use.

    Args:
        model: any module. A layer of Tied-LoRA in it is known by its `factors`, `uses` and `module_name`.
    """
    users: dict[tuple[str, str], list[tuple[str, Any]]] = {}
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


def report_on_adapter(source: Source) -> TyingReport:
    """Report a saved adapter. Its settings and the header of its file are read, and no weight.

    A Tied-LoRA adapter has a group for each factor that modules share. An adapter of another type shares nothing; a
    LoRA that was published beside its tied form has the groups of that form.

    Args:
        source: folder with `adapter_config.json` and `adapter_model.safetensors`.

    Raises:
        TyingError: the files are missing, truncated or malformed.
    """
    settings = adapter_settings(source)
    if settings["peft_type"] == "TIED_LORA":
        return _report_on_tied(source, settings)
    parameters = sum(prod(shape) for shape, _ in adapter_header(source).values())
    name = {"LORA": "LoRA"}.get(settings["peft_type"], settings["peft_type"])
    if not source.has(f"{TIED_FORM}/{SETTINGS}"):
        return TyingReport(source.name, name, None, parameters)
    tied = report_on_adapter(source.below(TIED_FORM))
    return TyingReport(
        source.name, f"{name}, with its tied form in {TIED_FORM}/", None, parameters, tied.groups, tied.findings
    )


def adapter_settings(source: Source) -> dict[str, Any]:
    """`adapter_config.json`, with the types of what is read here checked.

    Raises:
        TyingError: it is malformed.
    """
    settings = source.json(SETTINGS)
    kind, rank, modules = settings.get("peft_type"), settings.get("r"), settings.get("adapted_modules")
    if not isinstance(kind, str):
        raise TyingError(f"{SETTINGS} in {source.name} has peft_type {kind!r:.80}: expected 'LORA', 'TIED_LORA', ...")
    if rank is not None and (not isinstance(rank, int) or isinstance(rank, bool) or not 0 < rank < 10**6):
        raise TyingError(
            f"{SETTINGS} in {source.name} has r = {rank!r:.80}: expected a rank, an integer of at least 1."
        )
    if modules is not None and not (
        isinstance(modules, dict) and all(isinstance(entry, dict) for entry in modules.values())
    ):
        raise TyingError(f"{SETTINGS} in {source.name} has adapted_modules that are no dict of dicts: save it again.")
    return settings


def adapter_header(source: Source) -> dict[str, tuple[tuple[int, ...], str]]:
    """(shape, dtype) of each tensor of an adapter.

    Raises:
        TyingError: there is no `adapter_model.safetensors`, or it is broken.
    """
    if not source.has(WEIGHTS):
        raise TyingError(
            f"{source.name} has {SETTINGS} and no {WEIGHTS}: expected both, as save_pretrained writes them."
        )
    return {name: (place.shape, place.dtype) for name, place in source.places(WEIGHTS).items()}


def _report_on_tied(source: Source, config: dict[str, Any]) -> TyingReport:
    header = adapter_header(source)
    users: dict[tuple[str, str, str], list[str]] = {}
    adapted = config.get("adapted_modules") or {}
    for module in in_layer_order(adapted):
        names = adapted[module]
        for kind, rows in (("A", "A"), ("B", "B"), ("u", "u_rows")):
            if kind != "u" or config.get("train_u"):
                if not all(isinstance(names.get(part), str) for part in (kind, rows)):
                    raise TyingError(
                        f"{SETTINGS} in {source.name} has no {kind} for the module {module!r:.100}: save it again."
                    )
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
    findings = [missing_in_file(group, WEIGHTS) for group in groups if group.broken]
    name = f"Tied-LoRA {config.get('variant') or ''}".strip()
    return TyingReport(source.name, name, None, parameters, groups, findings)
