"""`open_source`: what a user has named, as a `Source`."""

import re
from pathlib import Path

from ..config import TyingError
from ..ties.headers import regular_size
from .hub_folder import HubFolder
from .sources import Folder, Source

_HUB = re.compile(
    r"(?P<repo>[\w.-]+(?:/[\w.-]+)?)(?:@(?P<revision>refs/\w+/[\w.-]+|[\w.-]+))?(?:/(?P<subfolder>[\w./-]+))?"
)


def open_source(
    source: str | Path,
    revision: str | None = None,
    subfolder: str | None = None,
    token: str | bool | None = None,
) -> Source:
    """Find what a user has named: a folder, a file of weights, or `owner/name[@revision][/subfolder]` on the Hub.

    Args:
        source: the name; `hf://` in front says that it is on the Hub.
        revision: branch, tag or commit on the Hub.
        subfolder: folder inside of it.
        token: token of the Hub.

    Raises:
        TyingError: there is no such place, or the Hub does not answer.
    """
    name = str(source)
    if any(part == ".." for part in Path(subfolder or "").parts) or (subfolder or "").startswith("/"):
        raise TyingError(f"subfolder={subfolder!r}: expected a folder inside of {name!r}.")
    path = Path(name)
    try:
        if name and path.is_dir():
            _refuse_revision(name, revision)
            return Folder(path / (subfolder or ""), name)
        if name and path.exists() and not name.startswith("hf://"):
            _refuse_revision(name, revision)
            regular_size(path)
            return Folder(path.parent, name, only=path.name)
    except TyingError:
        raise
    except (OSError, ValueError) as error:  # no such place, or a name that no file can have
        raise TyingError(f"{name!r:.300} cannot be read: {error}.") from error
    found = _HUB.fullmatch(name.removeprefix("hf://"))
    inner = found["subfolder"] if found else None
    if found is None or ".." in name.split("/"):
        raise TyingError(
            f"{name!r:.300} is neither a folder nor a file of weights, and no id on the Hub: expected "
            "owner/name[@revision][/subfolder]."
        )
    if revision and found["revision"]:
        raise TyingError(f"{name!r} has a revision, and revision={revision!r} is another one: give one of them.")
    repo, revision = found["repo"], revision or found["revision"]
    inner = "/".join(part for part in (inner, subfolder) if part) or None
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return _in_cache(repo, revision, inner, name)
    return HubFolder(repo, revision, inner, name, token)


def _refuse_revision(name: str, revision: str | None) -> None:
    if revision:
        raise TyingError(f"{name!r} is on this machine, and has no revision {revision!r}.")


def _in_cache(repo: str, revision: str | None, subfolder: str | None, name: str) -> Folder:
    """What an earlier download has left in the Hub's cache."""
    from huggingface_hub import try_to_load_from_cache

    prefix = f"{subfolder}/" if subfolder else ""
    for file in ("config.json", "adapter_config.json", "tokenizer_config.json"):
        try:
            found = try_to_load_from_cache(repo, prefix + file, revision=revision)
        except ValueError as error:  # no id
            raise TyingError(f"{name!r} is neither a folder nor a repository that can be read: {error}") from error
        if isinstance(found, str):
            folder = Path(found).parent
            parts = folder.parts
            commit = parts[parts.index("snapshots") + 1] if "snapshots" in parts else None
            return Folder(folder, name, commit=commit)
    raise TyingError(
        f"{name!r} is neither a folder nor a repository that can be read: no folder of that name is here, and with "
        "HF_HUB_OFFLINE=1 only the Hub's cache is looked at, which does not have it."
    )
