"""A report on a live model: the ties that are declared, and whether each of them holds."""

import sys

from torch import nn

from ..ties.anatomy import Anatomy
from ..ties.groups import TieGroup, scheme_of
from ..ties.slots import find_parameter
from ..ties.verify import groups_of, unwrapped
from .records import TyingReport, group_report


def report_on_model(model: nn.Module) -> TyingReport:
    """Report the declared groups of `model`, then the ties that nobody declared, then what adapters share.

    Args:
        model: a `PreTrainedModel`, also wrapped.

    Raises:
        TyingError: there is no `PreTrainedModel` in it.
    """
    adapters = []
    if "peft" in sys.modules and hasattr(model, "peft_config"):
        from .on_adapters import adapter_groups

        adapters = adapter_groups(model)
    model = unwrapped(model)
    anatomy = Anatomy(model)
    declared = groups_of(model)
    known = {name for group in declared for name in group.names}
    undeclared = [names for names in anatomy.tied if not known & set(names)]
    groups = declared + [TieGroup(f"undeclared_{i}", tuple(names)) for i, names in enumerate(undeclared, 1)]
    rows = []
    for group in groups:
        held = [find_parameter(model, name) for name in group.names]
        some = next((parameter for parameter in held if parameter is not None), None)
        distinct = len({id(parameter) for parameter in held})
        used = [name for name in group.names if name not in anatomy.carriers] or group.names
        rows.append(
            group_report(
                group.name,
                list(group.names),
                anatomy.role_of,
                list(some.shape) if some is not None else [],
                str(some.dtype).removeprefix("torch.") if some is not None else "",
                some.element_size() if some is not None else 0,
                declared=group in declared,
                actual=distinct == 1 and some is not None,
                copies=len({id(find_parameter(model, name)) for name in used}),
                carriers=anatomy.carriers,
            )
        )
    parameters = sum(p.numel() for p in {id(p): p for p in anatomy.slots.values()}.values())
    scheme = scheme_of(anatomy, [group for group, row in zip(groups, rows, strict=True) if row.actual])
    return TyingReport(type(model).__name__, type(model).__name__, scheme, parameters, rows + adapters)
