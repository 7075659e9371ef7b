"""A folder on its way to the Hub: both forms of an adapter in it, and its card renewed."""

from pathlib import Path
from typing import Any

from ..config import TyingError, entry_of
from ..ties.headers import read_json
from .renewing import copy_published_card, renew_card

_CONFIG, _ADAPTER, _TIED = "config.json", "adapter_config.json", "tied_lora"


def finish_folder(
    folder: str | Path, repo_id: str, revision: str | None = None, token: bool | str | None = None
) -> None:
    """Make a folder that others can load of one that is about to be uploaded. A folder without ties is left alone.

    A Tied-LoRA adapter in it, in the root or in the folder of its name, gets both forms. The card gets the sections of
    this package; that is the card of the revision, which transformers takes from the main branch.

    Args:
        folder: folder to be uploaded.
        repo_id: where it goes.
        revision: branch it goes to. Default: the main branch.
        token: token of the Hub. Default: the saved one.
    """
    folder = Path(folder)
    write_forms(folder)
    if not is_tied(folder):
        return
    if revision not in (None, "main"):
        copy_published_card(folder, repo_id, revision, token)
    renew_card(folder, repo_id)


def write_forms(folder: Path) -> None:
    """Give each Tied-LoRA adapter of a folder both forms, in the root or in the folder of its name.

    Args:
        folder: folder of adapters, or of a model, which is left alone.
    """
    for place in _places(folder):
        if _is_tied_lora(place):
            from .adapters import write_both_forms

            write_both_forms(place)


def is_tied(folder: Path) -> bool:
    """Whether a folder has a model whose config has a `tying` entry, or a Tied-LoRA adapter in either form.

    Args:
        folder: any folder.
    """
    if any(_is_tied_lora(place) or _is_tied_lora(place / _TIED) for place in _places(folder)):
        return True
    return entry_of(_read(folder / _CONFIG)) is not None


def _places(folder: Path) -> list[Path]:
    """Where PEFT saves adapters in a folder: in its root, and in folders of their names."""
    named = [path.parent for path in sorted(folder.glob(f"*/{_ADAPTER}"))]
    return [folder, *(place for place in named if place.name != _TIED and not place.name.startswith("checkpoint-"))]


def _is_tied_lora(place: Path) -> bool:
    return _read(place / _ADAPTER).get("peft_type") == "TIED_LORA"


def _read(path: Path) -> dict[str, Any]:
    """A JSON object; empty for a file that is not there, or is none."""
    try:
        return read_json(path) if path.is_file() else {}
    except TyingError:
        return {}
