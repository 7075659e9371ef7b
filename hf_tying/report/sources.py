"""Where a checkpoint is: a folder, one file, or a repository on the Hub. Files are read in pieces, never whole."""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

from ..config import TyingError
from ..ties.depth_groups import VARIANT
from ..ties.headers import (
    INDEX,
    LARGEST_INDEX,
    WHOLE,
    TensorPlace,
    files_of_index,
    parse_json,
    read_json,
    read_places,
    regular_size,
)

# A config has some kilobytes, and a megabyte where it names 20,000 labels.
_LARGEST_CONFIG = 6 * 2**20


class ReadError(TyingError):
    """A place cannot be read: nothing is said of what it holds."""


class Source(ABC):
    """A folder of files that can be read in pieces.

    Args:
        name: what the user called it.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    #: Commit on the Hub; `None` of a folder.
    commit: str | None = None
    #: The one file that was asked for; `None` where it was a folder.
    only: str | None = None

    @abstractmethod
    def has(self, file: str) -> bool:
        """Whether there is a regular file of that name."""

    @abstractmethod
    def files(self) -> list[str]:
        """The names of the files, those in subfolders too, sorted; of a very large folder the first."""

    @abstractmethod
    def size(self, file: str) -> int:
        """The bytes of a file."""

    @abstractmethod
    def read(self, file: str, start: int, count: int) -> bytes:
        """Read `count` bytes from `start`."""

    @abstractmethod
    def places(self, file: str) -> dict[str, TensorPlace]:
        """The tensors of a safetensors file."""

    @abstractmethod
    def below(self, folder: str) -> "Source":
        """A folder inside."""

    def json(self, file: str, largest: int = _LARGEST_CONFIG) -> dict[str, Any]:
        """Read a JSON object."""
        if (size := self.size(file)) > largest:
            raise TyingError(f"{file} in {self.name} has {size:,} bytes: more than {largest:,} are not read.")
        return parse_json(self.read(file, 0, size), f"{file} in {self.name}")

    def path(self) -> Path | None:
        """The folder on this machine; `None` of the Hub."""
        return None

    def weight_files(self) -> list[str]:
        """The safetensors files of a model, sharded or not; `[]` where there are none.

        Raises:
            TyingError: the index is malformed, points elsewhere, or names missing files.
        """
        if self.only:
            return [self.only]
        if self.has(INDEX):
            names = files_of_index(self.json(INDEX, LARGEST_INDEX), f"{INDEX} in {self.name}")
            if missing := [name for name in names if not self.has(name)]:
                more = f" and {len(missing) - 20:,} more" if len(missing) > 20 else ""
                raise TyingError(f"{INDEX} in {self.name} names files that are not there: {missing[:20]}{more}.")
            return names
        return [name for name in (WHOLE, f"model.{VARIANT}.safetensors") if self.has(name)][:1]

    def all_places(self, files: list[str]) -> dict[str, dict[str, TensorPlace]]:
        """The tensors of each of some safetensors files."""
        return {file: self.places(file) for file in files}


class Folder(Source):
    """A folder of this machine.

    Args:
        folder: the folder.
        name: what the user called it.
        only: the one file that was asked for.
        commit: commit, of a folder in the Hub's cache.
    """

    def __init__(self, folder: Path, name: str, only: str | None = None, commit: str | None = None) -> None:
        super().__init__(name)
        self.folder, self.only, self.commit = folder, only, commit

    def path(self) -> Path:
        """See `Source`."""
        return self.folder

    def has(self, file: str) -> bool:
        """See `Source`."""
        try:
            return (self.folder / file).is_file()
        except (OSError, ValueError):  # a name that no file can have
            return False

    def files(self) -> list[str]:
        """See `Source`."""
        found = [p for i, p in zip(range(10_000), self.folder.rglob("*"), strict=False) if p.is_file()]
        return sorted(str(path.relative_to(self.folder)) for path in found)

    def size(self, file: str) -> int:
        """See `Source`."""
        try:
            return regular_size(self.folder / file)
        except (OSError, ValueError) as error:
            raise ReadError(f"{file} in {self.folder} cannot be read: {error}.") from error

    def read(self, file: str, start: int, count: int) -> bytes:
        """See `Source`."""
        try:
            regular_size(self.folder / file)
            with (self.folder / file).open("rb") as opened:
                opened.seek(start)
                return opened.read(count)
        except (OSError, ValueError) as error:
            raise ReadError(f"{file} in {self.folder} cannot be read: {error}.") from error

    def json(self, file: str, largest: int = _LARGEST_CONFIG) -> dict[str, Any]:
        """See `Source`."""
        return read_json(self.folder / file, largest)

    def places(self, file: str) -> dict[str, TensorPlace]:
        """See `Source`."""
        return read_places(self.folder / file)

    def below(self, folder: str) -> "Folder":
        """See `Source`."""
        return Folder(self.folder / folder, f"{self.name}/{folder}", commit=self.commit)
