"""JSON and YAML files that give flags, or the value of one."""

import json
from pathlib import Path
from typing import Any

from ..config import TyingError


def read_mapping(path: Path, what: str, expected: str) -> dict[str, Any]:
    """Read a mapping from a JSON file (by its suffix) or a YAML file.

    Args:
        path: UTF-8 file.
        what: beginning of the message, such as `"The groups file"`.
        expected: sentence that shows the right form.

    Raises:
        TyingError: if the file cannot be read or parsed, or does not hold a mapping with at least one key.
    """
    import yaml

    try:
        text = path.read_text(encoding="utf-8")
        found = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise TyingError(f"{what} {str(path)!r} cannot be read: {' '.join(str(error).split())}. {expected}") from error
    if not isinstance(found, dict) or not found:
        raise TyingError(f"{what} {str(path)!r} does not hold a mapping. {expected}")
    return found
