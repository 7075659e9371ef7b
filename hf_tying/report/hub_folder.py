"""A repository on the Hub as a `Source`: files are read by ranges of bytes."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import Any

from ..config import TyingError
from ..ties.headers import TensorPlace, header_length, parse_header
from .sources import ReadError, Source

_FIRST_READ = 100_000
_AT_ONCE = 8


class HubFolder(Source):
    """A repository on the Hub, or a folder in it. Weights are never downloaded: headers and pieces are read by range.

    Args:
        repo: id of the repository.
        revision: branch, tag or commit. Default: `main`.
        subfolder: folder in the repository.
        name: what the user called it.
        token: token of the Hub. Default: the one that is logged in.
    """

    def __init__(
        self, repo: str, revision: str | None, subfolder: str | None, name: str, token: str | bool | None = None
    ) -> None:
        super().__init__(name)
        self.repo, self.revision, self.token = repo, revision, token
        self.subfolder = f"{subfolder.strip('/')}/" if subfolder else ""

    @cached_property
    def _sizes(self) -> dict[str, int | None]:
        from huggingface_hub import HfApi

        info = _asked(
            self.name,
            lambda: HfApi(token=self.token).model_info(self.repo, revision=self.revision, files_metadata=True),
        )
        self.commit = info.sha
        cut = len(self.subfolder)
        files = [file for file in info.siblings or () if file.rfilename.startswith(self.subfolder)]
        return {file.rfilename[cut:]: file.size for file in files}

    def has(self, file: str) -> bool:
        """See `Source`."""
        return file in self._sizes

    def files(self) -> list[str]:
        """See `Source`."""
        return sorted(self._sizes)

    def size(self, file: str) -> int:
        """See `Source`."""
        if file not in self._sizes:
            raise TyingError(f"{self.name} has no {file}.")
        size = self._sizes[file]
        if size is None:
            from huggingface_hub import get_hf_file_metadata

            url = self._url(file)
            size = self._sizes[file] = _asked(self.name, lambda: get_hf_file_metadata(url, token=self.token).size) or 0
        return size

    def read(self, file: str, start: int, count: int) -> bytes:
        """See `Source`."""
        if not count:
            return b""
        return _asked(self.name, lambda: self._range(file, start, count))

    def _url(self, file: str) -> str:
        from huggingface_hub import hf_hub_url

        return hf_hub_url(self.repo, self.subfolder + file, revision=self.commit or self.revision)

    def _range(self, file: str, start: int, count: int) -> bytes:
        from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

        headers = build_hf_headers(token=self.token) | {"Range": f"bytes={start}-{start + count - 1}"}
        with get_session().stream("GET", self._url(file), headers=headers, follow_redirects=True) as response:
            hf_raise_for_status(response)
            skip = 0 if response.status_code == 206 else start
            if skip > _FIRST_READ:
                raise OSError("the server does not answer for a part of a file")
            read = b""
            for piece in response.iter_bytes():  # a server that ignores the range sends all, of which this is enough
                read += piece
                if len(read) >= skip + count:
                    break
        return read[skip : skip + count]

    def places(self, file: str) -> dict[str, TensorPlace]:
        """See `Source`."""
        size = self.size(file)
        first = self.read(file, 0, min(_FIRST_READ, size))
        try:
            length = header_length(first[:8], size)
            header = first[8 : 8 + length]
            if len(header) < length:
                header += self.read(file, 8 + len(header), length - len(header))
            return parse_header(header, size)
        except TyingError:
            raise
        except ValueError as error:
            raise TyingError(
                f"{file} in {self.name} cannot be read as safetensors ({error}): it is truncated, corrupted or of "
                "another format."
            ) from error

    def all_places(self, files: list[str]) -> dict[str, dict[str, TensorPlace]]:
        """See `Source`."""
        self._sizes  # noqa: B018 - asked once, before there are several threads
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            return dict(zip(files, pool.map(self.places, files), strict=True))

    def below(self, folder: str) -> "HubFolder":
        """See `Source`."""
        return HubFolder(self.repo, self.revision, self.subfolder + folder, f"{self.name}/{folder}", self.token)


#: What the errors of huggingface_hub mean.
_ANSWERS = {
    "GatedRepoError": "it is gated. Ask for access on its page, and give a token (--token, or `hf auth login`).",
    "RepositoryNotFoundError": "there is none of that name, or it is private and the token does not open it.",
    "RevisionNotFoundError": "it has no branch, tag or commit of that name.",
}


def _asked(name: str, call: Callable[[], Any]) -> Any:
    """The answer of the Hub.

    Raises:
        ReadError: it has none.
    """
    try:
        return call()
    except TyingError:
        raise
    except Exception as error:  # of the client, of its HTTP library, of sockets
        kinds = [kind.__name__ for kind in type(error).__mro__]
        text = next((_ANSWERS[kind] for kind in kinds if kind in _ANSWERS), None)
        text = text or f"{kinds[0]}: {' '.join(str(error).split()):.500}"
        raise ReadError(f"{name!r} is neither a folder nor a repository that can be read: {text}") from error
