"""How the scripts in this folder write their results."""

import json
from pathlib import Path


def write_json(content: dict, path: Path) -> None:
    """By way of a temporary name: a reader never finds half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.tmp")
    scratch.write_text(json.dumps(content, indent=1, default=str) + "\n", encoding="utf-8")
    scratch.replace(path)
