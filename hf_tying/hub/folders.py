"""A folder on its way to the Hub: both forms of an adapter in it, and its card renewed."""

from pathlib import Path

from ..config import TyingError, entry_of
from ..ties.headers import read_json
from .renewing import copy_published_card, renew_card

_CONFIG, _ADAPTER = "config.json", "adapter_config.json"


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
    if not write_forms(folder) and not _has_entry(folder):
        return
    if revision not in (None, "main"):
        copy_published_card(folder, repo_id, revision, token)
    renew_card(folder, repo_id)


def write_forms(folder: Path) -> bool:
    """Give each Tied-LoRA adapter of a folder both forms, in the root or in the folder of its name.

    Args:
        folder: folder of adapters, or of a model, which is left alone.

    Returns:
        Whether there is such an adapter.
    """
    places = [folder, *(path.parent for path in folder.glob(f"*/{_ADAPTER}"))]
    if not any((place / _ADAPTER).is_file() for place in places):
        return False
    from .adapters import TIED_FOLDER, write_both_forms

    named = [place for place in places if not place.name.startswith("checkpoint-") and place.name != TIED_FOLDER]
    found = [write_both_forms(place) or (place / TIED_FOLDER).is_dir() for place in named]
    return any(found)


def _has_entry(folder: Path) -> bool:
    if not (folder / _CONFIG).is_file():
        return False
    try:
        return entry_of(read_json(folder / _CONFIG)) is not None
    except TyingError:
        return False
