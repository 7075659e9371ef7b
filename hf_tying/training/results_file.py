"""How the scripts write their results, and know those of a run that was finished, or begun, before."""

import json
from pathlib import Path
from typing import Any

from ..config import TyingError

RESULT, SETTINGS = "result.json", "settings.json"


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


def finished_run(folder: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """The result of an earlier run with the same settings; `None` where it has to be trained, or trained on.

    Args:
        folder: folder of the run, which is finished once it has `result.json`, with `settings` in it. `begin_run` has
            written those of a run that goes on from a checkpoint.
        settings: all that the result depends on, as JSON values.

    Raises:
        TyingError: if it was finished, or has a checkpoint, with other settings.
    """
    result, begun = folder / RESULT, folder / SETTINGS
    if result.is_file():
        found = json.loads(result.read_text(encoding="utf-8"))
        before = found["settings"]
    elif begun.is_file() and any(folder.glob("checkpoint-*")):
        found, before = None, json.loads(begun.read_text(encoding="utf-8"))
    else:
        return None
    changed = [key for key in settings.keys() & before.keys() if settings[key] != before[key]]
    if changed:
        changes = ", ".join(f"{key} {before[key]!r}, now {settings[key]!r}" for key in sorted(changed))
        raise TyingError(f"{str(folder)!r} has a run with other settings ({changes}): give another --output_dir.")
    return found


def begin_run(folder: Path, settings: dict[str, Any]) -> None:
    """Write down what a run is made of, before its first checkpoint."""
    write_json(settings, folder / SETTINGS)
