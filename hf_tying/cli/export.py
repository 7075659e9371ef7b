"""`hf-tying export`: an adapter, or a model with shared layers, in a form that is read without this package."""

from enum import StrEnum
from math import prod
from pathlib import Path
from typing import Annotated, Any

import typer

from ..config import TyingError
from .common import print_json, readable


class Format(StrEnum):
    """What `hf-tying export` writes."""

    lora = "lora"
    unrolled = "unrolled"


def export(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="Folder of a saved Tied-LoRA adapter, or of a model with shared layers; or its id on the Hub.",
        ),
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write to; of a model, a new one.")],
    format: Annotated[
        Format,
        typer.Option(
            "--format",
            help="lora: an ordinary LoRA adapter, of a Tied-LoRA with exactly the same update, of relaxed layers with "
            "their base model in OUT/base. unrolled: a plain model with every layer.",
        ),
    ] = Format.lora,
    replicate: Annotated[
        bool | None,
        typer.Option(
            "--replicate/--no-replicate",
            help="Of relaxed layers: a base model with each block once, which PEFT repeats, or one with every layer. "
            "Default: each block once where PEFT can.",
        ),
    ] = None,
    subfolder: Annotated[str | None, typer.Option("--subfolder", help="Where in SOURCE the files are.")] = None,
    revision: Annotated[str | None, typer.Option("--revision", help="Branch, tag or commit on the Hub.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for programs in place of the table.")] = False,
) -> None:
    """Write an adapter, or a model with shared layers, in a form that is read without this package.

    The base model of an adapter is not loaded. Exit codes: 0 written, 2 wrong usage, 3 cannot be read or written.

    Example: hf-tying export ./my-model ./plain --format unrolled
    """
    with readable("export", source, as_json):
        is_model = _is_model(source, revision, subfolder)
        if format == Format.unrolled or replicate is not None or is_model:
            from ..doctor import export_layers

            export_layers(source, out, format.value, replicate=replicate, revision=revision, subfolder=subfolder)
        else:
            from ..peft import export_to_lora

            try:
                export_to_lora(source, out, subfolder=subfolder, **({"revision": revision} if revision else {}))
            except (ValueError, RuntimeError, OSError) as error:
                raise TyingError(str(error)) from error
    report = {"format": format.value, "folder": str(out)}
    report |= _of_model(out) if format == Format.unrolled else _of_adapter(out)
    if as_json:
        print_json("export", source, {"findings": []} | report)
        return
    for name, value in report.items():
        shown = f"{value:,}" if isinstance(value, int) else value or "-"
        typer.echo(f"{name.replace('_', ' '):<10}  {shown}")


def _is_model(source: str, revision: str | None, subfolder: str | None) -> bool:
    from ..report.opening import open_source

    found = open_source(source, revision, subfolder)
    if found.has("adapter_config.json"):
        return False
    if not found.has("config.json"):
        raise TyingError(
            f"{source!r} has no adapter_config.json and no config.json: expected a folder of a saved Tied-LoRA "
            "adapter, or of a model with shared layers."
        )
    return True


def _of_model(out: Path) -> dict[str, Any]:
    from ..ties.headers import read_header

    files = sorted(out.glob("*.safetensors"))
    shapes = [shape for file in files for shape, _ in read_header(file).values()]
    return {"parameters": sum(map(prod, shapes)), "bytes": sum(file.stat().st_size for file in files)}


def _of_adapter(out: Path) -> dict[str, Any]:
    from ..ties.headers import read_header, read_json

    config, weights = read_json(out / "adapter_config.json"), out / "adapter_model.safetensors"
    shapes = [shape for name, (shape, _) in read_header(weights).items() if ".lora_" in name]
    return {
        "base_model": config["base_model_name_or_path"],
        "r": config["r"],
        "modules": len(config["target_modules"]),
        "parameters": sum(map(prod, shapes)),
        "bytes": weights.stat().st_size,
    }
