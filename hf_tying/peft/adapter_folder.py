"""Adapters in folders: reading without a base model, and writing that leaves no half-written folder."""

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
        path: folder, or id on the Hub.
        subfolder: subfolder of `path` that has the adapter. Default: none.
        **hub: arguments for the Hub: `revision`, `token`, `cache_dir`, ...

    Returns:
        The config, and the tensors by their names in the file.

    Raises:
        ValueError: the files are missing, or are not the files of an adapter.
    """
    path = os.fspath(path)
    place = os.path.join(path, subfolder) if subfolder else path
    try:
        config = PeftConfig.from_pretrained(path, subfolder=subfolder, **hub)
    except KeyError as error:
        raise ValueError(
            f"{place}: its {CONFIG_NAME} says peft_type {error}, which is not a known type of adapter."
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError, TypeError) as error:
        raise ValueError(f"{place}: its {CONFIG_NAME} cannot be read ({error}). Save the adapter again.") from error
    if os.path.isdir(place) and not any(
        os.path.isfile(os.path.join(place, name)) for name in (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME)
    ):
        raise ValueError(
            f"{place} has an {CONFIG_NAME} and no {SAFETENSORS_WEIGHTS_NAME}. Expected a folder written by "
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
    """Write `adapter_config.json` and `adapter_model.safetensors`. On an error, `out` is unchanged.

    Args:
        config: settings of the adapter. Its `auto_mapping` is written as it is.
        tensors: tensors by their names in the file.
        out: folder to write to. Other files in it stay.

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
    """Let `fill` write into a new folder beside `out`, then move its files into `out`.

    If `fill` raises an error, `out` is unchanged.

    Args:
        out: folder to write to. Other files in it stay.
        fill: function that writes into the folder that it is given.

    Returns:
        `out`.

    Raises:
        ValueError: `out` is a file.
    """
    out = Path(out)
    if out.is_file():
        raise ValueError(f"{out} is a file: expected a folder, or the name of one to make.")
    out.parent.mkdir(parents=True, exist_ok=True)
    # Beside `out`, because a move is atomic only within one file system; of its name, which is that of the card.
    name = os.path.basename(os.path.abspath(out))
    hidden = out.parent / f".{name}.{uuid4().hex}"
    new = hidden / name
    new.mkdir(parents=True)
    try:
        fill(new)
        _move(new, out)
    finally:
        shutil.rmtree(hidden, ignore_errors=True)
    return out


def _move(new: Path, out: Path) -> None:
    if not out.exists():
        os.replace(new, out)
        return
    # The settings are moved last, so that a reader never finds new settings beside old weights.
    for file in sorted(new.rglob("*"), key=lambda file: (file.name == CONFIG_NAME, file)):
        if file.is_file():
            place = out / file.relative_to(new)
            place.parent.mkdir(parents=True, exist_ok=True)
            os.replace(file, place)


def type_of_adapter(folder: str | os.PathLike) -> str | None:
    """Read the `peft_type` of the adapter in a local folder.

    Args:
        folder: local folder.

    Returns:
        The type, or `None` if there are no readable settings.
    """
    with suppress(OSError, ValueError, AttributeError):
        return json.loads((Path(folder) / CONFIG_NAME).read_text(encoding="utf-8")).get("peft_type")
    return None
