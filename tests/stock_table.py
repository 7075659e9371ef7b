"""Make `hf_tying/report/stock_table.json`: `python -m tests.stock_table`, once for each version of transformers.

A run with the oldest version begins the table anew (`--new`). A run with a later one adds the classes that it has, and
where a class has changed, what it is since that version.
"""

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import transformers

from hf_tying.report.stock_building import WORDS, describe
from hf_tying.report.stock_table import FLAG

from . import zoo

FILE = Path(__file__).parents[1] / "hf_tying" / "report" / "stock_table.json"
#: Their parts are any other models: names are those of the parts, and only the class itself can say them.
COMPOSED = {"encoder-decoder", "speech-encoder-decoder", "vision-encoder-decoder", "vision-text-dual-encoder", "rag"}


def row_of(name: str) -> dict[str, Any] | None:
    """The row of a class; `None` where its names depend on its sizes, on its parts, or it cannot be built tiny."""
    try:
        model = zoo.build(name)
    except zoo.CannotBuild:
        return None
    if model.config.model_type in COMPOSED:
        return None
    found = describe(model)
    numbered = any(part.isdigit() for tie in found.ties for tied in tie[:2] for part in tied.split("."))
    return None if numbered or not found.roles and not found.ties else json.loads(json.dumps(found.to_dict()))


def defaults_of(config_class: type) -> dict[str, Any]:
    """The flag and the vocabulary sizes of a config class."""
    try:
        fields = vars(config_class())
    except Exception:  # it needs its parts
        return {}
    return {name: value for name, value in fields.items()
            if value is not None and (name == FLAG or WORDS.fullmatch(name))}  # fmt: skip


def configs() -> dict[str, dict[str, Any]]:
    """`defaults_of` every config class, by its model type."""
    found = {}
    for model_type, config_class in transformers.CONFIG_MAPPING.items():
        if defaults := defaults_of(config_class):
            found[model_type] = defaults
    return found


def main() -> None:
    warnings.simplefilter("ignore")
    table = {"versions": [], "configs": {}, "classes": {}} if "--new" in sys.argv else json.loads(FILE.read_text())
    table["versions"].append(transformers.__version__)
    table["configs"] |= configs()
    for name in zoo.classes():
        if (row := row_of(name)) is None:
            continue
        known = table["classes"].setdefault(name, row)
        latest = {k: v for k, v in [known, *known.get("since", {}).values()][-1].items() if k != "since"}
        if latest != row:
            known.setdefault("since", {})[transformers.__version__] = row
    lines = [f" {json.dumps(k)}: {json.dumps(v, sort_keys=True)}" for k, v in sorted(table["classes"].items())]
    head = json.dumps({k: table[k] for k in ("versions", "configs")}, sort_keys=True)[:-1]
    FILE.write_text(f'{head}, "classes": {{\n' + ",\n".join(lines) + "\n}}\n")


if __name__ == "__main__":
    main()
