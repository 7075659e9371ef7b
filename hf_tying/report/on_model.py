"""A report on a live model: the ties that are declared, and whether each of them holds."""

import sys
from collections.abc import Iterable

from torch import nn

from ..ties.anatomy import Anatomy
from ..ties.groups import TieGroup, scheme_of
from ..ties.sharding import shape_of, stock_name
from ..ties.slots import find_parameter, parameter_at_work
from ..ties.verify import groups_of, problems, tied_part
from .records import Finding, GroupReport, TyingReport, group_report


def report_on_model(model: nn.Module) -> TyingReport:
    """Report the declared groups of `model`, then the ties that nobody declared, then what adapters share.

    Args:
        model: a `PreTrainedModel` or a plain `nn.Module`, also wrapped.

    Raises:
        TyingError: it is no module, or a plain module that holds a `PreTrainedModel`.
    """
    adapters: list[GroupReport] = []
    if "peft" in sys.modules and isinstance(model, nn.Module):
        from .on_adapters import adapter_groups

        adapters = adapter_groups(model)
    model = tied_part(model)
    anatomy = Anatomy(model)
    declared = groups_of(model)
    known = {name for group in declared for name in group.names}
    undeclared = [names for names in anatomy.tied if not known & set(names)]
    groups = declared + [TieGroup(f"undeclared_{i}", tuple(names)) for i, names in enumerate(undeclared, 1)]
    findings = find_faults(model, declared)
    broken = {finding.group for finding in findings}
    rows = []
    for group in groups:
        # Of a broken tie counts what is at work: PEFT puts a copy beside a parameter that stays where it was.
        find = parameter_at_work if group.name in broken else find_parameter
        held = {name: find(model, name) for name in group.names}
        some = next((parameter for parameter in held.values() if parameter is not None), None)
        distinct = len({id(parameter) for parameter in held.values()})
        used = [name for name in group.names if name not in anatomy.carriers] or group.names
        rows.append(
            group_report(
                group.name,
                list(group.names),
                anatomy.role_of,
                list(shape_of(some)) if some is not None else [],
                str(some.dtype).removeprefix("torch.") if some is not None else "",
                some.element_size() if some is not None else 0,
                declared=group in declared,
                actual=distinct == 1 and some is not None,
                copies=len({id(held[name]) for name in used}),
                carriers=anatomy.carriers,
                status="by hand" if group not in declared else "broken" if group.name in broken else "tied",
                apart=[name for name in group.names if held[name] is not held[group.root]],
            )
        )
    parameters = sum(shape_of(p).numel() for p in {id(p): p for p in anatomy.slots.values()}.values())
    scheme = scheme_of(anatomy, [group for group, row in zip(groups, rows, strict=True) if row.actual])
    name = stock_name(model)
    return TyingReport(name, name, scheme, parameters, rows + adapters, findings + broken_adapters(adapters))


def find_faults(model: nn.Module, groups: Iterable[TieGroup]) -> list[Finding]:
    """What `assert_tied` would refuse in a model, as findings in its own sentences."""
    findings = []
    for sentence in problems(model):
        group = next((group.name for group in groups if sentence.startswith(f"group {group.name!r}:")), None)
        code = "T004" if group is None else "T005" if "but its module says" in sentence else "T001"
        findings.append(Finding(code, "error", sentence, group=group))
    return findings


def broken_adapters(groups: Iterable[GroupReport]) -> list[Finding]:
    """A finding for each factor of an adapter that is not shared as it should be."""
    return [
        Finding(
            "T001",
            "error",
            f"group {group.name!r}: expected its {len(group.names)} modules to share one parameter, found several.",
            "Load the adapter again, or save what they have learnt apart as an ordinary LoRA: export_to_lora.",
            group.name,
        )
        for group in groups
        if group.broken
    ]
