"""The tensors in a folder of weights, read from the safetensors headers alone."""

import json
import stat
from collections.abc import Iterable
from math import prod
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

from ..config import TyingError

INDEX = "model.safetensors.index.json"
WHOLE = "model.safetensors"
#: The record of the ties of a plain module, beside its weights.
RECORD = "tying.json"
# What somebody else wrote is bounded before memory is taken for it. The index of the largest published models has
# 15 MB, their headers less, and 150,000 tensors are more than any of their files has. Python keeps some hundred bytes
# for each list or dict of three characters, so these are counted before JSON is read.
LARGEST_INDEX = 20 * 2**20
_LARGEST_HEADER = 64 * 2**20
_MOST_TENSORS = 150_000
_LONGEST_FILE_NAME = 255
#: Bits of one element, by the dtype's name in a header.
BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}


class TensorPlace(NamedTuple):
    """A tensor of a safetensors file: what it is, and where its bytes are.

    Args:
        shape: sizes of its dimensions.
        dtype: dtype as the file spells it, such as `"BF16"`.
        start: place of its first byte in the file.
        end: place after its last byte.
    """

    shape: tuple[int, ...]
    dtype: str
    start: int
    end: int


def read_header(path: str | Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Read the (shape, dtype as the file spells it) of each tensor of a safetensors file. No weights are read.

    Raises:
        TyingError: for a file that is truncated, corrupted or not safetensors.
    """
    return {name: (place.shape, place.dtype) for name, place in read_places(path).items()}


def read_places(path: str | Path) -> dict[str, TensorPlace]:
    """Read where each tensor of a safetensors file is. No weights are read.

    Raises:
        TyingError: see `read_header`.
    """
    path = Path(path)
    try:
        size = regular_size(path)
        with path.open("rb") as file:
            length = header_length(file.read(8), size)
            return parse_header(file.read(length), size)
    except OSError as error:
        raise TyingError(f"{path.name} in {path.parent} cannot be read: {error.strerror or error}.") from error
    except ValueError as error:
        raise TyingError(
            f"{path.name} in {path.parent} cannot be read as safetensors ({error}): it is truncated, "
            "corrupted or of another format. Download or save it again."
        ) from error


def header_length(prefix: bytes, size: int) -> int:
    """The length of a header, from the first 8 bytes of a file of `size` bytes.

    Raises:
        ValueError: the file is too short for it, or it is longer than any real one.
    """
    length = int.from_bytes(prefix, "little")
    if len(prefix) < 8 or length > size - 8:
        raise ValueError(f"its header should have {length:,} bytes, the file has {size:,}")
    if length > _LARGEST_HEADER:
        raise ValueError(f"its header has {length:,} bytes, and no more than {_LARGEST_HEADER:,} are read")
    return length


def parse_header(header: bytes, size: int) -> dict[str, TensorPlace]:
    """Read the header of a safetensors file of `size` bytes, as strictly as the library of that name.

    Raises:
        ValueError: it is malformed, or its tensors do not fill the file, each byte once.
    """
    if header.count(b"{") > _MOST_TENSORS:
        raise ValueError(f"it has more than {_MOST_TENSORS:,} tensors")
    try:
        entries = json.loads(header, object_pairs_hook=_unique)
    except RecursionError:
        raise ValueError("its header is nested too deep") from None
    if not isinstance(entries, dict):
        raise ValueError("its header is no JSON object")
    entries.pop("__metadata__", None)
    first = 8 + len(header)
    places = {name: _place(name, entry, first) for name, entry in entries.items()}
    end = first
    for name, place in sorted(places.items(), key=lambda item: item[1][2:]):
        if place.start != end:
            raise ValueError(f"there is a hole or an overlap before {name!r:.200}")
        end = place.end
    if end != size:
        raise ValueError(f"its tensors end at byte {end:,}, the file has {size:,}")
    return places


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) < len(pairs):
        raise ValueError("a name stands twice in its header")
    return entries


def _place(name: str, entry: object, first: int) -> TensorPlace:
    if not isinstance(entry, dict):
        raise ValueError(f"{name!r:.200} has no dtype, shape and place")
    shape, span, dtype = entry.get("shape"), entry.get("data_offsets"), entry.get("dtype")
    if not _counts(shape) or not _counts(span) or len(span) != 2 or not isinstance(dtype, str) or dtype not in BITS:
        raise ValueError(f"{name!r:.200} has no sound dtype, shape and place")
    if (span[1] - span[0]) * 8 != prod(shape) * BITS[dtype]:
        raise ValueError(f"{name!r:.200} does not have the bytes of its shape and dtype")
    return TensorPlace(tuple(shape), dtype, first + span[0], first + span[1])


def _counts(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and len(value) < 100 and all(type(n) is int and 0 <= n < 2**63 for n in value)


def shard_names(index: str | Path) -> list[str]:
    """The file names in the index of a sharded checkpoint.

    Raises:
        TyingError: for an index that is malformed, or points out of its folder.
    """
    return files_of_index(read_json(index), str(index))


def files_of_index(content: dict[str, Any], index: str) -> list[str]:
    """The file names in the content of an index, which messages call `index`.

    Raises:
        TyingError: it is malformed, or points out of its folder.
    """
    entries = content.get("weight_map")
    if not isinstance(entries, dict) or not entries or not all(isinstance(name, str) for name in entries.values()):
        raise TyingError(f"{index} has no `weight_map` from tensor names to file names: save the model again.")
    names = dict.fromkeys(entries.values())
    for name in names:
        if Path(name).name != name or len(name) > _LONGEST_FILE_NAME or not name.isprintable():
            raise TyingError(
                f"{index} places tensors in {name!r:.300}: expected a file name in its own folder. It is not read."
            )
    return sorted(names)


def read_json(path: str | Path, largest: int | None = None) -> dict:
    """Read a JSON object from a file.

    Args:
        path: a regular file; a device or a pipe is not opened.
        largest: the most bytes that are read. Default: those of the largest index.

    Raises:
        TyingError: when it is missing, not JSON, not an object, larger or nested deeper than any real one.
    """
    path = Path(path)
    try:
        if (size := regular_size(path)) > (largest := largest or LARGEST_INDEX):
            raise TyingError(f"{path.name} in {path.parent} has {size:,} bytes: more than {largest:,} are not read.")
        content = path.read_bytes()
    except OSError as error:
        raise TyingError(f"{path.name} in {path.parent} cannot be read as JSON: {error}.") from error
    return parse_json(content, f"{path.name} in {path.parent}")


def parse_json(content: bytes, name: str) -> dict:
    """Read a JSON object, which messages call `name`.

    Raises:
        TyingError: it is not JSON, not an object, or nested more often or deeper than any real one.
    """
    try:
        if content.count(b"{") + content.count(b"[") > _MOST_TENSORS:
            raise ValueError(f"more than {_MOST_TENSORS:,} objects and lists")
        found = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        reason = "nested too deep" if isinstance(error, RecursionError) else error
        raise TyingError(f"{name} cannot be read as JSON: {reason}.") from error
    if not isinstance(found, dict):
        raise TyingError(f"{name} holds a {type(found).__name__}: expected a JSON object.")
    return found


def regular_size(path: Path) -> int:
    """The bytes of a regular file, links followed.

    Raises:
        OSError: there is none, or it is a folder, a pipe or a device, which could be read for ever.
    """
    state = path.stat()
    if not stat.S_ISREG(state.st_mode):
        raise OSError(f"{path.name} is no regular file")
    return state.st_size


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
