"""What is tied, in a live model or in a checkpoint: as a table, as JSON, as a picture."""

import json
import sys
from dataclasses import asdict, dataclass, field
from io import StringIO
from math import prod
from pathlib import Path

from ..config import TyingConfig, TyingError
from ..ties.headers import read_header, read_json, shard_names, weight_files

# AdamW keeps two moments for every trained element, in the dtype of the parameter.
_ADAMW_STATES = 2
_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "U8": 1, "I8": 1}


@dataclass(frozen=True)
class GroupReport:
    """One tie group as declared, as it is, and as the file has it.

    Args:
        name: the group's name.
        names: its parameter names, the root first.
        roles: name to role, for the names that have one.
        shape: of the one matrix.
        dtype: of its elements, as torch spells it (`"float32"`).
        declared: the config, or the class under its flags, ties these names.
        actual: they are one `nn.Parameter` in the live model; `None` for a report on files.
        in_file: the names that the file holds; `None` for a report on a live model.
        parameters_saved: elements that the tie saves.
        bytes_saved: bytes of weights that it saves in memory.
        optimizer_bytes_saved: bytes of AdamW's two moments that it saves, kept in the weights' dtype.
    """

    name: str
    names: list[str]
    roles: dict[str, str]
    shape: list[int]
    dtype: str
    declared: bool
    actual: bool | None
    in_file: list[str] | None
    parameters_saved: int
    bytes_saved: int
    optimizer_bytes_saved: int

    @property
    def root(self) -> str:
        return self.names[0]


