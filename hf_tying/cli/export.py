"""`hf-tying export`: an adapter in a form that is read without this package."""

import json
from enum import StrEnum
from math import prod
from pathlib import Path
from typing import Annotated

import typer

from ..config import TyingError


class Format(StrEnum):
    """What `hf-tying export` writes."""

    lora = "lora"


def export(
    adapter: Annotated[
        str, typer.Argument(metavar="ADAPTER", help="Folder of a saved Tied-LoRA adapter, or its id on the Hub.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write to; it is made if need be.")],
    format: Annotated[
        Format, typer.Option("--format", help="lora: an ordinary LoRA adapter with exactly the same update.")
    ] = Format.lora,
    subfolder: Annotated[str | None, typer.Option("--subfolder", help="Where in ADAPTER the adapter is.")] = None,
    revision: Annotated[str | None, typer.Option("--revision", help="Branch, tag or commit on the Hub.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for programs in place of the table.")] = False,
) -> None:
    """Write a Tied-LoRA adapter in a form that is read without this package. The base model is not loaded."""
    from ..peft import export_to_lora
    from ..ties.headers import read_header, read_json

    try:
        export_to_lora(adapter, out, subfolder=subfolder, **({"revision": revision} if revision else {}))
    except (ValueError, RuntimeError, OSError) as error:
        raise TyingError(str(error)) from error
    config, weights = read_json(out / "adapter_config.json"), out / "adapter_model.safetensors"
    shapes = [shape for name, (shape, _) in read_header(weights).items() if ".lora_" in name]
    report = {
        "format": format.value,
        "folder": str(out),
        "base_model": config["base_model_name_or_path"],
        "r": config["r"],
        "modules": len(config["target_modules"]),
        "parameters": sum(map(prod, shapes)),
        "bytes": weights.stat().st_size,
    }
    if as_json:
        typer.echo(json.dumps(report, indent=2))
        return
    for name, value in report.items():
        shown = f"{value:,}" if isinstance(value, int) else value or "-"
        typer.echo(f"{name.replace('_', ' '):<10}  {shown}")
