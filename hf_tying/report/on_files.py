"""A report on a checkpoint, from its config and its headers. No weight is loaded, and no code is run."""

from math import prod

from .checkpoint import Checkpoint
from .dtypes import bytes_of, torch_dtype
from .records import Finding, GroupReport, TyingReport, group_report, missing_in_file
from .stock_table import FLAG, StockClass, generalised, roles_in

_NO_CLASS = StockClass([], {})
#: The buffers of torch's norms, which files have beside parameters. A class that transformers lacks may have them.
_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


def report_on_files(checkpoint: Checkpoint) -> TyingReport:
    """Report the groups that the config of a saved model declares, and which of their names the weight files hold.

    Without a `tying` entry, the groups are those of the transformers class that the config names. Where the files hold
    several names of a group, their bytes are compared.

    Args:
        checkpoint: the files, as `read_checkpoint` gives them.

    Raises:
        TyingError: the entry is malformed, or the config does not make its class.
    """
    entry, stock = checkpoint.entry, checkpoint.stock or _NO_CLASS
    kept = entry.on_conflict if entry else "error"
    rows: list[GroupReport] = []
    findings: list[Finding] = []
    repeated = 0
    for name, names in checkpoint.groups:
        keys_of = {n: checkpoint.keys_of(n) for n in names}
        in_file = [n for n in names if keys_of[n]]
        shape, dtype = checkpoint.matrix(in_file[0]) if in_file else ((), "")
        # The file has what a relaxed name comes to, and that differs.
        exact = {n: keys_of[n] for n in in_file if n not in checkpoint.relaxed}
        numbers, compared = checkpoint.values.different(exact)
        copies = dict.fromkeys(in_file, 0) | numbers
        apart = len(set(copies.values())) > 1
        broken = not in_file or (apart and kept == "error")
        used = [n for n in copies if n not in stock.carriers]
        rows.append(
            group_report(
                name,
                names,
                stock.role_of or roles_in(checkpoint.architecture),
                list(shape),
                torch_dtype(dtype),
                bytes_of(dtype),
                in_file=in_file,
                copies=len({copies[n] for n in used}) if apart and not kept.startswith("use:") and used else 1,
                carriers=stock.carriers,
                status="broken" if broken else "apart" if apart and kept == "keep_untied" else "tied",
                apart=[n for n in in_file if copies[n] != copies[in_file[0]]],
                compared=compared,
            )
        )
        repeated += max(len(in_file) - len(set(copies.values())), 0) * prod(shape)
        if not in_file:
            findings.append(missing_in_file(rows[-1], "the file"))
        elif broken:
            findings.append(_values_differ(checkpoint, rows[-1]))
    buffers = set(stock.buffers)
    sizes = (
        prod(shape)
        for key, (shape, _) in checkpoint.header.items()
        if generalised(key) not in buffers and key.rpartition(".")[2] not in _BUFFERS
    )
    scheme = entry.scheme if entry else None
    return TyingReport(checkpoint.source.name, checkpoint.architecture, scheme, sum(sizes) - repeated, rows, findings)


def _values_differ(checkpoint: Checkpoint, group: GroupReport) -> Finding:
    """The finding on a group whose names have several values in the file: which kind of difference it is."""
    root, other = group.in_file[0], group.apart[0]
    one, two = checkpoint.keys_of(root), checkpoint.keys_of(other)
    kinds = [checkpoint.tensors[keys[0]].kind for keys in (one, two)]
    between = f"{root!r} and {other!r}"
    if kinds[0][0] != kinds[1][0]:
        evidence = f"{between} have the shapes {list(kinds[0][0])} and {list(kinds[1][0])}"
    else:
        found = checkpoint.values.difference(one[0], two[0]) if len(one) == 1 == len(two) else None
        if found is not None and found.rows == 0 and kinds[0][1] != kinds[1][1]:
            return Finding(
                "T008",
                "warning",
                f"group {group.name!r}: expected one dtype, found {root!r} in {torch_dtype(kinds[0][1])} "
                f"and {other!r} in {torch_dtype(kinds[1][1])}, with the same numbers. transformers loads them untied "
                "where it keeps the dtypes of the file.",
                "Write one of them: hf-tying convert SOURCE OUT --to dedup.",
                group.name,
            )
        evidence = f"{between} differ" + (f": {found}" if found else "")
    stock = checkpoint.stock
    if stock and stock.forced and checkpoint.entry is None and checkpoint.config.get(FLAG) is False:
        return Finding(
            "T009",
            "warning",
            f"group {group.name!r}: config.json says {FLAG}=false, and the class ties all the same "
            f"({evidence}). Which matrix counts depends on the loader: this transformers compares them and leaves "
            "them untied, others keep the one that they meet first.",
            "Record what is meant: hf-tying untie SOURCE OUT.",
            group.name,
        )
    return Finding(
        "T001",
        "error",
        f"group {group.name!r}: expected one value for its names, found two in the file: {evidence}. transformers "
        "loads them untied, and hf_tying refuses them.",
        f"Choose when loading: from_pretrained(..., tying={{'on_conflict': 'use:{root}'}}) or 'keep_untied'; or in "
        f"the file: hf-tying convert SOURCE OUT --to dedup --init-from {root}, or hf-tying untie SOURCE OUT.",
        group.name,
    )
