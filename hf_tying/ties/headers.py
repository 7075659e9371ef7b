"""The tensors in a folder of weights, read from the safetensors headers alone."""

import json
from collections.abc import Iterable
from pathlib import Path

from safetensors import SafetensorError, safe_open

from ..config import TyingError

_INDEX = "model.safetensors.index.json"
_WHOLE = "model.safetensors"
#: The record of the ties of a plain module, beside its weights.
RECORD = "tying.json"
# The index of the largest published models has some ten megabytes.
_LARGEST_JSON = 256 * 2**20


def read_header(path: str | Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Read the (shape, dtype as the file spells it) of each tensor of a safetensors file. No weights are read.

    Raises:
        TyingError: for a file that is truncated, corrupted or not safetensors.
    """
    try:
        # "np" maps the file shared: a file larger than the memory can be opened, and torch is not needed.
        with safe_open(path, framework="np") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}
            return {name: (tuple(piece.get_shape()), piece.get_dtype()) for name, piece in slices.items()}
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise TyingError(
            f"{Path(path).name} in {Path(path).parent} cannot be read as safetensors ({error}): it is truncated, "
            "corrupted or of another format. Download or save it again."
        ) from error


def weight_files(folder: str | Path) -> list[Path]:
    """The safetensors files of a checkpoint folder, sharded or not.

    Raises:
        TyingError: when there is none, or an index that is malformed, points elsewhere, or names a missing file.
    """
    folder = Path(folder)
    if (index := folder / _INDEX).is_file():
        names = shard_names(index)
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise TyingError(f"{_INDEX} in {folder} names files that are not there: {missing}.")
        return [folder / name for name in names]
    if (whole := folder / _WHOLE).is_file():
        return [whole]
    raise TyingError(f"{folder} has no {_WHOLE} and no {_INDEX}: expected a folder written by save_pretrained.")


def shard_names(index: str | Path) -> list[str]:
    """The file names in the index of a sharded checkpoint.

    Raises:
        TyingError: for an index that is malformed, or points out of its folder.
    """
    entries = read_json(index).get("weight_map")
    if not isinstance(entries, dict) or not entries or not all(isinstance(name, str) for name in entries.values()):
        raise TyingError(f"{index} has no `weight_map` from tensor names to file names: save the model again.")
    for tensor, name in entries.items():
        if Path(name).name != name:
            raise TyingError(
                f"{index} places {tensor!r} in {name!r}: expected a file name in its own folder. It is not read."
            )
    return sorted(set(entries.values()))


def read_json(path: str | Path) -> dict:
    """Read a JSON object from a file.

    Raises:
        TyingError: when it is missing, not JSON, not an object, larger or nested deeper than any real one.
    """
    path = Path(path)
    try:
        if (size := path.stat().st_size) > _LARGEST_JSON:
            raise TyingError(
                f"{path.name} in {path.parent} has {size:,} bytes: more than {_LARGEST_JSON:,} are not read."
            )
        content = json.loads(path.read_text(encoding="utf-8"))
    except TyingError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        reason = "nested too deep" if isinstance(error, RecursionError) else error
        raise TyingError(f"{path.name} in {path.parent} cannot be read as JSON: {reason}.") from error
    if not isinstance(content, dict):
        raise TyingError(f"{path.name} in {path.parent} holds a {type(content).__name__}: expected a JSON object.")
    return content


def refuse_broken(paths: Iterable[str] | None) -> None:
    """Read the header of every safetensors file in `paths`, before any weight is loaded.

    Raises:
        TyingError: naming the first that is truncated or corrupted.
    """
    for path in paths or ():
        if str(path).endswith(".safetensors"):
            read_header(path)


def refuse_split(groups: Iterable, device_map: dict | None) -> None:
    """Refuse a device map that puts the names of one tie group on different devices.

    Args:
        groups: tie groups (with `name` and `names`).
        device_map: device (also `"cpu"` or `"disk"`) of each module name; `""` is the whole model.

    Raises:
        TyingError: for the first group that `device_map` splits.
    """
    if not isinstance(device_map, dict):
        return
    for group in groups:
        places = {name: _device(name, device_map) for name in group.names}
        if len(set(places.values())) > 1:
            listed = ", ".join(f"{name!r} on {device!r}" for name, device in places.items())
            raise TyingError(
                f"device_map splits group {group.name!r}: {listed}. One parameter lies on one device: give its "
                "modules the same device, use device_map='auto' (it keeps ties together), or untie(model) and save "
                "before loading so."
            )


def _device(name: str, device_map: dict) -> str:
    """The device of the longest entry that covers `name`."""
    covering = [place for place in device_map if place == "" or name == place or name.startswith(f"{place}.")]
    return str(device_map[max(covering, key=len)]) if covering else "no device"
