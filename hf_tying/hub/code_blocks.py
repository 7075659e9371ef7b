"""The code blocks of a card, run as a reader would: each in a fresh process, where it says so without this package."""

import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from ..ties.remote_code import WITHOUT_THIS_PACKAGE
from .errors import UnfitError

_BLOCK = re.compile(r"<!-- run(: plain)? -->\n```python\n(.*?)\n```", re.DOTALL)
_SECONDS = 600


@dataclass(frozen=True)
class CodeBlock:
    """A block of a card that is to run.

    Args:
        code: Python.
        plain: whether it is to run without this package.
    """

    code: str
    plain: bool


def blocks_of(text: str) -> list[CodeBlock]:
    """The blocks of a card below `<!-- run -->` or `<!-- run: plain -->`.

    Args:
        text: text of the card.
    """
    return [CodeBlock(match[2], match[1] is not None) for match in _BLOCK.finditer(text)]


def run_blocks(text: str, repo_id: str, source: str | Path) -> int:
    """Run every block of a card, each in a process of its own, in an empty folder.

    Args:
        text: text of the card.
        repo_id: repository that the blocks name.
        source: what they load in its place: the folder that is about to be uploaded, or the repository itself.

    Returns:
        How many blocks ran.

    Raises:
        UnfitError: one failed; the message has its last line.
    """
    blocks = blocks_of(text)
    for block in blocks:
        code = block.code.replace(f'"{repo_id}"', repr(str(source)))
        with tempfile.TemporaryDirectory() as empty:
            program = (WITHOUT_THIS_PACKAGE if block.plain else "") + code
            try:
                done = subprocess.run(
                    [sys.executable, "-c", program], capture_output=True, text=True, cwd=empty, timeout=_SECONDS,
                    env=_environment(), check=False,
                )  # fmt: skip
            except subprocess.TimeoutExpired:
                raise UnfitError(f"{_kind(block)} of the card took more than {_SECONDS} seconds:\n{code}") from None
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
            raise UnfitError(f"{_kind(block)} of the card does not run ({reason}):\n{code}")
    return len(blocks)


def _environment() -> dict[str, str]:
    """The environment, with this package importable where it is not installed but on the path."""
    places = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, places))}


def _kind(block: CodeBlock) -> str:
    return "A code block without hf_tying" if block.plain else "A code block"
