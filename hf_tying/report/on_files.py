"""A report on a checkpoint, from its config and its safetensors headers. No weight is read, and no code is run."""

from math import prod
from pathlib import Path

from ..config import TyingConfig, TyingError, entry_of
from ..ties.headers import read_header, read_json, shard_names, weight_files
from .records import TyingReport, bytes_of, group_report, torch_dtype


def report_on_files(folder: Path, source: str) -> TyingReport:
    """Report the groups that the config of a saved model declares, and which of their names the weight files hold.

    Without a `tying` entry, the groups are those of the transformers class that the config names.

    Args:
        folder: with `config.json` and safetensors files.
        source: what the report calls the checkpoint.

    Raises:
        TyingError: files are missing, truncated or malformed.
    """
    config = read_json(folder / "config.json")
    header: dict[str, tuple[tuple[int, ...], str]] = {}
    for file in weight_files(folder):
        header |= read_header(file)
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
                in_file=in_file,
                carriers=carriers,
            )  # fmt: skip
        )
    buffers = set() if blank is None else {name for name, _ in blank.named_buffers()}
    held = sum(prod(shape) for key, (shape, _) in header.items() if key not in buffers)
    held -= sum((len(row.in_file) - 1) * prod(row.shape) for row in rows if row.in_file)
    return TyingReport(source, architecture, entry.scheme if entry else None, held, rows)


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


def _without_weights(config: dict, architecture: str):
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


def _keys_on_disk(blank, name: str, header: dict) -> list[str]:
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
