"""How the scripts write their results."""

import json
from pathlib import Path
from typing import Any


def write_json(content: Any, path: Path) -> None:
    """Write a JSON file by way of a temporary name, so that a reader never finds half of it.

    Args:
        content: JSON values; others are written as text.
        path: file. Its folder is made if it is not there.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.tmp")
    scratch.write_text(json.dumps(content, indent=1, default=str) + "\n", encoding="utf-8")
    scratch.replace(path)
