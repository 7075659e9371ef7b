"""The cards of the reference runs, made from `records/NAME.json` by the code that makes every card: `make cards`.

    python model_cards/make.py
    python model_cards/make.py --collect NAME --folder runs/wt --results runs/wt/results.json \
        --other untied runs/base/results.json --metrics valid_perplexity test_perplexity --facts facts.json

A record has what a card is made from, and no weights: the JSON files of the model's folder, the names, shapes and
dtypes of its tensors, the results as the script of the run has written them, and what only a person can tell.
A card is made from a folder with these files and with stand-ins for weights, which have the same names, shapes and
size, and equal values where they are tied.
"""

import argparse
import json
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from hf_tying.hub import make_card
from hf_tying.hub.folders import write_forms

HERE = Path(__file__).parent
RECORDS = HERE / "records"
#: The files of a folder that decide what its card says, beside the weights.
_FILES = ("config.json", "adapter_config.json", "tied_lora/adapter_config.json", "trainer_state.json")


def make(record: dict[str, Any]) -> str:
    """The text of the card of a run.

    Args:
        record: content of `records/NAME.json`.
    """
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        for name, content in record["files"].items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(json.dumps(content), encoding="utf-8")
        groups = record["files"].get("config.json", {}).get("tying", {}).get("groups", {}).values()
        for name, tensors in record["tensors"].items():
            save_file(_stand_ins(tensors, groups), folder / name, {"format": "pt"})
        facts = record["facts"] | {"results": measured(record, "this")}
        others = {name: measured(record, name) for name in record["results"] if name != "this"}
        return make_card(folder, repo_id=record["repo_id"], save=False, **facts, others=others).content


def _stand_ins(tensors: dict[str, list], groups: Iterable[list[str]]) -> dict[str, torch.Tensor]:
    """A tensor of one number for each name: the same number for the names of a group."""
    number = {name: i for i, name in enumerate(tensors)}
    number |= {name: -1 - i for i, names in enumerate(groups) for name in names}
    return {
        name: torch.full(shape, number[name], dtype=getattr(torch, dtype)) for name, (dtype, shape) in tensors.items()
    }


def measured(record: dict[str, Any], run: str) -> dict[str, float]:
    """The metrics of a run: values of the results that its script has written.

    Args:
        record: content of `records/NAME.json`.
        run: `"this"`, or the name of another run beside it.
    """
    return {metric: at(record["results"][run], metric) for metric in record["metrics"]}


def at(results: dict[str, Any], path: str) -> Any:
    """The value in results at a path of keys, such as `"eval/bleu"`.

    Args:
        results: content of a file of results.
        path: keys with slashes between them.
    """
    for key in path.split("/"):
        results = results[key]
    return results


def collect(folder: Path, repo_id: str, facts: dict, metrics: list[str], results: dict[str, dict]) -> dict[str, Any]:
    """Make a record of a finished run.

    Args:
        folder: folder of the model or adapter.
        repo_id: name that the card gives it.
        facts: what only a person can tell, as for `make_card`.
        metrics: paths of keys in the results.
        results: content of the files of results: of `"this"` run, and of others by their names.
    """
    with tempfile.TemporaryDirectory() as work:
        copied = Path(work) / "run"
        shutil.copytree(folder, copied, ignore=shutil.ignore_patterns("checkpoint-*", "*.bin", "*.pt"))
        write_forms(copied)
        files = {name: json.loads((copied / name).read_text()) for name in _FILES if (copied / name).is_file()}
        for content in files.values():
            content.pop("base_model_name_or_path", None)  # a folder of the machine of the run
        tensors = {}
        for path in sorted(copied.glob("**/*.safetensors")):
            with safe_open(path, "pt") as file:
                found = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118, it is no dict
                tensors[path.relative_to(copied).as_posix()] = {
                    key: [_DTYPES[piece.get_dtype()], list(piece.get_shape())] for key, piece in found.items()
                }
    return {
        "repo_id": repo_id,
        "facts": facts,
        "metrics": metrics,
        "results": results,
        "files": files,
        "tensors": tensors,
    }


_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "I64": "int64", "BOOL": "bool"}


def main() -> None:
    """Write the card of every record, or one record."""
    parser = argparse.ArgumentParser(description="Make the cards of the reference runs.")
    parser.add_argument("--collect", metavar="NAME", help="Make the record of a finished run first.")
    parser.add_argument("--folder", type=Path, help="Folder of its model or adapter.")
    parser.add_argument("--results", type=Path, help="What its script has written.")
    parser.add_argument(
        "--inside", default="", help="Where in this file the results of the run are: keys/with/slashes."
    )
    parser.add_argument("--other", nargs=2, action="append", default=[], metavar=("NAME", "FILE[:INSIDE]"),
                        help="Results of another run beside it; the untied twin is called untied.")  # fmt: skip
    parser.add_argument("--metrics", nargs="+", default=[], help="Which of the results the card shows.")
    parser.add_argument("--facts", type=Path, help="JSON with what only a person can tell.")
    given = parser.parse_args()
    if given.collect:
        files = {"this": (given.results, given.inside)}
        files |= {name: (Path(place.partition(":")[0]), place.partition(":")[2]) for name, place in given.other}
        results = {name: _inside(path, keys) for name, (path, keys) in files.items()}
        facts = json.loads(given.facts.read_text(encoding="utf-8"))
        record = collect(given.folder, given.collect, facts, given.metrics, results)
        (RECORDS / f"{given.collect}.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    for path in sorted(RECORDS.glob("*.json")):
        text = make(json.loads(path.read_text(encoding="utf-8")))
        (HERE / f"{path.stem}.md").write_text(text, encoding="utf-8")
        print(f"model_cards/{path.stem}.md")


def _inside(path: Path, keys: str) -> dict[str, Any]:
    content = json.loads(path.read_text(encoding="utf-8"))
    return at(content, keys) if keys else content


if __name__ == "__main__":
    main()
