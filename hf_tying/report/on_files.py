"""A report on a checkpoint, from its config and its safetensors headers. No weight is loaded, and no code is run."""

from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import TyingConfig, TyingError, entry_of
from ..ties.headers import RECORD, read_header, read_json, shard_names, weight_files
from .file_values import ValuesOnDisk
from .records import Finding, GroupReport, TyingReport, bytes_of, group_report, missing_in_file, torch_dtype

if TYPE_CHECKING:
    from transformers.modeling_utils import PreTrainedModel


def report_on_files(folder: Path, source: str) -> TyingReport:
    """Report the groups that the config of a saved model declares, and which of their names the weight files hold.

    Without a `tying` entry, the groups are those of the transformers class that the config names. Where the files hold
    several names of a group, their bytes are compared. Of a plain module, `tying.json` has the entry.

    Args:
        folder: folder with `config.json` or `tying.json`, and safetensors files.
        source: what the report calls the checkpoint.

    Raises:
        TyingError: files are missing, truncated or malformed.
    """
    plain = (folder / RECORD).is_file() and not (folder / "config.json").is_file()
    config = {"architectures": ["nn.Module"], "tying": read_json(folder / RECORD)} if plain else _config_in(folder)
    header: dict[str, tuple[tuple[int, ...], str]] = {}
    file_of: dict[str, Path] = {}
    for file in weight_files(folder):
        held = read_header(file)
        header |= held
        file_of |= dict.fromkeys(held, file)
    named = config.get("architectures")
    architecture = named[0] if isinstance(named, list) and named and isinstance(named[0], str) else None
    architecture = architecture or str(config.get("model_type", "unknown"))
    entry = TyingConfig.in_config(config) if entry_of(config) is not None else None
    blank = _without_weights(config, architecture)
    role_of: dict[str, str] = {}
    carriers: set[str] = set()
    if blank is not None:
        from ..ties.anatomy import Anatomy

        anatomy = Anatomy(blank)
        role_of, carriers = anatomy.role_of, anatomy.carriers
    if entry is not None and (entry.groups or entry.scheme in (None, "none")):
        groups = list(entry.groups.items())
    elif blank is not None:
        from ..ties.verify import groups_of

        groups = [(group.name, list(group.names)) for group in groups_of(blank)]
    else:
        groups = []
    keys_of = {name: _keys_on_disk(blank, name, header) for _, names in groups for name in names}
    values = ValuesOnDisk(file_of, header)
    rows: list[GroupReport] = []
    findings: list[Finding] = []
    kept = entry.on_conflict if entry else "error"
    repeated = 0
    for name, names in groups:
        in_file = [n for n in names if keys_of[n]]
        shape, dtype = _matrix(keys_of[in_file[0]], header) if in_file else ((), "")
        copies, compared = values.different({n: keys_of[n] for n in in_file})
        apart = len(set(copies.values())) > 1
        broken = not in_file or (apart and kept == "error")
        used = [n for n in copies if n not in carriers]
        rows.append(
            group_report(
                name,
                names,
                role_of,
                list(shape),
                torch_dtype(dtype),
                bytes_of(dtype),
                in_file=in_file,
                copies=len({copies[n] for n in used}) if apart and not kept.startswith("use:") and used else 1,
                carriers=carriers,
                status="broken" if broken else "apart" if apart and kept == "keep_untied" else "tied",
                apart=[n for n in in_file if copies[n] != copies[in_file[0]]],
                compared=compared,
            )
        )
        repeated += max(len(in_file) - len(set(copies.values())), 0) * prod(shape)
        if not in_file:
            findings.append(missing_in_file(rows[-1], "the file"))
        elif broken:
            findings.append(_values_differ(rows[-1]))
    buffers = set() if blank is None else {name for name, _ in blank.named_buffers()}
    held = sum(prod(shape) for key, (shape, _) in header.items() if key not in buffers) - repeated
    return TyingReport(source, architecture, entry.scheme if entry else None, held, rows, findings)


def _config_in(folder: Path) -> dict[str, Any]:
    if not (folder / "config.json").is_file():
        raise TyingError(
            f"{str(folder)!r} has no config.json: expected a folder that save_pretrained wrote, or save_tied, whose "
            f"record is {RECORD}."
        )
    return read_json(folder / "config.json")


def _values_differ(group: GroupReport) -> Finding:
    return Finding(
        "T001",
        "error",
        f"group {group.name!r}: expected one value for its names, found two in the file: {group.in_file[0]!r} and "
        f"{group.apart[0]!r} differ. transformers loads them untied, and hf_tying refuses them.",
        f"Choose when loading: from_pretrained(..., tying={{'on_conflict': 'use:{group.in_file[0]}'}}) or "
        "'keep_untied'.",
        group.name,
    )


def local_folder(path: str | Path) -> Path:
    """The folder that holds a checkpoint: `path` itself, or the folder in the Hub's cache that a Hub id means.

    Raises:
        TyingError: it is neither.
    """
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


def _without_weights(config: dict[str, Any], architecture: str) -> "PreTrainedModel | None":
    """The transformers class that a config names, on the meta device; `None` where transformers has no such class."""
    import torch
    import transformers
    from transformers import AutoConfig

    cls = getattr(transformers, architecture, None)
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


def _keys_on_disk(blank: "PreTrainedModel | None", name: str, header: dict) -> list[str]:
    """The keys under which the files hold the parameter `name`; `[]` where they do not.

    transformers saves some architectures under other names than those of the live model.
    """
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
