"""How a report is shown: as a table of text, and as a picture."""

from abc import ABC, abstractmethod
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console, RenderableType

from .._extras import require

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Report(ABC):
    """The base of a report that people read. A subclass says what is in its table and what is in its picture."""

    @abstractmethod
    def _table(self, width: int) -> RenderableType:
        """The table to print, for lines of `width` columns."""

    @abstractmethod
    def _draw(self, figure: "Figure") -> None:
        """Size the empty `figure` and draw the picture in it."""

    def to_table(self, width: int = 80, color: bool = False) -> str:
        """The table as text.

        Args:
            width: columns of text, 72 or more. Default 80, which every terminal has.
            color: mark what is broken in red, by the codes of terminals. Default `False`: plain text.
        """
        width = max(width, 72)
        text = StringIO()
        system = "standard" if color else None
        console = Console(file=text, width=width, color_system=system, force_terminal=color, legacy_windows=False)
        console.print(self._table(width))
        return "\n".join(line.rstrip() for line in text.getvalue().splitlines()).strip("\n")

    def __str__(self) -> str:
        return self.to_table()

    def plot(self, path: str | Path) -> Path:
        """Write the picture to a file. No display is needed, and pyplot and its backend are left alone.

        Args:
            path: the file; its ending chooses the format (`.png`, `.svg`, `.pdf`).

        Returns:
            `path`.

        Raises:
            ImportError: matplotlib is missing (`pip install "hf-tying[plots]"`).
        """
        figure = require("matplotlib.figure", "A picture", "plots").Figure(layout="constrained")
        self._draw(figure)
        figure.savefig(path, dpi=150)
        return Path(path)
