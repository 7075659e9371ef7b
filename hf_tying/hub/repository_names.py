"""Names of repositories on the Hub, told from folders of this machine, which no published file may name."""

import re
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

from ..config import TyingError

_ID = re.compile(r"(?:[\w-][\w.-]{0,95}/)?[\w-][\w.-]{0,95}")


def is_repository_id(name: object) -> bool:
    """Whether `name` has the form of a repository's id, and no folder or file here has that name.

    Args:
        name: what a config or a card names as a model: `"owner/name"`, or one word for the oldest models.
    """
    return has_form_of_id(name) and not Path(str(name)).exists()


def has_form_of_id(name: object) -> bool:
    """Whether `name` is spelt as `"owner/name"` or as one word, whatever it names."""
    return isinstance(name, str) and _ID.fullmatch(name) is not None and ".." not in name and "--" not in name


def is_published(name: object, token: bool | str | None = None) -> bool:
    """Whether others can find a model by `name`.

    A folder here may have the name of a repository; then the Hub is asked.

    Args:
        name: what a config or a card names as a model.
        token: token of the Hub. Default: the saved one.
    """
    if is_repository_id(name):
        return True
    if not has_form_of_id(name):
        return False
    try:
        return HfApi().repo_exists(str(name), token=token)
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError):
        return False


def refuse_local_base(name: object, setting: str, token: bool | str | None = None) -> None:
    """Refuse to publish a file that names a folder of this machine as its base model. No name at all is no fault.

    Args:
        name: the name in the config.
        setting: the Python expression that holds it, for the way out.
        token: token of the Hub. Default: the saved one.

    Raises:
        TyingError: others could not load that base model.
    """
    if name and not is_published(name, token):
        raise TyingError(
            f"Nothing is uploaded: the base model is {str(name)!r}, a place on this machine that others cannot load "
            f'and that the Hub refuses in a card. Publish it first, and name it by its id: {setting} = "owner/name".'
        )
