"""How a report is shown: as a table of text, and as a picture."""

from abc import ABC, abstractmethod
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Report(ABC):
    """The base of a report that people read. A subclass says what is in its table and what is in its picture."""

    @abstractmethod
    def _table(self) -> Table:
        """The table to print."""

    @abstractmethod
    def _draw(self, figure: "Figure") -> None:
        """Size the empty `figure` and draw the picture in it."""

    def to_table(self, width: int = 120) -> str:
        """The table as plain text.

        Args:
            width: columns of text. Default 120, which a wide terminal has.
        """
        text = StringIO()
        Console(file=text, width=width, color_system=None).print(self._table())
        return text.getvalue().rstrip()

    def __str__(self) -> str:
        return self.to_table()

    def plot(self, path: str | Path) -> Path:
        """Write the picture to a file.

        Args:
            path: the file; its ending chooses the format (`.png`, `.svg`, `.pdf`).

        Returns:
            `path`.

        Raises:
            ImportError: matplotlib is missing (`pip install "hf-tying[plots]"`).
        """
        try:
            from matplotlib.figure import Figure  # not pyplot: no display, no global state
        except ImportError as error:
            raise ImportError('A picture needs matplotlib: pip install "hf-tying[plots]".') from error
        figure = Figure(layout="constrained")
        self._draw(figure)
        figure.savefig(path)
        return Path(path)
