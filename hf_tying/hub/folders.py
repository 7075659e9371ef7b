"""A folder on its way to the Hub: both forms of an adapter in it, and its card renewed."""

from pathlib import Path

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, RevisionNotFoundError
from transformers.utils import logging

from ..config import TyingError, entry_of
from ..ties.headers import read_json

logger = logging.get_logger(__name__)

CARD = "README.md"
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
    if (folder / _ADAPTER).is_file() or any(folder.glob(f"*/{_ADAPTER}")):
        from .adapters import write_both_forms

        named = [path.parent for path in folder.glob(f"*/{_ADAPTER}") if not path.parent.name.startswith("checkpoint-")]
        found = [write_both_forms(place) for place in (folder, *(path for path in named if path.name != "tied_lora"))]
        concerned = any(found)
    else:
        concerned = _has_entry(folder)
    if concerned:
        if revision not in (None, "main"):
            copy_published_card(folder, repo_id, revision, token)
        renew_card(folder, repo_id)


def renew_card(folder: Path, repo_id: str, tags: list[str] | None = None) -> None:
    """Write the card of a folder anew. A card that cannot be made is told of, and stops nothing.

    Args:
        folder: folder of a model or of an adapter.
        repo_id: name in the card's instructions.
        tags: more tags.
    """
    from .cards import make_card

    try:
        make_card(folder, repo_id=repo_id, tags=tags)
    except Exception as error:  # the weights are worth more than their card, whatever is wrong with it
        logger.warning(
            f"The card of {repo_id} was not renewed ({type(error).__name__}: {error}). The model itself is complete. "
            "To make the card later: hf_tying.hub.make_card(folder)."
        )


def copy_published_card(folder: Path, repo_id: str, revision: str | None, token: bool | str | None = None) -> None:
    """Put the card that a revision of a repository has into a folder; nothing, where it has none.

    Args:
        folder: where to write it.
        repo_id: repository, which exists.
        revision: branch of it. Default: the main branch.
        token: token of the Hub. Default: the saved one.
    """
    try:
        path = hf_hub_download(repo_id, CARD, revision=revision, token=token)
    except (EntryNotFoundError, RevisionNotFoundError):
        return
    except (HfHubHTTPError, OSError, ValueError) as error:
        logger.warning(f"The card of {repo_id} could not be read, and is made anew: {error}")
        return
    (folder / CARD).write_bytes(Path(path).read_bytes())


def _has_entry(folder: Path) -> bool:
    if not (folder / _CONFIG).is_file():
        return False
    try:
        return entry_of(read_json(folder / _CONFIG)) is not None
    except TyingError:
        return False