@dataclass(frozen=True)
class TyingReport:
    """Made by `tying_report`. `groups` holds a `GroupReport` for each tie group."""

    source: str
    architecture: str
    scheme: str | None
    parameters: int
    groups: list[GroupReport] = field(default_factory=list)

    def to_dict(self) -> dict:
        """Plain types all through, ready for `json.dumps`."""
        return asdict(self) | {
            "parameters_saved": sum(group.parameters_saved for group in self.groups),
            "bytes_saved": sum(group.bytes_saved for group in self.groups),
            "optimizer_bytes_saved": sum(group.optimizer_bytes_saved for group in self.groups),
        }

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2)

    def to_table(self, width: int = 120) -> str:
        """A table of `width` columns, one block of rows for each group."""
        from rich.console import Console
        from rich.table import Table

        scheme = f", scheme {self.scheme}" if self.scheme else ""
        table = Table(title=f"{self.architecture} ({self.source}): {self.parameters:,} parameters{scheme}")
        for column in ("group", "name (root first)", "role", "shape", "declared", "one", "in file", "saved"):
            table.add_column(column, overflow="fold", no_wrap=column.startswith("name"))
        table.caption = "one: a single parameter in the model; saved: parameters, and bytes with AdamW's two moments"
        for group in self.groups:
            for i, name in enumerate(group.names):
                first = i == 0
                table.add_row(
                    group.name if first else "",
                    name,
                    group.roles.get(name, ""),
                    " x ".join(map(str, group.shape)) + f" {group.dtype}" if first else "",
                    _mark(group.declared) if first else "",
                    _mark(group.actual) if first else "",
                    _mark(None if group.in_file is None else name in group.in_file),
                    f"{group.parameters_saved:,} ({_size(group.bytes_saved + group.optimizer_bytes_saved)})" * first,
                    end_section=i == len(group.names) - 1,
                )
        if not self.groups:
            table.add_row("nothing is tied", *[""] * 7)
        text = StringIO()
        Console(file=text, width=width, color_system=None).print(table)
        return text.getvalue().rstrip()

    def __str__(self) -> str:
        return self.to_table()

    def plot(self, path: str | Path) -> Path:
        """Draw each group's matrix once, the names that share it, and what an untied model would hold.

        Args:
            path: the picture's file; the ending chooses the format (`.png`, `.svg`, `.pdf`).

        Raises:
            ImportError: without matplotlib (`pip install "hf-tying[plots]"`).
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError('A picture needs matplotlib: pip install "hf-tying[plots]".') from error
        bars = [("all other parameters", self._rest(), 0)]
        bars += [(self._label(group), prod(group.shape), group.parameters_saved) for group in self.groups]
        heights = [1.0 + 0.35 * label.count("\n") for label, _, _ in bars]
        figure = Figure(figsize=(9, 1.2 + 0.55 * sum(heights)), layout="constrained")
        axes = figure.subplots()
        at = 0.0
        ticks = []
        for (_, held, saved), height in zip(bars, heights, strict=True):
            axes.barh(at + height / 2, held, height * 0.7, color="tab:blue", label="held" if at == 0 else None)
            if saved:
                axes.barh(
                    at + height / 2, saved, height * 0.7, left=held, color="none", edgecolor="tab:orange", hatch="///",
                    label="saved by the tie" if not any(s for _, _, s in bars[: len(ticks)]) else None,
                )  # fmt: skip
            ticks.append(at + height / 2)
            at += height
        axes.set_yticks(ticks, [label for label, _, _ in bars], fontsize=8)
        axes.invert_yaxis()
        axes.set_xlabel("parameters")
        axes.set_title(f"{self.architecture}: {self.parameters:,} parameters, scheme {self.scheme or 'none'}")
        axes.legend(loc="best", fontsize=8)
        figure.savefig(path)
        return Path(path)

    def _rest(self) -> int:
        held = self.parameters - sum(prod(group.shape) for group in self.groups)
        return max(held, 0)

    @staticmethod
    def _label(group: GroupReport) -> str:
        lines = [f"{name} ({group.roles[name]})" if name in group.roles else name for name in group.names[:6]]
        more = len(group.names) - len(lines)
        return "\n".join([f"{group.name}:", *lines, *([f"and {more} more"] if more else [])])


def tying_report(model_or_path) -> TyingReport:
    """What is tied in a live model, or in a checkpoint.

    Args:
        model_or_path: a `PreTrainedModel` (also wrapped by PEFT, DDP, torch.compile); or a folder or Hub id, of which
            `config.json` and the safetensors headers are read and no weight; a Tied-LoRA adapter, or its folder, has
            a group for each factor that modules share. For a checkpoint without a `tying` entry
            the declaration is that of the transformers class named in its config, built without weights; code from the
            checkpoint is never run.

    Returns:
        A `TyingReport`: `.groups`, `.to_dict()`, `.to_table()`, `.plot(path)`.

    Raises:
        TyingError: for files that are missing, truncated or malformed.
    """
    if isinstance(model_or_path, str | Path):
        return _report_on_files(model_or_path)
    return _report_on_model(model_or_path)


def _report_on_model(model) -> TyingReport:
    from ..ties.groups import TieGroup, roles, scheme_of
    from ..ties.slots import actual_groups, find_parameter, named_slots
    from ..ties.verify import groups_of, unwrapped

    adapters = []
    if "peft" in sys.modules and hasattr(model, "peft_config"):
        from .on_adapters import adapter_groups

        adapters = adapter_groups(model)
    model = unwrapped(model)
    declared = groups_of(model)
    known = {name for group in declared for name in group.names}
    undeclared = [names for names in actual_groups(model) if not known & set(names)]
    groups = declared + [TieGroup(f"undeclared_{i}", tuple(names)) for i, names in enumerate(undeclared, 1)]
    role_of = {name: role for role, names in roles(model).items() for name in names}
    slots = named_slots(model)
    rows = []
    for group in groups:
        held = {name: find_parameter(model, name) for name in group.names}
        some = next((p for p in held.values() if p is not None), None)
        distinct = len({id(p) for p in held.values()})
        rows.append(
            group_report(
                group.name,
                list(group.names),
                role_of,
                list(some.shape) if some is not None else [],
                str(some.dtype).removeprefix("torch.") if some is not None else "",
                some.element_size() if some is not None else 0,
                declared=group in declared,
                actual=distinct == 1 and some is not None,
                in_file=None,
                copies=distinct,
            )  # fmt: skip
        )
    parameters = sum(p.numel() for p in {id(p): p for p in slots.values()}.values())
    scheme = scheme_of(model, [g for g, row in zip(groups, rows, strict=True) if row.actual])
    return TyingReport(type(model).__name__, type(model).__name__, scheme, parameters, rows + adapters)


def _report_on_files(path: str | Path) -> TyingReport:
    folder = _folder(path)
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        from .on_adapters import report_on_adapter

        return report_on_adapter(folder)
    config = read_json(folder / "config.json")
    header: dict[str, tuple[tuple[int, ...], str]] = {}
    for file in weight_files(folder):
        header |= read_header(file)
    named = config.get("architectures")
    architecture = named[0] if isinstance(named, list) and named and isinstance(named[0], str) else None
    architecture = architecture or str(config.get("model_type", "unknown"))
    entry = TyingConfig.from_dict(config["tying"]) if config.get("tying") is not None else None
    blank = _without_weights(config, architecture)
    role_of: dict[str, str] = {}
    if blank is not None:
        from ..ties.groups import roles

        role_of = {name: role for role, names in roles(blank).items() for name in names}
    if entry is not None and (entry.groups or entry.scheme in (None, "none")):
        groups = list(entry.groups.items())
    elif blank is not None:
        from ..ties.verify import groups_of

        groups = [(group.name, list(group.names)) for group in groups_of(blank)]
    else:
        groups = []
    keys_of = {name: _keys_on_disk(blank, name, header) for _, names in groups for name in names}
    rows = []
    for name, names in groups:
        in_file = [n for n in names if keys_of[n]]
        shape, dtype = _matrix(keys_of[in_file[0]], header) if in_file else ((), "")
        rows.append(
            group_report(
                name,
                names,
                role_of,
                list(shape),
                torch_dtype(dtype),
                bytes_of(dtype),
                declared=True,
                actual=None,
                in_file=in_file,
                copies=1,
            )  # fmt: skip
        )
    buffers = set() if blank is None else {name for name, _ in blank.named_buffers()}
    held = sum(prod(shape) for key, (shape, _) in header.items() if key not in buffers)
    held -= sum((len(row.in_file) - 1) * prod(row.shape) for row in rows if row.in_file)
    return TyingReport(str(path), architecture, entry.scheme if entry else None, held, rows)


def _keys_on_disk(blank, name: str, header: dict) -> list[str]:
    """The keys under which a file holds the parameter `name`; transformers spells some architectures' otherwise."""
    if name in header:
        return [name]
    if blank is None:
        return []
    from ..ties.slots import find_parameter

    try:
        from transformers.core_model_loading import revert_weight_conversion  # private; without it, own names only

        keys = list(revert_weight_conversion(blank, {name: find_parameter(blank, name).detach()}))
    except (ImportError, AttributeError, TypeError):
        return []
    return keys if all(key in header for key in keys) else []


