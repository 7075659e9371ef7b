"""The card of a folder made anew, on top of the one that is published. Neither may stop an upload."""

from pathlib import Path

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
from transformers.utils import logging

from .cards import CARD, make_card

logger = logging.get_logger(__name__)


def renew_card(folder: Path, repo_id: str, tags: list[str] | None = None) -> None:
    """Write the card of a folder anew. A card that cannot be made is told of, and stops nothing.

    Args:
        folder: folder of a model or of an adapter.
        repo_id: name in the card's instructions.
        tags: more tags.
    """
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
    except (EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError):
        return
    except (HfHubHTTPError, OSError, ValueError) as error:
        logger.warning(f"The card of {repo_id} could not be read, and is made anew: {error}")
        return
    (folder / CARD).write_bytes(Path(path).read_bytes())
