"""The fenced code blocks of README.md and docs/, and the marks that stand before them in comments.

A reader does not see a comment, so what runs is what the reader sees. A mark stands on the line before its block:

    <!-- with: data -->                 names from `tests/docs/setups.py` that the block uses
    <!-- raises: TyingError -->         the block ends in this error; a block marked `prints` after it has the message
    <!-- prints -->                     lines that the block before printed, in this order
    <!-- stock -->                      run in a process of its own, without this package
    <!-- quick: --max_steps 1 -->       flags that are added to a script's command line, so that it ends soon
    <!-- not run: it needs a GPU -->    only compiled, and what it imports is looked up
"""

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md")))
MARKS = ("with", "raises", "prints", "stock", "quick", "not run")
_FENCE = re.compile(
    r"^(?P<indent> *)```(?P<language>\w*)[^\n]*\n(?P<code>.*?)^(?P=indent)```$", re.DOTALL | re.MULTILINE
)
_MARK = re.compile(r"<!-- ([a-z ]+?)(?:: (.*?))? -->")


@dataclass(frozen=True)
class Block:
    """One fenced block.

    Args:
        page: path from the root of the repository.
        line: line of the fence.
        language: what follows the backticks.
        code: text between the fences, without their indentation.
        marks: marks before the block, each with what follows its colon.
        printed: text of the block after it, if that one is marked `prints`.
    """

    page: str
    line: int
    language: str
    code: str
    marks: dict[str, str]
    printed: str | None = None

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks_of(path: Path) -> list[Block]:
    """All blocks of a page, in order."""
    text = path.read_text(encoding="utf-8")
    found: list[Block] = []
    for fence in _FENCE.finditer(text):
        before = text[: fence.start()].rstrip("\n").splitlines()
        marks = {}
        while before and (mark := _MARK.fullmatch(before[-1].strip())):
            marks[mark[1]] = mark[2] or ""
            before.pop()
        indent = len(fence["indent"])
        code = "".join(line[indent:] if line.strip() else line for line in fence["code"].splitlines(keepends=True))
        line = text[: fence.start()].count("\n") + 1
        if "prints" in marks:
            last = found.pop()
            found.append(Block(last.page, last.line, last.language, last.code, last.marks, printed=code))
        found.append(Block(path.relative_to(ROOT).as_posix(), line, fence["language"], code, marks))
    return found


BLOCKS = [block for page in PAGES for block in blocks_of(page)]
