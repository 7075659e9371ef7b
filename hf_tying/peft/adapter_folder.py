"""Adapters in folders: read one without its base model; write one whole or not at all."""

import json
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from peft import PeftConfig
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME, load_peft_weights
from safetensors import SafetensorError
from safetensors.torch import save_file


def read_adapter(path: str | os.PathLike, subfolder: str | None = None, **hub: Any) -> tuple[PeftConfig, dict]:
    """Read the settings and the tensors of a saved adapter of any type. The tensors are on the CPU.

    Args:
        path: a folder, or an id on the Hub.
        subfolder: the subfolder of `path` that has the adapter. Default: none.
        hub: arguments for the Hub: `revision`, `token`, `cache_dir`, ...

    Raises:
        ValueError: the files are missing, or are not the files of an adapter.
    """
    path = os.fspath(path)
    place = os.path.join(path, subfolder) if subfolder else path
    try:
        config = PeftConfig.from_pretrained(path, subfolder=subfolder, **hub)
    except KeyError as error:
        raise ValueError(
            f"{place}: its {CONFIG_NAME} says peft_type {error}, which is no type of adapter that is known here."
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError, TypeError) as error:
        raise ValueError(f"{place}: its {CONFIG_NAME} cannot be read ({error}). Save the adapter again.") from error
    if os.path.isdir(place) and not any(
        os.path.isfile(os.path.join(place, name)) for name in (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME)
    ):
        raise ValueError(
            f"{place} has a {CONFIG_NAME} and no {SAFETENSORS_WEIGHTS_NAME}. Expected a folder written by "
            "save_pretrained."
        )
    if subfolder:
        hub["subfolder"] = subfolder
    try:
        return config, load_peft_weights(path, device="cpu", **hub)
    except SafetensorError as error:
        raise ValueError(
            f"{place}: its {SAFETENSORS_WEIGHTS_NAME} cannot be read ({error}): it is truncated or corrupted. Save or "
            "download it again."
        ) from error


def write_adapter(config: PeftConfig, tensors: dict[str, torch.Tensor], out: str | os.PathLike) -> Path:
    """Write `adapter_config.json` and `adapter_model.safetensors`; on an error `out` is as it was.

    Args:
        config: the settings. Its `auto_mapping` is written as it is.
        tensors: the tensors by their names in the file.
        out: the folder. Other files in it stay.

    Returns:
        `out`.

    Raises:
        ValueError: `out` is a file.
    """
    # safetensors refuses tensors that share memory. A trained bias does, because PEFT has two names for it.
    tensors = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}

    def fill(folder: Path) -> None:
        save_file(tensors, folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
        config.save_pretrained(folder)

    return write_folder(out, fill)


def write_folder(out: str | os.PathLike, fill: Callable[[Path], None]) -> Path:
    """Let `fill` write into a new folder beside `out`, then move what it wrote into `out`.

    An error in `fill` leaves `out` as it was.

    Returns:
        `out`.

    Raises:
        ValueError: `out` is a file.
    """
    out = Path(out)
    if out.is_file():
        raise ValueError(f"{out} is a file: expected a folder, or the name of one to make.")
    out.parent.mkdir(parents=True, exist_ok=True)
    # Beside `out`, because a move is atomic only within one file system.
    new = out.parent / f".{out.name}.{uuid4().hex}"
    new.mkdir()
    try:
        fill(new)
        _move(new, out)
    finally:
        shutil.rmtree(new, ignore_errors=True)
    return out


def _move(new: Path, out: Path) -> None:
    if not out.exists():
        os.replace(new, out)
        return
    # The settings come last. Until then, nobody takes the new weights for an adapter of the new type.
    for file in sorted(new.rglob("*"), key=lambda file: (file.name == CONFIG_NAME, file)):
        if file.is_file():
            place = out / file.relative_to(new)
            place.parent.mkdir(parents=True, exist_ok=True)
            os.replace(file, place)


def type_of_adapter(folder: str | os.PathLike) -> str | None:
    """The `peft_type` in the settings in a local folder; `None` if there are no settings that can be read."""
    with suppress(OSError, ValueError, AttributeError):
        return json.loads((Path(folder) / CONFIG_NAME).read_text(encoding="utf-8")).get("peft_type")
    return None