def _matrix(keys: list[str], header: dict) -> tuple[tuple[int, ...], str]:
    """Shape and dtype of a parameter from its keys on disk (several where a file holds experts one by one)."""
    shape, dtype = header[keys[0]]
    return (shape if len(keys) == 1 else (len(keys), *shape)), dtype


def group_report(name, names, role_of, shape, dtype, size, declared, actual, in_file, copies) -> GroupReport:
    """A `GroupReport` with what is saved counted: each of the `names` but the `copies` that there are."""
    saved = (len(names) - copies) * prod(shape) if shape else 0
    return GroupReport(
        name=name,
        names=names,
        roles={n: role_of[n] for n in names if n in role_of},
        shape=shape,
        dtype=dtype,
        declared=declared,
        actual=actual,
        in_file=in_file,
        parameters_saved=saved,
        bytes_saved=saved * size,
        optimizer_bytes_saved=saved * size * _ADAMW_STATES,
    )


def _folder(path: str | Path) -> Path:
    """A local folder as it is; a Hub id as the folder in the cache that holds its config and weights."""
    if Path(path).is_dir():
        return Path(path)
    from transformers.utils import cached_file

    try:
        found = Path(cached_file(str(path), "config.json")).parent
        try:
            weight_files(found)
        except TyingError:
            index = cached_file(str(path), "model.safetensors.index.json", _raise_exceptions_for_missing_entries=False)
            names = shard_names(index) if index else ["model.safetensors"]
            for name in names:
                cached_file(str(path), name)
        return found
    except (OSError, ValueError) as error:
        raise TyingError(f"{str(path)!r} is neither a folder nor a repository that can be read: {error}") from error


def _without_weights(config: dict, architecture):
    """The transformers class that a config names, on the meta device; `None` where transformers has none."""
    import torch
    import transformers
    from transformers import AutoConfig

    cls = getattr(transformers, architecture, None) if isinstance(architecture, str) else None
    if not hasattr(cls, "post_init") or not isinstance(config.get("model_type"), str):
        return None
    try:
        fields = {key: value for key, value in config.items() if key not in ("model_type", "auto_map")}
        with torch.device("meta"):
            return cls(AutoConfig.for_model(config["model_type"], **fields))
    except TyingError:
        raise
    except Exception as error:
        raise TyingError(f"config.json does not make a {architecture}: {error}") from error


def bytes_of(dtype: str) -> int:
    """Of one element, by the dtype's name in a safetensors header; 0 for one that is not known."""
    return _BYTES.get(dtype, 0)


def torch_dtype(dtype: str) -> str:
    return {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}.get(dtype, dtype.lower())


def _mark(value: bool | None) -> str:
    return "-" if value is None else "yes" if value else "NO"


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:,.1f} {unit}"
        count /= 1024
    return f"{count:,.1f} GiB"
